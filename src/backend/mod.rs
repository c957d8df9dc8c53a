/*! Where tensors live and arithmetic runs: one trait, named after the method's steps.

`model/` and `pipeline/` are written once against it. A backend is free in layout, precision of
intermediate floats and parallelism, but quantized arithmetic must follow the specification that the
CPU's integer path computes (docs/format.md), and results must not depend on the thread count. */

pub mod cpu;
pub mod cuda;

use crate::Result;
use crate::quant::kv::KvFormat;
use crate::quant::linear::QuantizedLinear;
use crate::quant::site::SiteFormat;
use crate::quant::weights::WeightFormat;

/// A matrix on the host, row-major `[rows, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub data: Vec<f32>,
}

/// What attention needs to know of a model.
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
    /// Cosines and sines of RoPE, each `[seq_len, head_dim / 2]`.
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    /// How keys and values are held.
    pub kv: KvFormat,
}

/// What a Hessian's factorization took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Damping {
    /// Share of the mean diagonal that was added.
    pub share: f32,
    /// How many smaller shares failed before.
    pub failures: usize,
}

/// The arithmetic of a device. Tensors are f32 `[rows, columns]`; rows are tokens or windows' tokens
/// one after the other.
pub trait Backend: Sync {
    /// Activations `[tokens, channels]`, or a vector as one row.
    type Tensor: Send + Sync;
    /// Quantized activations of a site.
    type Rows: Send;
    /// A full-precision weight `[out, in]`, laid out for products.
    type Dense: Send + Sync;
    /// A quantized weight, laid out for the integer kernels.
    type Packed: Send + Sync;
    /// A site's order and format, ready for use.
    type Site: Send + Sync;
    /// A running sum of `x^T x`, `[channels, channels]`.
    type Hessian: Send;
    /// `U` of GPTQ: upper triangular, `U^T U = H^-1`.
    type Factor: Send + Sync;

    /// The device for a person: `cpu (avx512, 2 threads)`.
    fn device(&self) -> String;

    /// Rows of a tensor.
    fn rows(&self, tensor: &Self::Tensor) -> usize;
    /// Copies a host matrix to the device.
    fn upload(&self, matrix: Matrix) -> Result<Self::Tensor>;
    /// Copies a tensor.
    fn duplicate(&self, tensor: &Self::Tensor) -> Result<Self::Tensor>;
    /// Lays a weight `[out, in]` out for [`product`](Self::product).
    fn dense(&self, weight: &Matrix) -> Result<Self::Dense>;
    /// Lays a quantized weight out for [`integer_product`](Self::integer_product).
    fn packed(&self, weight: &QuantizedLinear) -> Result<Self::Packed>;
    /// Prepares a site.
    fn site(&self, format: &SiteFormat) -> Result<Self::Site>;

    /// RMSNorm of each row: `x / sqrt(mean(x^2) + epsilon) * weight`.
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        epsilon: f32,
    ) -> Result<Self::Tensor>;
    /// Channels in the site's order, transformed, not quantized.
    fn arrange(&self, x: &Self::Tensor, site: &Self::Site) -> Result<Self::Tensor>;
    /// Channels in the site's order, transformed, quantized.
    fn quantize(&self, x: &Self::Tensor, site: &Self::Site) -> Result<Self::Rows>;
    /// The values quantized activations stand for, in the site's order.
    fn dequantize(&self, x: &Self::Rows) -> Result<Self::Tensor>;
    /// `x W^T` in f32.
    fn product(&self, x: &Self::Tensor, weight: &Self::Dense) -> Result<Self::Tensor>;
    /// `x W^T` by the integer path: the specification of docs/format.md, bit for bit.
    fn integer_product(&self, x: &Self::Rows, weight: &Self::Packed) -> Result<Self::Tensor>;
    /// `x += y`.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;
    /// `silu(gate) * up`.
    fn silu_mul(&self, gate: Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor>;
    /// Causal attention of each window, over keys and values as the cache holds them.
    fn attention(
        &self,
        spec: &AttentionSpec,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
    ) -> Result<Self::Tensor>;
    /// Negative log likelihoods: for each window of `seq_len` rows, of tokens 1.. given the rows
    /// before them, in nats, `[windows * (seq_len - 1)]`.
    fn cross_entropy(
        &self,
        x: &Self::Tensor,
        head: &Self::Dense,
        tokens: &[u32],
        seq_len: usize,
    ) -> Result<Vec<f64>>;

    /// Adds each channel's sum of squares over the tokens to `energy`.
    fn add_energy(&self, x: &Self::Tensor, energy: &mut [f64]) -> Result<()>;
    /// A Hessian of zeros.
    fn hessian(&self, channels: usize) -> Result<Self::Hessian>;
    /// `H += x^T x`, tokens in order.
    fn add_to_hessian(&self, hessian: &mut Self::Hessian, x: &Self::Tensor) -> Result<()>;
    /// `U` for the damped Hessian, or none if no rung of the damping ladder makes it positive
    /// definite.
    fn factor(
        &self,
        hessian: &Self::Hessian,
        damping: f32,
    ) -> Result<Option<(Self::Factor, Damping)>>;
    /// The GPTQ sweep over arranged weights, as [`sweep_plain`](crate::quant::gptq::sweep_plain)
    /// defines it.
    fn gptq(
        &self,
        weights: Matrix,
        format: &WeightFormat,
        factor: &Self::Factor,
    ) -> Result<QuantizedLinear>;
    /// `sqrt(tr(E H E^T) / tr(W H W^T))` with `E = W - Q`: the relative output error on the
    /// calibration tokens. Both are arranged.
    fn output_error(
        &self,
        hessian: &Self::Hessian,
        original: &Matrix,
        quantized: &QuantizedLinear,
    ) -> Result<f64>;

    /// Frees what the backend keeps for reuse.
    fn trim(&self) {}
}
