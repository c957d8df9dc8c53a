/*! The forward pass of a decoder block, written once.

Calibration, evaluation of the source, evaluation of the checkpoint and verification all run this
code; only what a site does with its activation and how a linear is held differ. */

use super::experts::{Router, Share};
use super::sites::{ATTN_IN, ATTN_OUT, MLP_ACT, MLP_IN};
use crate::Result;
use crate::backend::{AttentionSpec, Backend, Placement};

/// A linear on a backend.
pub enum Linear<B: Backend> {
    /// Full precision, `[out, in]`; behind a site with a format, in that site's order.
    Dense(B::Dense),
    /// Quantized, on the integer path.
    Packed(B::Packed),
}

/// What becomes of a site's activation before its linears see it.
pub enum Treatment<B: Backend> {
    /// Nothing: full precision, in the source's channel order.
    Source,
    /// Arranged in the site's order and left in floating point.
    Arranged(B::Site),
    /// Arranged and quantized.
    Quantized(B::Site),
}

/// A site of a block with the linears it feeds.
pub struct Site<B: Backend> {
    /// Its number in the block.
    pub at: usize,
    /// Its full name, for errors.
    pub name: String,
    /// What becomes of the activation.
    pub treatment: Treatment<B>,
    /// q, k, v; or o; or gate, up, of every expert; or down.
    pub linears: Vec<Linear<B>>,
    /// What is added to the output of each, if anything is, `[1, rows]`.
    pub biases: Vec<Option<B::Tensor>>,
}

/// A decoder block, ready to run.
pub struct Block<B: Backend> {
    /// RMSNorm before attention.
    pub attn_norm: B::Tensor,
    /// RMSNorm before the MLP.
    pub mlp_norm: B::Tensor,
    /// RMSNorm's epsilon.
    pub epsilon: f32,
    /// What is taken from the embedded keys before they are quantized, `[1, kv_heads * head_dim]`.
    pub key_mean: Option<B::Tensor>,
    /// RMSNorm of each query and key head before the rotary embedding, `[1, head_dim]`.
    pub head_norms: Option<[B::Tensor; 2]>,
    /// Chooses experts, where there are any.
    pub router: Option<Router<B>>,
    /// attn_in, attn_out, mlp_in, and an mlp_act for each expert, or the one there is.
    pub sites: Vec<Site<B>>,
}

/// What an observer is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// What enters a site, before it is arranged. Not shown where the backend makes codes in one step with what comes
    /// before.
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

/// Sees activations on their way.
pub type Observer<'a, T> = &'a mut dyn FnMut(Seen, &T) -> Result<()>;

impl<B: Backend> Block<B> {
    /// Runs the block over `x` `[tokens, hidden]`, whole windows of `attention.seq_len` rows, in
    /// place.
    pub fn forward(
        &self,
        backend: &B,
        attention: &AttentionSpec,
        x: &mut B::Tensor,
        observer: Observer<B::Tensor>,
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
        x: &mut B::Tensor,
    ) -> Result<()> {
        let unobserved: Observer<B::Tensor> = &mut |_, _| Ok(());
        let [q, k, v] = self.queries_keys_values(backend, x, unobserved)?;
        let key_mean = self.key_mean.as_ref();
        let mut heads = backend.placed_attention(attention, placement, q, k, v, key_mean)?;
        if let Some(wanted) = wanted {
            heads = backend.select_rows(&heads, wanted)?;
            *x = backend.select_rows(x, wanted)?;
        }
        self.sites[ATTN_OUT].apply_onto(backend, heads, x, unobserved)?;
        self.mlp(backend, x, unobserved)
    }

    /// Adds the MLP's output, or that of each token's experts, to the hidden states `x` behind attention.
    pub fn mlp(&self, backend: &B, x: &mut B::Tensor, observer: Observer<B::Tensor>) -> Result<()> {
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
        [gate, up]: [B::Tensor; 2],
        observer: Observer<B::Tensor>,
    ) -> Result<Input<B>> {
        let site = &self.sites[at];
        if let Some(order) = site.packed_order()
            && let Some(rows) = backend.silu_quantize(&gate, &up, order, &site.name)?
        {
            return Ok(Input::Rows(rows));
        }
        site.input(backend, backend.silu_mul(gate, &up)?, observer)
    }

    /// Shows `observer` every site's activation; `x` is used up on the way. The last product is
    /// left out, since nobody looks at what it gives.
    pub fn observe(
        &self,
        backend: &B,
        attention: &AttentionSpec,
        mut x: B::Tensor,
        observer: Observer<B::Tensor>,
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
        x: &B::Tensor,
        observer: Observer<B::Tensor>,
    ) -> Result<B::Tensor> {
        let [q, k, v] = self.queries_keys_values(backend, x, observer)?;
        observer(Seen::Queries, &q)?;
        observer(Seen::Keys, &k)?;
        observer(Seen::Values, &v)?;
        backend.attention(attention, &q, &k, &v, self.key_mean.as_ref())
    }

    /// The outputs of q, k and v for the hidden states `x`, queries and keys normed where heads are.
    fn queries_keys_values(
        &self,
        backend: &B,
        x: &B::Tensor,
        observer: Observer<B::Tensor>,
    ) -> Result<[B::Tensor; 3]> {
        let [mut q, mut k, v] = match self.behind_norm(backend, ATTN_IN, x, &self.attn_norm)? {
            Some(outputs) => outputs,
            None => {
                let normed = backend.rms_norm(x, &self.attn_norm, self.epsilon)?;
                self.sites[ATTN_IN].apply(backend, normed, observer)?
            }
        };
        if let Some([of_q, of_k]) = &self.head_norms {
            backend.head_norm(&mut q, of_q, self.epsilon)?;
            backend.head_norm(&mut k, of_k, self.epsilon)?;
        }
        Ok([q, k, v])
    }

