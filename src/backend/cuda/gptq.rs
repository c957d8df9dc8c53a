/*! The GPTQ sweep: spans of columns swept in registers, products in between (kernels/gptq.cu says why
that is GPTQ). Linears of one site share a factor, and those of one format are swept together. */

use std::ops::Range;
use std::sync::Arc;

use super::Cuda;
use super::gpu::{Buffer, Stream};
use super::kernels::Float;
use super::kernels::gptq::{OutlierBlock, OutlierErrors, SPAN, Sweep, WideGroupScales};
use super::product::{Operand, Precision, Product};
use super::quantize::PermutedRows;
use super::slice::{In, Out};
use super::tensor::{
    Codes, CrossCovariance, DeviceLinear, DeviceSite, Factor, Hessian, OutlierSlices, Weight,
};
use crate::backend::{AccumulatedError, Quantization, Unquantized};
use crate::quant::codebook::Codebook;
use crate::quant::grid::{Grid, ScaleRule, Scaling};
use crate::quant::number::{LinearFormat, RowFormat};
use crate::{Error, Result};

/// The spans of `format`. A group that starts in a span either ends in it or starts at its first column, so its scale
/// always comes from weights that include every update.
fn spans(format: &RowFormat) -> Vec<Range<usize>> {
    let (group, grouped) = (format.numbers.group_size, format.grouped_channels());
    let step = if group <= SPAN { SPAN / group * group } else { group };
    let starts = (0..grouped).step_by(step);
    starts.flat_map(|start| cut(start..(start + step).min(grouped))).collect()
}

/// Spans of SPAN columns at most.
fn cut(columns: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = columns.end;
    columns.step_by(SPAN).map(move |first| first..(first + SPAN).min(end))
}

/// Weights that are swept together, permuted and corrected for the accumulated error, row under row.
struct WeightStack {
    format: LinearFormat,
    scaling: Scaling,
    rows: usize,
    /// `[rows, width]`, f32.
    original: Buffer,
}

/// What weights are corrected by before they are swept.
#[derive(Clone, Copy)]
pub(super) struct Correction<'a> {
    pub(super) error: &'a AccumulatedError<CrossCovariance>,
    pub(super) hessian: &'a Hessian,
}

/// What GPTQ needs beyond rounding: the error that is propagated to later columns.
struct Feedback<'a> {
    factor: &'a Factor,
    /// The weights with every update so far, `[rows, width]`.
    updated: Buffer,
    /// `w - q` of a span, `[rows, SPAN]`.
    difference: Buffer,
    /// What each row costs, `[rows, 2]`.
    errors: Buffer,
}

/// The operands of every step of a sweep.
struct SweepStep<'a> {
    stack: &'a WeightStack,
    /// None to round to nearest.
    feedback: Option<&'a Feedback<'a>>,
    codes: &'a Codes,
    bad: &'a Buffer,
}

impl SweepStep<'_> {
    /// The weights that are swept.
    fn weights(&self) -> &Buffer {
        self.feedback.map_or(&self.stack.original, |feedback| &feedback.updated)
    }

    fn grid(&self) -> Grid {
        let rule = if self.feedback.is_some() { ScaleRule::Gptq } else { ScaleRule::Rounding };
        Grid::of(&self.stack.format.row.numbers, self.stack.scaling, rule)
    }
}

impl Cuda {
    pub(super) fn sweep_all(
        &self,
        linears: &[Unquantized<Weight>],
        site: &DeviceSite,
        factor: &Factor,
        correction: Option<Correction<'_>>,
    ) -> Result<Vec<DeviceLinear>> {
        // Rows that share a scale must not lie in two linears.
        let together = |a: &Unquantized<Weight>, b: &Unquantized<Weight>| {
            (a.format, a.scaling) == (b.format, b.scaling)
                && a.weight.rows.is_multiple_of(a.format.rows_per_scale)
        };
        let mut quantized = Vec::with_capacity(linears.len());
        for part in linears.chunk_by(together) {
            quantized.extend(self.sweep(part, site, Some(factor), correction)?);
        }
        Ok(quantized)
    }

    /// Rounding to nearest.
    pub fn round(&self, linear: &Unquantized<Weight>, site: &DeviceSite) -> Result<DeviceLinear> {
        let mut quantized = self.sweep(std::slice::from_ref(linear), site, None, None)?;
        Ok(quantized.remove(0))
    }

