/*! Where tensors live and arithmetic runs: one trait, named after the method's steps.

`model/` and `pipeline/` are written once against it. A backend is free in layout, precision of
intermediate floats and parallelism, but quantized arithmetic must follow the specification that the
CPU's integer path computes (docs/format.md), and results must not depend on the thread count. */

pub mod cpu;
pub mod cuda;

use std::sync::Arc;

use crate::checkpoint;
use crate::quant::kv::KvFormat;
use crate::quant::levels::Levels;
use crate::quant::linear::QuantizedLinear;
use crate::quant::number::LinearFormat;
use crate::quant::rows::QuantizedRows;
use crate::quant::site::SiteFormat;
use crate::{Error, Result};

/// A matrix on the host, row-major `[rows, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub data: Vec<f32>,
}

/// Tokens that stand once in `x` where windows of attention begin alike: each token is computed once, and only attention
/// sees the windows whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// For every place of every window, `[windows * seq_len]`, the row of `x` that stands there. Behind a window's own
    /// tokens any row will do: attention is causal, so nobody before sees it.
    pub windows: Vec<u32>,
    /// For every row of `x` a place among the windows' where it stands. A window's own places, those that are named
    /// here, follow one another.
    pub rows: Vec<u32>,
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
    /// Tokens that a token attends to, itself included, where that is not all before it.
    pub sliding_window: Option<usize>,
    /// Cosines and sines of RoPE, each `[seq_len, head_dim / 2]`.
    pub cos: Arc<[f32]>,
    pub sin: Arc<[f32]>,
    /// How keys and values are held.
    pub kv: KvFormat,
}

/// `sqrt(lost / total)` of two quadratic forms with a Hessian: a linear's relative output error.
///
/// # Errors
/// An input error if the Hessian was not finite.
pub(crate) fn output_error(lost: f64, total: f64) -> Result<f64> {
    if total > 0.0 && lost.is_finite() {
        Ok((lost.max(0.0) / total).sqrt())
    } else if total == 0.0 {
        Ok(0.0)
    } else {
        Err(Error::input("the calibration activations are not finite"))
    }
}

/// A linear that is to be quantized.
pub struct Unquantized<'a, W> {
    /// Its name, for errors.
    pub name: &'a str,
    /// Its weight `[out, in]`, as the source has it.
    pub weight: &'a W,
    /// How its weights will be held.
    pub format: LinearFormat,
    /// The factor on a group's absmax before its scale is taken.
    pub clip: f32,
}

/// How far quantization has moved a site: what its linears' targets are corrected by.
///
/// A linear's input is `x` behind the quantized blocks and was `x0` behind the source's. The weights that come
/// closest to the source's output on `x` are `W + (W sum d x^T + sum r x^T) H^-1`, with `d = x0 - x` and, for a linear that
/// adds to the hidden states, `r` what these have lost so far (least squares; GPTAQ, arXiv 2504.02692, and Qronos,
/// arXiv 2505.11695, correct the first part).
pub struct Drift<C> {
    /// `sum d x^T` over the calibration tokens, `[channels, channels]`.
    pub inputs: C,
    /// `sum r x^T`, `[hidden, channels]`.
    pub outputs: Option<C>,
    /// How much of the correction is made, 0 to 1.
    pub share: f32,
}

/// What a row of hidden states predicts of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// The token's negative log likelihood, in nats.
    pub nats: f64,
    /// Whether no token is likelier; of equal ones the first counts.
    pub greedy: bool,
}

/// What a Hessian's factorization took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Damping {
    /// Share of the mean diagonal that was added.
    pub share: f32,
    /// How many smaller shares failed before.
    pub failures: usize,
}

/// The arithmetic of a device. Tensors are f32 `[rows, columns]` (or f16 between the operations of a
/// block, where a backend chooses so); rows are tokens or windows' tokens one after the other.
///
/// A backend may run ahead of its caller: what it was asked for is done when a method returns values
/// to the host, or [`wait`](Self::wait) returns.
pub trait Backend: Sync {
    /// Activations `[tokens, channels]`, or a vector as one row.
    type Tensor: Send + Sync;
    /// Quantized activations of a site.
    type Rows: Send;
    /// A source's weight `[out, in]`, in its own type and channel order. It may borrow the file.
    type Weight<'a>: Send + Sync;
    /// A full-precision weight `[out, in]`, laid out for products.
    type Dense: Send + Sync;
    /// A quantized weight in neutral form, where the backend made it.
    type Quantized: Send + Sync;
    /// A quantized weight, laid out for the integer kernels.
    type Packed: Send + Sync;
    /// A site's order and format, ready for use.
    type Site: Send + Sync;
    /// A running sum of `x^T x`, `[channels, channels]`.
    type Hessian: Send;
    /// A running sum of `y^T x` for two activations.
    type Cross: Send;
    /// What the GPTQ sweep needs of the damped Hessian's Cholesky factor.
    type Factor: Send + Sync;

