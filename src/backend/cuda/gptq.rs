/*! The GPTQ sweep: spans of columns swept in registers, products in between (kernels/gptq.cu says why
that is GPTQ). Linears of one site share a factor, and those of one format are swept together. */

use std::sync::Arc;

use super::gpu::Buffer;
use super::launch::{Geometry, arguments};
use super::product::{Operand, Precision, Product};
use super::quantize::Arranging;
use super::tensor::{Codes, Factor, Quantized, Site, Weight};
use super::{Cuda, THREADS};
use crate::backend::Unquantized;
use crate::quant::grid::Grid;
use crate::quant::weights::WeightFormat;
use crate::{Error, Result};

/// Columns of a span, as in gptq.cu.
const SPAN: usize = 128;

/// Where the spans of `format` begin and end. A group that starts in a span either ends in it or starts
/// at its first column, so its scale always comes from weights that carry every update.
fn spans(format: &WeightFormat) -> Vec<(usize, usize)> {
    let (group, grouped) = (format.group_size, format.grouped_channels());
    let step = if group <= SPAN { SPAN / group * group } else { group };
    (0..grouped)
        .step_by(step)
        .flat_map(|start| {
            let end = (start + step).min(grouped);
            (start..end).step_by(SPAN).map(move |first| (first, (first + SPAN).min(end)))
        })
        .collect()
}

/// Weights that are swept together, arranged, row under row.
struct Stack {
    format: WeightFormat,
    rows: usize,
    /// `[rows, width]`, f32.
    original: Buffer,
}

impl Cuda {
    pub(super) fn sweep_all(
        &self,
        linears: &[Unquantized<Weight>],
        site: &Site,
        factor: &Factor,
    ) -> Result<Vec<Quantized>> {
        // Rows that share a scale must not lie in two linears.
        let together = |a: &Unquantized<Weight>, b: &Unquantized<Weight>| {
            a.format == b.format && a.weight.rows.is_multiple_of(a.format.rows_per_scale)
        };
        let mut quantized = Vec::with_capacity(linears.len());
        for part in linears.chunk_by(together) {
            quantized.extend(self.sweep(part, site, Some(factor))?);
        }
        Ok(quantized)
    }

    pub(super) fn round_to_nearest(
        &self,
        linear: &Unquantized<Weight>,
        site: &Site,
    ) -> Result<Quantized> {
        let mut quantized = self.sweep(std::slice::from_ref(linear), site, None)?;
        Ok(quantized.remove(0))
    }

    /// GPTQ with a factor, rounding to nearest without.
    fn sweep(
        &self,
        linears: &[Unquantized<Weight>],
        site: &Site,
        factor: Option<&Factor>,
    ) -> Result<Vec<Quantized>> {
        let stack = self.stack(linears, site)?;
        let Stack { format, rows, original } = &stack;
        let (rows, width) = (*rows, format.width());
        let scale_rows = rows.div_ceil(format.rows_per_scale);
        let codes = Codes {
            codes: self.gpu.alloc(rows * format.grouped_channels())?,
            scales: self.gpu.alloc(4 * scale_rows * format.groups)?,
            outliers: self.outliers(format.outlier_channels, format.outlier_format, rows)?,
        };
        let bad = self.gpu.alloc(4)?;
        bad.fill(0xff)?;
        let updated = match factor {
            None => None,
            Some(factor) => {
                assert_eq!(factor.n, width, "channels of the factor and of the weights");
                let updated = self.gpu.alloc(4 * rows * width)?;
                updated.copy_from(original, 4 * rows * width)?;
                Some(updated)
            }
        };
        let weights = updated.as_ref().unwrap_or(original);
        let difference = match factor {
            Some(_) => Some(self.gpu.alloc(4 * rows * SPAN)?),
            None => None,
        };
        for (first, end) in spans(format) {
            self.sweep_span(
                &stack,
                weights,
                factor,
                (first, end),
                &codes,
                difference.as_ref(),
                &bad,
            )?;
            if let (Some(factor), Some(difference)) = (factor, &difference) {
                // w[:, end..] += (w - q)[:, first..end] R[first..end, end..]
                let entry = |row: usize, column: usize| 4 * (row * width + column) as u64;
                self.products.run(&Product {
                    m: width - end,
                    n: rows,
                    k: end - first,
                    a: Operand {
                        pointer: factor.data.pointer() + entry(first, end),
                        stride: width,
                        transposed: false,
                    },
                    b: Operand { pointer: difference.pointer(), stride: SPAN, transposed: false },
                    c: Operand {
                        pointer: weights.pointer() + entry(0, end),
                        stride: width,
                        transposed: false,
                    },
                    add: true,
                    precision: Precision::Float,
                })?;
            }
        }
        if format.outlier_channels > 0 {
            self.launch(
                "gptq",
                "outlier_block",
                Geometry::over(32 * rows, THREADS),
                arguments![
                    weights,
                    rows,
                    width,
                    format.outlier_channels,
                    codes.outliers.padded(),
                    Self::outlier_ratio(),
                    codes.outliers.codes.as_ref(),
                    codes.outliers.scales.as_ref(),
                    codes.outliers.values.as_ref(),
                    &bad
                ],
            )?;
        }
        let bad = bad.download::<u32>(0..4)?[0];
        let mut first_row = 0;
        let shared = Arc::new(codes);
        linears
            .iter()
            .map(|linear| {
                let rows = linear.weight.rows;
                if (first_row..first_row + rows).contains(&(bad as usize)) {
                    return Err(Error::input(format!(
                        "a magnitude in row {} is not finite, or its scale exceeds f16",
                        bad as usize - first_row
                    ))
                    .context(format!("weights of {}", linear.name)));
                }
                let (format, shared) = (*format, Arc::clone(&shared));
                let quantized = Quantized { format, first_row, rows, shared };
                first_row += rows;
                Ok(quantized)
            })
            .collect()
    }

