/*! Every kind of network compared with transformers: a tiny random checkpoint of each and the logits that it computes in f32
(tests/families.py). */

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::{BlockBuilder, BlockWeights, OutputHead, Stream, expect, network, split_fused};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::device_of_tests;
use crate::checkpoint::Source;
use crate::model::architecture::{Activation, Experts, Norms, QkNorm, RouterKind, SharedExpert};
use crate::model::rope::{Rope, RopeScaling};
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
    logits_of(backend, &source, &architecture, (tokens, seq_len))
}

/// The logits of a network that has the weights of `source`.
fn logits_of<B: Backend>(
    backend: &B,
    source: &Source,
    architecture: &Architecture,
    (tokens, seq_len): (&[u32], usize),
) -> Vec<f32> {
    let attention = AttentionSpecs::of(architecture, KvFormat::FULL, seq_len);
    let mut stream = Stream::embed(backend, source, architecture, tokens, seq_len, 0).unwrap();
    for index in 0..architecture.blocks {
        let weights = BlockWeights::load_all(backend, source, architecture, index).unwrap();
        let block = BlockBuilder::new(backend, architecture, &weights).source().unwrap();
        stream.advance(backend, &attention, &block, || Ok(())).unwrap();
    }
    let head = OutputHead::load(backend, source, architecture).unwrap();
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

type Change = fn(&mut Architecture);

fn experts(network: &mut Architecture) -> &mut Experts {
    network.experts.as_mut().unwrap()
}

/// Changes the RoPE of all blocks that have one.
fn ropes(network: &mut Architecture, change: fn(&mut Rope)) {
    network.attention.iter_mut().filter_map(|block| block.rope.as_mut()).for_each(change);
}

/// Gives every block the RoPE of block `from`.
fn share_rope(network: &mut Architecture, from: usize) {
    let rope = network.attention[from].rope.clone();
    network.attention.iter_mut().for_each(|block| block.rope.clone_from(&rope));
}

/// Every special field of a family, and the network without it.
const FIELDS: [(&str, &str, Change); 37] = [
    ("llama-yarn", "scaling", |n| ropes(n, |rope| rope.scaling = RopeScaling::None)),
    ("llama-yarn", "factor of cosines", |n| {
        ropes(n, |rope| {
            if let RopeScaling::Yarn { attention, .. } = &mut rope.scaling {
                *attention = 1.0;
            }
        })
    }),
    ("llama-yarn", "truncation", |n| {
        ropes(n, |rope| {
            if let RopeScaling::Yarn { truncated, .. } = &mut rope.scaling {
                *truncated = true;
            }
        })
    }),
    ("smollm3", "blocks without positions", |n| share_rope(n, 0)),
    ("smollm3", "windows", |n| n.set_windows([None; 3])),
    ("seed-oss", "biases", |n| n.biases.attn_out = false),
    ("phi3", "scaling", |n| ropes(n, |rope| rope.scaling = RopeScaling::None)),
    ("phi3", "long factors", |n| {
        ropes(n, |rope| {
            if let RopeScaling::LongRope { long, short, .. } = &mut rope.scaling {
                long.clone_from(short);
            }
        })
    }),
    ("phi3-short", "short factors", |n| {
        ropes(n, |rope| {
            if let RopeScaling::LongRope { long, short, .. } = &mut rope.scaling {
                short.clone_from(long);
            }
        })
    }),
    ("phi3-short", "window", |n| n.set_windows([None; 2])),
    ("granite", "embedding", |n| n.multipliers.embedding = 1.0),
    ("granite", "residual", |n| n.multipliers.residual = 1.0),
    ("granite", "logits", |n| n.multipliers.logits = 1.0),
    ("granite", "attention", |n| n.attention_scale = None),
    ("ministral3", "scaling", |n| ropes(n, |rope| rope.scaling = RopeScaling::None)),
    ("ministral3", "queries by position", |n| n.query_scaling = None),
    ("ernie4-5", "neighbouring channels", |n| ropes(n, |rope| rope.interleaved = false)),
    ("ernie4-5", "biases", |n| n.biases.mlp = false),
    ("glm4", "share", |n| ropes(n, |rope| rope.share = 1.0)),
    ("glm4", "neighbouring channels", |n| ropes(n, |rope| rope.interleaved = false)),
    ("glm4", "norms after", |n| n.norms.after = None),
    ("olmo2", "QK-norm", |n| n.qk_norm = QkNorm::None),
    ("olmo2", "norms after", |n| n.norms = Norms { before: n.norms.after, after: None, ..n.norms }),
    ("olmo3", "windows", |n| n.set_windows([None; 3])),
    ("olmo3", "RoPE of each block", |n| share_rope(n, 0)),
    ("exaone4", "blocks without positions", |n| share_rope(n, 0)),
    ("exaone4", "QK-norm", |n| n.qk_norm = QkNorm::None),
    ("gemma3", "weights less one", |n| n.norms.unit_offset = false),
    ("gemma3", "GELU", |n| n.mlp.activation = Activation::Silu),
    ("gemma3", "attention", |n| n.attention_scale = None),
    ("gemma3", "embedding", |n| n.multipliers.embedding = 1.0),
    ("gemma3", "RoPE of each block", |n| share_rope(n, 1)),
    ("qwen2-moe", "gate of the shared expert", |n| {
        let shared = experts(n).shared.unwrap();
        experts(n).shared = Some(SharedExpert { gated: false, ..shared });
    }),
    ("qwen2-moe", "normalization", |n| experts(n).normalized = false),
    ("glm4-moe", "shared expert", |n| experts(n).shared = None),
    ("glm4-moe", "factor of routing weights", |n| experts(n).scale = 1.0),
    ("dots1", "sigmoids", |n| experts(n).router = RouterKind::Softmax),
];

#[test]
fn a_field_that_is_ignored_changes_the_logits() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families");
    let cpu = Cpu::new().unwrap();
    let mut unseen = Vec::new();
    for (family, field, change) in FIELDS {
        let directory = directory.join(family);
        let (tokens, seq_len, expected) = expected(&directory);
        let source = split_fused(Source::open(&directory).unwrap()).unwrap();
        let mut architecture = Architecture::from_config(source.config()).unwrap();
        change(&mut architecture);
        let found = logits_of(&cpu, &source, &architecture, (&tokens, seq_len));
        let extreme = |pick: fn(f32, f32) -> f32| expected.iter().copied().reduce(pick).unwrap();
        let range = extreme(f32::max) - extreme(f32::min);
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        if worst <= 100.0 * TOLERANCE * range {
            unseen.push(format!("{family} without {field}: {worst} of {range}"));
        }
    }
    assert!(unseen.is_empty(), "{unseen:?}");
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
