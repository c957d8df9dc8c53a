//! Several ranks make the bytes of one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::outcome::QuantizeOutcome;
use super::*;
use crate::backend::Exchange;
use crate::backend::cpu::Cpu;
use crate::checkpoint::{AtomCheckpoint, Destination, Inputs, Source};
use crate::eval::{atom_perplexity, source_perplexity};
use crate::progress::{Progress, Silent};
use crate::ranks::thread_ranks;
use crate::recipe::{Group, Outliers, Recipe};
use crate::text::{Evaluation, Split, TextSet};
use crate::{Kind, Result};

/// A run that any number of ranks share.
struct Run<'a> {
    source: &'a Source,
    recipe: Recipe,
    samples: usize,
    resume: bool,
}

impl Run<'_> {
    /// The run of one rank.
    fn of_rank(&self, cpu: &Cpu, out: &Path, progress: &dyn Progress) -> Result<QuantizeOutcome> {
        let text = TextSet::sample(Split::Calibration);
        let calibration = Calibration { text, samples: self.samples, seq_len: 24, seed: 0 };
        let destination =
            Destination { out: out.into(), overwrite: false, inputs: Inputs::default() };
        let output = Output { destination, resume: self.resume };
        let quantization = Quantization {
            source: self.source,
            calibration: &calibration,
            recipe: &self.recipe,
            output: &output,
            evaluation: None,
        };
        quantize(cpu, &quantization, progress)
    }

    /// What each of so many ranks returns.
    fn of(
        &self,
        ranks: usize,
        out: &Path,
        progress: &(dyn Fn(usize) -> Box<dyn Progress> + Sync),
    ) -> Vec<Result<QuantizeOutcome>> {
        on_ranks(ranks, |rank, cpu| self.of_rank(cpu, out, &*progress(rank)))
    }
}

