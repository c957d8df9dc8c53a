/*! `config.json` -> what the forward pass and the pipeline need to know of a network. */

use std::sync::Arc;

use serde_json::Value;

use crate::{Error, Result};

/// A Llama-like decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// `model_type` of config.json.
    pub family: String,
    /// Decoder blocks.
    pub blocks: usize,
    /// Channels of the residual stream.
    pub hidden: usize,
    /// Channels between the projections of an MLP that is not one of several experts.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// RMSNorm's epsilon.
    pub norm_epsilon: f32,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Longest context the model was trained for.
    pub max_positions: usize,
    /// Rotary embedding.
    pub rope: Rope,
    /// Tokens that a token attends to, itself included, where that is not all before it.
    pub sliding_window: Option<usize>,
    /// Which linears have a bias.
    pub biases: Biases,
    /// Whether each query and key head goes through an RMSNorm before the rotary embedding.
    pub head_norms: bool,
    /// The experts of a sparse network.
    pub experts: Option<Experts>,
}

/// Which linears have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// q, k and v.
    pub attn_in: bool,
    /// o.
    pub attn_out: bool,
    /// gate, up and down.
    pub mlp: bool,
}

/// Several MLPs in a block, of which a router chooses a few for each token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    /// In a block.
    pub count: usize,
    /// For each token.
    pub per_token: usize,
    /// Channels between an expert's projections.
    pub intermediate: usize,
    /// Whether the chosen experts' shares add up to one.
    pub normalized: bool,
    /// Blocks that have one MLP like any dense network's.
    pub dense_blocks: Vec<usize>,
    /// What they are called.
    pub names: ExpertNames,
}

/// What a block's experts are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertNames {
    /// What the router and the experts are part of.
    pub part: &'static str,
    /// gate, up and down.
    pub linears: [&'static str; 3],
}

const MIXTRAL_NAMES: ExpertNames =
    ExpertNames { part: "block_sparse_moe", linears: ["w1", "w3", "w2"] };
const QWEN_NAMES: ExpertNames =
    ExpertNames { part: "mlp", linears: ["gate_proj", "up_proj", "down_proj"] };

/// Values of `model_type` that can be run.
const FAMILIES: [&str; 6] = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"];

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Change of the frequencies for long contexts.
    pub scaling: RopeScaling,
}

/// How RoPE's frequencies are changed.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by a factor.
    Linear(f64),
    /// Llama 3.1's: low frequencies divided, high ones kept, blended in between.
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
}

impl Architecture {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// An architecture this version cannot run, or a field that is missing or impossible.
    pub fn from_config(config: &Value) -> Result<Self> {
        let family = text(config, "model_type").unwrap_or("").to_owned();
        if !FAMILIES.contains(&family.as_str()) {
            let named = if family.is_empty() { "(none)" } else { &family };
            return Err(Error::input(format!("unknown architecture: model_type is `{named}`"))
                .hint(format!("this version runs models of the types {}", FAMILIES.join(", "))));
        }
        if text(config, "hidden_act").is_some_and(|act| act != "silu") {
            return Err(Error::input("config.json sets hidden_act to something other than silu")
                .hint("this version runs networks with SiLU-gated MLPs"));
        }
        let hidden = number(config, "hidden_size")?;
        let heads = number(config, "num_attention_heads")?;
        let architecture = Self {
            blocks: number(config, "num_hidden_layers")?,
            hidden,
            intermediate: number(config, "intermediate_size")?,
            heads,
            kv_heads: optional(config, "num_key_value_heads").unwrap_or(heads),
            head_dim: optional(config, "head_dim").unwrap_or(hidden / heads),
            vocabulary: number(config, "vocab_size")?,
            norm_epsilon: config.get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(1e-6) as f32,
            tied: config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
            max_positions: optional(config, "max_position_embeddings").unwrap_or(2048),
            rope: Rope::from_config(config)?,
            sliding_window: sliding_window(config, &family)?,
            biases: Biases::from_config(config, &family),
            head_norms: family.starts_with("qwen3"),
            experts: Experts::from_config(config, &family)?,
            family,
        };
        architecture.check()
    }

    fn check(self) -> Result<Self> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::input(format!(
                "config.json: {} query heads cannot share {} key/value heads evenly",
                self.heads, self.kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::input(format!("config.json: head_dim {} is odd", self.head_dim)));
        }
        Ok(self)
    }

    /// The experts of block `block`, if it has any.
    pub fn experts_of(&self, block: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| !experts.dense_blocks.contains(&block))
    }

    /// Cosines and sines `[seq_len, head_dim / 2]` of positions 0..seq_len.
    pub fn rope_tables(&self, seq_len: usize) -> (Arc<[f32]>, Arc<[f32]>) {
        let frequencies = self.rope.frequencies(self.head_dim);
        let (cos, sin): (Vec<f32>, Vec<f32>) = (0..seq_len)
            .flat_map(|position| {
                frequencies.iter().map(move |f| f64::from((position as f64 * f) as f32))
            })
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
            .unzip();
        (cos.into(), sin.into())
    }
}

