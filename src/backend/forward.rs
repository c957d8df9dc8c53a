//! The operations of a decoder block's forward pass.

use std::sync::Arc;

use super::Memory;
use crate::Result;
use crate::quant::kv::KvFormat;

/// Tokens that stand once in `x` where windows of attention begin alike: each token is computed once, and only attention
/// sees the windows in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// For every position of every window, `[windows * seq_len]`, the row of `x` that stands there. After a window's own
    /// tokens any row will do: attention is causal, so no earlier token sees it.
    pub windows: Vec<u32>,
    /// For every row of `x` a position among the windows' where it stands. A window's own positions, those that are named
    /// here, follow one another.
    pub rows: Vec<u32>,
}

/// What attention depends on.
#[derive(Clone, Debug)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens in a window; every window attends to itself alone.
    pub seq_len: usize,
    /// Tokens that a token attends to, itself included, where that is not all before it.
    pub sliding_window: Option<usize>,
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// Cosines and sines of RoPE, each `[seq_len, head_dim / 2]`.
    pub cos: Arc<[f32]>,
    pub sin: Arc<[f32]>,
    /// Those of the queries, where they are others than the keys'.
    pub query_tables: Option<[Arc<[f32]>; 2]>,
    /// How keys and values are held.
    pub kv: KvFormat,
}

impl AttentionSpec {
    /// The factor that most networks have: `1 / sqrt(head_dim)`.
    pub fn usual_scale(head_dim: usize) -> f32 {
        1.0 / (head_dim as f32).sqrt()
    }

    /// Cosines and sines of the keys' rotary embedding.
    pub fn key_tables(&self) -> [&Arc<[f32]>; 2] {
        [&self.cos, &self.sin]
    }

    /// Cosines and sines of the queries' rotary embedding.
    pub fn query_tables(&self) -> [&Arc<[f32]>; 2] {
        self.query_tables.as_ref().map_or(self.key_tables(), |[cos, sin]| [cos, sin])
    }
}

/// Queries, keys and values before the rotary embedding, `[tokens, heads * head_dim]` each.
pub struct Qkv<A> {
    pub q: A,
    pub k: A,
    pub v: A,
}

/// What a decoder block computes. Weights are laid out by [`Quantization`](super::Quantization).
pub trait Forward: Memory {
    /// Quantized activations of a site.
    type Rows: Send;
    /// A full-precision weight `[out, in]`, laid out for products.
    type Dense: Send + Sync;
    /// A quantized weight, laid out for the integer kernels.
    type Packed: Send + Sync;
    /// A site's order and format, ready for use.
    type Site: Send + Sync;

