/*! The forward pass of a decoder block, written once.

Calibration, evaluation of the source, evaluation of the checkpoint and verification all run this
code; only what a site does with its activation and how a linear is held differ. */

use super::experts::{Router, Share};
use super::sites::{ATTN_IN, ATTN_OUT, MLP_ACT, MLP_IN};
use crate::Result;
use crate::backend::{AttentionSpec, Forward, Memory, Placement, Qkv};

/// A linear on a backend.
pub enum Linear<B: Forward> {
    /// Full precision, `[out, in]`; behind a site with a format, in that site's order.
    Dense(B::Dense),
    /// Quantized, on the integer path.
    Packed(B::Packed),
}

/// What becomes of a site's activation before its linears see it.
pub enum Treatment<B: Forward> {
    /// Nothing: full precision, in the source's channel order.
    Source,
    /// Arranged in the site's order and left in floating point.
    Arranged(B::Site),
    /// Arranged and quantized.
    Quantized(B::Site),
}

/// A site of a block with the linears it feeds.
pub struct Site<B: Forward> {
    /// Its number in the block.
    pub at: usize,
    /// Its full name, for errors.
    pub name: String,
    /// What becomes of the activation.
    pub treatment: Treatment<B>,
    /// q, k, v; or o; or gate, up, of every expert; or down.
    pub linears: Vec<Linear<B>>,
    /// What is added to the output of each, if anything is, `[1, rows]`.
    pub biases: Vec<Option<B::Hidden>>,
}

/// A decoder block, ready to run.
pub struct Block<B: Forward> {
    /// RMSNorm before attention.
    pub attn_norm: B::Hidden,
    /// RMSNorm before the MLP.
    pub mlp_norm: B::Hidden,
    /// RMSNorm's epsilon.
    pub epsilon: f32,
    /// What is taken from the embedded keys before they are quantized, `[1, kv_heads * head_dim]`.
    pub key_mean: Option<B::Hidden>,
    /// RMSNorm of each query and key head before the rotary embedding, `[1, head_dim]`.
    pub head_norms: Option<[B::Hidden; 2]>,
    /// Chooses experts, where there are any.
    pub router: Option<Router<B>>,
    /// attn_in, attn_out, mlp_in, and an mlp_act for each expert, or the one there is.
    pub sites: Vec<Site<B>>,
}

/// What an observer is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// What enters a site, before it is permuted.
    Entering(usize),
    /// A site's activation as its dense linears see it. Sites whose linears are all packed are not shown. Where there are
    /// experts, mlp_in is shown once for each, with the tokens that go there.
    Site(usize),
    /// Queries, before the rotary embedding.
    Queries,
    /// Keys, likewise.
    Keys,
    /// Values.
    Values,
}

/// Sees activations on their way, if anybody does. What nobody observes may be fused away.
pub struct Observer<'a, B: Forward>(Option<See<'a, B>>);

type See<'a, B> = &'a mut dyn FnMut(Seen, &<B as Memory>::Activation) -> Result<()>;

impl<'a, B: Forward> Observer<'a, B> {
    /// Nobody.
    pub fn none() -> Self {
        Self(None)
    }

    /// Calls `see` with each activation.
    pub fn new(see: See<'a, B>) -> Self {
        Self(Some(see))
    }

    fn see(&mut self, seen: Seen, x: &B::Activation) -> Result<()> {
        self.0.as_mut().map_or(Ok(()), |see| see(seen, x))
    }
}

