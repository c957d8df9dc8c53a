/*! The GPTQ sweep: spans of columns swept in registers, products in between (kernels/gptq.cu says why
that is GPTQ). Linears of one site share a factor, and those of one format are swept together. */

use std::sync::Arc;

use super::gpu::{Buffer, Stream};
use super::kernels;
use super::launch::{Geometry, arguments};
use super::product::{Operand, Precision, Product};
use super::quantize::Arranging;
use super::tensor::{Codes, Cross, Factor, Quantized, Site, Weight};
use super::{Cuda, THREADS};
use crate::backend::{AccumulatedError, Quantization, Unquantized};
use crate::quant::grid::{Grid, ScaleRule};
use crate::quant::levels::Levels;
use crate::quant::number::{LinearFormat, RowFormat};
use crate::{Error, Result};

/// Columns of a span, as in gptq.cu.
const SPAN: usize = 128;

/// Where the spans of `format` begin and end. A group that starts in a span either ends in it or starts
/// at its first column, so its scale always comes from weights that carry every update.
fn spans(format: &RowFormat) -> Vec<(usize, usize)> {
    let (group, grouped) = (format.numbers.group_size, format.grouped_channels());
    let step = if group <= SPAN { SPAN / group * group } else { group };
    (0..grouped)
        .step_by(step)
        .flat_map(|start| {
            let end = (start + step).min(grouped);
            (start..end).step_by(SPAN).map(move |first| (first, (first + SPAN).min(end)))
        })
        .collect()
}

/// Weights that are swept together, arranged and corrected for the drift, row under row.
struct Stack {
    format: LinearFormat,
    clip: f32,
    rows: usize,
    /// `[rows, width]`, f32.
    original: Buffer,
}

/// The operands of every step of a sweep.
struct Step<'a> {
    stack: &'a Stack,
    /// With every update so far.
    weights: &'a Buffer,
    /// None to round to nearest.
    factor: Option<&'a Factor>,
    codes: &'a Codes,
    /// `w - q` of a span, `[rows, SPAN]`; there with a factor.
    difference: Option<Buffer>,
    /// What each row costs, `[rows, 2]`; there with a factor.
    errors: Option<&'a Buffer>,
    bad: &'a Buffer,
}

impl Step<'_> {
    fn grid(&self) -> Grid {
        let rule = if self.factor.is_some() { ScaleRule::Gptq } else { ScaleRule::Rounding };
        Grid::of(&self.stack.format.row.numbers, self.stack.clip, rule)
    }
}

impl Cuda {
    pub(super) fn sweep_all(
        &self,
        linears: &[Unquantized<Weight>],
        site: &Site,
        factor: &Factor,
        drift: Option<&AccumulatedError<Cross>>,
    ) -> Result<Vec<Quantized>> {
        // Rows that share a scale must not lie in two linears.
        let together = |a: &Unquantized<Weight>, b: &Unquantized<Weight>| {
            (a.format, a.clip) == (b.format, b.clip)
                && a.weight.rows.is_multiple_of(a.format.rows_per_scale)
        };
        let mut quantized = Vec::with_capacity(linears.len());
        for part in linears.chunk_by(together) {
            quantized.extend(self.sweep(part, site, Some(factor), drift)?);
        }
        Ok(quantized)
    }

    /// Rounding to nearest.
    pub fn round(&self, linear: &Unquantized<Weight>, site: &Site) -> Result<Quantized> {
        let mut quantized = self.sweep(std::slice::from_ref(linear), site, None, None)?;
        Ok(quantized.remove(0))
    }