    fn stack(&self, linears: &[Unquantized<Weight>], site: &Site) -> Result<Stack> {
        let format = linears[0].format;
        let width = format.width();
        let rows = linears.iter().map(|linear| linear.weight.rows).sum();
        let original = self.gpu.alloc(4 * rows * width)?;
        let mut first = 0;
        for linear in linears {
            let weight = linear.weight;
            let to = original.pointer() + 4 * (first * width) as u64;
            self.arrange_rows(
                weight.data.pointer(),
                weight.kind(),
                weight.rows,
                site,
                to,
                "float",
            )?;
            first += weight.rows;
        }
        Ok(Stack { format, rows, original })
    }

    /// Columns `first..end`.
    #[expect(clippy::too_many_arguments, reason = "the operands of one step")]
    fn sweep_span(
        &self,
        stack: &Stack,
        weights: &Buffer,
        factor: Option<&Factor>,
        (first, end): (usize, usize),
        codes: &Codes,
        difference: Option<&Buffer>,
        bad: &Buffer,
    ) -> Result<()> {
        let Stack { format, rows, original } = stack;
        let WeightFormat { bits, group_size, groups, rows_per_scale, clip, .. } = *format;
        let (rows, width) = (*rows, format.width());
        let grid = match factor {
            Some(_) => Grid::gptq(bits, clip),
            None => Grid::rounding(bits, clip),
        };
        let warps = rows.div_ceil(rows_per_scale);
        let wide = group_size > SPAN;
        if wide && first.is_multiple_of(group_size) {
            self.launch(
                "gptq",
                "wide_group_scales",
                Geometry::over(32 * warps, THREADS),
                arguments![
                    weights,
                    rows,
                    width,
                    rows_per_scale,
                    first,
                    group_size,
                    first / group_size,
                    groups,
                    grid.ratio(),
                    &codes.scales,
                    bad
                ],
            )?;
        }
        let (least, greatest) = grid.limits();
        let entry = if rows_per_scale == 1 { "sweep_rows" } else { "sweep_row_pairs" };
        let shared_bytes = if factor.is_some() { 4 * SPAN * (end - first) } else { 0 };
        self.launch(
            "gptq",
            entry,
            Geometry { shared_bytes, ..Geometry::over(32 * warps, THREADS) },
            arguments![
                weights,
                original,
                factor.map(|factor| &factor.data),
                rows,
                width,
                first,
                end - first,
                group_size,
                groups,
                i32::from(wide),
                i32::from(factor.is_some()),
                grid.ratio(),
                least,
                greatest,
                &codes.codes,
                &codes.scales,
                difference,
                bad
            ],
        )
    }

    /// The relative output error of uncorrelated channels, from energies.
    pub(super) fn relative_energy_error(
        &self,
        energy: &[f64],
        site: &Site,
        weight: &Weight,
        quantized: &Quantized,
    ) -> Result<f64> {
        let format = &site.format;
        let energy = self.gpu.upload(energy)?;
        let sums = self.gpu.alloc(16 * weight.rows)?;
        let [outlier_codes, outlier_scales, outlier_values] = quantized.outliers();
        let arranging = Arranging::new(format, weight.kind());
        self.kernels.launch(
            "arrange",
            &arranging.defines,
            "energy_errors",
            arranging.geometry(weight.rows),
            arguments![
                &*weight.data,
                &site.order,
                format.channels,
                format.groups,
                format.outlier_channels,
                quantized.shared.outliers.padded(),
                arranging.staged,
                quantized.codes(),
                quantized.scales(),
                outlier_codes,
                outlier_scales,
                outlier_values,
                quantized.format.rows_per_scale,
                &energy,
                &sums
            ],
        )?;
        let sums = sums.download::<f64>(0..16 * weight.rows)?;
        let (lost, total) =
            sums.chunks(2).fold((0.0, 0.0), |(lost, total), row| (lost + row[0], total + row[1]));
        Ok(if total > 0.0 { (lost / total).sqrt() } else { 0.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::site::OutlierFormat;

    #[test]
    fn a_group_never_begins_inside_a_span_and_ends_outside_it() {
        for (group_size, groups) in [(16, 9), (48, 7), (128, 3), (192, 3), (304, 1), (96, 5)] {
            let format = WeightFormat {
                bits: 4,
                group_size,
                groups,
                rows_per_scale: 1,
                clip: 1.0,
                outlier_channels: 5,
                outlier_format: OutlierFormat::Int8,
            };
            let spans = spans(&format);
            assert_eq!(spans[0].0, 0);
            assert_eq!(spans[spans.len() - 1].1, format.grouped_channels());
            assert!(spans.windows(2).all(|pair| pair[0].1 == pair[1].0));
            for (first, end) in spans {
                assert!(end - first <= SPAN);
                if group_size <= SPAN {
                    assert!(first % group_size == 0 && end % group_size == 0);
                } else {
                    assert_eq!(first / group_size, (end - 1) / group_size);
                }
            }
        }
    }
}
