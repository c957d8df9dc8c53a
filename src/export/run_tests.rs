//! Exports that end early, and what they find when they begin.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::backend::cpu::Cpu;
use crate::checkpoint::{AtomCheckpoint, Inputs};
use crate::export::find;
use crate::pipeline::{self, Calibration, Output, Quantization};
use crate::progress::{Progress, Silent};
use crate::text::{Split, TextSet};
use crate::{Kind, hub};

/// Stops after so many units.
struct Stop {
    after: usize,
    units: AtomicUsize,
}

impl Progress for Stop {
    fn begin(&self, _: &str, _: usize) {}
    fn advance(&self, _: &str) {
        self.units.fetch_add(1, Ordering::Relaxed);
    }
    fn end(&self) {}
    fn info(&self, _: &str) {}
    fn warn(&self, _: &str) {}
    fn stop_requested(&self) -> bool {
        self.units.load(Ordering::Relaxed) >= self.after
    }
}

/// tiny-llama by rounding, in `home`.
fn checkpoint(home: &Path) -> AtomCheckpoint {
    let out = home.join("atom");
    let source = hub::tiny_llama().unwrap();
    let text = TextSet::sample(Split::Calibration);
    let calibration = Calibration { text, samples: 1, seq_len: 16, seed: 0 };
    let recipe = Recipe { gptq: false, search_scales: false, ..Recipe::w4a16() };
    let quantization = Quantization {
        source: &source,
        calibration: &calibration,
        recipe: &recipe,
        output: &Output { destination: destination(&out), resume: false },
        evaluation: None,
    };
    pipeline::quantize(&Cpu::new().unwrap(), &quantization, &Silent).unwrap();
    AtomCheckpoint::open(&out).unwrap()
}

fn destination(out: &Path) -> Destination {
    Destination { out: out.to_owned(), overwrite: false, inputs: Inputs::default() }
}

struct Case {
    home: tempfile::TempDir,
    checkpoint: AtomCheckpoint,
}