impl Biases {
    fn from_config(config: &Value, family: &str) -> Self {
        let set = |key: &str| flag(config, key);
        match family {
            "qwen2" => Self { attn_in: true, attn_out: false, mlp: false },
            "llama" | "qwen3" | "qwen3_moe" => Self {
                attn_in: set("attention_bias"),
                attn_out: set("attention_bias"),
                mlp: family == "llama" && set("mlp_bias"),
            },
            _ => Self::default(),
        }
    }
}

impl Experts {
    fn from_config(config: &Value, family: &str) -> Result<Option<Self>> {
        let per_token = || number(config, "num_experts_per_tok");
        let experts = match family {
            "mixtral" => Self {
                count: number(config, "num_local_experts")?,
                per_token: per_token()?,
                intermediate: number(config, "intermediate_size")?,
                normalized: true,
                dense_blocks: Vec::new(),
                names: MIXTRAL_NAMES,
            },
            "qwen3_moe" => {
                let blocks = number(config, "num_hidden_layers")?;
                let step = optional(config, "decoder_sparse_step").unwrap_or(1);
                let listed = |block: usize| {
                    let list = config.get("mlp_only_layers").and_then(Value::as_array);
                    list.is_some_and(|list| {
                        list.iter().any(|own| own.as_u64() == Some(block as u64))
                    })
                };
                let dense = |block: &usize| listed(*block) || !(block + 1).is_multiple_of(step);
                Self {
                    // transformers 5 writes the latter name.
                    count: number(config, "num_experts")
                        .or_else(|_| number(config, "num_local_experts"))?,
                    per_token: per_token()?,
                    intermediate: number(config, "moe_intermediate_size")?,
                    normalized: flag(config, "norm_topk_prob"),
                    dense_blocks: (0..blocks).filter(dense).collect(),
                    names: QWEN_NAMES,
                }
            }
            _ => return Ok(None),
        };
        if experts.per_token > experts.count {
            return Err(Error::input(format!(
                "config.json: a token cannot have {} of {} experts",
                experts.per_token, experts.count
            )));
        }
        Ok(Some(experts))
    }
}

/// Tokens that a token attends to, where not all.
///
/// # Errors
/// Blocks that differ in it.
fn sliding_window(config: &Value, family: &str) -> Result<Option<usize>> {
    let window = optional(config, "sliding_window");
    match family {
        "mistral" | "mixtral" => Ok(window),
        "qwen2" | "qwen3" | "qwen3_moe" if flag(config, "use_sliding_window") => {
            let blocks = number(config, "num_hidden_layers")?;
            let whole = config.get("max_window_layers").and_then(Value::as_u64);
            match whole.unwrap_or(0) {
                0 => Ok(window),
                whole if whole >= blocks as u64 => Ok(None),
                whole => Err(Error::input(format!(
                    "config.json gives the blocks from {whole} on a sliding window and the others none"
                ))
                .hint("this version runs networks whose blocks attend alike")),
            }
        }
        _ => Ok(None),
    }
}

impl Rope {
    fn from_config(config: &Value) -> Result<Self> {
        // Newer files hold everything in `rope_parameters`, older ones in two fields.
        let parameters = config.get("rope_parameters").filter(|value| value.is_object());
        let scaling = parameters.or(config.get("rope_scaling")).filter(|value| value.is_object());
        let theta = parameters
            .and_then(|value| value.get("rope_theta"))
            .or(config.get("rope_theta"))
            .and_then(Value::as_f64)
            .unwrap_or(10_000.0);
        let Some(scaling) = scaling else {
            return Ok(Self { theta, scaling: RopeScaling::None });
        };
        let kind = text(scaling, "rope_type").or(text(scaling, "type")).unwrap_or("default");
        let field = |key: &str| {
            scaling.get(key).and_then(Value::as_f64).filter(|x| *x > 0.0).ok_or_else(|| {
                Error::input(format!("config.json: rope scaling `{kind}` lacks a positive `{key}`"))
            })
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear(field("factor")?),
            "llama3" => RopeScaling::Llama3 {
                factor: field("factor")?,
                low: field("low_freq_factor")?,
                high: field("high_freq_factor")?,
                original: field("original_max_position_embeddings")?,
            },
            other => {
                return Err(Error::input(format!("config.json: unknown rope scaling `{other}`"))
                    .hint("this version knows `default`, `linear` and `llama3`"));
            }
        };
        Ok(Self { theta, scaling })
    }