    /// GPTQ with a factor, rounding to nearest without.
    fn sweep(
        &self,
        linears: &[Unquantized<Weight>],
        site: &Site,
        factor: Option<&Factor>,
        drift: Option<&AccumulatedError<Cross>>,
    ) -> Result<Vec<Quantized>> {
        let stack = self.stack(linears, site)?;
        if let (Some(factor), Some(drift)) = (factor, drift) {
            self.correct(&stack.original, stack.rows, drift, factor)?;
        }
        let Stack { format, rows, original, .. } = &stack;
        let (rows, row) = (*rows, format.row);
        let width = row.width();
        let mut codes = Codes {
            codes: self.gpu.alloc(rows * row.grouped_channels())?,
            scales: self.gpu.alloc(4 * format.scale_rows(rows) * row.groups)?,
            outliers: self.outliers(&row, rows)?,
            ready: self.gpu.mark()?,
        };
        let bad = self.gpu.alloc(4)?;
        bad.fill(0xff, Stream::Main)?;
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
        let errors = match factor {
            Some(_) => Some(self.gpu.zeros(16 * rows)?),
            None => None,
        };
        let step = Step {
            stack: &stack,
            weights,
            factor,
            codes: &codes,
            difference,
            errors: errors.as_ref(),
            bad: &bad,
        };
        for (first, end) in spans(&row) {
            if format.row.numbers.group_size > SPAN
                && first.is_multiple_of(format.row.numbers.group_size)
            {
                self.wide_scales(&step, first)?;
            }
            self.sweep_span(&step, weights, (first, end), None)?;
            self.carry(&step, weights, (first, end), width)?;
        }
        if factor.is_some() {
            // Outliers are rounded together, so each must be at its best value before, given what the
            // groups lost: as a sweep would leave them that rounds nothing.
            for first in (format.row.grouped_channels()..width).step_by(SPAN) {
                let span = (first, (first + SPAN).min(width));
                self.sweep_span(&step, weights, span, Some(weights))?;
                self.carry(&step, weights, span, width)?;
            }
        }
        if format.row.outlier_channels > 0 {
            self.launch(
                "gptq",
                "outlier_block",
                Geometry::over(32 * rows, THREADS),
                arguments![
                    weights,
                    rows,
                    width,
                    format.row.outlier_channels,
                    codes.outliers.padded(),
                    Self::outlier_ratio(format.row.outlier_format),
                    codes.outliers.codes.as_ref(),
                    codes.outliers.scales.as_ref(),
                    codes.outliers.values.as_ref(),
                    &bad
                ],
            )?;
        }
        if let (Some(factor), Some(errors), true) =
            (factor, &errors, format.row.outlier_channels > 0)
        {
            self.launch(
                "gptq",
                "outlier_errors",
                Geometry::over(32 * rows, THREADS),
                arguments![
                    weights,
                    original,
                    &factor.data,
                    &factor.pivots,
                    rows,
                    width,
                    format.row.outlier_channels,
                    codes.outliers.padded(),
                    codes.outliers.codes.as_ref(),
                    codes.outliers.scales.as_ref(),
                    codes.outliers.values.as_ref(),
                    errors
                ],
            )?;
        }
        codes.ready = self.gpu.mark()?;
        let errors = match (factor, errors) {
            (Some(factor), Some(errors)) => {
                let damp = f64::from(factor.damp);
                let rows = errors.download::<f64>(0..16 * rows)?;
                Some(rows.chunks(2).map(|row| row[0] - damp * row[1]).collect::<Vec<f64>>())
            }
            _ => None,
        };
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
                let own = errors.as_ref().map(|errors| &errors[first_row..first_row + rows]);
                let lost = own.map(|own| own.iter().sum());
                let quantized = Quantized { format, first_row, rows, shared, lost };
                first_row += rows;
                Ok(quantized)
            })
            .collect()
    }

    fn stack(&self, linears: &[Unquantized<Weight>], site: &Site) -> Result<Stack> {
        let Unquantized { format, clip, .. } = linears[0];
        self.check_levels(format.row.numbers.levels)?;
        let width = format.row.width();
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
        Ok(Stack { format, clip, rows, original })
    }

    /// Sweeps columns `first..end` of `weights`; with `relaxed` without rounding, into it.
    fn sweep_span(
        &self,
        step: &Step<'_>,
        weights: &Buffer,
        (first, end): (usize, usize),
        relaxed: Option<&Buffer>,
    ) -> Result<()> {
        let Stack { format, rows, original, .. } = step.stack;
        let LinearFormat { row, rows_per_scale } = *format;
        let RowFormat { numbers, groups, .. } = row;
        let group_size = numbers.group_size;
        let grid = step.grid();
        let (least, greatest) = grid.limits();
        let entry = if rows_per_scale == 1 { "sweep_rows" } else { "sweep_row_pairs" };
        let shared_bytes = if step.factor.is_some() { 4 * SPAN * (end - first) } else { 0 };
        self.kernels.launch(
            "gptq",
            &kernels::formats(numbers.levels == Levels::Fp4, false),
            entry,
            Geometry {
                shared_bytes,
                ..Geometry::over(32 * rows.div_ceil(rows_per_scale), THREADS)
            },
            arguments![
                weights,
                original,
                step.factor.map(|factor| &factor.data),
                *rows,
                row.width(),
                first,
                end - first,
                group_size,
                groups,
                i32::from(group_size > SPAN),
                i32::from(step.factor.is_some()),
                grid.ratio(),
                i32::from(grid.is_signed()),
                least,
                greatest,
                &step.codes.codes,
                &step.codes.scales,
                step.difference.as_ref(),
                relaxed,
                step.factor.map(|factor| &factor.pivots),
                step.errors,
                step.bad
            ],
        )
    }

    /// `w[:, end..until] += (w - q)[:, first..end] R[first..end, end..until]`.
    fn carry(
        &self,
        step: &Step<'_>,
        weights: &Buffer,
        (first, end): (usize, usize),
        until: usize,
    ) -> Result<()> {
        let (Some(factor), Some(difference)) = (step.factor, &step.difference) else {
            return Ok(());
        };
        let width = step.stack.format.row.width();
        let entry = |row: usize, column: usize| 4 * (row * width + column) as u64;
        let operand = |pointer, stride| Operand { pointer, stride, transposed: false };
        self.products.run(&Product {
            m: until - end,
            n: step.stack.rows,
            k: end - first,
            a: operand(factor.data.pointer() + entry(first, end), width),
            b: operand(difference.pointer(), SPAN),
            c: operand(weights.pointer() + entry(0, end), width),
            add: true,
            // In f32: no later column makes up for what an update rounds away.
            precision: Precision::Float,
        })
    }

    /// The scales of a group that is wider than a span and begins at `first`.
    fn wide_scales(&self, step: &Step<'_>, first: usize) -> Result<()> {
        let Stack { format, rows, .. } = step.stack;
        let LinearFormat { row, rows_per_scale } = *format;
        let (group_size, groups) = (row.numbers.group_size, row.groups);
        let (rows, width) = (*rows, row.width());
        // Nothing is lost before the first column, nor without feedback.
        let relaxed = if step.factor.is_some() && first > 0 {
            let relaxed = self.gpu.alloc(4 * rows * width)?;
            relaxed.copy_from(step.weights, 4 * rows * width)?;
            for start in (first..first + group_size).step_by(SPAN) {
                let span = (start, (start + SPAN).min(first + group_size));
                self.sweep_span(step, &relaxed, span, Some(&relaxed))?;
                self.carry(step, &relaxed, span, first + group_size)?;
            }
            Some(relaxed)
        } else {
            None
        };
        self.launch(
            "gptq",
            "wide_group_scales",
            Geometry::over(32 * rows.div_ceil(rows_per_scale), THREADS),
            arguments![
                relaxed.as_ref().unwrap_or(step.weights),
                rows,
                width,
                rows_per_scale,
                first,
                group_size,
                first / group_size,
                groups,
                step.grid().ratio(),
                i32::from(step.grid().is_signed()),
                &step.codes.scales,
                step.bad
            ],
        )
    }

    /// The relative output error of uncorrelated channels, from energies.
    pub(super) fn energy_error(
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
                &*site.order,
                format.channels,
                format.row.groups,
                format.row.outlier_channels,
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
    use crate::quant::number::{NumberFormat, OutlierFormat, ScaleFormat};

    #[test]
    fn a_group_never_begins_inside_a_span_and_ends_outside_it() {
        for (group_size, groups) in [(16, 9), (48, 7), (128, 3), (192, 3), (304, 1), (96, 5)] {
            let numbers =
                NumberFormat { bits: 4, levels: Levels::Int, group_size, scale: ScaleFormat::F16 };
            let format = RowFormat {
                numbers,
                groups,
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
