//! Losses and differences of distributions, with logits made in parts that stay in the cache.

use rayon::prelude::*;

use super::gemm::gemm;
use super::gemm_pack::{Panels, Rows};
use super::{Cpu, HostTensor, elementwise};
use crate::Result;
use crate::backend::{Measurement, Prediction};
use crate::quant::rows::QuantizedRows;

/// Rows that pass the output head together: its columns are read once for all of them.
const HEAD_ROWS: usize = 240;
/// Columns of the output head whose logits are made together, so that they stay in L2.
const HEAD_COLUMNS: usize = 1024;

/// Rows whose logits over all tokens a thread holds, twice, for their divergence.
const DIVERGENCE_ROWS: usize = 24;

/// `|x - y|^2 / |y|^2`.
fn relative_squared_error(x: &[f32], y: &[f32]) -> f64 {
    let (mut change, mut total) = (0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        change += (f64::from(*x) - f64::from(*y)).powi(2);
        total += f64::from(*y).powi(2);
    }
    if change == 0.0 { 0.0 } else { change / total }
}

/// A token's cross entropy while the logits come in parts.
#[derive(Clone, Copy)]
struct Loss {
    /// `ln(sum(exp))` of the logits so far.
    log_sum: f64,
    /// The token's own logit.
    target: f64,
    /// The largest logit so far and the first token that has it.
    most: (f32, usize),
}

impl Default for Loss {
    fn default() -> Self {
        Self { log_sum: f64::NEG_INFINITY, target: f64::NAN, most: (f32::NEG_INFINITY, usize::MAX) }
    }
}

impl Loss {
    /// Takes in the `ln(sum(exp))` of the next part. A NaN stays one.
    fn add(&mut self, log_sum: f64) {
        let (former, next) = (self.log_sum, log_sum);
        self.log_sum = match former.partial_cmp(&next) {
            None => f64::NAN,
            _ if former == f64::NEG_INFINITY => next,
            Some(std::cmp::Ordering::Less) => next + (former - next).exp().ln_1p(),
            Some(_) => former + (next - former).exp().ln_1p(),
        };
    }

    /// Takes in the next logits, those of the tokens from `first` on.
    fn look(&mut self, logits: &[f32], first: usize) {
        // In lanes, so that no comparison waits for the one before.
        let mut lanes = [f32::NEG_INFINITY; 32];
        let (chunks, rest) = logits.as_chunks::<32>();
        for logits in chunks {
            for (lane, logit) in lanes.iter_mut().zip(logits) {
                *lane = if *logit > *lane { *logit } else { *lane };
            }
        }
        let most = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
        if most > self.most.0 {
            let at = logits.iter().position(|logit| *logit == most);
            self.most = (most, first + at.expect("the largest is one of them"));
        }
    }

    fn nats(&self) -> f64 {
        self.log_sum - self.target
    }
}

impl Cpu {
    /// The losses of `targets`, `(row of x, token)` each; with `ARGMAX` the argmax is found too. The logits of a
    /// row are made once for all targets of it that follow one another.
    fn losses<const ARGMAX: bool>(
        &self,
        x: &HostTensor,
        head: &Panels,
        targets: &[(usize, usize)],
    ) -> Vec<Loss> {
        let (hidden, vocabulary) = (x.columns, head.n());
        let by_row: Vec<&[(usize, usize)]> = targets.chunk_by(|a, b| a.0 == b.0).collect();
        by_row
            .par_chunks(HEAD_ROWS)
            .map_init(
                || (vec![0f32; HEAD_ROWS * hidden], vec![0f32; HEAD_ROWS * HEAD_COLUMNS]),
                |(rows, logits), by_row| {
                    for (to, targets) in rows.chunks_mut(hidden).zip(by_row) {
                        to.copy_from_slice(&x.data[targets[0].0 * hidden..][..hidden]);
                    }
                    let rows = Rows::new(rows, by_row.len(), hidden);
                    let mut losses: Vec<Vec<Loss>> =
                        by_row.iter().map(|targets| vec![Loss::default(); targets.len()]).collect();
                    for first in (0..vocabulary).step_by(HEAD_COLUMNS) {
                        let columns = first..(first + HEAD_COLUMNS).min(vocabulary);
                        let width = columns.len();
                        let part = head.part(columns.clone(), 0..hidden);
                        gemm(self.isa, rows, part, logits, width, false);
                        for ((losses, logits), targets) in
                            losses.iter_mut().zip(logits.chunks(width)).zip(by_row)
                        {
                            losses[0].add(elementwise::log_sum_exp(self.isa, logits));
                            if ARGMAX {
                                losses[0].look(logits, first);
                            }
                            for (loss, (_, token)) in losses.iter_mut().zip(*targets) {
                                if columns.contains(token) {
                                    loss.target = f64::from(logits[token - first]);
                                }
                            }
                        }
                    }
                    let of_row = |losses: Vec<Loss>| {
                        let all = losses[0];
                        losses.into_iter().map(move |loss| Loss { target: loss.target, ..all })
                    };
                    losses.into_iter().flat_map(of_row).collect::<Vec<Loss>>()
                },
            )
            .flatten()
            .collect()
    }
}

