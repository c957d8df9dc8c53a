/*! Sums over tokens, over channels and over the vocabulary. */

use super::gpu::Buffer;
use super::launch::{Geometry, arguments};
use super::product::Precision;
use super::tensor::{Activation, Dense, Hidden};
use super::{Cuda, Part, THREADS};
use crate::Result;
use crate::backend::Prediction;

/// Bytes of logits held at once.
const LOGITS_BYTES: usize = 256 << 20;
/// Tokens whose squares one block sums.
const ENERGY_TOKENS: usize = 512;
/// Channels that one block sums, as in reduce.cu.
const ENERGY_CHANNELS: usize = 64;

impl Cuda {
    pub(super) fn add_energy(&self, x: &Activation, energy: &mut [f64]) -> Result<()> {
        let (tokens, channels) = (x.rows, x.columns);
        assert_eq!(energy.len(), channels, "channels of x and of the energies");
        let count = tokens.div_ceil(ENERGY_TOKENS);
        let parts = self.gpu.alloc(8 * count * channels)?;
        self.launch(
            "reduce",
            "energy_parts",
            Geometry {
                grid: (channels.div_ceil(ENERGY_CHANNELS), count, 1),
                threads: THREADS,
                shared_bytes: 0,
            },
            arguments![x.half(), tokens, channels, ENERGY_TOKENS, &parts],
        )?;
        self.sum_parts(&parts, count, energy)
    }

    /// Adds the sums of `parts` `[count, channels]`, in order, to `sums`.
    pub(super) fn sum_parts(&self, parts: &Buffer, count: usize, sums: &mut [f64]) -> Result<()> {
        let channels = sums.len();
        let total = self.gpu.alloc(8 * channels)?;
        self.launch(
            "reduce",
            "sum_parts",
            Geometry::over(channels, THREADS),
            arguments![parts, count, channels, &total],
        )?;
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
        let likeliest = self.gpu.alloc(4 * x.rows)?;
        let nats = self.nats(x, head, tokens, |logits, Part { first, count }| {
            self.launch(
                "reduce",
                "likeliest",
                Geometry::line(count, THREADS),
                arguments![logits, head.rows, likeliest.pointer() + 4 * first as u64],
            )
        })?;
        let likeliest = likeliest.download::<u32>(0..4 * x.rows)?;
        let rows = nats.into_iter().zip(likeliest).zip(tokens);
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
        look: impl Fn(&Buffer, Part) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let (rows, vocabulary) = (x.rows, head.rows);
        assert_eq!(rows, targets.len(), "a target for each row");
        let part = (LOGITS_BYTES / (4 * vocabulary)).clamp(1, rows.max(1));
        let logits = self.gpu.alloc(4 * part * vocabulary)?;
        let targets = self.gpu.upload(targets)?;
        let nats = self.gpu.alloc(8 * rows)?;
        for first in (0..rows).step_by(part) {
            let count = part.min(rows - first);
            let rows = Part { first, count };
            self.multiply_part(x, rows, head, &logits, Precision::HalfToFloat, false)?;
            self.launch(
                "reduce",
                "cross_entropy",
                Geometry::line(count, THREADS),
                arguments![
                    &logits,
                    targets.pointer() + 4 * first as u64,
                    vocabulary,
                    nats.pointer() + 8 * first as u64
                ],
            )?;
            look(&logits, Part { first, count })?;
        }
        nats.download::<f64>(0..8 * rows)
    }

    /// `|x - y|^2 / |y|^2` of each row of two tensors of hidden states.
    pub(super) fn relative_squared_error(&self, x: &Hidden, original: &Hidden) -> Result<Vec<f64>> {
        let changes = self.gpu.alloc(8 * x.rows)?;
        self.launch(
            "reduce",
            "row_changes",
            Geometry::line(x.rows, THREADS),
            arguments![x.float(), original.float(), x.columns, &changes],
        )?;
        changes.download::<f64>(0..8 * x.rows)
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
                let rows = Part { first, count };
                self.multiply_part(x, rows, head, logits, Precision::HalfToFloat, false)?;
            }
            self.launch(
                "reduce",
                "divergence",
                Geometry::line(count, THREADS),
                arguments![&changed, &logits, vocabulary, nats.pointer() + 8 * first as u64],
            )?;
        }
        nats.download::<f64>(0..8 * rows)
    }
}
