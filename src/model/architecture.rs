/*! `config.json` -> what the forward pass and the pipeline need to know of a network. */

use std::sync::Arc;

use serde_json::Value;

use super::config::Config;
use super::families::Family;
use super::rope::Rope;
use super::{bounds, class, quantized};
use crate::{Error, Result};

/// A Llama-like decoder. It can say more than the forward pass computes: `support.rs` refuses the rest by name.
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
    /// Where a block's norms stand, and what their stored weights mean.
    pub norms: Norms,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Longest context the model was trained for, by `max_position_embeddings`.
    pub max_positions: usize,
    /// How each block attends, one entry a block.
    pub attention: Vec<BlockAttention>,
    /// Factor of queries times keys; none for `1 / sqrt(head_dim)`.
    pub attention_scale: Option<f32>,
    /// Factor of queries that grows with their position, if there is one.
    pub query_scaling: Option<QueryScaling>,
    /// Factors of the residual stream.
    pub multipliers: Multipliers,
    /// Which linears have a bias.
    pub biases: Biases,
    /// Norms of queries and keys before the rotary embedding.
    pub qk_norm: QkNorm,
    /// What an MLP, or each expert, computes between its projections.
    pub mlp: Mlp,
    /// The experts of a sparse network.
    pub experts: Option<Experts>,
    /// Linears that a source stores as one tensor.
    pub fused: &'static [FusedLinears],
    /// What its user should know, as a warning: code of the repository's own that is not run.
    pub remark: Option<String>,
}

/// Where norms stand in a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and before the MLP (Llama).
    #[default]
    Before,
    /// After each, on what is added to the residual stream (OLMo 2).
    After,
    /// Both before and after (Gemma 3).
    Both,
}

/// A block's norms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Norms {
    /// Where they stand.
    pub placement: NormPlacement,
    /// Whether a stored weight `w` means `1 + w`.
    pub unit_offset: bool,
}

/// How one block attends.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockAttention {
    /// Rotary embedding; none for a block without positions.
    pub rope: Option<Rope>,
    /// Tokens that a token attends to, itself included, where that is not all before it.
    pub window: Option<usize>,
}

/// Queries at position `p` are multiplied by `1 + beta * ln(1 + floor(p / original))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScaling {
    /// How fast the factor grows.
    pub beta: f64,
    /// Tokens of the original context.
    pub original: usize,
}

/// Factors of the residual stream, 1 where there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Multipliers {
    /// Of the embedded tokens.
    pub embedding: f32,
    /// Of what attention and the MLP add.
    pub residual: f32,
    /// Of the logits.
    pub logits: f32,
}

impl Default for Multipliers {
    fn default() -> Self {
        Self { embedding: 1.0, residual: 1.0, logits: 1.0 }
    }
}

/// RMSNorm of queries and keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    #[default]
    None,
    /// Of each head by itself, with one weight `[head_dim]` for all (Qwen3).
    PerHead,
    /// Of all heads as one row, with a weight `[heads * head_dim]` (OLMo 2).
    AllHeads,
}

/// What an MLP computes between its projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mlp {
    /// Its nonlinearity.
    pub activation: Activation,
    /// Whether it has a gate: `activation(gate) * up`, and not `activation(up)`.
    pub gated: bool,
}

impl Default for Mlp {
    fn default() -> Self {
        Self { activation: Activation::Silu, gated: true }
    }
}

/// The nonlinearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// GELU, approximated by a hyperbolic tangent (Gemma).
    GeluTanh,
    /// `max(x, 0)^2` (Arcee).
    ReluSquared,
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
    /// The field of config.json that gives attention's linears biases, where the family has one.
    pub attention_flag: Option<&'static str>,
    /// The field that gives those of the MLP biases.
    pub mlp_flag: Option<&'static str>,
}

/// Linears of one site that a source stores as one tensor, their rows one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FusedLinears {
    /// What stands in the place of a linear's own name, e.g. `qkv_proj`.
    pub stored: &'static str,
    /// The linears in the order of their rows, e.g. `q_proj`, `k_proj`, `v_proj`.
    pub linears: &'static [&'static str],
}

