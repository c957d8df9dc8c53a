/*! The backward pass of a decoder block, written once, like its forward pass.

Only the block's input is kept from the forward pass. The inside is computed again by the operations of the forward pass, so
that codes and outputs are the same, and the operations of [`Train`] follow in reverse order. */

use super::attention::AttentionSpecs;
use super::block::{Block, Linear, Observer};
use super::site::Input;
use super::sites::{ATTN_IN, ATTN_OUT, MLP_ACT, MLP_IN};
use crate::Result;
use crate::backend::{Qkv, SiteGradient, Train, TrainedLinear};

/// Gradients of what a block trains.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockGradient {
    /// Of the weights of the norms before attention and before the MLP, `[hidden]`.
    pub norms: [Vec<f32>; 2],
    /// Of the weights of QK-norm, `[head_dim]`, if there is one.
    pub qk_norms: Option<[Vec<f32>; 2]>,
    /// Of its sites.
    pub sites: Vec<SiteGradient>,
}

/// The codes of the quantized linears of each site of a block; none for an unquantized one.
pub type BlockCodes<'a, Q> = Vec<Vec<Option<&'a Q>>>;

/// What is computed again of the MLP.
struct Mlp<B: Train> {
    entering: B::Activation,
    input: Input<B>,
    gate: B::Activation,
    up: B::Activation,
    gated: B::Activation,
    gated_input: Input<B>,
}

/// What is computed again of attention.
struct Attention<B: Train> {
    entering: B::Activation,
    input: Input<B>,
    /// Queries and keys before QK-norm, if there is one.
    unnormed: Option<[B::Activation; 2]>,
    qkv: Qkv<B::Activation>,
    heads: B::Activation,
    heads_input: Input<B>,
}

impl<B: Train> Block<B> {
    /// From the gradient `d_out` of the hidden states that the block returned for `x` `[tokens, hidden]`, the gradient of `x`
    /// and of what is trained. Its linears, with the codes of `codes`, are packed without `feeds`.
    ///
    /// # Panics
    /// If the block is none of a network that `Architecture::not_plain` finds nothing of, or has a site that neither permutes nor quantizes.
    pub fn backward(
        &self,
        backend: &B,
        attention: &AttentionSpecs,
        codes: &BlockCodes<'_, B::Quantized>,
        x: &B::Hidden,
        d_out: B::Hidden,
    ) -> Result<(B::Hidden, BlockGradient)> {
        assert!(self.router.is_none(), "blocks with experts are not trained");
        let inside = self.attention_again(backend, attention, x)?;
        let mut middle = backend.duplicate(x)?;
        self.sites[ATTN_OUT].add_onto(backend, &inside.heads_input, &mut middle)?;
        let (d_middle, mlp_norm, mut sites) = self.mlp_backward(backend, codes, &middle, d_out)?;
        drop(middle);
        let (d_x, attn_norm, qk_norms, attention_sites) =
            self.attention_backward(backend, attention, codes, x, (inside, d_middle))?;
        sites.splice(0..0, attention_sites);
        Ok((d_x, BlockGradient { norms: [attn_norm, mlp_norm], qk_norms, sites }))
    }

    fn attention_again(
        &self,
        backend: &B,
        attention: &AttentionSpecs,
        x: &B::Hidden,
    ) -> Result<Attention<B>> {
        let (entering, input) = self.normed(backend, ATTN_IN, x)?;
        let [mut q, mut k, v] = self.sites[ATTN_IN].outputs(backend, &input)?;
        let mut unnormed = None;
        if let Some([of_q, of_k]) = &self.qk_norm {
            unnormed = Some([backend.duplicate_activation(&q)?, backend.duplicate_activation(&k)?]);
            backend.norm_in_place(&mut q, of_q, self.epsilon)?;
            backend.norm_in_place(&mut k, of_k, self.epsilon)?;
        }
        let again = |x: &B::Activation| backend.duplicate_activation(x);
        let taken = Qkv { q: again(&q)?, k: again(&k)?, v: again(&v)? };
        let heads = backend.attention(
            attention.of_block(self.index),
            None,
            taken,
            self.key_mean.as_ref(),
        )?;
        let heads_input = self.sites[ATTN_OUT].read(backend, &heads)?;
        let qkv = Qkv { q, k, v };
        Ok(Attention { entering, input, unnormed, qkv, heads, heads_input })
    }

    fn mlp_again(&self, backend: &B, middle: &B::Hidden) -> Result<Mlp<B>> {
        let (entering, input) = self.normed(backend, MLP_IN, middle)?;
        let [gate, up] = self.sites[MLP_IN].outputs(backend, &input)?;
        let site = &self.sites[MLP_ACT];
        let gated = backend.silu_mul(backend.duplicate_activation(&gate)?, &up)?;
        let gated_input = match site.fusible_order(&Observer::none()) {
            Some(order) => {
                let gate = backend.duplicate_activation(&gate)?;
                Input::Rows(backend.silu_quantize(gate, &up, order, &site.name)?)
            }
            None => site.read(backend, &gated)?,
        };
        Ok(Mlp { entering, input, gate, up, gated, gated_input })
    }