    /// The rows of `table` that `tokens` name, `[tokens, hidden]`. Every token is less than its rows.
    fn embed(&self, table: &Self::Weight<'_>, tokens: &[u32]) -> Result<Self::Hidden>;
    /// The rows of `x` that `rows` names, in that order; one may be named more than once, or not at all.
    fn select_hidden(&self, x: &Self::Hidden, rows: &[u32]) -> Result<Self::Hidden>;
    /// The same of an activation.
    fn select_rows(&self, x: &Self::Activation, rows: &[u32]) -> Result<Self::Activation>;

    /// RMSNorm of each row: `x / sqrt(mean(x^2) + epsilon) * weight`.
    fn rms_norm(
        &self,
        x: &Self::Hidden,
        weight: &Self::Hidden,
        epsilon: f32,
    ) -> Result<Self::Activation>;
    /// RMSNorm in place of each run of `weight`'s length in the rows of `x`: of each head of queries or keys
    /// `[tokens, heads * head_dim]` with a weight `[1, head_dim]`, of entire rows with one as long as a row.
    fn norm_in_place(
        &self,
        x: &mut Self::Activation,
        weight: &Self::Hidden,
        epsilon: f32,
    ) -> Result<()>;
    /// Hidden states as an activation, where a site reads them without a norm.
    fn activation(&self, x: &Self::Hidden) -> Result<Self::Activation>;
    /// `silu(gate) * up`.
    fn silu_mul(&self, gate: Self::Activation, up: &Self::Activation) -> Result<Self::Activation>;
    /// `gelu(gate) * up`, GELU approximated by a hyperbolic tangent. Neither is in the order of the site that they feed.
    fn gelu_mul(&self, gate: Self::Activation, up: &Self::Activation) -> Result<Self::Activation>;
    /// Causal attention of each window, over keys and values as the cache holds them. `key_mean`
    /// `[1, kv_heads * head_dim]` is subtracted from the embedded keys before they are quantized. With a `placement` the
    /// windows' tokens stand in the rows of q, k and v as it says, and the result has their rows; otherwise windows
    /// follow one another.
    fn attention(
        &self,
        spec: &AttentionSpec,
        placement: Option<&Placement>,
        qkv: Qkv<Self::Activation>,
        key_mean: Option<&Self::Hidden>,
    ) -> Result<Self::Activation>;

    /// Channels in the site's order, transformed, not quantized.
    fn permute(&self, x: &Self::Activation, site: &Self::Site) -> Result<Self::Activation>;
    /// Channels in the site's order, transformed, quantized. `name` is the site's, for errors.
    ///
    /// # Errors
    /// An input error if a value or a scale is not finite; a backend that runs ahead returns it where it is waited for.
    fn quantize(&self, x: &Self::Activation, site: &Self::Site, name: &str) -> Result<Self::Rows>;
    /// [`quantize`](Self::quantize) of [`rms_norm`](Self::rms_norm). A backend may do both in one step and round nothing in
    /// between.
    fn norm_quantize(
        &self,
        x: &Self::Hidden,
        weight: &Self::Hidden,
        epsilon: f32,
        site: &Self::Site,
        name: &str,
    ) -> Result<Self::Rows>;
    /// [`quantize`](Self::quantize) of [`silu_mul`](Self::silu_mul), likewise.
    fn silu_quantize(
        &self,
        gate: Self::Activation,
        up: &Self::Activation,
        site: &Self::Site,
        name: &str,
    ) -> Result<Self::Rows>;
    /// The values quantized activations stand for, in the site's order.
    fn dequantize(&self, x: &Self::Rows) -> Result<Self::Activation>;

    /// `x W^T`, with sums in f32.
    fn product(&self, x: &Self::Activation, weight: &Self::Dense) -> Result<Self::Activation>;
    /// `x += y W^T`.
    fn add_product(
        &self,
        x: &mut Self::Hidden,
        y: &Self::Activation,
        weight: &Self::Dense,
    ) -> Result<()>;
    /// `x W^T` by the integer path: the specification of docs/format.md, bit for bit.
    fn integer_product(&self, x: &Self::Rows, weight: &Self::Packed) -> Result<Self::Activation>;
    /// [`integer_product`](Self::integer_product) of each of the linears of a site. A backend may compute them together.
    fn integer_products(
        &self,
        x: &Self::Rows,
        weights: &[&Self::Packed],
    ) -> Result<Vec<Self::Activation>> {
        weights.iter().map(|weight| self.integer_product(x, weight)).collect()
    }
    /// `x += y W^T` by the integer path.
    fn add_integer_product(
        &self,
        x: &mut Self::Hidden,
        y: &Self::Rows,
        weight: &Self::Packed,
    ) -> Result<()>;
    /// `y += bias` for each row of `y`, a linear's output; `bias` is one row.
    fn add_bias(&self, y: &mut Self::Activation, bias: &Self::Hidden) -> Result<()>;
    /// `x += factor * y`: a linear's output onto hidden states.
    fn add(&self, x: &mut Self::Hidden, y: &Self::Activation, factor: f32) -> Result<()>;
    /// `x *= factor`.
    fn scale(&self, x: &mut Self::Hidden, factor: f32) -> Result<()>;
    /// `x[rows[i]] += weights[i] * y[i]`, likewise. No row is named twice.
    fn add_rows(
        &self,
        x: &mut Self::Hidden,
        y: &Self::Activation,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<()>;
}
