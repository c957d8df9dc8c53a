/*! The GPTQ sweep: spans of columns swept in registers, products in between (kernels/gptq.cu says why
that is GPTQ). Linears of one site share a factor, and those of one format are swept together. */

use std::sync::Arc;

use super::Cuda;
use super::gpu::{Buffer, Stream};
use super::kernels::Float;
use super::kernels::gptq::{OutlierBlock, OutlierErrors, SPAN, Sweep, WideGroupScales};
use super::kernels::permute::{EnergyErrors, Permutation};
use super::product::{Operand, Precision, Product};
use super::slice::{In, Out};
use super::tensor::{Codes, Cross, Factor, OutlierSlices, Quantized, Site, Weight};
use crate::backend::{AccumulatedError, Quantization, Unquantized};
use crate::quant::codebook::Codebook;
use crate::quant::grid::{Grid, ScaleRule};
use crate::quant::number::{LinearFormat, RowFormat};
use crate::{Error, Result};

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

/// Weights that are swept together, permuted and corrected for the accumulated error, row under row.
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
            self.kernels.launch(&OutlierBlock {
                weights: weights.into(),
                rows,
                width,
                outliers: format.row.outlier_channels,
                padded: codes.outliers.padded(),
                ratio: Self::outlier_ratio(format.row.outlier_format),
                codes: codes.outliers.codes.as_ref().map(Into::into),
                scales: codes.outliers.scales.as_ref().map(Into::into),
                values: codes.outliers.values.as_ref().map(Into::into),
                bad: (&bad).into(),
            })?;
        }
        if let (Some(factor), Some(errors), true) =
            (factor, &errors, format.row.outlier_channels > 0)
        {
            let OutlierSlices { codes: of_codes, scales, values } = codes.outliers.from(0);
            self.kernels.launch(&OutlierErrors {
                weights: weights.into(),
                original: original.into(),
                r: (&factor.data).into(),
                pivots: (&factor.pivots).into(),
                rows,
                width,
                outliers: format.row.outlier_channels,
                padded: codes.outliers.padded(),
                codes: of_codes,
                scales,
                values,
                errors: errors.into(),
            })?;
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
        self.check_codebook(format.row.numbers.codebook)?;
        let width = format.row.width();
        let rows = linears.iter().map(|linear| linear.weight.rows).sum();
        let original = self.gpu.alloc(4 * rows * width)?;
        let mut first = 0;
        for linear in linears {
            let weight = linear.weight;
            let to = Out::from(&original).skip(4 * first * width);
            let from = ((&*weight.data).into(), weight.element());
            self.permute_rows(from, weight.rows, site, (to, Float::Single))?;
            first += weight.rows;
        }
        Ok(Stack { format, clip, rows, original })
    }

    /// Sweeps columns `first..end` of `weights`; with `unrounded` without rounding, into it.
    fn sweep_span(
        &self,
        step: &Step<'_>,
        weights: &Buffer,
        (first, end): (usize, usize),
        unrounded: Option<&Buffer>,
    ) -> Result<()> {
        let Stack { format, rows, original, .. } = step.stack;
        let LinearFormat { row, rows_per_scale } = *format;
        let RowFormat { numbers, groups, .. } = row;
        let group_size = numbers.group_size;
        let grid = step.grid();
        let (least, greatest) = grid.limits();
        let factor = step.factor;
        self.kernels.launch(&Sweep {
            weights: weights.into(),
            original: original.into(),
            r: factor.map(|factor| (&factor.data).into()),
            rows: *rows,
            width: row.width(),
            first,
            count: end - first,
            group_size,
            groups,
            wide: group_size > SPAN,
            feedback: factor.is_some(),
            ratio: grid.ratio(),
            signed_scales: grid.is_signed(),
            least,
            greatest,
            codes: (&step.codes.codes).into(),
            scales: (&step.codes.scales).into(),
            difference: step.difference.as_ref().map(Into::into),
            unrounded: unrounded.map(Into::into),
            pivots: factor.map(|factor| (&factor.pivots).into()),
            errors: step.errors.map(Into::into),
            bad: step.bad.into(),
            rows_per_scale,
            fp4: numbers.codebook == Codebook::Fp4,
        })
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
        let entry = |row: usize, column: usize| 4 * (row * width + column);
        let operand = |memory, stride| Operand { memory, stride, transposed: false };
        self.products.run(&Product {
            m: until - end,
            n: step.stack.rows,
            k: end - first,
            a: operand(In::from(&factor.data).skip(entry(first, end)), width),
            b: operand(difference.into(), SPAN),
            c: operand(In::from(weights).skip(entry(0, end)), width),
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
        let unrounded = if step.factor.is_some() && first > 0 {
            let unrounded = self.gpu.alloc(4 * rows * width)?;
            unrounded.copy_from(step.weights, 4 * rows * width)?;
            for start in (first..first + group_size).step_by(SPAN) {
                let span = (start, (start + SPAN).min(first + group_size));
                self.sweep_span(step, &unrounded, span, Some(&unrounded))?;
                self.carry(step, &unrounded, span, first + group_size)?;
            }
            Some(unrounded)
        } else {
            None
        };
        self.kernels.launch(&WideGroupScales {
            weights: unrounded.as_ref().unwrap_or(step.weights).into(),
            rows,
            width,
            rows_per_scale,
            first,
            size: group_size,
            group: first / group_size,
            groups,
            ratio: step.grid().ratio(),
            signed_scales: step.grid().is_signed(),
            scales: (&step.codes.scales).into(),
            bad: step.bad.into(),
        })
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
        let outliers = quantized.outliers();
        let permutation = Permutation::new(format, weight.element());
        self.kernels.launch(&EnergyErrors {
            x: (&*weight.data).into(),
            order: (&*site.order).into(),
            channels: format.channels,
            groups: format.row.groups,
            outliers: format.row.outlier_channels,
            padded_outliers: quantized.shared.outliers.padded(),
            staged: permutation.staged,
            codes: quantized.codes(),
            scales: quantized.scales(),
            outlier_codes: outliers.codes,
            outlier_scales: outliers.scales,
            outlier_values: outliers.values,
            rows_per_scale: quantized.format.rows_per_scale,
            energy: (&energy).into(),
            sums: (&sums).into(),
            permutation,
            rows: weight.rows,
        })?;
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
            let numbers = NumberFormat {
                bits: 4,
                codebook: Codebook::Int,
                group_size,
                scale: ScaleFormat::F16,
            };
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