    /// Radians per position of each pair of channels.
    fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        let half = head_dim / 2;
        (0..half)
            .map(|pair| {
                // f32 steps as in the models' own code, so that angles agree with it.
                let exponent = (2 * pair) as f32 / head_dim as f32;
                let frequency = f64::from(1.0 / (self.theta as f32).powf(exponent));
                match self.scaling {
                    RopeScaling::None => frequency,
                    RopeScaling::Linear(factor) => frequency / factor,
                    RopeScaling::Llama3 { factor, low, high, original } => {
                        let turns = original * frequency / std::f64::consts::TAU;
                        let blend = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                        frequency * (blend + (1.0 - blend) / factor)
                    }
                }
            })
            .collect()
    }
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}

fn flag(config: &Value, key: &str) -> bool {
    config.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn optional(config: &Value, key: &str) -> Option<usize> {
    config.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0)
}

fn number(config: &Value, key: &str) -> Result<usize> {
    optional(config, key).ok_or_else(|| {
        Error::input(format!("config.json: `{key}` is missing or not a positive number"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config() -> Value {
        json!({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
               "num_attention_heads": 4, "vocab_size": 100})
    }

    #[test]
    fn fields_fall_back_as_in_the_models_own_code() {
        let architecture = Architecture::from_config(&config()).unwrap();
        assert_eq!((architecture.kv_heads, architecture.head_dim), (4, 16));
        assert_eq!(architecture.rope, Rope { theta: 10_000.0, scaling: RopeScaling::None });
        assert!(!architecture.tied);
    }

    #[test]
    fn unknown_networks_are_refused_by_name() {
        for (key, value, part) in [
            ("model_type", json!("gpt2"), "`gpt2`"),
            ("num_attention_heads", json!(0), "num_attention_heads"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("hidden_size", json!(null), "hidden_size"),
            ("num_key_value_heads", json!(3), "evenly"),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "`yarn`"),
            ("rope_scaling", json!({"rope_type": "linear"}), "`factor`"),
        ] {
            let mut config = config();
            config[key] = value;
            let error = Architecture::from_config(&config).unwrap_err();
            assert!(error.to_string().contains(part), "{key}: {error}");
        }
    }

    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        let mut config = config();
        config["rope_theta"] = json!(500_000.0);
        config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        let scaled = Architecture::from_config(&config).unwrap().rope.frequencies(128);
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::None }.frequencies(128);
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!(scaled.windows(2).all(|pair| pair[0] > pair[1]));
    }

    #[test]
    fn families_say_what_their_blocks_have() {
        let with = |changes: Value| {
            let mut config = config();
            config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            Architecture::from_config(&config)
        };
        let qwen2 = with(json!({"model_type": "qwen2", "sliding_window": 32})).unwrap();
        assert_eq!(qwen2.biases, Biases { attn_in: true, attn_out: false, mlp: false });
        assert_eq!((qwen2.sliding_window, qwen2.head_norms), (None, false));
        let sliding = json!({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 32,
            "max_window_layers": 1});
        assert!(with(sliding.clone()).unwrap_err().to_string().contains("sliding window"));
        for (whole, window) in [(0, Some(32)), (2, None)] {
            let mut changed = sliding.clone();
            changed["max_window_layers"] = json!(whole);
            assert_eq!(with(changed).unwrap().sliding_window, window);
        }
        let mistral = with(json!({"model_type": "mistral", "sliding_window": 16})).unwrap();
        assert_eq!((mistral.sliding_window, mistral.experts), (Some(16), None));
        let biased = with(json!({"attention_bias": true, "mlp_bias": true})).unwrap();
        assert_eq!(biased.biases, Biases { attn_in: true, attn_out: true, mlp: true });

        let experts =
            json!({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2});
        let mixtral = with(experts).unwrap();
        let experts = mixtral.experts_of(1).unwrap();
        assert_eq!((experts.count, experts.intermediate, experts.normalized), (4, 128, true));
        let mut sparse = json!({"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "norm_topk_prob": true, "decoder_sparse_step": 2});
        let qwen = with(sparse.clone()).unwrap();
        assert!(qwen.head_norms && qwen.experts_of(0).is_none());
        assert_eq!(qwen.experts_of(1).unwrap().intermediate, 24);
        sparse["num_experts_per_tok"] = json!(9);
        assert!(with(sparse).unwrap_err().to_string().contains("9 of 8"));
    }
}