impl Measurement for Cpu {
    fn cross_entropy(
        &self,
        x: &HostTensor,
        head: &Panels,
        tokens: &[u32],
        seq_len: usize,
    ) -> Result<Vec<f64>> {
        // The row that predicts token t of a window is t - 1; a window's last row predicts nothing.
        let targets: Vec<(usize, usize)> = (0..tokens.len())
            .filter(|token| token % seq_len != 0)
            .map(|token| (token - 1, tokens[token] as usize))
            .collect();
        Ok(self.losses::<false>(x, head, &targets).iter().map(Loss::nats).collect())
    }

    fn predict(
        &self,
        x: &HostTensor,
        head: &Panels,
        targets: &[(u32, u32)],
    ) -> Result<Vec<Prediction>> {
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|target| targets[*target].0);
        let sorted = order.iter().map(|target| targets[*target]);
        let sorted: Vec<_> = sorted.map(|(row, token)| (row as usize, token as usize)).collect();
        let mut predictions = vec![Prediction { nats: f64::NAN, argmax: false }; targets.len()];
        let losses = self.losses::<true>(x, head, &sorted);
        for ((target, (_, token)), loss) in order.into_iter().zip(sorted).zip(losses) {
            predictions[target] = Prediction { nats: loss.nats(), argmax: loss.most.1 == token };
        }
        Ok(predictions)
    }

    fn relative_squared_error(&self, x: &HostTensor, original: &HostTensor) -> Result<Vec<f64>> {
        let rows = x.data.par_chunks(x.columns).zip(original.data.par_chunks(x.columns));
        Ok(rows.map(|(x, y)| relative_squared_error(x, y)).collect())
    }

    fn kl_divergence(
        &self,
        x: &HostTensor,
        original: &HostTensor,
        head: &Panels,
    ) -> Result<Vec<f64>> {
        let (hidden, vocabulary) = (x.columns, head.n());
        let part = DIVERGENCE_ROWS * hidden;
        let parts = x.data.par_chunks(part).zip(original.data.par_chunks(part));
        let divergences = parts
            .map_init(
                || {
                    [
                        vec![0f32; DIVERGENCE_ROWS * vocabulary],
                        vec![0f32; DIVERGENCE_ROWS * vocabulary],
                    ]
                },
                |[changed, logits], (x, original)| {
                    let rows = x.len() / hidden;
                    for (x, logits) in [(x, &mut *changed), (original, &mut *logits)] {
                        let rows = Rows::new(x, rows, hidden);
                        let all = head.part(0..vocabulary, 0..hidden);
                        gemm(self.isa, rows, all, logits, vocabulary, false);
                    }
                    let rows = changed.chunks(vocabulary).zip(logits.chunks(vocabulary)).take(rows);
                    rows.map(|(x, y)| elementwise::kl_divergence(self.isa, x, y))
                        .collect::<Vec<f64>>()
                },
            )
            .flatten()
            .collect();
        Ok(divergences)
    }

    fn fetch_rows(&self, x: &QuantizedRows) -> Result<QuantizedRows> {
        Ok(x.clone())
    }

    fn restore_rows(&self, x: &QuantizedRows) -> Result<QuantizedRows> {
        Ok(x.clone())
    }
}
