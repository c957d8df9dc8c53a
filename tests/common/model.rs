/*! A random Llama: nothing it says means anything, and everything that can be done to a model can be
done to it in a moment. */

use std::path::Path;

use fs_err as fs;
use half::{bf16, f16};
use serde_json::{Map, Value, json};

/// Element type of a written checkpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dtype {
    F16,
    BF16,
    F32,
}

/// A tensor before it is written.
pub(crate) struct RandomTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// A Llama with tied embeddings and the bundled tokenizer. Its MLP's width is a multiple of nothing
/// that groups are made of.
pub(crate) struct RandomModel {
    pub config: Value,
    pub tensors: Vec<RandomTensor>,
}

const HIDDEN: usize = 64;
const MLP: usize = 172;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const VOCABULARY: usize = 4096;

impl RandomModel {
    pub(crate) fn new(blocks: usize) -> Self {
        Self::with_widths(blocks, HIDDEN, MLP)
    }

    /// With other widths of the residual stream and the MLP.
    pub(crate) fn with_widths(blocks: usize, hidden: usize, mlp: usize) -> Self {
        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": blocks,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": VOCABULARY,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": true,
        });
        let kv = hidden / HEADS * KV_HEADS;
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, hidden])];
        for block in 0..blocks {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![mlp, hidden]),
                ("mlp.up_proj", vec![mlp, hidden]),
                ("mlp.down_proj", vec![hidden, mlp]),
            ] {
                shapes.push((format!("model.layers.{block}.{name}.weight"), shape));
            }
        }
        shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
        let tensors = shapes.into_iter().enumerate().map(|(seed, (name, shape))| {
            let values = random_values(seed as u64, &shape);
            RandomTensor { name, shape, values }
        });
        Self { config, tensors: tensors.collect() }
    }

    /// The tensor of this name, to be spoiled.
    pub(crate) fn tensor(&mut self, name: &str) -> &mut RandomTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// Writes the checkpoint; with more than one shard, tensors are distributed round-robin.
    pub(crate) fn write(&self, dir: &Path, dtype: Dtype, shards: usize) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama/tokenizer.json");
        fs::copy(tokenizer, dir.join("tokenizer.json")).unwrap();
        let mut weight_map = Map::new();
        for shard in 0..shards {
            let name = match shards {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{shards:05}.safetensors", shard + 1),
            };
            let tensors: Vec<&RandomTensor> =
                self.tensors.iter().skip(shard).step_by(shards).collect();
            for tensor in &tensors {
                weight_map.insert(tensor.name.clone(), name.clone().into());
            }
            fs::write(dir.join(name), shard_bytes(&tensors, dtype)).unwrap();
        }
        if shards > 1 {
            let index = json!({ "metadata": {}, "weight_map": weight_map });
            fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
    }
}

/// A safetensors file.
fn shard_bytes(tensors: &[&RandomTensor], dtype: Dtype) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        for value in &tensor.values {
            match dtype {
                Dtype::F16 => data.extend(f16::from_f32(*value).to_le_bytes()),
                Dtype::BF16 => data.extend(bf16::from_f32(*value).to_le_bytes()),
                Dtype::F32 => data.extend(value.to_le_bytes()),
            }
        }
        let entry = json!({
            "dtype": format!("{dtype:?}"),
            "shape": tensor.shape,
            "data_offsets": [start, data.len()],
        });
        header.insert(tensor.name.clone(), entry);
    }
    let header = Value::Object(header).to_string().into_bytes();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// Norms about one; weights of variance `1 / columns` with a few channels that stand out, as the
/// outlier channels of real models do. Every value is one that BF16 and F16 hold, so that the
/// same model can be written in every type.
fn random_values(seed: u64, shape: &[usize]) -> Vec<f32> {
    let columns = shape[shape.len() - 1];
    let count: usize = shape.iter().product();
    (0..count)
        .map(|at| {
            let hash = (at as u64 ^ (seed << 40)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let uniform = ((hash ^ (hash >> 29)) as u32) as f32 / u32::MAX as f32 - 0.5;
            let value = match (shape.len(), at % columns) {
                (1, channel) if channel % 16 == 5 => 4.0 + uniform,
                (1, _) => 1.0 + uniform / 4.0,
                _ => uniform * (12.0 / columns as f32).sqrt(),
            };
            f16::from_f32(bf16::from_f32(value).to_f32()).to_f32()
        })
        .collect()
}
