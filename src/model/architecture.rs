/*! `config.json` -> what the forward pass and the pipeline need to know of a network. */

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
    /// Channels between the MLP's projections.
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
}

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
        if !matches!(family.as_str(), "llama" | "mistral") {
            let named = if family.is_empty() { "(none)" } else { &family };
            return Err(Error::input(format!("unknown architecture: model_type is `{named}`"))
                .hint("this version runs `llama` and `mistral` models (Llama 1 to 3, Mistral, SmolLM2, TinyLlama, Vicuna, ...)"));
        }
        for key in ["attention_bias", "mlp_bias"] {
            if config.get(key).and_then(Value::as_bool) == Some(true) {
                return Err(Error::input(format!(
                    "config.json sets {key}, which this version does not support"
                )));
            }
        }
        if text(config, "hidden_act").is_some_and(|act| act != "silu") {
            return Err(Error::input("config.json sets hidden_act to something other than silu")
                .hint("this version runs networks with SiLU-gated MLPs"));
        }
        let hidden = number(config, "hidden_size")?;
        let heads = number(config, "num_attention_heads")?;
        let architecture = Self {
            family,
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

    /// Cosines and sines `[seq_len, head_dim / 2]` of positions 0..seq_len.
    pub fn rope_tables(&self, seq_len: usize) -> (Vec<f32>, Vec<f32>) {
        let frequencies = self.rope.frequencies(self.head_dim);
        (0..seq_len)
            .flat_map(|position| {
                frequencies.iter().map(move |f| f64::from((position as f64 * f) as f32))
            })
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
            .unzip()
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
            ("attention_bias", json!(true), "attention_bias"),
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
}
