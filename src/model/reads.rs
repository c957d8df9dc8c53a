//! What the linears of a block's sites read, each as the forward pass computes it: codes, where a site is quantized.

use super::architecture::Activation;
use super::attention::AttentionSpecs;
use super::block::{Block, Observer};
use super::experts::RoutedTokens;
use super::site::Input;
use super::sites::{ATTN_IN, ATTN_OUT, MLP_ACT, MLP_IN};
use crate::Result;
use crate::backend::Forward;

impl<B: Forward> Block<B> {
    /// What the linears of attn_in read for the hidden states `x`, as the forward pass computes it.
    pub fn attn_in(&self, backend: &B, x: &B::Hidden) -> Result<Input<B>> {
        self.read_entering(backend, ATTN_IN, x)
    }

    /// What o reads for the hidden states `x`, likewise.
    pub fn attn_out(
        &self,
        backend: &B,
        attention: &AttentionSpecs,
        x: &B::Hidden,
    ) -> Result<Input<B>> {
        let heads = self.heads(backend, attention, x, &mut Observer::none())?;
        self.sites[ATTN_OUT].read(backend, &heads)
    }

    /// What gate and up read for the hidden states `x` after attention, likewise.
    pub fn mlp_in(&self, backend: &B, x: &B::Hidden) -> Result<Input<B>> {
        self.read_entering(backend, MLP_IN, x)
    }

    /// What down reads for the hidden states `x` after attention, likewise. Only without experts.
    pub fn mlp_act(&self, backend: &B, x: &B::Hidden) -> Result<Input<B>> {
        let pair = self.gate_and_up(backend, x, &mut Observer::none())?;
        self.read_after_activation(backend, MLP_ACT, pair)
    }

    /// What the down of one expert reads for its tokens of the normed hidden states, likewise.
    pub fn mlp_act_of(
        &self,
        backend: &B,
        expert: usize,
        normed: &B::Activation,
        routed: &RoutedTokens,
    ) -> Result<Input<B>> {
        let observer = &mut Observer::none();
        let pair = self.gate_and_up_of(backend, expert, normed, routed, observer)?;
        self.read_after_activation(backend, MLP_ACT + expert, pair)
    }

    /// What the linear of the mlp_act numbered `at` reads, from gate and up, unobserved.
    fn read_after_activation(
        &self,
        backend: &B,
        at: usize,
        [gate, up]: [B::Activation; 2],
    ) -> Result<Input<B>> {
        let site = &self.sites[at];
        match site.fusible_order(&Observer::none()) {
            Some(order) if self.activation == Activation::Silu => {
                Ok(Input::Rows(backend.silu_quantize(gate, &up, order, &site.name)?))
            }
            _ => site.read(backend, &self.activated(backend, gate, &up)?),
        }
    }

    /// What the linears of attn_in or mlp_in read for the hidden states `x`, unobserved.
    pub(super) fn read_entering(&self, backend: &B, at: usize, x: &B::Hidden) -> Result<Input<B>> {
        let site = &self.sites[at];
        match (site.fusible_order(&Observer::none()), self.norm_before(at)) {
            (Some(order), Some(norm)) => {
                let (epsilon, name) = (self.epsilon, &site.name);
                Ok(Input::Rows(backend.norm_quantize(x, norm, epsilon, order, name)?))
            }
            _ => site.read(backend, &self.entering(backend, at, x)?),
        }
    }
}
