/*! The forward pass of a decoder block, written once.

Calibration, evaluation of the source, evaluation of the checkpoint and verification all run this
code. Only the treatment of a site's activation and the form of its linears differ. */

use super::architecture::Activation;
use super::attention::AttentionSpecs;
use super::experts::{RoutedTokens, Router};
pub use super::site::{Input, Leaving, Linear, Site, Treatment};
use super::sites::{ATTN_IN, ATTN_OUT, MLP_ACT, MLP_IN};
use crate::Result;
use crate::backend::{AttentionSpec, Decode, Forward, Memory, Placement, Qkv};

/// A decoder block, ready to run.
pub struct Block<B: Forward> {
    /// Its number.
    pub index: usize,
    /// RMSNorm before attention, and before the MLP; none where they read the hidden states as they are.
    pub norms: Option<[B::Hidden; 2]>,
    /// RMSNorm's epsilon.
    pub epsilon: f32,
    /// What is subtracted from the keys after the rotary embedding, before they are quantized, `[1, kv_heads * head_dim]`.
    pub key_mean: Option<B::Hidden>,
    /// RMSNorm of queries and keys before the rotary embedding: of each head `[1, head_dim]`, or of all of them as one row.
    pub qk_norm: Option<[B::Hidden; 2]>,
    /// Orders of the channels of queries and keys in which attention computes them, where these are not the source's.
    pub head_order: Option<[B::Site; 2]>,
    /// The nonlinearity of the MLP.
    pub activation: Activation,
    /// Chooses experts, where there are any.
    pub router: Option<Router<B>>,
    /// attn_in, attn_out, mlp_in, and one mlp_act, or one for each expert.
    pub sites: Vec<Site<B>>,
}

/// Attention of a step's new tokens over the cache of one block.
pub struct CachedAttention<'a, B: Decode> {
    /// What it depends on; `seq_len` is that of the longest sequence.
    pub spec: &'a AttentionSpec,
    /// The block's keys and values.
    pub cache: &'a mut B::Cache,
    /// The step, as the backend prepared it.
    pub step: &'a B::Step,
}

/// Which activation an observer is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The input of a site, before it is permuted.
    Entering(usize),
    /// A site's activation as its dense linears read it. Sites whose linears are all packed are not shown. With
    /// experts, mlp_in is shown once for each, with the tokens routed to it.
    Site(usize),
    /// Queries, before the rotary embedding.
    Queries,
    /// Keys, before the rotary embedding.
    Keys,
    /// Values.
    Values,
}

/// Sees the activations of a forward pass. A backend may fuse away those that no observer sees.
pub struct Observer<'a, B: Forward>(Option<See<'a, B>>);

type See<'a, B> = &'a mut dyn FnMut(Seen, &<B as Memory>::Activation) -> Result<()>;

impl<'a, B: Forward> Observer<'a, B> {
    /// Sees nothing.
    pub fn none() -> Self {
        Self(None)
    }

    /// Calls `see` with each activation.
    pub fn new(see: See<'a, B>) -> Self {
        Self(Some(see))
    }

    pub(super) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    pub(super) fn see(&mut self, seen: Seen, x: &B::Activation) -> Result<()> {
        self.0.as_mut().map_or(Ok(()), |see| see(seen, x))
    }
}

