/*! What one batch of both streams adds to the sums of a site that is quantized sequentially. */

use super::pass::Pair;
use crate::Result;
use crate::backend::{AccumulatedError, Backend, ErrorKind, Tensor};
use crate::model::block::{Block, Input, Observer};
use crate::model::experts::RoutedTokens;
use crate::model::sites::{MLP_IN, SiteKind, SiteSpec};
use crate::pipeline::division::SiteSums;
use crate::pipeline::quantizer::BlockQuantizer;

/// One batch of both streams at one site.
pub(super) struct Visit<'v, B: Backend> {
    pub(super) quantizer: &'v BlockQuantizer<'v, B>,
    pub(super) blocks: &'v Pair<Block<B>>,
    pub(super) spec: &'v SiteSpec,
    pub(super) at: usize,
    /// The tokens that reach an expert's own site.
    pub(super) routed: Option<&'v RoutedTokens>,
    /// The negated bias of a linear that adds to the hidden states.
    pub(super) bias: Option<&'v B::Hidden>,
}

impl<B: Backend> Visit<'_, B> {
    /// Adds the batch to the sums. Returns what the site's linears read of the quantized stream.
    pub(super) fn add(
        &self,
        states: &Pair<&mut B::Hidden>,
        sums: &mut SiteSums<B>,
    ) -> Result<Input<B>> {
        let backend = self.quantizer.backend;
        let SiteSums { tokens, gram, correction } = sums;
        let (mut seen, rows) = match self.read(states.quantized)? {
            Input::Rows(rows) => (backend.dequantize(&rows)?, Some(rows)),
            Input::Float(x) => (x, None),
        };
        // The output of an expert is scaled by the routing weight of the token, and so are its errors.
        if let Some(RoutedTokens { weights, .. }) = self.routed {
            backend.scale_rows(&mut seen, weights)?;
        }
        *tokens += seen.rows() as u64;
        match correction {
            None => backend.add_gram(gram, &seen)?,
            Some(AccumulatedError { cross, kind, .. }) => {
                let left = match kind {
                    ErrorKind::Inputs => self.lost_inputs(states.source, &seen)?,
                    ErrorKind::Outputs => self.wanted_outputs(states)?,
                };
                backend.add_gram_and_cross(gram, cross, &left, &seen)?;
            }
        }
        Ok(rows.map_or(Input::Float(seen), Input::Rows))
    }

    /// What the site's linears read of the quantized stream.
    fn read(&self, x: &B::Hidden) -> Result<Input<B>> {
        let BlockQuantizer { backend, attention, .. } = self.quantizer;
        let block = &self.blocks.quantized;
        match (self.spec.kind, self.spec.expert.zip(self.routed)) {
            (SiteKind::AttnIn, _) => block.attn_in(*backend, x),
            (SiteKind::AttnOut, _) => block.attn_out(*backend, attention, x),
            (SiteKind::MlpIn, _) => block.mlp_in(*backend, x),
            (SiteKind::MlpAct, None) => block.mlp_act(*backend, x),
            (SiteKind::MlpAct, Some((expert, routed))) => {
                let normed = block.entering(*backend, MLP_IN, x)?;
                block.mlp_act_of(*backend, expert, &normed, routed)
            }
        }
    }

    /// What the source's linears see more than the quantized block's, which see `seen`.
    fn lost_inputs(&self, source: &B::Hidden, seen: &B::Activation) -> Result<B::Activation> {
        let BlockQuantizer { backend, full_attention, .. } = self.quantizer;
        let (block, unobserved) = (&self.blocks.source, &mut Observer::none());
        let x0 = match (self.spec.kind, self.spec.expert.zip(self.routed)) {
            (SiteKind::AttnIn | SiteKind::MlpIn, _) => block.entering(*backend, self.at, source)?,
            (SiteKind::AttnOut, _) => block.heads(*backend, full_attention, source, unobserved)?,
            (SiteKind::MlpAct, None) => block.gated(*backend, source, unobserved)?,
            (SiteKind::MlpAct, Some((expert, routed))) => {
                let normed = block.entering(*backend, MLP_IN, source)?;
                block.gated_of(*backend, expert, &normed, routed, unobserved)?
            }
        };
        let order = self.blocks.quantized.sites[self.at].order();
        let mut wanted = backend.permute(&x0, order)?;
        if let Some(RoutedTokens { weights, .. }) = self.routed {
            backend.scale_rows(&mut wanted, weights)?;
        }
        backend.difference(&wanted, seen)
    }

    /// The output that the site's linear should have: it takes the quantized stream to where the source's is.
    fn wanted_outputs(&self, states: &Pair<&mut B::Hidden>) -> Result<B::Activation> {
        let (backend, block) = (self.quantizer.backend, &self.blocks.source);
        let site = &block.sites[self.at];
        let mut wanted = backend.hidden_difference(states.source, states.quantized)?;
        let experts = self.spec.expert.zip(self.routed);
        // An output is multiplied before it is added.
        let mut part = 1.0 / site.leaving.factor;
        if let Some((_, routed)) = experts {
            // No expert's output is in the difference yet, and each of a token's experts makes up for its part of it.
            let router = block.router.as_ref().expect("experts have a router");
            part /= router.of_a_token() as f32;
            wanted = backend.select_rows(&wanted, &routed.tokens)?;
        }
        if part != 1.0 {
            let parts = vec![part; wanted.rows()];
            backend.scale_rows(&mut wanted, &parts)?;
        }
        if let Some((expert, routed)) = experts {
            let normed = block.entering(backend, MLP_IN, states.source)?;
            let x0 = block.gated_of(backend, expert, &normed, routed, &mut Observer::none())?;
            let mut output = site.dense_product(backend, &x0)?;
            let weights: Vec<f32> = routed.weights.iter().map(|weight| -weight).collect();
            backend.scale_rows(&mut output, &weights)?;
            wanted = backend.difference(&wanted, &output)?;
        } else if let Some(bias) = self.bias {
            backend.add_bias(&mut wanted, bias)?;
        }
        Ok(wanted)
    }
}
