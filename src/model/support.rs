/*! Refuses by name what an [`Architecture`] can describe and the forward pass does not compute. */

use super::architecture::{
    Activation, Architecture, Experts, Mlp, Multipliers, NormPlacement, Norms, QkNorm, RouterKind,
};
use super::window::ALIKE;
use crate::{Error, Result};

impl Architecture {
    /// Refuses a network that the forward pass does not compute, so that no field is ignored in silence.
    ///
    /// # Errors
    /// Bad input that names the file, the family and the first thing that is not computed.
    pub(super) fn check_supported(&self, file: &str) -> Result<()> {
        self.check_alike(file)?;
        match self.unsupported() {
            None => Ok(()),
            Some(what) => Err(Error::input(format!(
                "{file}: a network of type {} with {what}, which this version does not compute",
                self.family
            ))
            .hint("newer versions may: this one runs networks whose blocks are like Llama's")),
        }
    }

    /// Refuses blocks with different attention windows.
    fn check_alike(&self, file: &str) -> Result<()> {
        let windows = || self.attention.iter().map(|block| block.window);
        let sliding = windows().flatten().count();
        let blocks = self.blocks;
        let what = if (1..blocks).contains(&sliding) {
            format!("gives {sliding} of {blocks} blocks a sliding window and the others none")
        } else if windows().any(|window| window != self.attention[0].window) {
            "gives blocks sliding windows of several lengths".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::input(format!("{file} {what}")).hint(ALIKE))
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
            norms: Norms { placement, unit_offset },
            tied: _,
            max_positions: _,
            attention,
            attention_scale,
            query_scaling,
            multipliers: Multipliers { embedding, residual, logits },
            biases: _,
            qk_norm,
            mlp: Mlp { activation, gated },
            experts,
            fused: _,
            remark: _,
        } = self;
        let ropes = || attention.iter().map(|block| block.rope.as_ref());
        let refused = [
            (*placement != NormPlacement::Before, "norms after attention and MLP"),
            (*unit_offset, "norm weights that are stored less one"),
            (ropes().any(|rope| rope.is_none()), "blocks without RoPE"),
            (
                ropes().any(|rope| rope != attention[0].rope.as_ref()),
                "a RoPE of its own in each block",
            ),
            (ropes().flatten().any(|rope| rope.share != 1.0), "RoPE over a part of each head"),
            (ropes().flatten().any(|rope| rope.interleaved), "RoPE of neighbouring channels"),
            (attention_scale.is_some(), "a factor of attention of its own"),
            (query_scaling.is_some(), "queries that are scaled by their position"),
            (*embedding != 1.0, "a factor of the embedding"),
            (*residual != 1.0, "a factor of the residual stream"),
            (*logits != 1.0, "a factor of the logits"),
            (*qk_norm == QkNorm::AllHeads, "a norm over all heads together"),
            (*activation != Activation::Silu, "another activation than SiLU"),
            (!*gated, "an MLP without a gate"),
        ];
        let refused = refused.into_iter().find_map(|(found, what)| found.then_some(what));
        refused.or_else(|| experts.as_ref().and_then(Experts::unsupported))
    }
}

impl Experts {
    /// What the experts have that the forward pass does not compute.
    fn unsupported(&self) -> Option<&'static str> {
        let Self {
            count: _,
            per_token: _,
            intermediate: _,
            normalized: _,
            router,
            scale,
            shared,
            dense_blocks: _,
            names: _,
        } = self;
        let refused = [
            (*router != RouterKind::Softmax, "a router by sigmoids"),
            (*scale != 1.0, "a factor of the routing weights"),
            (shared.is_some(), "a shared expert"),
        ];
        refused.into_iter().find_map(|(found, what)| found.then_some(what))
    }
}

#[cfg(test)]
#[path = "support_tests.rs"]
mod tests;
