/*! Every kind of network compared with transformers: a tiny random checkpoint of each and the logits that it computes in f32
(tests/families.py). */

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::{BlockBuilder, BlockWeights, OutputHead, Stream, attention_spec, expect};
use crate::backend::cpu::Cpu;
use crate::backend::{Forward, Memory};
use crate::checkpoint::Source;
use crate::model::Architecture;
use crate::quant::kv::KvFormat;

/// The largest error of a logit, as a share of the range of all logits.
const TOLERANCE: f32 = 1e-4;

fn families() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families");
    let mut all: Vec<PathBuf> =
        fs_err::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

/// Tokens `[windows, seq_len]` and logits `[windows, seq_len, vocabulary]`.
fn expected(directory: &Path) -> (Vec<u32>, usize, Vec<f32>) {
    let bytes = fs_err::read(directory.join("logits.st")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (tokens, logits) = (file.tensor("tokens").unwrap(), file.tensor("logits").unwrap());
    let seq_len = tokens.shape()[1];
    let tokens = tokens.data().as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
    let logits = logits.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    (tokens.collect(), seq_len, logits.collect())
}

fn logits(directory: &Path, tokens: &[u32], seq_len: usize) -> Vec<f32> {
    let (cpu, source) = (Cpu::new().unwrap(), Source::open(directory).unwrap());
    let architecture = Architecture::from_config(source.config()).unwrap();
    for (name, shape) in architecture.tensors() {
        expect(&source, &name, &shape).unwrap();
    }
    let known = architecture.tensors().len();
    assert_eq!(source.names().count(), known, "{}: tensors that are not read", directory.display());
    let attention = attention_spec(&architecture, KvFormat::FULL, seq_len);
    let mut stream = Stream::embed(&cpu, &source, &architecture, tokens, seq_len, 0).unwrap();
    for index in 0..architecture.blocks {
        let weights = BlockWeights::load_all(&cpu, &source, &architecture, index).unwrap();
        let block = BlockBuilder::new(&cpu, &architecture, &weights).source().unwrap();
        stream.advance(&cpu, &attention, &block, || Ok(())).unwrap();
    }
    let head = OutputHead::load(&cpu, &source, &architecture).unwrap();
    let of_batch = |batch| {
        let normed = head.normed(&cpu, batch).unwrap();
        cpu.download_activation(&cpu.product(&normed, &head.weight).unwrap()).unwrap().data
    };
    stream.batches.iter().flat_map(of_batch).collect()
}

#[test]
fn logits_are_those_of_transformers() {
    let families = families();
    assert!(families.len() >= 10, "{families:?}");
    for directory in families {
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        let (tokens, seq_len, expected) = expected(&directory);
        let found = logits(&directory, &tokens, seq_len);
        assert_eq!(found.len(), expected.len(), "{name}");
        let extreme = |pick: fn(f32, f32) -> f32| expected.iter().copied().reduce(pick).unwrap();
        let range = extreme(f32::max) - extreme(f32::min);
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        eprintln!("{name}: {:.1e} of the range", worst / range);
        assert!(worst <= TOLERANCE * range, "{name}: {worst} of {range}");
    }
}
