//! Codes of weights, and weights laid out for products.

use super::factor::factor;
use super::gemm_pack::Panels;
use super::integer::IntegerLinear;
use super::weights::{self, permuted};
use super::{Cpu, Factor, Hessian, gptq};
use crate::Result;
use crate::backend::{AccumulatedError, Damping, Matrix, Quantization, Unquantized, output_error};
use crate::checkpoint;
use crate::machine::hand_back;
use crate::quant::linear::QuantizedLinear;
use crate::quant::site::SiteFormat;
use crate::quant::weights::{dequantize, round_to_nearest};

impl Quantization for Cpu {
    type Quantized = QuantizedLinear;
    type Factor = Factor;

    fn site(&self, format: &SiteFormat) -> Result<SiteFormat> {
        Ok(format.clone())
    }

    fn dense(&self, weight: &checkpoint::Tensor<'_>, site: Option<&SiteFormat>) -> Result<Panels> {
        weights::panels(weight, site)
    }

    fn dense_of(&self, weight: &QuantizedLinear) -> Result<Panels> {
        let columns = weight.format.row.grouped_channels() + weight.format.row.outlier_channels;
        Ok(Panels::from_rows(&dequantize(weight), weight.rows, columns))
    }

    fn pack(&self, weight: &QuantizedLinear, _feeds: Option<&SiteFormat>) -> Result<IntegerLinear> {
        Ok(IntegerLinear::new(weight))
    }

    fn cholesky(&self, gram: &mut Hessian, damping: f32) -> Result<Option<(Factor, Damping)>> {
        // What the site before left must not take memory next to a second matrix of this size.
        hand_back();
        Ok(factor(self.isa, &gram.lower, gram.n, damping))
    }

    fn gptq(
        &self,
        linears: &[Unquantized<checkpoint::Tensor<'_>>],
        site: &SiteFormat,
        gram: &Hessian,
        factor: &Factor,
        accumulated: Option<&AccumulatedError<Matrix>>,
    ) -> Result<Vec<(QuantizedLinear, f64)>> {
        let sweep = |linear: &Unquantized<checkpoint::Tensor<'_>>| {
            let mut weights = permuted(linear.weight, site)?;
            let total = gram.energy(self.isa, &weights.data);
            if let Some(accumulated) = accumulated {
                self.correct(&mut weights, accumulated, gram, factor);
            }
            let quantized =
                gptq::sweep(self.isa, weights.clone(), &linear.format, linear.scaling, factor)
                    .map_err(|error| error.context(format!("weights of {}", linear.name)))?;
            let error = weights::difference(&quantized, &weights);
            let lost = gram.energy(self.isa, &error);
            Ok((quantized, output_error(lost, total)?))
        };
        linears.iter().map(sweep).collect()
    }

    fn round(
        &self,
        linear: &Unquantized<checkpoint::Tensor<'_>>,
        site: &SiteFormat,
    ) -> Result<QuantizedLinear> {
        let weights = permuted(linear.weight, site)?;
        round_to_nearest(&weights.data, weights.rows, &linear.format, linear.scaling)
            .map_err(|error| error.context(format!("weights of {}", linear.name)))
    }

    fn output_error(
        &self,
        gram: &Hessian,
        site: &SiteFormat,
        weight: &checkpoint::Tensor<'_>,
        quantized: &QuantizedLinear,
    ) -> Result<f64> {
        let original = permuted(weight, site)?;
        let error = weights::difference(quantized, &original);
        let [lost, total] = [&error, &original.data].map(|weights| gram.energy(self.isa, weights));
        output_error(lost, total)
    }

    fn energy_error(
        &self,
        energy: &[f64],
        site: &SiteFormat,
        weight: &checkpoint::Tensor<'_>,
        quantized: &QuantizedLinear,
    ) -> Result<f64> {
        Ok(weights::energy_error(&permuted(weight, site)?, quantized, site, energy))
    }

    fn fetch(&self, weight: QuantizedLinear) -> Result<QuantizedLinear> {
        Ok(weight)
    }

    fn restore(&self, weight: QuantizedLinear) -> Result<QuantizedLinear> {
        Ok(weight)
    }
}
