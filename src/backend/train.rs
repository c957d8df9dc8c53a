/*! The backward pass of a decoder block and of the network's end, for training by distillation (docs/distillation.md).

What is trained keeps every code and every byte count: scales of groups and of outliers, weights of RMSNorms, clip ratios.
The forward pass of training is the one in `model/block.rs`, with the checkpoint's arithmetic; `model/backward.rs` runs it again
for a block from its kept input and calls the operations here in reverse order.

Every gradient is that of the *sum* over tokens of the loss in nats, so that its size does not depend on how many tokens
there are; what calls divides by their number. Rounding passes straight through: where a quantizer rounds, its derivative is
that of the same function with the roundings' residues held constant. */

use half::f16;

use super::{AttentionSpec, Backend, Qkv};
use crate::Result;

/// A linear of a site, as the backward pass reads its weights.
pub enum TrainedLinear<'a, B: Backend + ?Sized> {
    /// Codes and scales, whose gradients are wanted.
    Quantized(&'a B::Quantized),
    /// Full precision, in the site's order; nothing in it is trained.
    Unquantized(&'a B::Dense),
}

/// Gradients of what a site trains.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SiteGradient {
    /// Of the clip ratio, the part of each group of the activation, `[groups]`. A site with one clip ratio sums them up. Empty
    /// where the activation has 16 bits.
    pub clips: Vec<f32>,
    /// Of its linears.
    pub linears: Vec<LinearGradient>,
}

/// Gradients of the scales of a linear; both are empty if it is unquantized.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LinearGradient {
    /// Of the scales of groups, `[rows.div_ceil(rows_per_scale), groups]`.
    pub scales: Vec<f32>,
    /// Of the scales of INT8 and FP8 outliers, `[rows]`; empty without outliers or with outliers in f16.
    pub outlier_scales: Vec<f32>,
}

/// Gradients of a quantized network, operation by operation.
///
/// `d_y` is the gradient of the loss with respect to `y`. Sums over tokens are made in an order that depends on nothing but their
/// number: not on a thread count, nor on the order of a device's threads.
pub trait Train: Backend {
    /// The gradient of an activation inside a block, `[tokens, channels]`. A backend chooses its type; gradients of hidden
    /// states are [`Hidden`](super::Memory::Hidden).
    type Gradient: Send;
    /// The output head `[vocabulary, hidden]`, laid out for logits and for their gradient.
    type LossHead: Send + Sync;

    /// Copies an activation that the next operation takes, and the backward pass needs afterwards.
    fn duplicate_activation(&self, x: &Self::Activation) -> Result<Self::Activation>;

    /// Gives a quantized weight other scales; its codes stay. `scales` are `[scale rows, groups]`, numbers of its grid;
    /// `outlier_scales` `[rows]`, or empty where outliers have none.
    ///
    /// # Panics
    /// If there are not as many scales as before.
    fn rescale(
        &self,
        weight: &mut Self::Quantized,
        scales: &[f16],
        outlier_scales: &[f16],
    ) -> Result<()>;