    /// `silu(gate) * up` of one expert for its share of the normed hidden states: what its mlp_act sees.
    pub fn gated_of(
        &self,
        backend: &B,
        expert: usize,
        normed: &B::Tensor,
        share: &Share,
        observer: Observer<B::Tensor>,
    ) -> Result<B::Tensor> {
        let [gate, up] = self.gate_and_up_of(backend, expert, normed, share, observer)?;
        backend.silu_mul(gate, &up)
    }

    /// The outputs of one expert's gate and up.
    fn gate_and_up_of(
        &self,
        backend: &B,
        expert: usize,
        normed: &B::Tensor,
        share: &Share,
        observer: Observer<B::Tensor>,
    ) -> Result<[B::Tensor; 2]> {
        let site = &self.sites[MLP_IN];
        let input = site.input(backend, backend.select_rows(normed, &share.tokens)?, observer)?;
        let output = |linear| site.output(backend, &input, linear);
        Ok([output(2 * expert)?, output(2 * expert + 1)?])
    }

    /// `silu(gate) * up` for the hidden states `x` behind attention: what mlp_act sees. Not where there are experts.
    pub fn gated(
        &self,
        backend: &B,
        x: &B::Tensor,
        observer: Observer<B::Tensor>,
    ) -> Result<B::Tensor> {
        let [gate, up] = self.gate_and_up(backend, x, observer)?;
        backend.silu_mul(gate, &up)
    }

    /// The outputs of gate and up for the hidden states `x` behind attention. Not where there are experts.
    pub fn gate_and_up(
        &self,
        backend: &B,
        x: &B::Tensor,
        observer: Observer<B::Tensor>,
    ) -> Result<[B::Tensor; 2]> {
        if let Some(outputs) = self.behind_norm(backend, MLP_IN, x, &self.mlp_norm)? {
            return Ok(outputs);
        }
        let normed = backend.rms_norm(x, &self.mlp_norm, self.epsilon)?;
        self.sites[MLP_IN].apply(backend, normed, observer)
    }

    /// The outputs of a site behind a norm, where its codes are made in one step with the norm.
    fn behind_norm<const N: usize>(
        &self,
        backend: &B,
        site: usize,
        x: &B::Tensor,
        norm: &B::Tensor,
    ) -> Result<Option<[B::Tensor; N]>> {
        let site = &self.sites[site];
        let Some(order) = site.packed_order() else { return Ok(None) };
        let rows = backend.norm_quantize(x, norm, self.epsilon, order, &site.name)?;
        rows.map(|rows| site.outputs(backend, &Input::Rows(rows))).transpose()
    }
}

/// An activation as the linears of its site see it.
enum Input<B: Backend> {
    /// In floating point.
    Float(B::Tensor),
    /// Quantized.
    Rows(B::Rows),
}

impl<B: Backend> Site<B> {
    /// The outputs of the site's linears for the activation `x` `[tokens, channels]`.
    fn apply<const N: usize>(
        &self,
        backend: &B,
        x: B::Tensor,
        observer: Observer<B::Tensor>,
    ) -> Result<[B::Tensor; N]> {
        let input = self.input(backend, x, observer)?;
        self.outputs(backend, &input)
    }

    fn outputs<const N: usize>(&self, backend: &B, input: &Input<B>) -> Result<[B::Tensor; N]> {
        let linears = 0..self.linears.len();
        let outputs = linears.map(|linear| self.output(backend, input, linear));
        let outputs: Vec<B::Tensor> = outputs.collect::<Result<_>>()?;
        Ok(outputs.try_into().ok().expect("a site is built with the linears of its kind"))
    }

    /// The output of one of its linears.
    fn output(&self, backend: &B, input: &Input<B>, linear: usize) -> Result<B::Tensor> {
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
        x: B::Tensor,
        stream: &mut B::Tensor,
        observer: Observer<B::Tensor>,
    ) -> Result<()> {
        let input = self.input(backend, x, observer)?;
        self.add_onto(backend, &input, stream)
    }

    /// Adds the output of the site's one linear to the residual stream.
    fn add_onto(&self, backend: &B, input: &Input<B>, stream: &mut B::Tensor) -> Result<()> {
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
    pub fn seen(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor> {
        match &self.treatment {
            Treatment::Source => unreachable!("only sites with a format are quantized"),
            Treatment::Arranged(site) => backend.arrange(x, site),
            Treatment::Quantized(site) => {
                backend.dequantize(&backend.quantize(x, site, &self.name)?)
            }
        }
    }

    /// Its order, where its activation is quantized and all its linears are packed.
    fn packed_order(&self) -> Option<&B::Site> {
        let packed = self.linears.iter().all(|linear| matches!(linear, Linear::Packed(_)));
        match &self.treatment {
            Treatment::Quantized(site) if packed => Some(site),
            _ => None,
        }
    }

    fn input(&self, backend: &B, x: B::Tensor, observer: Observer<B::Tensor>) -> Result<Input<B>> {
        observer(Seen::Entering(self.at), &x)?;
        let float = match &self.treatment {
            Treatment::Source => x,
            Treatment::Arranged(site) => backend.arrange(&x, site)?,
            Treatment::Quantized(site) => {
                let rows = backend.quantize(&x, site, &self.name)?;
                drop(x);
                if self.linears.iter().any(|linear| matches!(linear, Linear::Packed(_))) {
                    return Ok(Input::Rows(rows));
                }
                backend.dequantize(&rows)?
            }
        };
        observer(Seen::Site(self.at), &float)?;
        Ok(Input::Float(float))
    }
}
