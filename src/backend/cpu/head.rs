/*! The output head of decoding: weights stay in the source's 16 bits.

A step has few rows, so the product takes as long as reading the weights. Values of BF16 and F16 are values of f32, and
each logit is the chain of fused products that [`super::gemm`] defines, so the bits are those of the product with
[`Panels`], which are twice as large. */

use rayon::prelude::*;

use super::elementwise::dispatch;
use super::gemm::{PANEL, Panels, Rows, par_gemm};
use super::isa::Isa;
use super::weights;
use crate::Result;
use crate::checkpoint::{Dtype, Tensor};

/// Rows that are multiplied with a panel together.
const ROWS: usize = 4;

/// The output head `[vocabulary, hidden]`, laid out for products with few rows.
pub struct Head {
    rows: usize,
    form: Form,
}

enum Form {
    /// `[ceil(rows / 64), hidden, 64]`, zeros after the last row.
    Halves { bfloat: bool, panels: Vec<[u16; PANEL]> },
    /// Of a source in F32.
    Floats(Panels),
}

impl Head {
    /// Lays a weight out; its pages are given back.
    ///
    /// # Errors
    /// Input: a value that is not finite.
    pub(super) fn new(weight: &Tensor<'_>) -> Result<Self> {
        let (rows, columns) = (weight.shape[0], weight.shape[1]);
        if !matches!(weight.dtype, Dtype::BF16 | Dtype::F16) {
            return Ok(Self { rows, form: Form::Floats(weights::panels(weight, None)?) });
        }
        weight.check_finite(&|| Ok(()))?;
        let values: &[[u8; 2]] = weight.bytes.as_chunks().0;
        let mut panels = vec![[0; PANEL]; rows.div_ceil(PANEL) * columns];
        panels.par_chunks_mut(columns.max(1)).enumerate().for_each(|(panel, lines)| {
            let first = panel * PANEL;
            for row in first..rows.min(first + PANEL) {
                let values = &values[row * columns..][..columns];
                for (line, value) in lines.iter_mut().zip(values) {
                    line[row - first] = u16::from_le_bytes(*value);
                }
            }
        });
        weight.release();
        Ok(Self { rows, form: Form::Halves { bfloat: weight.dtype == Dtype::BF16, panels } })
    }

    /// Rows of the weight.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// `x W^T` for `x` `[count, hidden]`.
    pub(super) fn product(&self, isa: Isa, x: &[f32], count: usize, y: &mut [f32]) {
        let width = self.rows;
        assert!(y.len() == count * width);
        match &self.form {
            Form::Floats(panels) => {
                par_gemm(isa, Rows::new(x, count, panels.k()), panels, y, width, false);
            }
            Form::Halves { bfloat, panels } => {
                let hidden = x.len() / count.max(1);
                for (x, y) in x.chunks(ROWS * hidden).zip(y.chunks_mut(ROWS * width)) {
                    few_rows(isa, *bfloat, panels, x, (width, y));
                }
            }
        }
    }
}

/// The product of up to [`ROWS`] rows.
fn few_rows(
    isa: Isa,
    bfloat: bool,
    panels: &[[u16; PANEL]],
    x: &[f32],
    (width, y): (usize, &mut [f32]),
) {
    let count = y.len() / width;
    let hidden = x.len() / count;
    let mut sums = vec![[[0.0f32; PANEL]; ROWS]; width.div_ceil(PANEL)];
    // A task is as large as that waking a thread does not show.
    let together = (panels.len() / hidden.max(1)).div_ceil(4 * rayon::current_num_threads());
    let tasks =
        sums.par_chunks_mut(together.max(1)).zip(panels.par_chunks(together.max(1) * hidden));
    tasks.for_each(|(sums, panels)| {
        for (sums, panel) in sums.iter_mut().zip(panels.chunks_exact(hidden)) {
            dispatch!(isa, panel_body(bfloat: bool, panel: &[[u16; PANEL]], x: &[f32], count: usize, sums: &mut [[f32; PANEL]; ROWS]));
        }
    });
    for (row, y) in y.chunks_exact_mut(width).enumerate() {
        for (y, sums) in y.chunks_mut(PANEL).zip(&sums) {
            y.copy_from_slice(&sums[row][..y.len()]);
        }
    }
}