    /// The gradient of the hidden states between attention and MLP, of the MLP's norm and of its sites.
    fn mlp_backward(
        &self,
        backend: &B,
        codes: &BlockCodes<'_, B::Quantized>,
        middle: &B::Hidden,
        d_out: B::Hidden,
    ) -> Result<(B::Hidden, Vec<f32>, Vec<SiteGradient>)> {
        let Mlp { entering, input, gate, up, gated, gated_input } =
            self.mlp_again(backend, middle)?;
        let d_output = [backend.output_gradient(&d_out)?];
        let (d_gated, of_act) =
            self.site_backward(backend, MLP_ACT, codes, (&gated, &gated_input), &d_output)?;
        drop((d_output, gated, gated_input));
        let d_pair = backend.silu_mul_backward(&gate, &up, d_gated)?;
        drop((gate, up));
        let (d_entering, of_in) =
            self.site_backward(backend, MLP_IN, codes, (&entering, &input), &d_pair)?;
        drop((d_pair, entering, input));
        let (d_middle, d_norm) = backend.rms_norm_backward(
            middle,
            self.trained_norm(MLP_IN),
            self.epsilon,
            &d_entering,
            Some(d_out),
        )?;
        Ok((d_middle, d_norm, vec![of_in, of_act]))
    }

    /// The gradient of the block's input, of its first norm, of QK-norm and of attention's sites.
    #[expect(clippy::type_complexity, reason = "the parts of a block's gradient, named above")]
    fn attention_backward(
        &self,
        backend: &B,
        attention: &AttentionSpecs,
        codes: &BlockCodes<'_, B::Quantized>,
        x: &B::Hidden,
        (inside, d_middle): (Attention<B>, B::Hidden),
    ) -> Result<(B::Hidden, Vec<f32>, Option<[Vec<f32>; 2]>, Vec<SiteGradient>)> {
        let Attention { entering, input, unnormed, qkv, heads, heads_input } = inside;
        let d_output = [backend.output_gradient(&d_middle)?];
        let (d_heads, of_out) =
            self.site_backward(backend, ATTN_OUT, codes, (&heads, &heads_input), &d_output)?;
        drop((d_output, heads, heads_input));
        let Qkv { mut q, mut k, v } = backend.attention_backward(
            attention.of_block(self.index),
            &qkv,
            self.key_mean.as_ref(),
            d_heads,
        )?;
        drop(qkv);
        let mut qk_norms = None;
        if let (Some([of_q, of_k]), Some([raw_q, raw_k])) = (&self.qk_norm, &unnormed) {
            let (d_q, d_of_q) = backend.qk_norm_backward(raw_q, of_q, self.epsilon, q)?;
            let (d_k, d_of_k) = backend.qk_norm_backward(raw_k, of_k, self.epsilon, k)?;
            (q, k, qk_norms) = (d_q, d_k, Some([d_of_q, d_of_k]));
        }
        let (d_entering, of_in) =
            self.site_backward(backend, ATTN_IN, codes, (&entering, &input), &[q, k, v])?;
        let (d_x, d_norm) = backend.rms_norm_backward(
            x,
            self.trained_norm(ATTN_IN),
            self.epsilon,
            &d_entering,
            Some(d_middle),
        )?;
        Ok((d_x, d_norm, qk_norms, vec![of_in, of_out]))
    }

    fn trained_norm(&self, site: usize) -> &B::Hidden {
        self.norm_before(site).expect("a network that is trained has norms before both")
    }

    /// The output of a norm, and the same as the linears of its site read it.
    fn normed(&self, backend: &B, site: usize, x: &B::Hidden) -> Result<(B::Activation, Input<B>)> {
        let norm = self.trained_norm(site);
        let site = &self.sites[site];
        let normed = backend.rms_norm(x, norm, self.epsilon)?;
        let input = match site.fusible_order(&Observer::none()) {
            Some(order) => {
                Input::Rows(backend.norm_quantize(x, norm, self.epsilon, order, &site.name)?)
            }
            None => site.read(backend, &normed)?,
        };
        Ok((normed, input))
    }

    fn site_backward(
        &self,
        backend: &B,
        at: usize,
        codes: &BlockCodes<'_, B::Quantized>,
        (x, input): (&B::Activation, &Input<B>),
        d_outputs: &[B::Gradient],
    ) -> Result<(B::Gradient, SiteGradient)> {
        let site = &self.sites[at];
        let linears = site.linears.iter().zip(&codes[at]);
        let linears = linears.map(|(linear, codes)| match (linear, codes) {
            (_, Some(codes)) => TrainedLinear::Quantized(&**codes),
            (Linear::Dense(weight), None) => TrainedLinear::Unquantized(weight),
            (Linear::Packed(_), None) => unreachable!("packed linears have codes"),
        });
        let rows = match input {
            Input::Rows(rows) => Some(rows),
            Input::Float(_) => None,
        };
        let linears: Vec<TrainedLinear<'_, B>> = linears.collect();
        backend.site_backward(site.order(), &linears, x, rows, d_outputs)
    }
}
