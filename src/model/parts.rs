/*! The parts of an [`Architecture`](super::architecture::Architecture): norms, attention, MLP, biases, experts. */

use super::bounds;
use super::config::Config;
use super::rope::Rope;
use crate::Result;

/// A block's norms, by their names: of attention and of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Norms {
    /// Norms before attention and before the MLP, on the residual stream (Llama).
    pub before: Option<[&'static str; 2]>,
    /// Norms after each, on what is added to the residual stream (OLMo 2).
    pub after: Option<[&'static str; 2]>,
    /// Whether a stored weight `w` means `1 + w` (Gemma 3).
    pub unit_offset: bool,
}

impl Norms {
    /// Llama's.
    pub(super) const LLAMA: Self = Self {
        before: Some(["input_layernorm", "post_attention_layernorm"]),
        after: None,
        unit_offset: false,
    };
    /// OLMo's: none before.
    pub(super) const OLMO: Self = Self {
        before: None,
        after: Some(["post_attention_layernorm", "post_feedforward_layernorm"]),
        unit_offset: false,
    };
}

impl Default for Norms {
    fn default() -> Self {
        Self::LLAMA
    }
}

/// How one block attends.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockAttention {
    /// Rotary embedding; none for a block without positions.
    pub rope: Option<Rope>,
    /// Tokens that a token attends to, itself included; none for all before it.
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

impl QueryScaling {
    /// The factor at a position.
    pub fn factor(&self, position: usize) -> f32 {
        let contexts = (position / self.original.max(1)) as f64;
        (1.0 + self.beta * contexts.ln_1p()) as f32
    }
}

/// Factors of the residual stream, 1 by default.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Multipliers {
    /// Factor of the embedded tokens.
    pub embedding: f32,
    /// Factor of the outputs of attention and MLP.
    pub residual: f32,
    /// Factor of the logits.
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
    /// Over each head, with one weight `[head_dim]` for all heads (Qwen3).
    PerHead,
    /// Over all heads as one row, with a weight `[heads * head_dim]` (OLMo 2).
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
    /// The field of config.json that turns on biases of attention's linears, if the family has one.
    pub attention_flag: Option<&'static str>,
    /// The field that turns on biases of the MLP's linears.
    pub mlp_flag: Option<&'static str>,
}

/// gate and up as one tensor.
pub(super) const FUSED_GATE_UP: FusedLinears =
    FusedLinears { stored: "gate_up_proj", linears: &["gate_proj", "up_proj"] };
/// q, k and v as one tensor.
pub(super) const FUSED_QKV: FusedLinears =
    FusedLinears { stored: "qkv_proj", linears: &["q_proj", "k_proj", "v_proj"] };

/// Linears of one site that a source stores as one tensor, their rows one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FusedLinears {
    /// The stored name in place of a linear's own, e.g. `qkv_proj`.
    pub stored: &'static str,
    /// The linears in the order of their rows, e.g. `q_proj`, `k_proj`, `v_proj`.
    pub linears: &'static [&'static str],
}

/// Several MLPs in a block, of which a router chooses a few for each token.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// Experts in a block.
    pub count: usize,
    /// Experts of a token.
    pub per_token: usize,
    /// Channels between an expert's projections.
    pub intermediate: usize,
    /// Whether the routing weights of a token add up to one.
    pub normalized: bool,
    /// How the router's logits become routing weights.
    pub router: RouterKind,
    /// Factor of the routing weights.
    pub scale: f32,
    /// An expert that computes every token. It counts after the others where they are numbered.
    pub shared: Option<SharedExpert>,
    /// Blocks with one dense MLP instead of experts, ascending.
    pub dense_blocks: Vec<usize>,
    /// Their names.
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

/// An expert that computes every token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedExpert {
    /// Channels between its projections.
    pub intermediate: usize,
    /// Whether its output is multiplied by the sigmoid of its own gate.
    pub gated: bool,
}

/// Names of a block's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertNames {
    /// The module of the router and the experts.
    pub part: &'static str,
    /// gate, up and down.
    pub linears: [&'static str; 3],
    /// The shared expert's module in `part`, where there is one.
    pub shared: &'static str,
}

impl ExpertNames {
    /// Those of most families.
    pub(super) const USUAL: Self = Self {
        part: "mlp",
        linears: ["gate_proj", "up_proj", "down_proj"],
        shared: "shared_experts",
    };
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
    /// All of them, the shared one included.
    pub fn all(&self) -> usize {
        self.count + usize::from(self.shared.is_some())
    }

    /// Experts that compute a token, the shared one included.
    pub fn of_a_token(&self) -> usize {
        self.per_token + usize::from(self.shared.is_some())
    }

    /// Channels between the projections of expert `expert`.
    pub fn width(&self, expert: usize) -> usize {
        match self.shared {
            Some(shared) if expert == self.count => shared.intermediate,
            _ => self.intermediate,
        }
    }

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
