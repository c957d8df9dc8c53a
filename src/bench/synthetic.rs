/*! A checkpoint of random weights with a known model's widths, to measure `quantize` where the model
itself is not at hand. Its tokenizer is the bundled tiny model's. */

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::f16;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::model::Architecture;
use crate::{Error, Result, hub};

/// A synthetic model, and how it is calibrated.
#[derive(Clone, Debug)]
pub struct SyntheticModel {
    /// The model whose widths it has, one of [`SHAPES`].
    pub shape: String,
    /// Decoder blocks; none for as many as the model has.
    pub blocks: Option<usize>,
    /// Calibration windows.
    pub samples: usize,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Where checkpoint and result are left; none for a temporary directory.
    pub directory: Option<PathBuf>,
}

/// Widths of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// `model_type` of its config.json.
    pub family: &'static str,
    /// Channels of the residual stream.
    pub hidden: usize,
    /// Channels between the MLP's projections, or an expert's.
    pub intermediate: usize,
    /// Decoder blocks.
    pub blocks: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Experts of a block, and of a token.
    pub experts: Option<[usize; 2]>,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Further fields of its config.json: a JSON object.
    pub more: &'static str,
}

/// A Llama's of 32,000 tokens.
const fn llama(
    hidden: usize,
    intermediate: usize,
    blocks: usize,
    heads: usize,
    kv_heads: usize,
) -> Shape {
    Shape {
        family: "llama",
        hidden,
        intermediate,
        blocks,
        heads,
        kv_heads,
        head_dim: hidden / heads,
        vocabulary: 32_000,
        experts: None,
        tied: false,
        more: "{}",
    }
}

/// One of another family or vocabulary.
const fn other(family: &'static str, vocabulary: usize, shape: Shape) -> Shape {
    Shape { family, vocabulary, ..shape }
}

/// One of a later family, with the width of a head and further fields.
const fn later(
    family: &'static str,
    vocabulary: usize,
    head_dim: usize,
    more: &'static str,
    shape: Shape,
) -> Shape {
    Shape { family, vocabulary, head_dim, more, ..shape }
}

/// The same with the embedding as its head.
const fn tied(shape: Shape) -> Shape {
    Shape { tied: true, ..shape }
}