    /// Whether activations inside a block are f16; f32 otherwise.
    const HALF: bool;

    /// The device for a person: `cpu (avx512, 2 threads)`.
    fn device(&self) -> String;
    /// Bytes that a batch's activations inside a block may take, counted as f32: enough that each
    /// operation fills the device. Results do not depend on it.
    fn batch_bytes(&self) -> usize;
    /// Bytes of hidden states that an evaluation may hold at once. Results do not depend on it.
    fn stream_bytes(&self) -> usize;

    /// Rows of a tensor.
    fn rows(&self, tensor: &Self::Tensor) -> usize;
    /// Copies a host matrix to the device.
    fn upload(&self, matrix: Matrix) -> Result<Self::Tensor>;
    /// Copies a host matrix to where the operations inside a block take it, rounded as these are.
    fn upload_activation(&self, matrix: Matrix) -> Result<Self::Tensor>;
    /// A tensor on the host.
    fn download(&self, tensor: &Self::Tensor) -> Result<Matrix>;
    /// The rows of `x` that `rows` names, in that order; one may be named more than once, or not at all.
    fn select_rows(&self, x: &Self::Tensor, rows: &[u32]) -> Result<Self::Tensor>;
    /// Copies a tensor.
    fn duplicate(&self, tensor: &Self::Tensor) -> Result<Self::Tensor>;
    /// Tells how much memory a block's work takes beside the hidden states, before these are made.
    ///
    /// # Errors
    /// A machine error if there is not so much.
    fn reserve(&self, _bytes: u64) -> Result<()> {
        Ok(())
    }
    /// Tells that `tensor` will not be used for a while: a backend whose memory is short may move it
    /// to the host's.
    fn set_aside(&self, _tensor: &mut Self::Tensor) -> Result<()> {
        Ok(())
    }
    /// Undoes [`set_aside`](Self::set_aside); no other operation takes a tensor that was set aside
    /// but [`duplicate`](Self::duplicate), whose copy is ready for use.
    fn recall(&self, _tensor: &mut Self::Tensor) -> Result<()> {
        Ok(())
    }
    /// Brings a weight to the device, or only notes where it is. Safe to call from a thread beside
    /// the one that computes.
    fn load<'a>(&self, tensor: checkpoint::Tensor<'a>) -> Result<Self::Weight<'a>>;
    /// The rows of `table` that `tokens` name, `[tokens, hidden]`. Every token is less than its rows.
    fn embed(&self, table: &Self::Weight<'_>, tokens: &[u32]) -> Result<Self::Tensor>;
    /// Lays a weight out for [`product`](Self::product), with a site in the site's order and
    /// transformed.
    fn dense(&self, weight: &Self::Weight<'_>, site: Option<&Self::Site>) -> Result<Self::Dense>;
    /// Lays out what the codes of a quantized weight stand for.
    fn dense_of(&self, weight: &Self::Quantized) -> Result<Self::Dense>;
    /// Lays a quantized weight out for [`integer_product`](Self::integer_product). Of gate and up, `feeds` is the site that
    /// their product enters: a backend may hold their rows, and so their outputs, in its order, which
    /// [`silu_mul`](Self::silu_mul) and [`silu_quantize`](Self::silu_quantize) know of and nothing else takes.
    fn packed(&self, weight: &Self::Quantized, feeds: Option<&Self::Site>) -> Result<Self::Packed>;
    /// Refuses codes that the backend cannot compute with; asked before long work.
    ///
    /// # Errors
    /// A machine error that names another way.
    fn check_levels(&self, _levels: Levels) -> Result<()> {
        Ok(())
    }
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
    /// Channels in the site's order, transformed, quantized. `name` is the site's, for errors.
    ///
    /// # Errors
    /// An input error if a value or a scale is not finite; a backend that runs ahead gives it where it is waited for.
    fn quantize(&self, x: &Self::Tensor, site: &Self::Site, name: &str) -> Result<Self::Rows>;
    /// Quantized activations on the host, in neutral form.
    fn fetch_rows(&self, x: &Self::Rows) -> Result<QuantizedRows>;
    /// Undoes [`fetch_rows`](Self::fetch_rows).
    fn restore_rows(&self, x: &QuantizedRows) -> Result<Self::Rows>;
    /// [`quantize`](Self::quantize) of [`rms_norm`](Self::rms_norm), where the backend makes both in one step.
    fn norm_quantize(
        &self,
        _x: &Self::Tensor,
        _weight: &Self::Tensor,
        _epsilon: f32,
        _site: &Self::Site,
        _name: &str,
    ) -> Result<Option<Self::Rows>> {
        Ok(None)
    }
    /// [`quantize`](Self::quantize) of [`silu_mul`](Self::silu_mul), likewise.
    fn silu_quantize(
        &self,
        _gate: &Self::Tensor,
        _up: &Self::Tensor,
        _site: &Self::Site,
        _name: &str,
    ) -> Result<Option<Self::Rows>> {
        Ok(None)
    }
    /// The values quantized activations stand for, in the site's order.
    fn dequantize(&self, x: &Self::Rows) -> Result<Self::Tensor>;
    /// `x W^T`, with sums in f32.
    fn product(&self, x: &Self::Tensor, weight: &Self::Dense) -> Result<Self::Tensor>;
    /// `x += y W^T`.
    fn add_product(
        &self,
        x: &mut Self::Tensor,
        y: &Self::Tensor,
        weight: &Self::Dense,
    ) -> Result<()> {
        let product = self.product(y, weight)?;
        self.add(x, &product)
    }
    /// `x W^T` by the integer path: the specification of docs/format.md, bit for bit.
    fn integer_product(&self, x: &Self::Rows, weight: &Self::Packed) -> Result<Self::Tensor>;
    /// `x += y W^T` by the integer path.
    fn add_integer_product(
        &self,
        x: &mut Self::Tensor,
        y: &Self::Rows,
        weight: &Self::Packed,
    ) -> Result<()> {
        let product = self.integer_product(y, weight)?;
        self.add(x, &product)
    }
    /// `x += y`.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;
    /// `y += bias` for each row of `y`, a linear's output; `bias` is one row.
    fn add_bias(&self, y: &mut Self::Tensor, bias: &Self::Tensor) -> Result<()>;
    /// RMSNorm of each head of queries or keys `[tokens, heads * head_dim]`, in place; `weight` is
    /// `[1, head_dim]`.
    fn head_norm(&self, x: &mut Self::Tensor, weight: &Self::Tensor, epsilon: f32) -> Result<()>;
    /// Multiplies each row of an activation by its weight.
    fn scale_rows(&self, x: &mut Self::Tensor, weights: &[f32]) -> Result<()>;
    /// `x[rows[i]] += weights[i] * y[i]`: a linear's output onto hidden states. No row is named twice.
    fn add_rows(
        &self,
        x: &mut Self::Tensor,
        y: &Self::Tensor,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<()>;
    /// `silu(gate) * up`.
    fn silu_mul(&self, gate: Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor>;
    /// Causal attention of each window, over keys and values as the cache holds them. `key_mean`
    /// `[1, kv_heads * head_dim]` is taken from the embedded keys before they are quantized.
    fn attention(
        &self,
        spec: &AttentionSpec,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        key_mean: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor>;
    /// As [`Backend::attention`], of windows whose tokens stand in the rows of `q`, `k` and `v` as `placement` says; its
    /// result has their rows.
    fn placed_attention(
        &self,
        spec: &AttentionSpec,
        placement: &Placement,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        key_mean: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor> {
        let placed = |rows: Self::Tensor| self.select_rows(&rows, &placement.windows);
        let (q, k, v) = (placed(q)?, placed(k)?, placed(v)?);
        self.select_rows(&self.attention(spec, &q, &k, &v, key_mean)?, &placement.rows)
    }
    /// Adds each channel's sum over the tokens of the embedded keys to `sums`.
    fn add_keys(&self, spec: &AttentionSpec, k: &Self::Tensor, sums: &mut [f64]) -> Result<()>;
    /// Negative log likelihoods: for each window of `seq_len` rows, of tokens 1.. given the rows
    /// before them, in nats, `[windows * (seq_len - 1)]`.
    fn cross_entropy(
        &self,
        x: &Self::Tensor,
        head: &Self::Dense,
        tokens: &[u32],
        seq_len: usize,
    ) -> Result<Vec<f64>>;

    /// What each row of `x`, normed hidden states, predicts of the token beside it: `tokens` has one a row.
    fn predict(
        &self,
        x: &Self::Tensor,
        head: &Self::Dense,
        tokens: &[u32],
    ) -> Result<Vec<Prediction>>;
    /// As [`Backend::predict`], of `targets`, `(row of x, token)` each.
    fn predict_each(
        &self,
        x: &Self::Tensor,
        head: &Self::Dense,
        targets: &[(u32, u32)],
    ) -> Result<Vec<Prediction>> {
        let (rows, tokens): (Vec<u32>, Vec<u32>) = targets.iter().copied().unzip();
        self.predict(&self.select_rows(x, &rows)?, head, &tokens)
    }

    /// What was done to each row: `|x - y|^2 / |y|^2` with `y` the row of `original`, both hidden
    /// states; 0 for a row of zeros that still is one.
    fn row_changes(&self, x: &Self::Tensor, original: &Self::Tensor) -> Result<Vec<f64>>;
    /// Kullback-Leibler divergence in nats of each row's distribution over the vocabulary, `x head^T`,
    /// from that of `original`: what a token costs on average if it is drawn by `original`'s. Both are
    /// normed hidden states.
    fn divergence(
        &self,
        x: &Self::Tensor,
        original: &Self::Tensor,
        head: &Self::Dense,
    ) -> Result<Vec<f64>>;

    /// Adds each channel's sum of squares over the tokens to `energy`.
    fn add_energy(&self, x: &Self::Tensor, energy: &mut [f64]) -> Result<()>;
    /// A Hessian of zeros.
    fn hessian(&self, channels: usize) -> Result<Self::Hessian>;
    /// `H += x^T x`, tokens in order.
    fn add_to_hessian(&self, hessian: &mut Self::Hessian, x: &Self::Tensor) -> Result<()>;
    /// `x - y`: of two hidden states, or of two other activations.
    fn difference(&self, x: &Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor>;
    /// Zeros, `[rows, columns]`.
    fn cross(&self, rows: usize, columns: usize) -> Result<Self::Cross>;
    /// `C += y^T x`, tokens in order.
    fn add_to_cross(
        &self,
        cross: &mut Self::Cross,
        y: &Self::Tensor,
        x: &Self::Tensor,
    ) -> Result<()>;
    /// The factor of the damped Hessian, or none if no rung of the damping ladder makes it positive
    /// definite.
    fn factor(
        &self,
        hessian: &mut Self::Hessian,
        damping: f32,
    ) -> Result<Option<(Self::Factor, Damping)>>;
    /// The GPTQ sweep over the weights of a site's linears, arranged and corrected for the drift, as
    /// [`sweep_plain`](crate::quant::gptq::sweep_plain) defines it; each with its relative output error
    /// `sqrt(tr(E H E^T) / tr(W H W^T))`, `E` what is missing to the corrected weights.
    fn gptq(
        &self,
        linears: &[Unquantized<Self::Weight<'_>>],
        site: &Self::Site,
        hessian: &Self::Hessian,
        factor: &Self::Factor,
        drift: Option<&Drift<Self::Cross>>,
    ) -> Result<Vec<(Self::Quantized, f64)>>;
    /// Arranged weights rounded to nearest, as
    /// [`round_to_nearest`](crate::quant::weights::round_to_nearest) defines it.
    fn round(
        &self,
        linear: &Unquantized<Self::Weight<'_>>,
        site: &Self::Site,
    ) -> Result<Self::Quantized>;
    /// `sqrt(tr(E H E^T) / tr(W H W^T))` with `E = W - Q`, arranged: the relative output error on
    /// the calibration tokens.
    fn output_error(
        &self,
        hessian: &Self::Hessian,
        site: &Self::Site,
        weight: &Self::Weight<'_>,
        quantized: &Self::Quantized,
    ) -> Result<f64>;
    /// `sqrt(sum_j s_j |E_j|^2 / sum_j s_j |W_j|^2)` over the source's channels j of energy s_j: the
    /// relative output error if channels were uncorrelated, which is all that is known without a
    /// Hessian.
    fn energy_error(
        &self,
        energy: &[f64],
        site: &Self::Site,
        weight: &Self::Weight<'_>,
        quantized: &Self::Quantized,
    ) -> Result<f64>;
    /// A quantized weight on the host. Safe to call from a thread beside the one that computes.
    fn fetch(&self, weight: Self::Quantized) -> Result<QuantizedLinear>;
    /// A quantized weight that was stored.
    fn restore(&self, weight: QuantizedLinear) -> Result<Self::Quantized>;

    /// Returns when all that was asked for is done.
    fn wait(&self) -> Result<()> {
        Ok(())
    }
    /// Frees what the backend keeps for reuse.
    fn trim(&self) {}
    /// Seconds of each of the device's kernels so far, where they are timed.
    fn kernel_seconds(&self) -> Vec<(String, f64)> {
        Vec::new()
    }
    /// Most device memory in use so far; none where the device's memory is the host's.
    fn peak_bytes(&self) -> Option<u64> {
        None
    }
}
