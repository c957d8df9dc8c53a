/*! Losses, divergences and other sums over tokens, channels and the vocabulary. */

use super::gpu::Buffer;
use super::kernels::reduce::{
    Argmax, CrossEntropy, EnergyParts, KlDivergence, RelativeSquaredErrors, SumParts,
};
use super::product::Precision;
use super::slice::{In, Out};
use super::tensor::{Activation, Dense, Hidden};
use super::{ActivationPart, Cuda};
use crate::Result;
use crate::backend::Prediction;

/// Bytes of logits held together.
const LOGITS_BYTES: usize = 256 << 20;
/// Tokens whose squares one block sums.
const ENERGY_TOKENS: usize = 512;

impl Cuda {
    pub(super) fn add_energy(&self, x: &Activation, energy: &mut [f64]) -> Result<()> {
        let (tokens, channels) = (x.rows, x.columns);
        assert_eq!(energy.len(), channels, "channels of x and of the energies");
        let count = tokens.div_ceil(ENERGY_TOKENS);
        let parts = self.gpu.alloc(8 * count * channels)?;
        self.kernels.launch(&EnergyParts {
            x: x.half().into(),
            tokens,
            channels,
            tokens_per_part: ENERGY_TOKENS,
            parts: (&parts).into(),
        })?;
        self.sum_parts(&parts, count, energy)
    }

    /// Adds the sums of `parts` `[count, channels]`, in order, to `sums`.
    pub(super) fn sum_parts(&self, parts: &Buffer, count: usize, sums: &mut [f64]) -> Result<()> {
        let channels = sums.len();
        let total = self.gpu.alloc(8 * channels)?;
        self.kernels.launch(&SumParts {
            parts: parts.into(),
            count,
            channels,
            sums: (&total).into(),
        })?;
        let total = total.download::<f64>(0..8 * channels)?;
        sums.iter_mut().zip(total).for_each(|(sum, more)| *sum += more);
        Ok(())
    }

    pub(super) fn cross_entropy(
        &self,
        x: &Activation,
        head: &Dense,
        tokens: &[u32],
        seq_len: usize,
    ) -> Result<Vec<f64>> {
        let rows = x.rows;
        // Row t predicts token t + 1; a window's last row predicts nothing and its loss is dropped.
        let targets: Vec<u32> =
            (1..=rows).map(|token| if token % seq_len == 0 { 0 } else { tokens[token] }).collect();
        let nats = self.nats(x, head, &targets, |_, _| Ok(()))?;
        let windows = nats.chunks(seq_len).flat_map(|window| &window[..window.len() - 1]);
        Ok(windows.copied().collect())
    }

    /// What each row predicts of its token.
    pub(super) fn predictions(
        &self,
        x: &Activation,
        head: &Dense,
        tokens: &[u32],
    ) -> Result<Vec<Prediction>> {
        let argmax = self.gpu.alloc(4 * x.rows)?;
        let nats = self.nats(x, head, tokens, |logits, ActivationPart { first, count, .. }| {
            self.kernels.launch(&Argmax {
                logits: logits.into(),
                vocabulary: head.rows,
                tokens: Out::from(&argmax).skip(first),
                rows: count,
            })
        })?;
        let argmax = argmax.download::<u32>(0..4 * x.rows)?;
        let rows = nats.into_iter().zip(argmax).zip(tokens);
        let prediction =
            |((nats, most), token): ((f64, u32), &u32)| Prediction { nats, argmax: most == *token };
        Ok(rows.map(prediction).collect())
    }

    /// Negative log likelihood of each row's target. `look` is shown the logits of the rows, some at a time.
    fn nats(
        &self,
        x: &Activation,
        head: &Dense,
        targets: &[u32],
        look: impl Fn(&Buffer, ActivationPart<'_>) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let (rows, vocabulary) = (x.rows, head.rows);
        assert_eq!(rows, targets.len(), "a target for each row");
        let part = (LOGITS_BYTES / (4 * vocabulary)).clamp(1, rows.max(1));
        let logits = self.gpu.alloc(4 * part * vocabulary)?;
        let targets = self.gpu.upload(targets)?;
        let nats = self.gpu.alloc(8 * rows)?;
        for first in (0..rows).step_by(part) {
            let count = part.min(rows - first);
            let part = ActivationPart { x, first, count };
            self.multiply(part, head, &logits, Precision::HalfToFloat, false)?;
            self.kernels.launch(&CrossEntropy {
                logits: (&logits).into(),
                targets: In::from(&targets).skip(first),
                vocabulary,
                nats: Out::from(&nats).skip(first),
                rows: count,
            })?;
            look(&logits, part)?;
        }
        nats.download::<f64>(0..8 * rows)
    }

    /// `|x - y|^2 / |y|^2` of each row of two tensors of hidden states.
    pub(super) fn relative_squared_error(&self, x: &Hidden, original: &Hidden) -> Result<Vec<f64>> {
        let errors = self.gpu.alloc(8 * x.rows)?;
        self.kernels.launch(&RelativeSquaredErrors {
            x: x.float().into(),
            y: original.float().into(),
            columns: x.columns,
            errors: (&errors).into(),
            rows: x.rows,
        })?;
        errors.download::<f64>(0..8 * x.rows)
    }

    /// Each row's divergence from `original`'s.
    pub(super) fn kl_divergence(
        &self,
        x: &Activation,
        original: &Activation,
        head: &Dense,
    ) -> Result<Vec<f64>> {
        let (rows, vocabulary) = (x.rows, head.rows);
        let part = (LOGITS_BYTES / (8 * vocabulary)).clamp(1, rows.max(1));
        let changed = self.gpu.alloc(4 * part * vocabulary)?;
        let logits = self.gpu.alloc(4 * part * vocabulary)?;
        let nats = self.gpu.alloc(8 * rows)?;
        for first in (0..rows).step_by(part) {
            let count = part.min(rows - first);
            for (x, logits) in [(x, &changed), (original, &logits)] {
                let part = ActivationPart { x, first, count };
                self.multiply(part, head, logits, Precision::HalfToFloat, false)?;
            }
            self.kernels.launch(&KlDivergence {
                changed: (&changed).into(),
                logits: (&logits).into(),
                vocabulary,
                nats: Out::from(&nats).skip(first),
                rows: count,
            })?;
        }
        nats.download::<f64>(0..8 * rows)
    }
}