impl Case {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(home.path());
        Self { home, checkpoint }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Runs `work` on an export as dense to `name`, which stops after `units` units.
    fn with<T>(&self, name: &str, units: usize, work: impl FnOnce(&Export<'_>) -> T) -> T {
        self.with_format("dense", name, units, work)
    }

    fn with_format<T>(
        &self,
        format: &str,
        name: &str,
        units: usize,
        work: impl FnOnce(&Export<'_>) -> T,
    ) -> T {
        let progress = Stop { after: units, units: AtomicUsize::new(0) };
        let model = ExportedModel::open(&self.checkpoint, None, &progress).unwrap();
        work(&Export {
            model: &model,
            format: find(format).unwrap(),
            destination: &destination(&self.out(name)),
            resume: false,
            perplexities: &[],
        })
    }

    fn names(&self) -> Vec<String> {
        let entries = fs_err::read_dir(self.home.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[test]
fn an_interrupted_export_is_continued_and_ends_with_the_same_bytes() {
    let case = Case::new();
    let whole = case.with("whole", usize::MAX, |job| export(job).unwrap());
    assert_eq!((whole.tensors, whole.resumed_tensors), (38, 0));
    let stopped = case.with("out", 3, |job| export(job).unwrap_err());
    assert_eq!(stopped.kind(), Kind::Interrupted);
    assert_eq!(case.names(), [".out.atom-work", "atom", "whole"], "nothing unfinished is seen");

    let found = case.with("out", usize::MAX, |job| dry_run(job).unwrap());
    assert!((1..38).contains(&found.finished_tensors), "{found:?}");
    assert_eq!(found.needed_disk_bytes, 0, "the room is reserved already");
    let outcome = case.with("out", usize::MAX, |job| export(job).unwrap());
    assert_eq!(outcome.resumed_tensors, found.finished_tensors);
    assert_eq!(case.names(), ["atom", "out", "whole"]);
    let files = |name: &str| {
        let dir = case.out(name);
        let names = fs_err::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.collect();
        names.sort();
        let read = |name| fs_err::read(dir.join(name)).unwrap();
        names.into_iter().map(|name| (name.clone(), read(name))).collect::<Vec<_>>()
    };
    let (one, other) = (files("out"), files("whole"));
    assert_eq!(one.len(), 6);
    assert!(one == other, "an export depends on the checkpoint and the format only");
}

#[test]
fn an_export_that_never_finished_a_unit_leaves_nothing() {
    let case = Case::new();
    let stopped = case.with("out", 0, |job| export(job).unwrap_err());
    assert_eq!(stopped.kind(), Kind::Interrupted);
    assert_eq!(case.names(), ["atom"]);
    case.with("out", usize::MAX, |job| dry_run(job).unwrap());
    assert_eq!(case.names(), ["atom"], "a dry run writes nothing");
}

#[test]
fn an_export_is_not_the_same_as_one_of_another_checkpoint_or_type() {
    let case = Case::new();
    case.with("out", 3, |job| export(job).unwrap_err());
    let model =
        ExportedModel::open(&case.checkpoint, Some(crate::checkpoint::Dtype::BF16), &Silent);
    let model = model.unwrap();
    let destination = destination(&case.out("out"));
    let format = find("dense").unwrap();
    let job = Export {
        model: &model,
        format,
        destination: &destination,
        resume: false,
        perplexities: &[],
    };
    let error = export(&job).unwrap_err();
    assert!(error.message().contains("the unfinished run in"), "{error}");
    assert!(error.message().contains("torch_dtype was \"float16\", now \"bfloat16\""), "{error}");
}

/// Tensors that are copied, those whose bits are turned on the way, and those that are made into others.
#[test]
fn a_damaged_tensor_is_not_exported() {
    let case = Case::new();
    let shard = case.out("atom").join("model.safetensors");
    let intact = fs_err::read(&shard).unwrap();
    let q_proj = "model.layers.3.self_attn.q_proj";
    let names = [
        "model.embed_tokens.weight".to_owned(),
        "model.norm.weight".to_owned(),
        format!("{q_proj}.weight_codes"),
        format!("{q_proj}.weight_scales"),
    ];
    for name in names {
        let bytes = case.checkpoint.tensor(&name).unwrap().bytes.to_vec();
        let at = intact.windows(bytes.len()).position(|found| found == bytes).unwrap();
        let mut damaged = intact.clone();
        damaged[at + bytes.len() / 2] ^= 1;
        fs_err::write(case.out("damaged"), damaged).unwrap();
        fs_err::rename(case.out("damaged"), &shard).unwrap();
        let checkpoint = AtomCheckpoint::open(&case.out("atom")).unwrap();
        let damaged = Case { checkpoint, home: tempfile::tempdir().unwrap() };
        for format in ["compressed-tensors", "gptq", "dense"] {
            let run = |job: &Export<'_>| export(job).unwrap_err();
            let error = damaged.with_format(format, format, usize::MAX, run);
            assert_eq!(error.kind(), Kind::Input, "{format} {name}: {error}");
            let expected = format!("tensor `{name}` has SHA-256");
            assert!(error.message().starts_with(&expected), "{format} {name}: {error}");
            assert!(error.message().contains("atom.json says"), "{error}");
            assert!(!damaged.out(format).exists());
        }
    }
}

#[test]
fn parts_are_written_in_units_that_depend_on_their_sizes_only() {
    use crate::checkpoint::Dtype;
    let part = |name: &str, bytes: u64| Part {
        tensors: vec![TensorSpec::new(name, Dtype::U8, [bytes as usize])],
        make: Box::new(|| Ok(Vec::new())),
    };
    let found = units(vec![
        part("a", 1),
        part("b", UNIT_BYTES),
        part("c", UNIT_BYTES - 1),
        part("d", 1),
        part("e", 0),
    ]);
    let found: Vec<_> = found.iter().map(|unit| (&unit.name[..], unit.parts.len())).collect();
    assert_eq!(found, [("a", 2), ("c", 2), ("e", 1)]);
}
