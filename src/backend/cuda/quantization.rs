//! Codes of weights, and weights laid out for products. The larger operations stand in files of their own, under the
//! same names.

use std::sync::{Arc, OnceLock};

use super::Cuda;
use super::gptq::Correction;
use super::gpu::Stream;
use super::kernels::Float;
use super::tensor::{
    CrossCovariance, Dense, DeviceLinear, DeviceSite, Factor, Hessian, PackedLinear, Weight,
};
use crate::backend::{AccumulatedError, Damping, Quantization, Unquantized};
use crate::checkpoint::Dtype;
use crate::quant::codebook::Codebook;
use crate::quant::linear::QuantizedLinear;
use crate::quant::site::SiteFormat;
use crate::{Error, Result};

impl Quantization for Cuda {
    type Quantized = DeviceLinear;
    type Factor = Factor;

    fn check_codebook(&self, codebook: Codebook) -> Result<()> {
        if codebook == Codebook::Fp4Bnb {
            return Err(Error::machine("the CUDA backend has no kernels for fp4-bnb codes")
                .hint("run with --device cpu, or quantize with --format fp4, which both have"));
        }
        Ok(())
    }

    fn site(&self, format: &SiteFormat) -> Result<DeviceSite> {
        if format.row.numbers.bits < 16 {
            self.check_codebook(format.row.numbers.codebook)?;
        }
        let slots = self.slots(format)?;
        let order = Arc::new(self.gpu.upload(&format.order)?);
        Ok(DeviceSite { format: format.clone(), order, slots, norm: OnceLock::new() })
    }

    fn dense(&self, weight: &Weight, site: Option<&DeviceSite>) -> Result<Dense> {
        if let Some(site) = site {
            let data = Arc::new(self.permuted(weight, site, Float::Half)?);
            return Ok(Dense { rows: weight.rows, columns: site.format.width(), data });
        }
        let (rows, columns) = (weight.rows, weight.columns);
        if weight.dtype == Dtype::F16 {
            return Ok(Dense { rows, columns, data: Arc::clone(&weight.data) });
        }
        let data = Arc::new(self.gpu.alloc(2 * rows * columns)?);
        match self.convert(weight, Some(&data), Stream::Main)? {
            None => Ok(Dense { rows, columns, data }),
            Some(at) => Err(Error::machine(format!(
                "a weight of [{rows}, {columns}] is beyond f16 at row {}, column {}",
                at as usize / columns,
                at as usize % columns
            ))
            .hint("products on a GPU are in f16; run with --device cpu")),
        }
    }

    fn dense_of(&self, weight: &DeviceLinear) -> Result<Dense> {
        let data = Arc::new(self.dequantized(weight, Float::Half)?);
        Ok(Dense { rows: weight.rows, columns: weight.format.row.width(), data })
    }

    fn pack(&self, weight: &DeviceLinear, feeds: Option<&DeviceSite>) -> Result<PackedLinear> {
        self.pack(weight, feeds)
    }

    fn cholesky(&self, gram: &mut Hessian, damping: f32) -> Result<Option<(Factor, Damping)>> {
        self.cholesky(gram, damping)
    }

    fn gptq(
        &self,
        linears: &[Unquantized<Weight>],
        site: &DeviceSite,
        gram: &Hessian,
        factor: &Factor,
        error: Option<&AccumulatedError<CrossCovariance>>,
    ) -> Result<Vec<(DeviceLinear, f64)>> {
        let correction = error.map(|error| Correction { error, hessian: gram });
        let quantized = self.sweep_all(linears, site, factor, correction)?;
        let with_error = |(linear, quantized): (&Unquantized<Weight>, DeviceLinear)| {
            let error = self.output_error(gram, site, linear.weight, &quantized)?;
            Ok((quantized, error))
        };
        linears.iter().zip(quantized).map(with_error).collect()
    }

    fn round(&self, linear: &Unquantized<Weight>, site: &DeviceSite) -> Result<DeviceLinear> {
        self.round(linear, site)
    }

    fn output_error(
        &self,
        gram: &Hessian,
        site: &DeviceSite,
        weight: &Weight,
        quantized: &DeviceLinear,
    ) -> Result<f64> {
        self.output_error(gram, site, weight, quantized)
    }

    fn energy_error(
        &self,
        energy: &[f64],
        site: &DeviceSite,
        weight: &Weight,
        quantized: &DeviceLinear,
    ) -> Result<f64> {
        self.energy_error(energy, site, weight, quantized)
    }

    fn fetch(&self, weight: DeviceLinear) -> Result<QuantizedLinear> {
        self.fetch(weight)
    }

    fn restore(&self, weight: QuantizedLinear) -> Result<DeviceLinear> {
        self.restore(weight)
    }
}