    /// Lays the output head out.
    fn loss_head(&self, weight: &Self::Weight<'_>) -> Result<Self::LossHead>;

    /// The divergence of each row of `x` from that of `original`, and the gradient of their sum with respect to `x`.
    ///
    /// Both are normed hidden states `[tokens, hidden]`. With logits `l = x W^T`, `l0 = original W^T`, `q = softmax(l)` and
    /// `p = softmax(l0)`, each row's loss is `sum_v p_v (ln p_v - ln q_v)`, the number that
    /// [`kl_divergence`](super::Measurement::kl_divergence) returns, and `d_x = (q - p) W`. Logits exist for a chunk of
    /// tokens at a time.
    fn divergence_backward(
        &self,
        x: &Self::Activation,
        original: &Self::Activation,
        head: &Self::LossHead,
    ) -> Result<(Vec<f64>, Self::Gradient)>;

    /// The gradient of an output that was added to hidden states, whose gradient is `d_x`: the same values.
    fn output_gradient(&self, d_x: &Self::Hidden) -> Result<Self::Gradient>;

    /// The backward of [`rms_norm`](super::Forward::rms_norm), `y = x r w` with `r = 1 / sqrt(mean(x^2) + epsilon)`. Returns
    /// `d_x`, added to `onto`, the gradient that reaches `x` past the norm, and `d_w` `[hidden]`.
    ///
    /// With `g = d_y w`, elementwise: `d_x = r (g - x r^2 mean(g x))`, `d_w = sum over tokens of d_y x r`.
    fn rms_norm_backward(
        &self,
        x: &Self::Hidden,
        weight: &Self::Hidden,
        epsilon: f32,
        d_y: &Self::Gradient,
        onto: Option<Self::Hidden>,
    ) -> Result<(Self::Hidden, Vec<f32>)>;

    /// The backward of [`norm_in_place`](super::Forward::norm_in_place): the formulas of
    /// [`rms_norm_backward`](Self::rms_norm_backward) for each head of `x` `[tokens, heads * head_dim]`, the activation
    /// before the norm. Returns `d_x` and `d_w` `[head_dim]`, summed over tokens and heads.
    fn qk_norm_backward(
        &self,
        x: &Self::Activation,
        weight: &Self::Hidden,
        epsilon: f32,
        d_y: Self::Gradient,
    ) -> Result<(Self::Gradient, Vec<f32>)>;

    /// The backward of [`silu_mul`](super::Forward::silu_mul), `z = g s(g) u` with `s` the logistic function: `d_gate = d_z u
    /// s(g) (1 + g (1 - s(g)))` and `d_up = d_z g s(g)`. `gate` and `up` come from linears packed without `feeds`: their
    /// channels are in the source's order.
    fn silu_mul_backward(
        &self,
        gate: &Self::Activation,
        up: &Self::Activation,
        d_z: Self::Gradient,
    ) -> Result<[Self::Gradient; 2]>;

    /// The backward of [`attention`](super::Forward::attention) over consecutive windows, from queries, keys and values as
    /// they went in (before the rotary embedding) and `d_heads` `[tokens, heads * head_dim]`.
    ///
    /// With q, k, v as the products see them (embedded, rotated, out of the cache), `c = 1 / sqrt(head_dim)`, `S = c q k^T`,
    /// `P = softmax(S)` over the tokens that are seen, and `o = P v`:
    ///
    /// ```text
    /// d_v = P^T d_o               over the query heads that share the key and value head
    /// d_S = P (d_o v^T - rowsum(d_o o))       elementwise; rowsum(d_o o) = rowsum(P (d_o v^T))
    /// d_q = c d_S k,  d_k = c d_S^T q
    /// ```
    ///
    /// and then what was done to q, k and v, transposed, in reverse order: outputs of rotated values were multiplied with H, so
    /// `d_o` is first; the rotary embedding's transpose is the rotation by the negative angle; H is its own transpose; the
    /// subtracted mean key changes nothing. The cache's quantizer passes the gradient where `0 <= x / scale + zero <= 2^bits - 1`
    /// (not rounded) and blocks it elsewhere; its scale and zero point are constants. Nothing here is trained.
    fn attention_backward(
        &self,
        spec: &AttentionSpec,
        qkv: &Qkv<Self::Activation>,
        key_mean: Option<&Self::Hidden>,
        d_heads: Self::Gradient,
    ) -> Result<Qkv<Self::Gradient>>;

    /// The backward of a site and its linears: `y_l = f(x) W_l^T`, f the permutation, transform and quantization of `site`.
    /// `x` `[tokens, channels]` is the activation that entered it, `rows` what it was quantized to (none where the activation
    /// has 16 bits), `d_outputs` one for each of `linears`, `[tokens, rows]`. Returns `d_x` `[tokens, channels]`.
    ///
    /// With `x' = P x` permuted and transformed, `t = x' / s` in a group of scale s, `n` the number of its code (`x^ = n s`), and
    /// `lowest`, `highest` the limits of the numbers:
    ///
    /// ```text
    /// d_x^ = sum over linears of d_y W                      W [rows, width], the values of the codes
    /// in   = lowest <= t <= highest                         1 in a group whose scale is 0, and for outliers
    /// d_x' = d_x^ in,   d_x = P^T d_x'                      the transform is its own transpose; padding is dropped
    /// d_clip[g] = sum over tokens and the group of d_x^ (n - t in) s / clip       0 where s is 0
    /// D = d_y^T x^  [rows, width]
    /// d_scale[r, g] = sum over the group of D[r, k] n_w[r, k]     and over the rows that share the scale
    /// d_outlier_scale[r] = sum over the outliers of D[r, k] n_w[r, k]
    /// ```
    ///
    /// with `n_w` the number of a weight's code. Where the activation has 16 bits, `x^ = x'`, `in` is 1 and there are no clips.
    fn site_backward(
        &self,
        site: &Self::Site,
        linears: &[TrainedLinear<'_, Self>],
        x: &Self::Activation,
        rows: Option<&Self::Rows>,
        d_outputs: &[Self::Gradient],
    ) -> Result<(Self::Gradient, SiteGradient)>;
}