/// Several MLPs in a block, of which a router chooses a few for each token.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// In a block.
    pub count: usize,
    /// For each token.
    pub per_token: usize,
    /// Channels between an expert's projections.
    pub intermediate: usize,
    /// Whether the routing weights of a token add up to one.
    pub normalized: bool,
    /// How the router's logits become routing weights.
    pub router: RouterKind,
    /// Factor of the routing weights.
    pub scale: f32,
    /// An expert that every token goes to.
    pub shared: Option<SharedExpert>,
    /// Blocks that have one MLP like any dense network's, ascending.
    pub dense_blocks: Vec<usize>,
    /// What they are called.
    pub names: ExpertNames,
}

/// How a router's logits become routing weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterKind {
    /// Softmax over all experts (Mixtral).
    Softmax,
    /// Sigmoid of each logit; experts are chosen by it plus a stored bias (GLM 4.5).
    SigmoidWithBias,
}

/// An expert that every token goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedExpert {
    /// Channels between its projections.
    pub intermediate: usize,
    /// Whether its output is multiplied by the sigmoid of a gate of its own.
    pub gated: bool,
}

/// What a block's experts are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertNames {
    /// What the router and the experts are part of.
    pub part: &'static str,
    /// gate, up and down.
    pub linears: [&'static str; 3],
}

impl Architecture {
    /// Reads the content of `config.json`, or of a part of it that describes a language model.
    ///
    /// # Errors
    /// As [`Architecture::read`]'s, with a name of the file that says nothing of where it is.
    pub fn from_config(config: &Value) -> Result<Self> {
        Self::read(config, "config.json")
    }

    /// Reads the content of `config.json`, which messages call `file`. Every field that the family's implementation in
    /// transformers reads is read with its type and that family's default. Fields that change nothing at inference
    /// (dropout, `pretraining_tp`, `use_cache`, router losses) and those that the family's implementation does not know
    /// are not read.
    ///
    /// # Errors
    /// A network that this version cannot run, or a field that is missing, of a wrong type or impossible: kind `Input`,
    /// with the file, the field, what it holds and what would be right.
    pub fn read(config: &Value, file: &str) -> Result<Self> {
        let config = &Config::new(config, file)?;
        let family = Family::of(config)?;
        quantized::check(config)?;
        let remark = class::check(config, family)?;
        check_constants(config)?;
        let blocks = config.required_count("num_hidden_layers", bounds::BLOCKS)?;
        let hidden = config.required_count("hidden_size", bounds::CHANNELS)?;
        let heads = config.required_count("num_attention_heads", bounds::HEADS)?;
        let kv_heads = config.nullable_count("num_key_value_heads", bounds::HEADS)?;
        let max_positions = config.count("max_position_embeddings", 1..=usize::MAX)?;
        let max_positions = max_positions.unwrap_or(family.max_positions);
        let rope = Rope::from_config(config, family.rope_theta, max_positions)?;
        let mut architecture = Self {
            family: family.name.to_owned(),
            blocks,
            hidden,
            intermediate: config.required_count("intermediate_size", bounds::CHANNELS)?,
            heads,
            kv_heads: kv_heads.unwrap_or(family.kv_heads).unwrap_or(heads),
            head_dim: head_dim(config, family, hidden, heads)?,
            vocabulary: config.required_count("vocab_size", bounds::VOCABULARY)?,
            norm_epsilon: norm_epsilon(config, family)?,
            norms: Norms::default(),
            tied: config.flag("tie_word_embeddings")?,
            max_positions,
            attention: vec![BlockAttention { rope: Some(rope), window: None }; blocks],
            attention_scale: None,
            query_scaling: None,
            multipliers: Multipliers::default(),
            biases: Biases::default(),
            qk_norm: QkNorm::default(),
            mlp: Mlp::default(),
            experts: None,
            fused: &[],
            remark,
        };
        (family.differences)(config, &mut architecture)?;
        architecture.check_supported(file)?;
        architecture.check(file)?;
        Ok(architecture)
    }