impl<B: Forward> Block<B> {
    /// Runs the block over `x` `[tokens, hidden]`, whole windows of `attention.seq_len` rows, in
    /// place.
    pub fn forward(
        &self,
        backend: &B,
        attention: &AttentionSpec,
        x: &mut B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<()> {
        let heads = self.heads(backend, attention, x, observer)?;
        self.sites[ATTN_OUT].apply_onto(backend, heads, x, observer)?;
        self.mlp(backend, x, observer)
    }

    /// Runs the block over `x` `[tokens, hidden]`, whose rows stand in attention's windows as `placement` says, in
    /// place. Where only some rows are `wanted`, only they are left.
    pub fn forward_placed(
        &self,
        backend: &B,
        attention: &AttentionSpec,
        placement: &Placement,
        wanted: Option<&[u32]>,
        x: &mut B::Hidden,
    ) -> Result<()> {
        let unobserved = &mut Observer::none();
        let qkv = self.queries_keys_values(backend, x, unobserved)?;
        let key_mean = self.key_mean.as_ref();
        let mut heads = backend.attention(attention, Some(placement), qkv, key_mean)?;
        if let Some(wanted) = wanted {
            heads = backend.select_rows(&heads, wanted)?;
            *x = backend.select_hidden(x, wanted)?;
        }
        self.sites[ATTN_OUT].apply_onto(backend, heads, x, unobserved)?;
        self.mlp(backend, x, unobserved)
    }

    /// Adds the MLP's output, or that of each token's experts, to the hidden states `x` behind attention.
    pub fn mlp(&self, backend: &B, x: &mut B::Hidden, observer: &mut Observer<B>) -> Result<()> {
        if let Some(router) = &self.router {
            let normed = backend.rms_norm(x, &self.mlp_norm, self.epsilon)?;
            let shares = router.shares(backend, &normed)?;
            for (expert, share) in shares.iter().enumerate().filter(|(_, share)| !share.is_empty())
            {
                let pair = self.gate_and_up_of(backend, expert, &normed, share, observer)?;
                let input = self.behind_silu(backend, MLP_ACT + expert, pair, observer)?;
                let [output] = self.sites[MLP_ACT + expert].outputs(backend, &input)?;
                backend.add_rows(x, &output, &share.tokens, &share.weights)?;
            }
            return Ok(());
        }
        let pair = self.gate_and_up(backend, x, observer)?;
        let input = self.behind_silu(backend, MLP_ACT, pair, observer)?;
        self.sites[MLP_ACT].add_onto(backend, &input, x)
    }

    /// What the linear of the mlp_act numbered `at` sees, from gate and up.
    fn behind_silu(
        &self,
        backend: &B,
        at: usize,
        [gate, up]: [B::Activation; 2],
        observer: &mut Observer<B>,
    ) -> Result<Input<B>> {
        let site = &self.sites[at];
        if let Some(order) = site.fusible_order(observer) {
            return Ok(Input::Rows(backend.silu_quantize(gate, &up, order, &site.name)?));
        }
        site.input(backend, backend.silu_mul(gate, &up)?, observer)
    }

    /// Shows `observer` every site's activation; `x` is used up on the way. The last product is
    /// left out, since nobody looks at what it gives.
    pub fn observe(
        &self,
        backend: &B,
        attention: &AttentionSpec,
        mut x: B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<()> {
        let heads = self.heads(backend, attention, &x, observer)?;
        self.sites[ATTN_OUT].apply_onto(backend, heads, &mut x, observer)?;
        let Some(router) = &self.router else {
            let z = self.gated(backend, &x, observer)?;
            drop(x);
            self.sites[MLP_ACT].input(backend, z, observer)?;
            return Ok(());
        };
        let normed = backend.rms_norm(&x, &self.mlp_norm, self.epsilon)?;
        for (expert, share) in router.shares(backend, &normed)?.iter().enumerate() {
            if !share.is_empty() {
                let z = self.gated_of(backend, expert, &normed, share, observer)?;
                self.sites[MLP_ACT + expert].input(backend, z, observer)?;
            }
        }
        Ok(())
    }

    /// The joined heads of attention for the hidden states `x`: what attn_out sees.
    pub fn heads(
        &self,
        backend: &B,
        attention: &AttentionSpec,
        x: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<B::Activation> {
        let qkv = self.queries_keys_values(backend, x, observer)?;
        observer.see(Seen::Queries, &qkv.q)?;
        observer.see(Seen::Keys, &qkv.k)?;
        observer.see(Seen::Values, &qkv.v)?;
        backend.attention(attention, None, qkv, self.key_mean.as_ref())
    }

    /// The outputs of q, k and v for the hidden states `x`, queries and keys normed where heads are.
    fn queries_keys_values(
        &self,
        backend: &B,
        x: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<Qkv<B::Activation>> {
        let [mut q, mut k, v] = self.after_norm(backend, ATTN_IN, x, &self.attn_norm, observer)?;
        if let Some([of_q, of_k]) = &self.head_norms {
            backend.qk_norm(&mut q, of_q, self.epsilon)?;
            backend.qk_norm(&mut k, of_k, self.epsilon)?;
        }
        Ok(Qkv { q, k, v })
    }

    /// `silu(gate) * up` of one expert for its share of the normed hidden states: what its mlp_act sees.
    pub fn gated_of(
        &self,
        backend: &B,
        expert: usize,
        normed: &B::Activation,
        share: &Share,
        observer: &mut Observer<B>,
    ) -> Result<B::Activation> {
        let [gate, up] = self.gate_and_up_of(backend, expert, normed, share, observer)?;
        backend.silu_mul(gate, &up)
    }

    /// The outputs of one expert's gate and up.
    fn gate_and_up_of(
        &self,
        backend: &B,
        expert: usize,
        normed: &B::Activation,
        share: &Share,
        observer: &mut Observer<B>,
    ) -> Result<[B::Activation; 2]> {
        let site = &self.sites[MLP_IN];
        let input = site.input(backend, backend.select_rows(normed, &share.tokens)?, observer)?;
        let output = |linear| site.output(backend, &input, linear);
        Ok([output(2 * expert)?, output(2 * expert + 1)?])
    }

    /// `silu(gate) * up` for the hidden states `x` behind attention: what mlp_act sees. Not where there are experts.
    pub fn gated(
        &self,
        backend: &B,
        x: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<B::Activation> {
        let [gate, up] = self.gate_and_up(backend, x, observer)?;
        backend.silu_mul(gate, &up)
    }

    /// The outputs of gate and up for the hidden states `x` behind attention. Not where there are experts.
    pub fn gate_and_up(
        &self,
        backend: &B,
        x: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<[B::Activation; 2]> {
        self.after_norm(backend, MLP_IN, x, &self.mlp_norm, observer)
    }

    /// The outputs of the linears of a site after a norm.
    fn after_norm<const N: usize>(
        &self,
        backend: &B,
        site: usize,
        x: &B::Hidden,
        norm: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<[B::Activation; N]> {
        let (site, epsilon) = (&self.sites[site], self.epsilon);
        let input = match site.fusible_order(observer) {
            Some(order) => Input::Rows(backend.norm_quantize(x, norm, epsilon, order, &site.name)?),
            None => site.input(backend, backend.rms_norm(x, norm, epsilon)?, observer)?,
        };
        site.outputs(backend, &input)
    }
}

/// An activation as the linears of its site see it.
enum Input<B: Forward> {
    /// In floating point.
    Float(B::Activation),
    /// Quantized.
    Rows(B::Rows),
}

impl<B: Forward> Site<B> {
    /// The outputs of the site's linears.
    fn outputs<const N: usize>(&self, backend: &B, input: &Input<B>) -> Result<[B::Activation; N]> {
        let linears = 0..self.linears.len();
        let outputs = linears.map(|linear| self.output(backend, input, linear));
        let outputs: Vec<B::Activation> = outputs.collect::<Result<_>>()?;
        Ok(outputs.try_into().ok().expect("a site is built with the linears of its kind"))
    }

    /// The output of one of its linears.
    fn output(&self, backend: &B, input: &Input<B>, linear: usize) -> Result<B::Activation> {
        let mut y = match (&self.linears[linear], input) {
            (Linear::Dense(weight), Input::Float(x)) => backend.product(x, weight),
            (Linear::Packed(weight), Input::Rows(x)) => backend.integer_product(x, weight),
            (Linear::Dense(weight), Input::Rows(x)) => {
                backend.product(&backend.dequantize(x)?, weight)
            }
            (Linear::Packed(_), Input::Float(_)) => {
                unreachable!("packed linears are only built behind quantized sites")
            }
        }?;
        if let Some(bias) = &self.biases[linear] {
            backend.add_bias(&mut y, bias)?;
        }
        Ok(y)
    }

    /// Adds the output of the site's one linear for the activation `x` to the residual stream.
    pub fn apply_onto(
        &self,
        backend: &B,
        x: B::Activation,
        stream: &mut B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<()> {
        let input = self.input(backend, x, observer)?;
        self.add_onto(backend, &input, stream)
    }

    /// Adds the output of the site's one linear to the residual stream.
    fn add_onto(&self, backend: &B, input: &Input<B>, stream: &mut B::Hidden) -> Result<()> {
        match (&self.linears[..], &self.biases[..], input) {
            ([Linear::Dense(weight)], [None], Input::Float(x)) => {
                backend.add_product(stream, x, weight)
            }
            ([Linear::Packed(weight)], [None], Input::Rows(x)) => {
                backend.add_integer_product(stream, x, weight)
            }
            _ => {
                let [output] = self.outputs(backend, input)?;
                backend.add(stream, &output)
            }
        }
    }

    /// Its order and format on the backend.
    ///
    /// # Panics
    /// If it has none.
    pub fn order(&self) -> &B::Site {
        match &self.treatment {
            Treatment::Source => unreachable!("only sites with a format are quantized"),
            Treatment::Arranged(site) | Treatment::Quantized(site) => site,
        }
    }

    /// The activation `x` as dense linears behind a site with a format see it, whatever its linears are.
    pub fn seen(&self, backend: &B, x: &B::Activation) -> Result<B::Activation> {
        match &self.treatment {
            Treatment::Source => unreachable!("only sites with a format are quantized"),
            Treatment::Arranged(site) => backend.permute(x, site),
            Treatment::Quantized(site) => {
                backend.dequantize(&backend.quantize(x, site, &self.name)?)
            }
        }
    }

    /// Its order, where its activation is quantized, all its linears are packed and nobody looks at what enters: a backend
    /// may then make codes in one step with what comes before.
    fn fusible_order(&self, observer: &Observer<B>) -> Option<&B::Site> {
        let packed = self.linears.iter().all(|linear| matches!(linear, Linear::Packed(_)));
        match &self.treatment {
            Treatment::Quantized(site) if packed && observer.0.is_none() => Some(site),
            _ => None,
        }
    }

    fn input(&self, backend: &B, x: B::Activation, observer: &mut Observer<B>) -> Result<Input<B>> {
        observer.see(Seen::Entering(self.at), &x)?;
        let float = match &self.treatment {
            Treatment::Source => x,
            Treatment::Arranged(site) => backend.permute(&x, site)?,
            Treatment::Quantized(site) => {
                let rows = backend.quantize(&x, site, &self.name)?;
                drop(x);
                if self.linears.iter().any(|linear| matches!(linear, Linear::Packed(_))) {
                    return Ok(Input::Rows(rows));
                }
                backend.dequantize(&rows)?
            }
        };
        observer.see(Seen::Site(self.at), &float)?;
        Ok(Input::Float(float))
    }
}