    /// GPTQ with a factor, rounding to nearest without.
    fn sweep(
        &self,
        linears: &[Unquantized<Weight>],
        site: &DeviceSite,
        factor: Option<&Factor>,
        correction: Option<Correction<'_>>,
    ) -> Result<Vec<DeviceLinear>> {
        let stack = self.stack(linears, site)?;
        if let (Some(factor), Some(Correction { error, hessian })) = (factor, correction) {
            self.correct(&stack.original, stack.rows, error, hessian, factor)?;
        }
        let WeightStack { format, rows, .. } = stack;
        let row = format.row;
        let mut codes = Codes {
            codes: self.gpu.alloc(rows * row.grouped_channels())?,
            scales: self.gpu.alloc(4 * format.scale_rows(rows) * row.groups)?,
            outliers: self.outliers(&row, rows)?,
            ready: self.gpu.mark()?,
        };
        let bad = self.gpu.alloc(4)?;
        bad.fill(0xff, Stream::Main)?;
        let feedback = factor.map(|factor| self.feedback(factor, &stack)).transpose()?;
        let step =
            SweepStep { stack: &stack, feedback: feedback.as_ref(), codes: &codes, bad: &bad };
        self.sweep_groups(&step)?;
        if row.outlier_channels > 0 {
            self.quantize_outliers(&step)?;
        }
        codes.ready = self.gpu.mark()?;
        let errors = feedback.as_ref().map(|feedback| feedback.row_errors(rows)).transpose()?;
        let bad = bad.download::<u32>(0..4)?[0];
        parts(linears, format, codes, errors.as_deref(), bad as usize)
    }

    fn feedback<'a>(&self, factor: &'a Factor, stack: &WeightStack) -> Result<Feedback<'a>> {
        let (rows, width) = (stack.rows, stack.format.row.width());
        assert_eq!(factor.n, width, "channels of the factor and of the weights");
        let updated = self.gpu.alloc(4 * rows * width)?;
        updated.copy_from(&stack.original, 4 * rows * width)?;
        let difference = self.gpu.alloc(4 * rows * SPAN)?;
        Ok(Feedback { factor, updated, difference, errors: self.gpu.zeros(16 * rows)? })
    }

    /// Sweeps all columns, and rounds those of the groups.
    fn sweep_groups(&self, step: &SweepStep<'_>) -> Result<()> {
        let row = step.stack.format.row;
        let (width, group_size) = (row.width(), row.numbers.group_size);
        let weights = step.weights();
        for span in spans(&row) {
            if group_size > SPAN && span.start.is_multiple_of(group_size) {
                self.wide_scales(step, span.start)?;
            }
            self.sweep_span(step, weights, &span, None)?;
            self.propagate(step, weights, &span, width)?;
        }
        if step.feedback.is_some() {
            // Outliers are rounded together, so each must be at its best value before, given what the
            // groups lost: as a sweep would leave them that rounds nothing.
            for span in cut(row.grouped_channels()..width) {
                self.sweep_span(step, weights, &span, Some(weights))?;
                self.propagate(step, weights, &span, width)?;
            }
        }
        Ok(())
    }

    /// Quantizes the outliers, and adds what they cost to the rows' errors.
    fn quantize_outliers(&self, step: &SweepStep<'_>) -> Result<()> {
        let WeightStack { format, rows, ref original, .. } = *step.stack;
        let RowFormat { outlier_channels, outlier_format, .. } = format.row;
        let (width, outliers) = (format.row.width(), &step.codes.outliers);
        let weights = step.weights();
        self.kernels.launch(&OutlierBlock {
            weights: weights.into(),
            rows,
            width,
            outliers: outlier_channels,
            padded: outliers.padded(),
            ratio: Self::outlier_ratio(outlier_format),
            codes: outliers.codes.as_ref().map(Into::into),
            scales: outliers.scales.as_ref().map(Into::into),
            values: outliers.values.as_ref().map(Into::into),
            bad: step.bad.into(),
        })?;
        let Some(Feedback { factor, errors, .. }) = step.feedback else { return Ok(()) };
        let OutlierSlices { codes, scales, values } = outliers.from(0);
        self.kernels.launch(&OutlierErrors {
            weights: weights.into(),
            original: original.into(),
            r: (&factor.data).into(),
            pivots: (&factor.pivots).into(),
            rows,
            width,
            outliers: outlier_channels,
            padded: outliers.padded(),
            codes,
            scales,
            values,
            errors: errors.into(),
        })
    }

    fn stack(&self, linears: &[Unquantized<Weight>], site: &DeviceSite) -> Result<WeightStack> {
        let Unquantized { format, scaling, .. } = linears[0];
        self.check_codebook(format.row.numbers.codebook)?;
        let width = format.row.width();
        let rows = linears.iter().map(|linear| linear.weight.rows).sum();
        let original = self.gpu.alloc(4 * rows * width)?;
        let mut first = 0;
        for linear in linears {
            let weight = linear.weight;
            let to = Out::from(&original).skip(4 * first * width);
            let to = PermutedRows { values: to, element: Float::Single };
            self.permute_rows(weight.source(), site, to)?;
            first += weight.rows;
        }
        Ok(WeightStack { format, scaling, rows, original })
    }

    /// Sweeps a span of `weights`; with `unrounded` without rounding, into it.
    fn sweep_span(
        &self,
        step: &SweepStep<'_>,
        weights: &Buffer,
        span: &Range<usize>,
        unrounded: Option<&Buffer>,
    ) -> Result<()> {
        let WeightStack { format, rows, original, .. } = step.stack;
        let LinearFormat { row, rows_per_scale } = *format;
        let RowFormat { numbers, groups, .. } = row;
        let group_size = numbers.group_size;
        let grid = step.grid();
        let (least, greatest) = grid.limits();
        let feedback = step.feedback;
        self.kernels.launch(&Sweep {
            weights: weights.into(),
            original: original.into(),
            r: feedback.map(|feedback| (&feedback.factor.data).into()),
            rows: *rows,
            width: row.width(),
            first: span.start,
            count: span.len(),
            group_size,
            groups,
            wide: group_size > SPAN,
            feedback: feedback.is_some(),
            ratio: grid.ratio(),
            signed_scales: grid.scale_format().signed,
            scale_unit: grid.scale_format().unit(),
            least,
            greatest,
            codes: (&step.codes.codes).into(),
            scales: (&step.codes.scales).into(),
            difference: feedback.map(|feedback| (&feedback.difference).into()),
            unrounded: unrounded.map(Into::into),
            pivots: feedback.map(|feedback| (&feedback.factor.pivots).into()),
            errors: feedback.map(|feedback| (&feedback.errors).into()),
            bad: step.bad.into(),
            rows_per_scale,
            fp4: numbers.codebook == Codebook::Fp4,
            grid: numbers.scale.grid,
            factors: grid.factors(),
        })
    }

    /// `w[:, end..until] += (w - q)[:, span] R[span, end..until]`, with `end` the span's: the error goes on to later columns.
    fn propagate(
        &self,
        step: &SweepStep<'_>,
        weights: &Buffer,
        span: &Range<usize>,
        until: usize,
    ) -> Result<()> {
        let Some(Feedback { factor, difference, .. }) = step.feedback else { return Ok(()) };
        let Range { start: first, end } = *span;
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
    fn wide_scales(&self, step: &SweepStep<'_>, first: usize) -> Result<()> {
        let WeightStack { format, rows, .. } = step.stack;
        let LinearFormat { row, rows_per_scale } = *format;
        let (group_size, groups) = (row.numbers.group_size, row.groups);
        let (rows, width) = (*rows, row.width());
        // Nothing is lost before the first column, nor without feedback.
        let unrounded = if step.feedback.is_some() && first > 0 {
            let unrounded = self.gpu.alloc(4 * rows * width)?;
            unrounded.copy_from(step.weights(), 4 * rows * width)?;
            for span in cut(first..first + group_size) {
                self.sweep_span(step, &unrounded, &span, Some(&unrounded))?;
                self.propagate(step, &unrounded, &span, first + group_size)?;
            }
            Some(unrounded)
        } else {
            None
        };
        self.kernels.launch(&WideGroupScales {
            weights: unrounded.as_ref().unwrap_or(step.weights()).into(),
            rows,
            width,
            rows_per_scale,
            first,
            size: group_size,
            group: first / group_size,
            groups,
            ratio: step.grid().ratio(),
            signed_scales: step.grid().scale_format().signed,
            scale_unit: step.grid().scale_format().unit(),
            grid: row.numbers.scale.grid,
            scales: (&step.codes.scales).into(),
            bad: step.bad.into(),
        })
    }
}

