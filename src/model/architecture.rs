/*! `config.json` -> [`Architecture`], the description of a network. */

use serde_json::Value;

use super::config::Config;
use super::families::Family;
pub use super::parts::{
    Activation, Biases, BlockAttention, ExpertNames, Experts, FusedLinears, Mlp, Multipliers,
    Norms, QkNorm, QueryScaling, RouterKind, SharedExpert,
};
use super::rope::Rope;
use super::rope_settings::{OuterThetas, RopeContext, RopeDefaults};
use super::{bounds, class, quantized};
use crate::{Error, Result};

/// A Llama-like decoder. It can describe more than the forward pass computes; `support.rs` refuses the rest by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// `model_type` of config.json.
    pub family: String,
    /// Decoder blocks.
    pub blocks: usize,
    /// Channels of the residual stream.
    pub hidden: usize,
    /// Channels between the projections of a dense MLP.
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
    /// Where a block's norms are, and what their stored weights mean.
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
    /// Blocks after the others that predict further tokens. They are stored, and no part of the network.
    pub prediction_blocks: usize,
    /// A warning for the user: the repository has its own code, which is not run.
    pub remark: Option<String>,
}

impl Architecture {
    /// Reads the content of `config.json`, or of a part of it that describes a language model.
    ///
    /// # Errors
    /// As [`Architecture::read`], with the file's name only.
    pub fn from_config(config: &Value) -> Result<Self> {
        Self::read(config, "config.json")
    }

    /// Reads the content of `config.json`; `file` is its name in messages. Every field that the family's implementation in
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
        check_constants(config, family)?;
        let blocks = config.required_count("num_hidden_layers", bounds::BLOCKS)?;
        let hidden = config.required_count("hidden_size", bounds::CHANNELS)?;
        let heads = config.required_count("num_attention_heads", bounds::HEADS)?;
        let kv_heads = config.nullable_count("num_key_value_heads", bounds::HEADS)?;
        let max_positions = config.count("max_position_embeddings", 1..=usize::MAX)?;
        let max_positions = max_positions.unwrap_or(family.max_positions);
        let head_dim = head_dim(config, family, hidden, heads)?;
        let rope = RopeContext { config, defaults: &family.rope, head_dim, max_positions };
        let rope = (family.reads_rope)(&rope)?;
        let mut architecture = Self {
            family: family.name.to_owned(),
            blocks,
            hidden,
            intermediate: config.required_count("intermediate_size", bounds::CHANNELS)?,
            heads,
            kv_heads: kv_heads.unwrap_or(family.kv_heads).unwrap_or(heads),
            head_dim,
            vocabulary: config.required_count("vocab_size", bounds::VOCABULARY)?,
            norm_epsilon: norm_epsilon(config, family)?,
            norms: family.norms,
            tied: config.flag_or("tie_word_embeddings", family.tied)?,
            max_positions,
            attention: vec![BlockAttention { rope: Some(rope), window: None }; blocks],
            attention_scale: None,
            query_scaling: None,
            multipliers: Multipliers::default(),
            biases: Biases::default(),
            qk_norm: QkNorm::default(),
            mlp: Mlp::default(),
            experts: None,
            fused: family.fused,
            prediction_blocks: 0,
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

    /// Positions that the network supports: `max_position_embeddings`, extended by RoPE's scaling.
    pub fn positions(&self) -> usize {
        let ropes = self.attention.iter().filter_map(|block| block.rope.as_ref());
        let positions = ropes.map(|rope| rope.positions(self.max_positions));
        positions.max().unwrap_or(self.max_positions)
    }

    /// The rotary embedding of all blocks, where they have the same.
    pub fn common_rope(&self) -> Option<&Rope> {
        let rope = self.attention[0].rope.as_ref();
        rope.filter(|_| self.attention.iter().all(|block| block.rope.as_ref() == rope))
    }

    /// The order of a head's channels in which all backends compute attention, where it is not the source's
    /// ([`Rope::head_order`]). Blocks without positions keep it, as it changes nothing there.
    pub fn head_order(&self, block: usize) -> Option<Vec<usize>> {
        self.attention[block].rope.as_ref().and_then(|rope| rope.head_order(self.head_dim))
    }

    /// The narrowest sliding window of a block, if one has any.
    pub fn sliding_window(&self) -> Option<usize> {
        self.attention.iter().filter_map(|block| block.window).min()
    }

    /// Takes the positions from blocks.
    pub(super) fn drop_positions(&mut self, without: impl Fn(usize) -> bool) {
        for (index, block) in self.attention.iter_mut().enumerate() {
            if without(index) {
                block.rope = None;
            }
        }
    }

    /// Gives blocks with a sliding window the rotary embedding that config.json has for these.
    pub(super) fn set_sliding_rope(
        &mut self,
        config: &Config,
        defaults: &RopeDefaults,
        thetas: &OuterThetas,
    ) -> Result<()> {
        let Self { head_dim, max_positions, .. } = *self;
        let context = RopeContext { config, defaults, head_dim, max_positions };
        let sliding = context.read_by_layer_type(thetas)?.sliding;
        for block in self.attention.iter_mut().filter(|block| block.window.is_some()) {
            block.rope = Some(sliding.clone());
        }
        Ok(())
    }

    /// Sets the sliding window of each block.
    pub(crate) fn set_windows(&mut self, windows: impl IntoIterator<Item = Option<usize>>) {
        for (block, window) in self.attention.iter_mut().zip(windows) {
            block.window = window;
        }
    }
}

/// Refuses what no family has: another activation, attention to later tokens, settings for single blocks.
fn check_constants(config: &Config, family: &Family) -> Result<()> {
    if family.reads_hidden_act
        && config.text("hidden_act")?.is_some_and(|act| !matches!(act, "silu" | "swish"))
    {
        let known = "this version runs networks of this type with SiLU-gated MLPs, `silu`";
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
    const RIGHT: &str = "a number of zero or more";
    let key = family.norm_epsilon_field;
    let given = config.number(key).map_err(|_| config.wrong(key, RIGHT))?;
    if given.is_some_and(|epsilon| epsilon < 0.0) {
        return Err(config.wrong(key, RIGHT));
    }
    Ok(given.unwrap_or(family.norm_epsilon) as f32)
}

#[cfg(test)]
#[path = "architecture_tests.rs"]
mod tests;
