/*! What a device does with a block's matrix products and nothing else: the measure of everything that
consists of such products. */

use std::time::Instant;

use super::cpu::random;
use super::median;
use crate::Result;
use crate::backend::{Backend, Matrix};
use crate::checkpoint::{Dtype, Tensor};
use crate::model::Architecture;
use crate::model::sites::{SiteKind, SiteSpec};

/// Seconds for which the products are repeated: a device that is hot or at its power limit is slower
/// than one that was just woken, and everything that is compared with this rate runs longer still.
const SECONDS: f64 = 3.0;

/// Multiplications and additions a second of the products of one block, all its linears one after another, on
/// `tokens` random tokens.
pub(super) fn products<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    tokens: usize,
) -> Result<f64> {
    let sites = architecture.sites(0);
    let mut weights = Vec::new();
    let mut inputs = Vec::new();
    for site in &sites {
        let ones = backend.upload(Matrix {
            rows: 1,
            columns: site.channels,
            data: vec![1.0; site.channels],
        })?;
        let data = random(tokens * site.channels, 1);
        let x = backend.upload(Matrix { rows: tokens, columns: site.channels, data })?;
        inputs.push(backend.rms_norm(&x, &ones, 1e-5)?);
        let mut own = Vec::new();
        for linear in &site.linears {
            let bytes: Vec<u8> = random(linear.rows * linear.columns, 2)
                .into_iter()
                .flat_map(|value| half::f16::from_f32(value).to_le_bytes())
                .collect();
            let shape = [linear.rows, linear.columns];
            let stored = Tensor::in_memory(&linear.name, Dtype::F16, &shape, &bytes);
            own.push(backend.dense(&backend.load(stored)?, None)?);
        }
        weights.push(own);
    }
    let mut seconds = Vec::new();
    let begin = Instant::now();
    while seconds.len() < 3 || begin.elapsed().as_secs_f64() < SECONDS {
        let start = Instant::now();
        for (x, weights) in inputs.iter().zip(&weights) {
            for weight in weights {
                backend.product(x, weight)?;
            }
        }
        backend.wait()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(product_operations(architecture) * tokens as f64 / median(&mut seconds))
}

/// Multiplications and additions of a block's linears for one token.
pub(super) fn product_operations(architecture: &Architecture) -> f64 {
    architecture.sites(0).iter().map(|site| site_operations(architecture, site)).sum()
}

/// Those of one site's linears.
pub(super) fn site_operations(architecture: &Architecture, site: &SiteSpec) -> f64 {
    let weights = site.linears.iter().map(|linear| linear.rows as f64 * linear.columns as f64);
    let share = match site.kind {
        SiteKind::MlpIn | SiteKind::MlpAct => expert_share(architecture),
        _ => 1.0,
    };
    2.0 * share * weights.sum::<f64>()
}

/// Share of a block's experts that a token goes through; all there is where there are none.
pub(super) fn expert_share(architecture: &Architecture) -> f64 {
    let experts = architecture.experts_of(0);
    experts.map_or(1.0, |experts| experts.per_token as f64 / experts.count as f64)
}

/// Multiplications and additions of a block's causal attention for one token of a window, on average.
pub(super) fn attention_operations(architecture: &Architecture, seq_len: usize) -> f64 {
    let width = (architecture.heads * architecture.head_dim) as f64;
    // Scores and outputs, over half of the window.
    2.0 * 2.0 * width * (seq_len + 1) as f64 / 2.0
}
