/*! Every kind of network compared with transformers: a tiny random checkpoint of each and the logits that it computes in f32
(tests/families.py). */

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::{BlockBuilder, BlockWeights, OutputHead, Stream, expect, network, split_fused};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::device_of_tests;
use crate::checkpoint::Source;
use crate::model::{Architecture, AttentionSpecs};
use crate::progress::Silent;
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

fn logits<B: Backend>(backend: &B, directory: &Path, tokens: &[u32], seq_len: usize) -> Vec<f32> {
    let source = split_fused(Source::open(directory).unwrap()).unwrap();
    let architecture = Architecture::from_config(source.config()).unwrap();
    for (name, shape) in architecture.tensors() {
        expect(&source, &name, &shape).unwrap();
    }
    // Every stored tensor is read.
    network(&source, &Silent).unwrap();
    let attention = AttentionSpecs::of(&architecture, KvFormat::FULL, seq_len);
    let mut stream = Stream::embed(backend, &source, &architecture, tokens, seq_len, 0).unwrap();
    for index in 0..architecture.blocks {
        let weights = BlockWeights::load_all(backend, &source, &architecture, index).unwrap();
        let block = BlockBuilder::new(backend, &architecture, &weights).source().unwrap();
        stream.advance(backend, &attention, &block, || Ok(())).unwrap();
    }
    let head = OutputHead::load(backend, &source, &architecture).unwrap();
    let of_batch = |batch| {
        let normed = head.normed(backend, batch).unwrap();
        backend.download_activation(&backend.product(&normed, &head.weight).unwrap()).unwrap().data
    };
    stream.batches.iter().flat_map(of_batch).collect()
}

#[test]
fn logits_are_those_of_transformers() {
    let families = families();
    assert!(families.len() >= 26, "{families:?}");
    let cpu = Cpu::new().unwrap();
    for directory in families {
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        let (tokens, seq_len, expected) = expected(&directory);
        let found = logits(&cpu, &directory, &tokens, seq_len);
        assert_eq!(found.len(), expected.len(), "{name}");
        let extreme = |pick: fn(f32, f32) -> f32| expected.iter().copied().reduce(pick).unwrap();
        let range = extreme(f32::max) - extreme(f32::min);
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        eprintln!("{name}: {:.1e} of the range", worst / range);
        assert!(worst <= TOLERANCE * range, "{name}: {worst} of {range}");
    }
}

/// Activations are f16 on a GPU: of the range of the logits, the mean error and the largest.
const ON_A_GPU: [f32; 2] = [2e-3, 2e-2];

#[test]
fn every_family_has_its_logits_on_a_gpu() {
    let Some(cuda) = device_of_tests("every_family_has_its_logits_on_a_gpu") else { return };
    let mut wrong = Vec::new();
    for directory in families() {
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        let (tokens, seq_len, expected) = expected(&directory);
        let found = logits(&cuda, &directory, &tokens, seq_len);
        assert_eq!(found.len(), expected.len(), "{name}");
        let extreme = |pick: fn(f32, f32) -> f32| expected.iter().copied().reduce(pick).unwrap();
        let range = extreme(f32::max) - extreme(f32::min);
        let errors = || found.iter().zip(&expected).map(|(a, b)| (a - b).abs() / range);
        let mean = errors().sum::<f32>() / found.len() as f32;
        // A NaN is the largest of all.
        let worst = errors().fold(0.0, |a: f32, b| if b.is_nan() { b } else { a.max(b) });
        eprintln!("{name}: {mean:.1e} of the range in the mean, {worst:.1e} at most");
        // A router may choose another expert for a token.
        let sparse = name.contains("moe") || name == "mixtral" || name == "dots1";
        let most = if sparse { 1.0 } else { ON_A_GPU[1] };
        if !(mean <= ON_A_GPU[0] && worst <= most) {
            wrong.push(format!("{name}: {mean} and {worst}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