impl<B: Forward> Block<B> {
    /// Runs the block over `x` `[tokens, hidden]`, complete windows of `attention.seq_len` rows, in
    /// place.
    pub fn forward(
        &self,
        backend: &B,
        attention: &AttentionSpecs,
        x: &mut B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<()> {
        self.attend(backend, attention, x, observer)?;
        self.mlp(backend, x, observer)
    }

    /// Adds attention's output to the hidden states `x`.
    pub fn attend(
        &self,
        backend: &B,
        attention: &AttentionSpecs,
        x: &mut B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<()> {
        let heads = self.heads(backend, attention, x, observer)?;
        self.sites[ATTN_OUT].apply_onto(backend, heads, x, observer)
    }

    /// Runs the block in place over `x` `[tokens, hidden]`, whose rows attention reads in the windows of `placement`.
    /// With `wanted`, `x` becomes these rows only.
    pub fn forward_placed(
        &self,
        backend: &B,
        attention: &AttentionSpecs,
        placement: &Placement,
        wanted: Option<&[u32]>,
        x: &mut B::Hidden,
    ) -> Result<()> {
        self.forward_attending(backend, wanted, x, |qkv, key_mean| {
            backend.attention(attention.of_block(self.index), Some(placement), qkv, key_mean)
        })
    }

    /// Runs the block in place over `x` `[tokens, hidden]`, the new tokens of a step, whose keys and values enter the
    /// cache. With `wanted`, `x` becomes these rows only.
    pub fn forward_cached(
        &self,
        backend: &B,
        cached: CachedAttention<'_, B>,
        wanted: Option<&[u32]>,
        x: &mut B::Hidden,
    ) -> Result<()>
    where
        B: Decode,
    {
        let CachedAttention { spec, cache, step } = cached;
        self.forward_attending(backend, wanted, x, |qkv, key_mean| {
            backend.cached_attention(spec, cache, step, qkv, key_mean)
        })
    }

    /// Runs the block with the attention of `attend`, which gets the mean keys too. With `wanted`, `x` becomes these
    /// rows only, once attention has seen all.
    fn forward_attending(
        &self,
        backend: &B,
        wanted: Option<&[u32]>,
        x: &mut B::Hidden,
        attend: impl FnOnce(Qkv<B::Activation>, Option<&B::Hidden>) -> Result<B::Activation>,
    ) -> Result<()> {
        let unobserved = &mut Observer::none();
        let qkv = self.queries_keys_values(backend, x, unobserved)?;
        let mut heads = attend(qkv, self.key_mean.as_ref())?;
        if let Some(wanted) = wanted {
            heads = backend.select_rows(&heads, wanted)?;
            *x = backend.select_hidden(x, wanted)?;
        }
        self.sites[ATTN_OUT].apply_onto(backend, heads, x, unobserved)?;
        self.mlp(backend, x, unobserved)
    }

    /// Adds the MLP's output, or that of each token's experts, to the hidden states `x` after attention.
    pub fn mlp(&self, backend: &B, x: &mut B::Hidden, observer: &mut Observer<B>) -> Result<()> {
        if let Some(router) = &self.router {
            let normed = self.entering(backend, MLP_IN, x)?;
            let routed = router.route(backend, &normed)?;
            for (expert, routed) in
                routed.iter().enumerate().filter(|(_, routed)| !routed.is_empty())
            {
                let pair = self.gate_and_up_of(backend, expert, &normed, routed, observer)?;
                let input = self.after_activation(backend, MLP_ACT + expert, pair, observer)?;
                let [output] = self.sites[MLP_ACT + expert].outputs(backend, &input)?;
                backend.add_rows(x, &output, &routed.tokens, &routed.weights)?;
            }
            return Ok(());
        }
        let pair = self.gate_and_up(backend, x, observer)?;
        let input = self.after_activation(backend, MLP_ACT, pair, observer)?;
        self.sites[MLP_ACT].add_onto(backend, &input, x)
    }

    /// The input of the linear of the mlp_act numbered `at`, from gate and up.
    fn after_activation(
        &self,
        backend: &B,
        at: usize,
        [gate, up]: [B::Activation; 2],
        observer: &mut Observer<B>,
    ) -> Result<Input<B>> {
        let site = &self.sites[at];
        if self.activation == Activation::Silu
            && let Some(order) = site.fusible_order(observer)
        {
            return Ok(Input::Rows(backend.silu_quantize(gate, &up, order, &site.name)?));
        }
        site.input(backend, self.activated(backend, gate, &up)?, observer)
    }

    /// `activation(gate) * up`.
    pub fn activated(
        &self,
        backend: &B,
        gate: B::Activation,
        up: &B::Activation,
    ) -> Result<B::Activation> {
        match self.activation {
            Activation::Silu => backend.silu_mul(gate, up),
            Activation::GeluTanh => backend.gelu_mul(gate, up),
            Activation::ReluSquared => unreachable!("`check_supported` refuses it"),
        }
    }

    /// The activation that enters attn_in or mlp_in for the hidden states `x`.
    pub fn entering(&self, backend: &B, site: usize, x: &B::Hidden) -> Result<B::Activation> {
        match self.norm_before(site) {
            Some(norm) => backend.rms_norm(x, norm, self.epsilon),
            None => backend.activation(x),
        }
    }

    /// The norm before attn_in or mlp_in, if there is one.
    pub fn norm_before(&self, site: usize) -> Option<&B::Hidden> {
        let at = match site {
            ATTN_IN => 0,
            MLP_IN => 1,
            _ => unreachable!("other sites have no norm before them"),
        };
        self.norms.as_ref().map(|norms| &norms[at])
    }

    /// Shows `observer` every site's activation. The last product is left out, since its output is not
    /// observed.
    pub fn observe(
        &self,
        backend: &B,
        attention: &AttentionSpecs,
        mut x: B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<()> {
        self.attend(backend, attention, &mut x, observer)?;
        let Some(router) = &self.router else {
            let z = self.gated(backend, &x, observer)?;
            drop(x);
            self.sites[MLP_ACT].input(backend, z, observer)?;
            return Ok(());
        };
        let normed = self.entering(backend, MLP_IN, &x)?;
        for (expert, routed) in router.route(backend, &normed)?.iter().enumerate() {
            if !routed.is_empty() {
                let z = self.gated_of(backend, expert, &normed, routed, observer)?;
                self.sites[MLP_ACT + expert].input(backend, z, observer)?;
            }
        }
        Ok(())
    }

    /// The joined heads of attention for the hidden states `x`: the input of attn_out.
    pub fn heads(
        &self,
        backend: &B,
        attention: &AttentionSpecs,
        x: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<B::Activation> {
        let qkv = self.queries_keys_values(backend, x, observer)?;
        observer.see(Seen::Queries, &qkv.q)?;
        observer.see(Seen::Keys, &qkv.k)?;
        observer.see(Seen::Values, &qkv.v)?;
        backend.attention(attention.of_block(self.index), None, qkv, self.key_mean.as_ref())
    }

    /// The outputs of q, k and v for the hidden states `x`, queries and keys normed where the network has QK-norm, and in the
    /// order that attention has them in.
    fn queries_keys_values(
        &self,
        backend: &B,
        x: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<Qkv<B::Activation>> {
        let [mut q, mut k, v] = self.after_norm(backend, ATTN_IN, x, observer)?;
        if let Some([of_q, of_k]) = &self.qk_norm {
            backend.norm_in_place(&mut q, of_q, self.epsilon)?;
            backend.norm_in_place(&mut k, of_k, self.epsilon)?;
        }
        if let Some([of_q, of_k]) = &self.head_order {
            (q, k) = (backend.permute(&q, of_q)?, backend.permute(&k, of_k)?);
        }
        Ok(Qkv { q, k, v })
    }

    /// `activation(gate) * up` of one expert for its tokens of the normed hidden states: the input of its mlp_act.
    pub fn gated_of(
        &self,
        backend: &B,
        expert: usize,
        normed: &B::Activation,
        routed: &RoutedTokens,
        observer: &mut Observer<B>,
    ) -> Result<B::Activation> {
        let [gate, up] = self.gate_and_up_of(backend, expert, normed, routed, observer)?;
        self.activated(backend, gate, &up)
    }

    /// The outputs of one expert's gate and up.
    pub(super) fn gate_and_up_of(
        &self,
        backend: &B,
        expert: usize,
        normed: &B::Activation,
        routed: &RoutedTokens,
        observer: &mut Observer<B>,
    ) -> Result<[B::Activation; 2]> {
        let site = &self.sites[MLP_IN];
        let input = site.input(backend, backend.select_rows(normed, &routed.tokens)?, observer)?;
        let output = |linear| site.output(backend, &input, linear);
        Ok([output(2 * expert)?, output(2 * expert + 1)?])
    }

    /// `activation(gate) * up` for the hidden states `x` after attention: the input of mlp_act. Only without experts.
    pub fn gated(
        &self,
        backend: &B,
        x: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<B::Activation> {
        let [gate, up] = self.gate_and_up(backend, x, observer)?;
        self.activated(backend, gate, &up)
    }

    /// The outputs of gate and up for the hidden states `x` after attention. Only without experts.
    pub fn gate_and_up(
        &self,
        backend: &B,
        x: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<[B::Activation; 2]> {
        self.after_norm(backend, MLP_IN, x, observer)
    }

    /// The outputs of the linears of attn_in or mlp_in, after its norm, if there is one.
    fn after_norm<const N: usize>(
        &self,
        backend: &B,
        site: usize,
        x: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<[B::Activation; N]> {
        let input = match (self.sites[site].fusible_order(observer), self.norm_before(site)) {
            (Some(_), Some(_)) => self.read_entering(backend, site, x)?,
            _ => self.sites[site].input(backend, self.entering(backend, site, x)?, observer)?,
        };
        self.sites[site].outputs(backend, &input)
    }
}
