//! Runs that end early: what they keep, what they say, and how they are continued.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::outcome::QuantizeOutcome;
use super::*;
use crate::backend::cpu::Cpu;
use crate::checkpoint::{Destination, Inputs, Source};
use crate::progress::Progress;
use crate::recipe::{Group, Outliers, Recipe};
use crate::text::{Split, TextSet};
use crate::{Kind, Result};

/// Blocks of tiny-llama.
const BLOCKS: usize = 4;

/// Collects messages, and stops the run after so many blocks.
struct Watcher {
    stop_after: usize,
    blocks: AtomicUsize,
    infos: Mutex<Vec<String>>,
}

impl Watcher {
    fn stopping_after(stop_after: usize) -> Self {
        Self { stop_after, blocks: AtomicUsize::new(0), infos: Mutex::default() }
    }

    fn infos(self) -> Vec<String> {
        self.infos.into_inner().unwrap()
    }
}

impl Progress for Watcher {
    fn begin(&self, _stage: &str, _steps: usize) {}
    fn advance(&self, _detail: &str) {
        self.blocks.fetch_add(1, Ordering::Relaxed);
    }
    fn end(&self) {}
    fn info(&self, message: &str) {
        self.infos.lock().unwrap().push(message.to_owned());
    }
    fn warn(&self, _message: &str) {}
    fn stop_requested(&self) -> bool {
        self.blocks.load(Ordering::Relaxed) >= self.stop_after
    }
}

/// A run of tiny-llama, or of a copy of it.
struct Run {
    source: Source,
    recipe: Recipe,
    out: PathBuf,
}

impl Run {
    fn new(source: Source, recipe: Recipe, out: PathBuf) -> Self {
        Self { source, recipe, out }
    }

    fn with<T>(&self, resume: bool, work: impl FnOnce(&Cpu, &Quantization<'_>) -> T) -> T {
        let text = TextSet::sample(Split::Calibration);
        let calibration = Calibration { text, samples: 1, seq_len: 16, seed: 0 };
        let destination =
            Destination { out: self.out.clone(), overwrite: false, inputs: Inputs::default() };
        let output = Output { destination, resume };
        let quantization = Quantization {
            source: &self.source,
            calibration: &calibration,
            recipe: &self.recipe,
            output: &output,
            evaluation: None,
        };
        work(&Cpu::new().unwrap(), &quantization)
    }

    fn quantize(&self, resume: bool, watcher: &Watcher) -> Result<QuantizeOutcome> {
        self.with(resume, |cpu, quantization| quantize(cpu, quantization, watcher))
    }

    /// Blocks that `--dry-run` finds finished.
    fn finished_blocks(&self) -> usize {
        let watcher = Watcher::stopping_after(usize::MAX);
        let found = self.with(false, |cpu, quantization| dry_run(cpu, quantization, &watcher));
        found.unwrap().finished_blocks
    }

    fn work(&self) -> PathBuf {
        let name = self.out.file_name().unwrap().to_string_lossy();
        self.out.with_file_name(format!(".{name}.atom-work"))
    }
}

fn recipe() -> Recipe {
    Recipe { group: Group::Size(32), outliers: Outliers::Count(16), ..Recipe::default_recipe() }
}

fn tiny_llama() -> Source {
    crate::hub::tiny_llama().unwrap()
}

/// tiny-llama in `dir`, with a NaN in a linear of block `block`.
fn with_nan(dir: &Path, block: usize) -> Source {
    fs_err::create_dir(dir).unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-llama");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs_err::copy(model.join(file), dir.join(file)).unwrap();
    }
    let shard = dir.join("model.safetensors");
    let mut bytes = fs_err::read(&shard).unwrap();
    let name = format!("model.layers.{block}.self_attn.q_proj.weight");
    let first = {
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = file.tensor(&name).unwrap().data();
        data.as_ptr() as usize - bytes.as_ptr() as usize
    };
    // All bits set are a NaN in every type of weights.
    bytes[first..first + 4].fill(0xff);
    fs_err::write(&shard, bytes).unwrap();
    Source::open(dir).unwrap()
}

fn bytes_of(out: &Path) -> Vec<Vec<u8>> {
    let files = ["atom.json", "config.json", "model.safetensors"];
    files.iter().map(|file| fs_err::read(out.join(file)).unwrap()).collect()
}