impl Feedback<'_> {
    /// What each row costs, by the Hessian without its damping.
    fn row_errors(&self, rows: usize) -> Result<Vec<f64>> {
        let damp = f64::from(self.factor.damp);
        let errors = self.errors.download::<f64>(0..16 * rows)?;
        Ok(errors.chunks(2).map(|row| row[0] - damp * row[1]).collect())
    }
}

/// The linears' parts of their codes. `bad` is the first row with a value or scale that is not finite, if there is one.
fn parts(
    linears: &[Unquantized<Weight>],
    format: LinearFormat,
    codes: Codes,
    errors: Option<&[f64]>,
    bad: usize,
) -> Result<Vec<DeviceLinear>> {
    let mut first_row = 0;
    let shared = Arc::new(codes);
    linears
        .iter()
        .map(|linear| {
            let rows = linear.weight.rows;
            if (first_row..first_row + rows).contains(&bad) {
                return Err(Error::input(format!(
                    "a magnitude in row {} is not finite, or its scale exceeds f16",
                    bad - first_row
                ))
                .context(format!("weights of {}", linear.name)));
            }
            let own = errors.map(|errors| &errors[first_row..first_row + rows]);
            let lost = own.map(|own| own.iter().sum());
            let quantized =
                DeviceLinear { format, first_row, rows, shared: Arc::clone(&shared), lost };
            first_row += rows;
            Ok(quantized)
        })
        .collect()
}

#[cfg(test)]
#[path = "gptq_tests.rs"]
mod tests;
