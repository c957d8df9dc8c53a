/*! Source weights on their way to panels and codes: converted, permuted, compared. */

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::gemm_pack::Panels;
use crate::backend::Matrix;
use crate::checkpoint::Tensor;
use crate::quant::hadamard;
use crate::quant::linear::QuantizedLinear;
use crate::quant::site::{SiteFormat, Transform};
use crate::quant::weights::dequantize;
use crate::{Error, Result};

/// A weight `[out, in]`, with a site in its order and transformed, packed for products. Rows are
/// converted as they are packed: no f32 copy of the entire weight is made. The weight's pages are
/// given back.
pub(super) fn panels(weight: &Tensor<'_>, site: Option<&SiteFormat>) -> Result<Panels> {
    let (rows, columns) = (weight.shape[0], weight.shape[1]);
    let width = site.map_or(columns, SiteFormat::width);
    // Of several rows that cannot be read, the first is reported, whichever thread meets it.
    let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let panels = Panels::from_rows_with(rows, width, |row, out| {
        match (weight.rows_f32(row..row + 1), site) {
            (Ok(values), None) => out.copy_from_slice(&values),
            (Ok(values), Some(site)) => site.permute(&values, out),
            (Err(error), _) => {
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                if failed.as_ref().is_none_or(|(first, _)| row < *first) {
                    *failed = Some((row, error));
                }
            }
        }
    });
    weight.release();
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => Ok(panels),
    }
}

/// A weight with its columns in the order of the site that feeds it, transformed; its pages are
/// given back.
pub(super) fn permuted(weight: &Tensor<'_>, site: &SiteFormat) -> Result<Matrix> {
    const ROWS: usize = 32;
    let (rows, columns, width) = (weight.shape[0], weight.shape[1], site.width());
    let mut data = vec![0.0; rows * width];
    data.par_chunks_mut(ROWS * width).enumerate().try_for_each(|(chunk, out)| {
        let first = chunk * ROWS;
        let rows = weight.rows_f32(first..first + out.len() / width)?;
        for (row, out) in rows.chunks(columns).zip(out.chunks_mut(width)) {
            site.permute(row, out);
        }
        Ok::<(), Error>(())
    })?;
    weight.release();
    Ok(Matrix { rows, columns: width, data })
}

/// `Q - W`.
pub(super) fn difference(quantized: &QuantizedLinear, original: &Matrix) -> Vec<f32> {
    let mut error = dequantize(quantized);
    for (error, weight) in error.iter_mut().zip(&original.data) {
        *error -= weight;
    }
    error
}

/// `sqrt(sum_j s_j |E_j|^2 / sum_j s_j |W_j|^2)` over the source's channels j of energy s_j, with
/// `E = W - Q`.
pub(super) fn energy_error(
    original: &Matrix,
    quantized: &QuantizedLinear,
    site: &SiteFormat,
    energy: &[f64],
) -> f64 {
    let error = difference(quantized, original);
    let mut row = vec![0.0; site.width()];
    let mut sum = |weights: &[f32]| -> f64 {
        weights
            .chunks(site.width())
            .map(|permuted| {
                row.copy_from_slice(permuted);
                if site.transform == Transform::Hadamard {
                    // The transform is its own inverse: back to single channels.
                    for group in
                        row[..site.row.grouped_channels()].chunks_mut(site.row.numbers.group_size)
                    {
                        hadamard::transform(group);
                    }
                }
                row.iter()
                    .zip(&site.order)
                    .filter_map(|(value, &channel)| {
                        let channel = usize::try_from(channel).ok()?;
                        Some(energy[channel] * f64::from(*value) * f64::from(*value))
                    })
                    .sum::<f64>()
            })
            .sum()
    };
    let (lost, total) = (sum(&error), sum(&original.data));
    if total > 0.0 { (lost / total).sqrt() } else { 0.0 }
}