/// What each of so many ranks returns of some work.
fn on_ranks<T: Send>(ranks: usize, work: impl Fn(usize, &Cpu) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads = thread_ranks(ranks).into_iter().enumerate().map(|(rank, own)| {
            scope.spawn(move || {
                let mut cpu = Cpu::new().unwrap();
                cpu.join(Arc::new(own)).unwrap();
                work(rank, &cpu)
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn silent(_rank: usize) -> Box<dyn Progress> {
    Box::new(Silent)
}

/// All files of a directory.
fn bytes(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs_err::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let read = |entry: fs_err::DirEntry| {
        (entry.file_name().into_string().unwrap(), fs_err::read(entry.path()).unwrap())
    };
    entries.map(read).collect()
}

/// The two recipes, for channels as few as these models have.
fn recipes() -> [Recipe; 2] {
    let narrow =
        |recipe| Recipe { group: Group::Size(32), outliers: Outliers::Count(16), ..recipe };
    [narrow(Recipe::default_recipe()), narrow(Recipe::paper())]
}

/// Files of 1, 2, 3 and 8 ranks are the same.
fn same_bytes(source: &Source, samples: usize) {
    let home = tempfile::tempdir().unwrap();
    for (number, recipe) in recipes().into_iter().enumerate() {
        let recipe = Recipe { expert_tokens: 40, ..recipe };
        let run = Run { source, recipe, samples, resume: false };
        let mut expected = None;
        for ranks in [1, 2, 3, 8] {
            let out = home.path().join(format!("{number}-{ranks}"));
            let outcomes = run.of(ranks, &out, &silent);
            let errors = |outcome: Result<QuantizeOutcome>| -> Vec<f64> {
                outcome.unwrap().linears.iter().map(|linear| linear.error).collect()
            };
            let outcomes: Vec<Vec<f64>> = outcomes.into_iter().map(errors).collect();
            assert!(outcomes.iter().all(|errors| *errors == outcomes[0]));
            let mut got = bytes(&out);
            // It names the directory.
            got.remove("README.md");
            assert!(got.len() > 3);
            let expected = expected.get_or_insert_with(|| got.clone());
            assert!(*expected == got, "recipe {number}, {ranks} ranks");
        }
    }
}

#[test]
fn any_number_of_ranks_makes_the_same_checkpoint() {
    same_bytes(&crate::hub::tiny_llama().unwrap(), 9);
}

#[test]
fn any_number_of_ranks_makes_the_same_checkpoint_of_experts() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-mixtral");
    same_bytes(&Source::open(&directory).unwrap(), 5);
}

/// Fewer windows than ranks leave some ranks without any.
#[test]
fn ranks_without_windows_take_part() {
    let home = tempfile::tempdir().unwrap();
    let source = &crate::hub::tiny_llama().unwrap();
    let [recipe, _] = recipes();
    let run = Run { source, recipe, samples: 2, resume: false };
    let of = |ranks: usize| {
        let out = home.path().join(ranks.to_string());
        run.of(ranks, &out, &silent).into_iter().for_each(|outcome| drop(outcome.unwrap()));
        fs_err::read(out.join("model.safetensors")).unwrap()
    };
    assert!(of(1) == of(3));
}

/// Stops after so many blocks.
struct Stopping {
    after: usize,
    blocks: std::sync::atomic::AtomicUsize,
}

impl Progress for Stopping {
    fn begin(&self, _stage: &str, _steps: usize) {}
    fn advance(&self, _detail: &str) {
        self.blocks.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
    fn end(&self) {}
    fn info(&self, _message: &str) {}
    fn warn(&self, _message: &str) {}
    fn stop_requested(&self) -> bool {
        self.blocks.load(std::sync::atomic::Ordering::Relaxed) >= self.after
    }
}

#[test]
fn a_stopped_run_is_continued_by_another_number_of_ranks() {
    let home = tempfile::tempdir().unwrap();
    let source = &crate::hub::tiny_llama().unwrap();
    for (number, recipe) in recipes().into_iter().enumerate() {
        let mut run = Run { source, recipe, samples: 4, resume: false };
        let (whole, parts) =
            (home.path().join(format!("{number}")), home.path().join(format!("{number}-parts")));
        run.of(1, &whole, &silent).remove(0).unwrap();
        // One rank is stopped, which ends the others.
        let stopping = |rank: usize| -> Box<dyn Progress> {
            let after = if rank == 1 { 2 } else { usize::MAX };
            Box::new(Stopping { after, blocks: Default::default() })
        };
        let outcomes = run.of(3, &parts, &stopping);
        assert!(outcomes.iter().all(Result::is_err) && !parts.exists());
        let kinds = outcomes.into_iter().map(|outcome| outcome.unwrap_err().kind());
        assert_eq!(kinds.collect::<Vec<_>>()[1], Kind::Interrupted);
        run.resume = true;
        let outcomes = run.of(2, &parts, &silent);
        let resumed = outcomes.into_iter().map(|outcome| outcome.unwrap().resumed_blocks);
        let resumed: Vec<usize> = resumed.collect();
        assert!(resumed[0] >= 1 && resumed[0] == resumed[1], "{resumed:?}");
        let read = |dir: &Path| fs_err::read(dir.join("model.safetensors")).unwrap();
        assert!(read(&whole) == read(&parts), "recipe {number}");
    }
}

#[test]
fn perplexity_is_the_same_for_any_number_of_ranks() {
    let home = tempfile::tempdir().unwrap();
    let source = &crate::hub::tiny_llama().unwrap();
    let [recipe, _] = recipes();
    let out = home.path().join("out");
    Run { source, recipe, samples: 1, resume: false }.of(1, &out, &silent).remove(0).unwrap();
    let checkpoint = &AtomCheckpoint::open(&out).unwrap();
    let text = TextSet::sample(Split::Evaluation);
    let evaluation = &Evaluation { text, seq_len: 64, windows: Some(20) };
    let of = |ranks: usize| {
        let all = on_ranks(ranks, |_, cpu| {
            let source = source_perplexity(cpu, source, evaluation, &Silent).unwrap();
            let atom = atom_perplexity(cpu, checkpoint, evaluation, &Silent).unwrap();
            [source, atom]
                .map(|outcome| (outcome.perplexity, outcome.standard_error, outcome.windows))
        });
        assert!(all.iter().all(|own| *own == all[0]));
        all[0]
    };
    let alone = of(1);
    assert!(alone[0] != alone[1] && alone[0].2 == 20);
    assert_eq!([2, 3, 8].map(of), [alone; 3]);
}