#[test]
fn a_stopped_run_is_continued_to_the_same_bytes() {
    for recipe in
        [recipe(), Recipe { sequential: false, ..recipe() }, Recipe { gptq: false, ..recipe() }]
    {
        let home = tempfile::tempdir().unwrap();
        let entire = Run::new(tiny_llama(), recipe.clone(), home.path().join("entire"));
        let watcher = Watcher::stopping_after(usize::MAX);
        let expected = entire.quantize(false, &watcher).unwrap();
        assert_eq!((expected.resumed_blocks, watcher.infos()), (0, Vec::new()));
        assert!(!entire.work().exists());

        let run = Run::new(tiny_llama(), recipe, home.path().join("out"));
        let watcher = Watcher::stopping_after(3);
        let error = run.quantize(false, &watcher).unwrap_err();
        assert_eq!(error.kind(), Kind::Interrupted);
        // Who stops a run knows that it can be continued.
        assert_eq!(watcher.infos(), Vec::<String>::new());
        // The first block is on the disk before the third is passed on; embedding, norm and head are no blocks.
        let finished = run.finished_blocks();
        assert!((1..BLOCKS).contains(&finished), "{finished}");

        let watcher = Watcher::stopping_after(usize::MAX);
        let outcome = run.quantize(true, &watcher).unwrap();
        assert_eq!(outcome.resumed_blocks, finished);
        assert_eq!(
            watcher.infos(),
            [format!(
                "continuing an unfinished run of the same job: {finished} of {BLOCKS} blocks are finished"
            )]
        );
        let linears = |outcome: &QuantizeOutcome| -> Vec<_> {
            outcome.linears.iter().map(|linear| (linear.name.clone(), linear.error)).collect()
        };
        assert_eq!(linears(&outcome), linears(&expected));
        assert_eq!(bytes_of(&run.out), bytes_of(&entire.out));
        assert!(!run.work().exists());
    }
}

#[test]
fn a_run_that_fails_keeps_finished_blocks_and_says_how_to_continue() {
    let home = tempfile::tempdir().unwrap();
    let recipe = Recipe { gptq: false, ..recipe() };
    let run =
        Run::new(with_nan(&home.path().join("model"), BLOCKS - 1), recipe, home.path().join("out"));
    let watcher = Watcher::stopping_after(usize::MAX);
    let error = run.quantize(false, &watcher).unwrap_err();
    assert_eq!(error.kind(), Kind::Input, "{error}");
    let kept = BLOCKS - 1;
    assert_eq!(
        watcher.infos(),
        [format!(
            "{kept} finished blocks are kept; the same command, or --resume, continues after them"
        )]
    );
    assert_eq!(run.finished_blocks(), kept);
    assert!(!run.out.exists());
}

#[test]
fn a_run_that_fails_before_a_block_is_finished_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let recipe = Recipe { gptq: false, ..recipe() };
    let run = Run::new(with_nan(&home.path().join("model"), 0), recipe, home.path().join("out"));
    let watcher = Watcher::stopping_after(usize::MAX);
    let error = run.quantize(false, &watcher).unwrap_err();
    assert_eq!(error.kind(), Kind::Input, "{error}");
    assert_eq!(watcher.infos(), Vec::<String>::new());
    assert!(!run.out.exists() && !run.work().exists());
}

#[test]
fn resume_insists_on_nothing_where_there_is_no_unfinished_run() {
    let home = tempfile::tempdir().unwrap();
    let recipe = Recipe { gptq: false, ..recipe() };
    let run = Run::new(tiny_llama(), recipe, home.path().join("out"));
    assert_eq!(run.finished_blocks(), 0);
    let watcher = Watcher::stopping_after(usize::MAX);
    let outcome = run.quantize(true, &watcher).unwrap();
    assert_eq!((outcome.resumed_blocks, watcher.infos()), (0, Vec::new()));
}

#[test]
fn a_run_of_another_recipe_is_not_continued() {
    let home = tempfile::tempdir().unwrap();
    let recipe = Recipe { gptq: false, ..recipe() };
    let run = Run::new(tiny_llama(), recipe.clone(), home.path().join("out"));
    run.quantize(false, &Watcher::stopping_after(3)).unwrap_err();
    let finished = run.finished_blocks();
    let other = Run::new(tiny_llama(), Recipe { bits: 3, ..recipe }, run.out.clone());
    for resume in [false, true] {
        let error = other.quantize(resume, &Watcher::stopping_after(usize::MAX)).unwrap_err();
        assert_eq!(error.kind(), Kind::Input);
        assert!(error.message().contains("job.recipe.bits was 4, now 3"), "{error}");
    }
    assert_eq!(run.finished_blocks(), finished);
}
