/*! A small linear on each backend, compared with the plain definition: codes, the integer product, and the product
in floating point.

`atom verify` does the same on a checkpoint of the user's. This takes a moment and finds a machine whose
kernels do not compute at all. */

use half::f16;

use super::Check;
use crate::Result;
use crate::backend::cpu::Cpu;
use crate::backend::cpu::integer::plain;
use crate::backend::cpu::isa::Isa;
use crate::backend::cuda::Cuda;
use crate::backend::{Backend, Matrix, Tensor};
use crate::checkpoint::Dtype;
use crate::eval::{code_fault, product_error};
use crate::quant::codebook::Codebook;
use crate::quant::grid::Scaling;
use crate::quant::linear::QuantizedLinear;
use crate::quant::number::{NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use crate::quant::rows::QuantizedRows;
use crate::quant::site::{SiteFormat, Transform, dequantize_rows_plain, quantize_rows_plain};
use crate::quant::weights::{dequantize, round_to_nearest};

/// The linear's size: no multiple of what kernels work on at once but for the channels.
const TOKENS: usize = 25;
const ROWS: usize = 75;
const CHANNELS: usize = 384;

/// Every instruction set of this processor.
pub(super) fn on_cpu() -> Check {
    const NAME: &str = "cpu arithmetic";
    let sets = Isa::available();
    let found = Example::new().and_then(|example| {
        let mut faults = Vec::new();
        for isa in &sets {
            let fault = example.fault(&Cpu::with_isa(*isa))?;
            faults.extend(fault.map(|fault| format!("{}: {fault}", isa.name())));
        }
        Ok(faults)
    });
    let names: Vec<&str> = sets.iter().map(|isa| isa.name()).collect();
    judge(NAME, found, &format!("as defined, on {}", names.join(", ")))
}

/// A GPU that was opened.
pub(super) fn on_gpu(device: &str, cuda: &Cuda) -> Check {
    let found = Example::new().and_then(|example| example.fault(cuda));
    let found = found.map(|fault| fault.into_iter().collect());
    judge(&format!("{device} arithmetic"), found, "codes and products as the CPU's")
}

fn judge(name: &str, found: Result<Vec<String>>, well: &str) -> Check {
    match found {
        Ok(faults) if faults.is_empty() => Check::ok(name, well),
        Ok(faults) => Check::fault(name, format!("it computes wrongly: {}", faults.join("; ")))
            .hint("trust no result of this device; please report it with this page"),
        Err(error) => Check::fault(name, format!("it does not compute: {error}"))
            .hint(error.hint_text().unwrap_or("please report it with this page")),
    }
}

/// Operands, and what is to come out.
struct Example {
    format: SiteFormat,
    x: Matrix,
    linear: QuantizedLinear,
    rows: QuantizedRows,
    /// By the integer path.
    product: Vec<f32>,
    /// Of the values that the codes stand for, with the sum of the terms' magnitudes.
    float_product: Vec<(f64, f64)>,
}

impl Example {
    /// Groups, transform, signs and outliers as the default recipe has them.
    fn new() -> Result<Self> {
        let group_size = 128;
        let format = SiteFormat {
            channels: CHANNELS,
            // 5 has no divisor in common with their number, so that each occurs once.
            order: (0..CHANNELS).map(|slot| (slot * 5 % CHANNELS) as i32).collect(),
            row: RowFormat {
                numbers: NumberFormat {
                    bits: 4,
                    codebook: Codebook::Int,
                    group_size,
                    scale: ScaleFormat::SIGNED_F16,
                },
                groups: 2,
                outlier_channels: CHANNELS - 2 * group_size,
                outlier_format: OutlierFormat::Int8,
            },
            clip: 0.95,
            transform: Transform::Hadamard,
        };
        format.check()?;
        let (x, weights) = (numbers(TOKENS, 1), numbers(ROWS, 2));
        let rows = quantize_rows_plain(&x, TOKENS, &format)?;
        let weights = format.permute_rows_plain(&weights, ROWS);
        let weight_format = format.row.weights(4, Codebook::Int, 1);
        let linear = round_to_nearest(&weights, ROWS, &weight_format, Scaling::clipped(0.95))?;
        let mut product = vec![0.0; TOKENS * ROWS];
        plain::linear(&rows, &linear, &mut product);
        let float_product = float_product(&dequantize_rows_plain(&rows), &dequantize(&linear));
        let x = Matrix { rows: TOKENS, columns: CHANNELS, data: x };
        Ok(Self { format, x, linear, rows, product, float_product })
    }

    /// What a backend gets wrong.
    fn fault<B: Backend>(&self, device: &B) -> Result<Option<String>> {
        let half = B::Activation::DTYPE == Dtype::F16;
        let site = device.site(&self.format)?;
        let rows =
            device.quantize(&device.upload_activation(self.x.clone())?, &site, "the check")?;
        if let Some(fault) = code_fault(&device.fetch_rows(&rows)?, &self.rows) {
            return Ok(Some(format!("codes of activations: {fault}")));
        }
        let weight = device.restore(self.linear.clone())?;
        let product = device.integer_product(&rows, &device.pack(&weight, None)?)?;
        if let Some(fault) = self.product_fault(&device.download_activation(&product)?.data, half) {
            return Ok(Some(format!("the integer product: {fault}")));
        }
        let product = device.product(&device.dequantize(&rows)?, &device.dense_of(&weight)?)?;
        let fault = self.float_fault(&device.download_activation(&product)?.data, half);
        Ok(fault.map(|fault| format!("the product in floating point: {fault}")))
    }

    /// Beyond the bound for another order of sums. A backend in f32 has the specification's own order.
    fn product_fault(&self, found: &[f32], half: bool) -> Option<String> {
        let results = if half { Dtype::F16 } else { Dtype::F32 };
        let (_, fault) = product_error(&self.rows, &self.linear, found, &self.product, results);
        fault.or_else(|| {
            let equal = |(found, right): (&f32, &f32)| found.to_bits() == right.to_bits();
            let differ = found.iter().zip(&self.product).filter(|pair| !equal(*pair)).count();
            (!half && differ > 0).then(|| format!("{differ} of {} results differ", found.len()))
        })
    }

    /// Beyond what rounding operands and result to f16, or sums in f32, may do.
    fn float_fault(&self, found: &[f32], half: bool) -> Option<String> {
        if found.len() != self.float_product.len() {
            return Some(format!("{} results", found.len()));
        }
        let roundings = (CHANNELS + 2) as f64 * 2f64.powi(-24);
        let share = roundings + if half { 3.0 * 2f64.powi(-11) } else { 0.0 };
        let least = f64::from(f16::MIN_POSITIVE_SUBNORMAL);
        let sound = |found: f32, (right, magnitude): (f64, f64)| {
            (f64::from(found) - right).abs() <= share * magnitude + if half { least } else { 0.0 }
        };
        let at = (0..found.len()).find(|&at| !sound(found[at], self.float_product[at]))?;
        let right = self.float_product[at].0;
        Some(format!("result {at} is {} where {right} is right", found[at]))
    }
}

/// `[rows, CHANNELS]` numbers that f16 holds, some channels larger than the rest, as activations have them.
fn numbers(rows: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        // Knuth's linear congruential generator; the high bits are the good ones.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as f32 / 65_536.0 - 0.5
    };
    let number = |at: usize| {
        let size = if (at % CHANNELS).is_multiple_of(37) { 16.0 } else { 1.0 };
        f16::from_f32(size * next()).to_f32()
    };
    (0..rows * CHANNELS).map(number).collect()
}

