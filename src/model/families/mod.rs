/*! The families of networks, as data: what differs from a plain Llama. Defaults of fields that `config.json` does not have
are those of transformers 5. */

mod llama;
mod mistral;
mod mixtral;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use super::architecture::Architecture;
use super::config::{Config, shortened};
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
    /// `rope_theta`.
    pub rope_theta: f64,
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
    rope_theta: 10_000.0,
    differences: |_, _| Ok(()),
};

/// Every family, by `model_type`.
pub(super) const FAMILIES: [&Family; 6] = [
    &llama::LLAMA,
    &mistral::MISTRAL,
    &mixtral::MIXTRAL,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &qwen3_moe::QWEN3_MOE,
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
