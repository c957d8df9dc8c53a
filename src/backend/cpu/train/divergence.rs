//! The divergence at the network's end and its gradient, some tokens at a time.

use rayon::prelude::*;

use super::super::elementwise::{self, exp};
use super::super::gemm::{Rows, gemm};
use super::super::isa::Isa;
use super::LossHead;

/// Rows whose logits a thread holds, twice.
const LOGIT_ROWS: usize = 48;

/// The divergence of each row, and its gradient in `d_x`; all `[rows, hidden]`.
pub(super) fn backward(
    isa: Isa,
    x: &[f32],
    original: &[f32],
    hidden: usize,
    head: &LossHead,
    d_x: &mut [f32],
) -> Vec<f64> {
    let vocabulary = head.logits.n();
    let part = LOGIT_ROWS * hidden;
    let parts = x.par_chunks(part).zip(original.par_chunks(part)).zip(d_x.par_chunks_mut(part));
    let nats = parts.map_init(
        || [(); 2].map(|()| vec![0f32; LOGIT_ROWS * vocabulary]),
        |[changed, logits], ((x, original), d_x)| {
            let rows = x.len() / hidden;
            for (x, logits) in [(x, &mut *changed), (original, &mut *logits)] {
                gemm(isa, Rows::new(x, rows, hidden), &head.logits, logits, vocabulary, false);
            }
            let pairs = changed.chunks_mut(vocabulary).zip(logits.chunks(vocabulary)).take(rows);
            let nats: Vec<f64> = pairs.map(|(x, y)| row_backward(isa, x, y)).collect();
            let d_logits = Rows::new(changed, rows, vocabulary);
            gemm(isa, d_logits, &head.hidden, d_x, hidden, false);
            nats
        },
    );
    nats.flatten().collect()
}

/// The divergence of a row; `q - p` takes the place of its logits.
fn row_backward(isa: Isa, changed: &mut [f32], logits: &[f32]) -> f64 {
    let nats = elementwise::kl_divergence(isa, changed, logits);
    let [of_q, of_p] = [&*changed, logits].map(|row| elementwise::log_sum_exp(isa, row) as f32);
    for (changed, logit) in changed.iter_mut().zip(logits) {
        *changed = exp(*changed - of_q) - exp(logit - of_p);
    }
    nats
}