/// `x w^T` in f64, each result with the sum of its terms' magnitudes.
fn float_product(x: &[f32], weights: &[f32]) -> Vec<(f64, f64)> {
    let dot = |x: &[f32], w: &[f32]| {
        let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
        terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
    };
    let rows = x.chunks_exact(CHANNELS);
    rows.flat_map(|x| weights.chunks_exact(CHANNELS).map(move |w| dot(x, w))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn every_instruction_set_computes_as_defined() {
        let check = on_cpu();
        assert_eq!(check.status, Status::Ok, "{check:?}");
        assert!(check.detail.starts_with("as defined, on plain, portable"), "{check:?}");
    }

    #[test]
    fn results_that_are_wrong_are_found() {
        let example = Example::new().unwrap();
        let right = example.product.clone();
        assert_eq!(example.product_fault(&right, false), None);
        let halves: Vec<f32> = right.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
        assert_eq!(example.product_fault(&halves, true), None);
        assert!(example.product_fault(&halves, false).is_some(), "a backend in f32 has every bit");
        let float: Vec<f32> = example.float_product.iter().map(|(x, _)| *x as f32).collect();
        assert_eq!(example.float_fault(&float, false), None);
        for wrong in [f32::NAN, 1.1, 0.0] {
            let mut off = halves.clone();
            off[700] = if wrong == 1.1 { 1.1 * off[700] } else { wrong };
            assert!(example.product_fault(&off, true).is_some(), "{wrong}");
            let mut off = float.clone();
            off[700] = if wrong == 1.1 { 1.1 * off[700] } else { wrong };
            assert!(example.float_fault(&off, false).is_some(), "{wrong}");
            // With f16's roundings of the operands only a part of the sum can be told.
            off[700] = 1e3;
            assert!(example.float_fault(&off, true).is_some());
        }
        assert!(example.float_fault(&float[1..], false).is_some());
    }

    #[test]
    fn what_does_not_compute_is_a_fault() {
        let check = judge("x", Ok(vec!["codes".into()]), "");
        assert_eq!(
            (check.status, check.detail.as_str()),
            (Status::Fault, "it computes wrongly: codes")
        );
        let check = judge("x", Err(crate::Error::machine("the GPU failed").hint("look")), "");
        assert_eq!((check.status, check.hint.as_deref()), (Status::Fault, Some("look")));
    }
}