    fn check(&self, file: &str) -> Result<()> {
        let hint = "correct the numbers, or download the file again";
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::input(format!(
                "{file}: {} query heads cannot share {} key/value heads evenly (`num_attention_heads`, \
                 `num_key_value_heads`)",
                self.heads, self.kv_heads
            ))
            .hint(hint));
        }
        if !self.head_dim.is_multiple_of(2) {
            let message =
                format!("{file}: head_dim {} is odd: RoPE turns pairs of channels", self.head_dim);
            return Err(Error::input(message).hint(hint));
        }
        if let Some(experts) = &self.experts
            && experts.per_token > experts.count
        {
            return Err(Error::input(format!(
                "{file}: a token cannot have {} of {} experts (`num_experts_per_tok`)",
                experts.per_token, experts.count
            ))
            .hint(hint));
        }
        self.check_size(file)
    }

    /// The experts of block `block`, if it has any.
    pub fn experts_of(&self, block: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| experts.dense_blocks.binary_search(&block).is_err())
    }

    /// Positions that the network was made for: `max_position_embeddings`, extended where RoPE's scaling extends it.
    pub fn positions(&self) -> usize {
        (self.max_positions as f64 * self.rope().scaling.extension()) as usize
    }

    /// The rotary embedding of all blocks.
    pub fn rope(&self) -> &Rope {
        self.attention[0].rope.as_ref().expect("every block has one: `check_supported`")
    }

    /// The sliding window of all blocks, if they have one.
    pub fn sliding_window(&self) -> Option<usize> {
        self.attention[0].window
    }

    /// Gives each block its sliding window.
    pub(super) fn set_windows(&mut self, windows: impl IntoIterator<Item = Option<usize>>) {
        for (block, window) in self.attention.iter_mut().zip(windows) {
            block.window = window;
        }
    }

    /// Cosines and sines `[seq_len, head_dim / 2]` of positions 0..seq_len.
    pub fn rope_tables(&self, seq_len: usize) -> (Arc<[f32]>, Arc<[f32]>) {
        let frequencies = self.rope().frequencies(self.head_dim);
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
    /// The biases of a family whose config.json has these fields.
    pub(super) fn by_flags(
        config: &Config,
        attention_flag: Option<&'static str>,
        mlp_flag: Option<&'static str>,
    ) -> Result<Self> {
        let is_set = |flag: Option<&str>| flag.map_or(Ok(false), |flag| config.flag(flag));
        let (attention, mlp) = (is_set(attention_flag)?, is_set(mlp_flag)?);
        Ok(Self { attn_in: attention, attn_out: attention, mlp, attention_flag, mlp_flag })
    }
}

impl Experts {
    /// Experts in a block. `num_experts` and `num_local_experts` are one field under two names.
    pub(super) fn count_field(config: &Config, default: usize) -> Result<usize> {
        let [new, old] = ["num_local_experts", "num_experts"];
        match (config.count(new, bounds::EXPERTS)?, config.count(old, bounds::EXPERTS)?) {
            (Some(a), Some(b)) if a != b => {
                Err(config.contradiction(new, &format!("`{old}` is {b}: both count the experts")))
            }
            (a, b) => Ok(a.or(b).unwrap_or(default)),
        }
    }
}

/// Refuses what no family here has: another activation, attention to later tokens, settings for single blocks.
fn check_constants(config: &Config) -> Result<()> {
    if config.text("hidden_act")?.is_some_and(|act| !matches!(act, "silu" | "swish")) {
        let known = "this version runs networks with SiLU-gated MLPs, `silu`";
        return Err(config.unsupported("hidden_act", known));
    }
    if config.has("is_causal") && !config.flag("is_causal")? {
        let known = "this version runs networks that predict the next token from those before it";
        return Err(config.unsupported("is_causal", known));
    }
    if config.given("per_layer_config").is_some() {
        let known = "this version runs networks whose blocks are alike";
        return Err(config.unsupported("per_layer_config", known));
    }
    Ok(())
}

fn head_dim(config: &Config, family: &Family, hidden: usize, heads: usize) -> Result<usize> {
    const KEY: &str = "head_dim";
    let given = match family.head_dim {
        Some(default) => Some(config.count(KEY, bounds::HEAD_DIM)?.unwrap_or(default)),
        None => config.nullable_count(KEY, bounds::HEAD_DIM)?.flatten(),
    };
    match given {
        Some(given) => Ok(given),
        None if hidden.is_multiple_of(heads) => Ok(hidden / heads),
        None => {
            let what =
                format!("`hidden_size` {hidden} is no multiple of it and `head_dim` is not given");
            Err(config.contradiction("num_attention_heads", &what))
        }
    }
}

fn norm_epsilon(config: &Config, family: &Family) -> Result<f32> {
    const KEY: &str = "rms_norm_eps";
    const RIGHT: &str = "a number of zero or more";
    let given = config.number(KEY).map_err(|_| config.wrong(KEY, RIGHT))?;
    if given.is_some_and(|epsilon| epsilon < 0.0) {
        return Err(config.wrong(KEY, RIGHT));
    }
    Ok(given.unwrap_or(family.norm_epsilon) as f32)
}

#[cfg(test)]
#[path = "architecture_tests.rs"]
mod tests;