#[inline(always)]
fn panel_body(
    bfloat: bool,
    panel: &[[u16; PANEL]],
    x: &[f32],
    count: usize,
    sums: &mut [[f32; PANEL]; ROWS],
) {
    match (bfloat, count) {
        (true, 1) => panel_of::<true, 1>(panel, x, sums),
        (true, 2) => panel_of::<true, 2>(panel, x, sums),
        (true, 3) => panel_of::<true, 3>(panel, x, sums),
        (true, _) => panel_of::<true, ROWS>(panel, x, sums),
        (false, 1) => panel_of::<false, 1>(panel, x, sums),
        (false, 2) => panel_of::<false, 2>(panel, x, sums),
        (false, 3) => panel_of::<false, 3>(panel, x, sums),
        (false, _) => panel_of::<false, ROWS>(panel, x, sums),
    }
}

/// As [`panel_body`], with a constant number of rows, so that their sums stay in registers.
#[inline(always)]
fn panel_of<const BFLOAT: bool, const COUNT: usize>(
    panel: &[[u16; PANEL]],
    x: &[f32],
    sums: &mut [[f32; PANEL]; ROWS],
) {
    let hidden = panel.len();
    let mut own = [[0.0f32; PANEL]; COUNT];
    for (depth, line) in panel.iter().enumerate() {
        let mut weights = [0.0f32; PANEL];
        for (weight, bits) in weights.iter_mut().zip(line) {
            *weight = if BFLOAT { from_bfloat(*bits) } else { from_half(*bits) };
        }
        for (row, own) in own.iter_mut().enumerate() {
            let x = x[row * hidden + depth];
            for (sum, weight) in own.iter_mut().zip(&weights) {
                *sum = x.mul_add(*weight, *sum);
            }
        }
    }
    sums[..COUNT].copy_from_slice(&own);
}

#[inline(always)]
fn from_bfloat(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The value of finite bits: exponent and mantissa in their place, times 2^112.
#[inline(always)]
fn from_half(bits: u16) -> f32 {
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn halves_are_what_they_are() {
        for bits in 0..=u16::MAX {
            let expected = f16::from_bits(bits);
            if expected.is_finite() {
                assert_eq!(from_half(bits).to_bits(), expected.to_f32().to_bits(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn logits_have_the_bits_of_the_product_with_panels() {
        let (rows, columns) = (150, 70);
        let wave = |count: usize, step: f32| -> Vec<f32> {
            (0..count).map(|i| (i as f32 * step).sin() * 3.0).collect()
        };
        let (x, w) = (wave(6 * columns, 0.37), wave(rows * columns, 0.11));
        let bytes = |dtype: Dtype| -> Vec<u8> {
            let bits = |value: &f32| match dtype {
                Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
                Dtype::BF16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
                _ => value.to_le_bytes().to_vec(),
            };
            w.iter().flat_map(bits).collect()
        };
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
            let bytes = bytes(dtype);
            let shape = [rows, columns];
            let tensor = Tensor::in_memory("head", dtype, &shape, &bytes);
            let panels = weights::panels(&tensor, None).unwrap();
            let head = Head::new(&tensor).unwrap();
            for isa in [Isa::Plain, Isa::detect().unwrap()] {
                for count in 1..=6 {
                    let (mut found, mut expected) =
                        (vec![0.0; count * rows], vec![0.0; count * rows]);
                    let x = &x[..count * columns];
                    head.product(isa, x, count, &mut found);
                    par_gemm(
                        isa,
                        Rows::new(x, count, columns),
                        &panels,
                        &mut expected,
                        rows,
                        false,
                    );
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert!(bits(&found) == bits(&expected), "{dtype} {count} rows");
                }
            }
        }
    }
}
