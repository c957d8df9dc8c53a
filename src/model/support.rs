/*! Refuses by name what an [`Architecture`] can describe and the forward pass does not compute. */

use super::architecture::{Activation, Architecture, Mlp, Multipliers, Norms, QkNorm};
use crate::{Error, Result};

impl Architecture {
    /// Refuses a network that the forward pass does not compute, so that no field is ignored in silence.
    ///
    /// # Errors
    /// Bad input that names the file, the family and the first thing that is not computed.
    pub(super) fn check_supported(&self, file: &str) -> Result<()> {
        match self.unsupported() {
            None => Ok(()),
            Some(what) => Err(Error::input(format!(
                "{file}: a network of type {} with {what}, which this version does not compute",
                self.family
            ))
            .hint("newer versions may: this one runs networks whose blocks are like Llama's")),
        }
    }

    /// What the network has besides norms before attention and MLP, SiLU with a gate, and RoPE over entire heads: neither the
    /// backward pass nor blocks of random weights compute it.
    pub fn not_plain(&self) -> Option<&'static str> {
        let reordered = (0..self.blocks).any(|block| self.head_order(block).is_some());
        let refused = [
            (self.experts.is_some(), "experts"),
            (self.norms.before.is_none(), "blocks without norms before attention and MLP"),
            (self.norms.after.is_some(), "norms after attention and MLP"),
            (self.norms.unit_offset, "norm weights that are stored less one"),
            (
                self.multipliers != Multipliers::default(),
                "factors of embedding, residual stream or logits",
            ),
            (self.qk_norm == QkNorm::AllHeads, "a norm over all heads together"),
            (self.query_scaling.is_some(), "queries that are scaled by their position"),
            (reordered, "RoPE over a part of each head or of neighbouring channels"),
            (self.mlp != Mlp::default(), "another MLP than SiLU with a gate"),
        ];
        refused.into_iter().find_map(|(found, what)| found.then_some(what))
    }

    /// What the network has that the forward pass does not compute.
    fn unsupported(&self) -> Option<&'static str> {
        // Every field is named, so that adding one fails to compile until it is decided here.
        let Self {
            family: _,
            blocks: _,
            hidden: _,
            intermediate: _,
            heads: _,
            kv_heads: _,
            head_dim: _,
            vocabulary: _,
            norm_epsilon: _,
            norms: Norms { before, after, unit_offset: _ },
            tied: _,
            max_positions: _,
            attention: _,
            attention_scale: _,
            query_scaling: _,
            multipliers: Multipliers { embedding: _, residual, logits: _ },
            biases: _,
            qk_norm: _,
            mlp: Mlp { activation, gated },
            experts,
            fused: _,
            prediction_blocks: _,
            remark: _,
        } = self;
        let unnormed = before.is_none() && after.is_none();
        let changes_outputs =
            after.is_some() || *residual != 1.0 || *activation != Activation::Silu;
        let refused = [
            (unnormed, "no norms"),
            (*activation == Activation::ReluSquared, "another activation than SiLU and GELU"),
            (!*gated, "an MLP without a gate"),
            (
                experts.is_some() && (changes_outputs || before.is_none()),
                "experts, and norms, factors or activations of its own",
            ),
        ];
        refused.into_iter().find_map(|(found, what)| found.then_some(what))
    }
}

#[cfg(test)]
#[path = "support_tests.rs"]
mod tests;
