/*! The families of networks, as data: what differs from a plain Llama. Defaults of fields that `config.json` does not have
are those of transformers 5. */

mod dots1;
mod ernie4_5;
mod exaone4;
mod gemma3;
mod glm4;
mod glm4_moe;
mod granite;
mod llama;
mod mimo;
mod ministral3;
mod mistral;
mod mixtral;
mod olmo2;
mod olmo3;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod seed_oss;
mod smollm3;

use super::architecture::{Architecture, FusedLinears, Norms};
use super::config::{Config, shortened};
use super::rope::Rope;
use super::rope_settings::{RopeContext, RopeDefaults};
use crate::{Error, Result};

/// A family: the defaults of its fields, and what else differs from a plain Llama.
pub(super) struct Family {
    /// `model_type` of config.json.
    pub name: &'static str,
    /// Prefix of its class names in transformers.
    pub class: &'static str,
    /// `num_key_value_heads`; none for as many as query heads, which is also what null means.
    pub kv_heads: Option<usize>,
    /// `head_dim`; none for `hidden_size / num_attention_heads`, which is then also what null means.
    pub head_dim: Option<usize>,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// `rms_norm_eps`.
    pub norm_epsilon: f64,
    /// The field of config.json that holds it.
    pub norm_epsilon_field: &'static str,
    /// `tie_word_embeddings`.
    pub tied: bool,
    /// Whether `hidden_act` is read, which must be SiLU.
    pub reads_hidden_act: bool,
    /// The rotary embedding.
    pub rope: RopeDefaults,
    /// Reads the rotary embedding of all blocks, or of most.
    pub reads_rope: fn(&RopeContext<'_>) -> Result<Rope>,
    /// The norms of a block.
    pub norms: Norms,
    /// Linears that the family's files store as one tensor.
    pub fused: &'static [FusedLinears],
    /// Reads the family's own fields and sets what differs from a plain network: RoPE and attention to all tokens in every
    /// block, norms before attention and MLP, gated SiLU, no biases, no experts.
    pub differences: fn(&Config, &mut Architecture) -> Result<()>,
}

/// The defaults that most families share.
const PLAIN: Family = Family {
    name: "",
    class: "",
    kv_heads: None,
    head_dim: None,
    max_positions: 32_768,
    norm_epsilon: 1e-6,
    norm_epsilon_field: "rms_norm_eps",
    tied: false,
    reads_hidden_act: true,
    rope: PLAIN_ROPE,
    reads_rope: |rope| rope.read(),
    norms: Norms::LLAMA,
    fused: &[],
    differences: |_, _| Ok(()),
};

/// The defaults that most families share.
const PLAIN_ROPE: RopeDefaults = RopeDefaults {
    theta: 10_000.0,
    share: None,
    interleaved: false,
    original: None,
    longrope_alone: false,
};

/// Every family, by `model_type`.
pub(super) const FAMILIES: [&Family; 21] = [
    &dots1::DOTS1,
    &ernie4_5::ERNIE4_5,
    &exaone4::EXAONE4,
    &gemma3::GEMMA3,
    &glm4::GLM4,
    &glm4_moe::GLM4_MOE,
    &granite::GRANITE,
    &llama::LLAMA,
    &mimo::MIMO,
    &ministral3::MINISTRAL3,
    &mistral::MISTRAL,
    &mixtral::MIXTRAL,
    &olmo2::OLMO2,
    &olmo3::OLMO3,
    &phi3::PHI3,
    &qwen2::QWEN2,
    &qwen2_moe::QWEN2_MOE,
    &qwen3::QWEN3,
    &qwen3_moe::QWEN3_MOE,
    &seed_oss::SEED_OSS,
    &smollm3::SMOLLM3,
];

impl Family {
    /// The family that `model_type` names.
    ///
    /// # Errors
    /// If this version has no family of that name.
    pub(super) fn of(config: &Config) -> Result<&'static Self> {
        let named = match config.given("model_type") {
            None => None,
            Some(_) => config.text("model_type")?,
        };
        let known = FAMILIES.into_iter().find(|family| Some(family.name) == named);
        known.ok_or_else(|| {
            let named = shortened(named.unwrap_or("(none)"));
            let message =
                format!("{}: unknown architecture: model_type is `{named}`", config.file());
            let names = FAMILIES.map(|family| family.name).join(", ");
            Error::input(message).hint(format!("this version runs models of the types {names}"))
        })
    }
}