/// The known models, by their published config.json.
pub const SHAPES: [(&str, Shape); 33] = [
    ("llama-7b", llama(4096, 11008, 32, 32, 32)),
    ("llama-13b", llama(5120, 13824, 40, 40, 40)),
    ("llama-30b", llama(6656, 17920, 60, 52, 52)),
    ("llama-65b", llama(8192, 22016, 80, 64, 64)),
    ("llama-2-7b", llama(4096, 11008, 32, 32, 32)),
    ("llama-2-13b", llama(5120, 13824, 40, 40, 40)),
    ("llama-2-70b", llama(8192, 28672, 80, 64, 8)),
    ("llama-3-8b", other("llama", 128_256, llama(4096, 14336, 32, 32, 8))),
    ("llama-3-70b", other("llama", 128_256, llama(8192, 28672, 80, 64, 8))),
    ("llama-3.2-1b", other("llama", 128_256, llama(2048, 8192, 16, 32, 8))),
    ("mistral-7b", other("mistral", 32_000, llama(4096, 14336, 32, 32, 8))),
    (
        "mixtral-8x7b",
        Shape { family: "mixtral", experts: Some([8, 2]), ..llama(4096, 14336, 32, 32, 8) },
    ),
    ("qwen2.5-7b", other("qwen2", 152_064, llama(3584, 18944, 28, 28, 4))),
    ("qwen2.5-72b", other("qwen2", 152_064, llama(8192, 29568, 80, 64, 8))),
    ("qwen3-8b", other("qwen3", 151_936, llama(4096, 12288, 36, 32, 8))),
    (
        "qwen3-32b",
        Shape { head_dim: 128, ..other("qwen3", 151_936, llama(5120, 25600, 64, 64, 8)) },
    ),
    (
        "qwen3-30b-a3b",
        Shape {
            head_dim: 128,
            experts: Some([128, 8]),
            ..other("qwen3_moe", 151_936, llama(2048, 768, 48, 32, 4))
        },
    ),
    ("smollm3-3b", tied(later("smollm3", 128_256, 128, "{}", llama(2048, 11008, 36, 16, 4)))),
    ("seed-oss-36b", later("seed_oss", 155_136, 128, "{}", llama(5120, 27648, 64, 80, 8))),
    ("mimo-7b", later("mimo", 151_680, 128, "{}", llama(4096, 11008, 36, 32, 8))),
    ("phi-3-mini", later("phi3", 32_064, 96, "{}", llama(3072, 8192, 32, 32, 32))),
    (
        "phi-4-mini",
        tied(later(
            "phi3",
            200_064,
            128,
            r#"{"partial_rotary_factor": 0.75}"#,
            llama(3072, 8192, 32, 24, 8),
        )),
    ),
    (
        "granite-3.3-8b",
        tied(later(
            "granite",
            49_159,
            128,
            r#"{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0078125, "logits_scaling": 16.0}"#,
            llama(4096, 12800, 40, 32, 8),
        )),
    ),
    (
        "ministral-3-8b",
        later(
            "ministral3",
            131_072,
            128,
            r#"{"rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0,
                "original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1}}"#,
            llama(4096, 14336, 34, 32, 8),
        ),
    ),
    ("ernie-4.5-0.3b", tied(later("ernie4_5", 103_424, 128, "{}", llama(1024, 3072, 18, 16, 2)))),
    (
        "glm-4-9b",
        later("glm4", 151_552, 128, r#"{"attention_bias": true}"#, llama(4096, 13696, 40, 32, 2)),
    ),
    ("olmo-2-7b", later("olmo2", 100_352, 128, "{}", llama(4096, 11008, 32, 32, 32))),
    ("olmo-3-7b", later("olmo3", 100_278, 128, "{}", llama(4096, 11008, 32, 32, 32))),
    ("exaone-4-32b", later("exaone4", 102_400, 128, "{}", llama(5120, 27392, 64, 40, 8))),
    ("gemma-3-4b", tied(later("gemma3_text", 262_208, 256, "{}", llama(2560, 10240, 34, 8, 4)))),
    (
        "qwen1.5-moe-a2.7b",
        later(
            "qwen2_moe",
            151_936,
            128,
            r#"{"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632}"#,
            llama(2048, 5632, 24, 16, 16),
        ),
    ),
    (
        "glm-4.5-air",
        later(
            "glm4_moe",
            151_552,
            128,
            r#"{"n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "n_shared_experts": 1,
                "first_k_dense_replace": 1, "attention_bias": true}"#,
            llama(4096, 10944, 46, 96, 8),
        ),
    ),
    (
        "dots-llm1",
        later(
            "dots1",
            152_064,
            128,
            r#"{"n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "n_shared_experts": 2,
                "first_k_dense_replace": 1, "norm_topk_prob": true, "routed_scaling_factor": 2.5}"#,
            llama(4096, 10944, 62, 32, 32),
        ),
    ),
];

impl SyntheticModel {
    /// The widths of the model it is named after.
    pub fn known_shape(&self) -> Result<Shape> {
        SHAPES.iter().find(|(name, _)| *name == self.shape).map(|(_, shape)| *shape).ok_or_else(
            || {
                let known: Vec<&str> = SHAPES.iter().map(|(name, _)| *name).collect();
                Error::usage(format!("there is no shape named `{}`", self.shape))
                    .hint(format!("the shapes are {}", known.join(", ")))
            },
        )
    }

    /// Its `config.json`.
    ///
    /// # Errors
    /// A usage error for a name that is not known.
    pub fn config(&self) -> Result<Value> {
        let shape = self.known_shape()?;
        let mut config = json!({
            "model_type": shape.family,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": self.blocks.unwrap_or(shape.blocks),
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocabulary,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": shape.tied,
            "torch_dtype": "float16",
        });
        let more: Value = serde_json::from_str(shape.more).expect("the table holds JSON");
        if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
            config.extend(more);
        }
        if let Some([count, per_token]) = shape.experts {
            config["num_experts"] = json!(count);
            config["num_experts_per_tok"] = json!(per_token);
            config["moe_intermediate_size"] = json!(shape.intermediate);
            config["norm_topk_prob"] = json!(true);
        }
        Ok(config)
    }

    /// Writes the checkpoint into `directory`, a tensor at a time, and sees that it is read from the
    /// disk and not from the system's cache.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let config = self.config()?;
        fs_err::create_dir_all(directory)?;
        fs_err::write(directory.join("config.json"), config.to_string())?;
        fs_err::write(directory.join("tokenizer.json"), hub::tiny_llama()?.tokenizer()?)?;

        let tensors = Architecture::from_config(&config)?.tensors();
        let mut header = Map::new();
        let mut offset = 0;
        for (name, shape) in &tensors {
            let end = offset + 2 * shape.iter().product::<usize>();
            header.insert(
                name.clone(),
                json!({"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}),
            );
            offset = end;
        }
        let header = Value::Object(header).to_string();
        let file = fs_err::File::create(directory.join("model.safetensors"))?;
        let mut file = BufWriter::new(file);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for (seed, (_, shape)) in tensors.iter().enumerate() {
            // Norms are ones; weights keep a token's energy from layer to layer.
            match shape[..] {
                [len] => file.write_all(&f16::ONE.to_le_bytes().repeat(len))?,
                _ => write_random(&mut file, seed as u64, shape)?,
            }
        }
        let file = file.into_inner().map_err(|error| error.into_error())?;
        file.sync_all()?;
        // Advice: the figures stand without it, only less cold.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        Ok(())
    }
}

