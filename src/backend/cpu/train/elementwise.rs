//! Backward of norms and of SiLU.

use rayon::prelude::*;

use super::super::ROWS;
use super::super::elementwise::{dispatch, exp};
use super::super::isa::Isa;

/// Columns of a task that sums over tokens.
const COLUMNS: usize = 64;

/// `d_gate` and, in place of `d_z`, `d_up`.
pub(super) fn silu_mul_backward(
    isa: Isa,
    gate: &[f32],
    up: &[f32],
    d_z: &mut [f32],
    d_gate: &mut [f32],
) {
    dispatch!(isa, silu_body(gate: &[f32], up: &[f32], d_z: &mut [f32], d_gate: &mut [f32]));
}

#[inline(always)]
fn silu_body(gate: &[f32], up: &[f32], d_z: &mut [f32], d_gate: &mut [f32]) {
    for (((gate, up), d_z), d_gate) in gate.iter().zip(up).zip(d_z).zip(d_gate) {
        let logistic = 1.0 / (1.0 + exp(-*gate));
        *d_gate = *d_z * up * (logistic * (1.0 + *gate * (1.0 - logistic)));
        *d_z *= *gate * logistic;
    }
}

/// Adds the gradient with respect to `x` of the norm of each row, `[rows, weight.len()]`, to `d_x`. Returns that with respect
/// to the weight.
pub(super) fn add_norm_backward(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    d_y: &[f32],
    d_x: &mut [f32],
) -> Vec<f32> {
    let n = weight.len();
    let rows = x.par_chunks(n).zip(d_y.par_chunks(n)).zip(d_x.par_chunks_mut(n));
    let inverses = rows.with_min_len(ROWS).map(|((x, d_y), d_x)| {
        let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let inverse = (1.0 / (squares / n as f64 + f64::from(epsilon)).sqrt()) as f32;
        let terms = x.iter().zip(d_y).zip(weight);
        let dot: f64 = terms.map(|((x, d_y), w)| f64::from(*x) * f64::from(*d_y * w)).sum();
        let along = inverse * inverse * (dot / n as f64) as f32;
        for (((d_x, x), d_y), w) in d_x.iter_mut().zip(x).zip(d_y).zip(weight) {
            *d_x += inverse * (d_y * w - x * along);
        }
        inverse
    });
    let inverses: Vec<f32> = inverses.collect();
    let mut d_weight = vec![0.0; n];
    d_weight.par_chunks_mut(COLUMNS).enumerate().for_each(|(chunk, sums)| {
        let columns = chunk * COLUMNS..chunk * COLUMNS + sums.len();
        for ((x, d_y), inverse) in x.chunks(n).zip(d_y.chunks(n)).zip(&inverses) {
            let (x, d_y) = (&x[columns.clone()], &d_y[columns.clone()]);
            for ((sum, x), d_y) in sums.iter_mut().zip(x).zip(d_y) {
                *sum += d_y * (x * inverse);
            }
        }
    });
    d_weight
}