/// Uniform values of variance `1 / columns`, written in parts of a few megabytes.
fn write_random(file: &mut impl Write, seed: u64, shape: &[usize]) -> Result<()> {
    const PART: usize = 1 << 21;
    let columns = shape.last().copied().unwrap_or(1);
    let scale = (12.0 / columns as f32).sqrt();
    let count: usize = shape.iter().product();
    let mut bytes = Vec::new();
    for first in (0..count).step_by(PART) {
        let len = PART.min(count - first);
        (first..first + len)
            .into_par_iter()
            .map(|at| {
                // A multiplicative hash of the position: the same weights however they are made.
                let hash = (at as u64 ^ (seed << 40)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let uniform = ((hash ^ (hash >> 29)) as u32) as f32 / u32::MAX as f32 - 0.5;
                f16::from_f32(uniform * scale).to_le_bytes()
            })
            .collect_into_vec(&mut bytes);
        file.write_all(bytes.as_flattened())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameters as the models' cards state them, in millions; of `llama-3.2-1b`, whose head is its embedding, with a head. From
    /// smollm3-3b on they are counted by hand from the published widths, without vision and blocks that predict further tokens.
    const PARAMETERS: [(&str, f64); 33] = [
        ("llama-7b", 6_738.0),
        ("llama-13b", 13_016.0),
        ("llama-30b", 32_529.0),
        ("llama-65b", 65_286.0),
        ("llama-2-7b", 6_738.0),
        ("llama-2-13b", 13_016.0),
        ("llama-2-70b", 68_977.0),
        ("llama-3-8b", 8_030.0),
        ("llama-3-70b", 70_554.0),
        ("llama-3.2-1b", 1_236.0 + 262.7),
        ("mistral-7b", 7_242.0),
        ("mixtral-8x7b", 46_703.0),
        ("qwen2.5-7b", 7_616.0),
        ("qwen2.5-72b", 72_706.0),
        ("qwen3-8b", 8_191.0),
        ("qwen3-32b", 32_762.0),
        ("qwen3-30b-a3b", 30_532.0),
        ("smollm3-3b", 3_075.1),
        ("seed-oss-36b", 36_151.1),
        ("mimo-7b", 7_622.6),
        ("phi-3-mini", 3_821.1),
        ("phi-4-mini", 3_836.0),
        ("granite-3.3-8b", 8_170.9),
        ("ministral-3-8b", 8_489.6),
        ("ernie-4.5-0.3b", 360.7),
        ("glm-4-9b", 9_400.3),
        ("olmo-2-7b", 7_298.6),
        ("olmo-3-7b", 7_298.0),
        ("exaone-4-32b", 32_003.2),
        ("gemma-3-4b", 3_880.3),
        ("qwen1.5-moe-a2.7b", 14_315.8),
        ("glm-4.5-air", 106_852.3),
        ("dots-llm1", 142_774.4),
    ];

    #[test]
    fn shapes_have_as_many_parameters_as_their_models() {
        assert_eq!(SHAPES.map(|(name, _)| name), PARAMETERS.map(|(name, _)| name));
        for (name, millions) in PARAMETERS {
            let model = SyntheticModel {
                shape: name.to_owned(),
                blocks: None,
                samples: 1,
                seq_len: 1,
                directory: None,
            };
            let architecture = Architecture::from_config(&model.config().unwrap()).unwrap();
            let tensors = architecture.tensors();
            let count: usize =
                tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            let found = count as f64 / 1e6;
            assert!((found / millions - 1.0).abs() < 2e-4, "{name}: {found} million");
        }
    }
}
