/*! Quantizing one block: Hessians of its sites on the quantized stream, then every linear by GPTQ, or
rounding to nearest without a Hessian. */

use super::calibrate::Energies;
use super::load::{QuantizedSite, arranged, hessian_block};
use super::plan::SitePlan;
use super::progress::Progress;
use super::stream::Stream;
use super::timing::Timing;
use crate::Result;
use crate::backend::{AttentionSpec, Backend, Matrix};
use crate::checkpoint::Source;
use crate::model::Architecture;
use crate::model::sites::{SITES, SiteSpec};
use crate::quant::hadamard;
use crate::quant::linear::QuantizedLinear;
use crate::quant::site::{SiteFormat, Transform};
use crate::quant::weights::{dequantize, round_to_nearest};

/// A block's quantized sites and the relative output error of each of its quantized linears.
pub struct QuantizedBlock {
    /// attn_in, attn_out, mlp_in, mlp_act.
    pub sites: Vec<QuantizedSite>,
    /// `(linear, error)`.
    pub errors: Vec<(String, f64)>,
}

/// What stays the same from block to block.
pub struct BlockQuantizer<'a, B: Backend> {
    /// Does the arithmetic.
    pub backend: &'a B,
    /// Where weights come from.
    pub source: &'a Source,
    /// The network.
    pub architecture: &'a Architecture,
    /// Attention over quantized keys and values.
    pub attention: &'a AttentionSpec,
    /// Damping of the Hessians.
    pub damping: f32,
    /// Told of fallbacks, and asked whether to stop.
    pub progress: &'a dyn Progress,
}

impl<B: Backend> BlockQuantizer<'_, B> {
    /// Quantizes block `index` by `plan`. With `stream`, the hidden states that the quantized blocks
    /// before it gave, by GPTQ; without, by rounding.
    pub fn quantize(
        &self,
        index: usize,
        plan: &[SitePlan],
        energies: &Energies,
        stream: Option<&Stream<B>>,
        timing: &mut Timing,
    ) -> Result<QuantizedBlock> {
        let formats: Vec<SiteFormat> = plan
            .iter()
            .zip(energies)
            .map(|(site, energy)| site.format(site.order(energy)))
            .collect();
        let mut hessians = match stream {
            None => vec![None, None, None, None],
            Some(stream) => {
                timing.measure("hessians", || self.hessians(index, &formats, stream))?
            }
        };
        self.backend.trim();
        let mut sites = Vec::with_capacity(plan.len());
        let mut errors = Vec::new();
        let specs = self.architecture.sites(index);
        for (at, format) in formats.into_iter().enumerate() {
            let hessian = hessians[at].take();
            let name = if hessian.is_some() { "gptq" } else { "round" };
            let site = timing.measure(name, || {
                self.quantize_site(
                    &specs[at],
                    &plan[at],
                    format,
                    hessian,
                    &energies[at],
                    &mut errors,
                )
            })?;
            sites.push(site);
        }
        Ok(QuantizedBlock { sites, errors })
    }

    /// `sum x^T x` at every site, with quantized activations and the source's weights, as the
    /// reference collects them: all of a block at once.
    fn hessians(
        &self,
        index: usize,
        formats: &[SiteFormat],
        stream: &Stream<B>,
    ) -> Result<Vec<Option<B::Hessian>>> {
        let backend = self.backend;
        let block = hessian_block(backend, self.source, self.architecture, index, formats)?;
        let mut hessians = formats
            .iter()
            .map(|format| backend.hessian(format.width()))
            .collect::<Result<Vec<_>>>()?;
        for batch in &stream.batches {
            self.progress.check_stop()?;
            let batch = backend.duplicate(batch)?;
            block.observe(backend, self.attention, batch, &mut |kind, x| {
                let site = SITES.iter().position(|known| *known == kind).expect("every kind");
                backend.add_to_hessian(&mut hessians[site], x)
            })?;
        }
        Ok(hessians.into_iter().map(Some).collect())
    }

    fn quantize_site(
        &self,
        spec: &SiteSpec,
        plan: &SitePlan,
        format: SiteFormat,
        hessian: Option<B::Hessian>,
        energy: &[f64],
        errors: &mut Vec<(String, f64)>,
    ) -> Result<QuantizedSite> {
        let factor = match &hessian {
            None => None,
            Some(hessian) => {
                let factor = self.backend.factor(hessian, self.damping)?;
                match &factor {
                    None => self.progress.warn(&format!(
                        "{}: the Hessian has no Cholesky factor at any damping; its linears are \
                         rounded to nearest instead of GPTQ",
                        spec.name
                    )),
                    Some((_, damping)) if damping.failures > 0 => self.progress.warn(&format!(
                        "{}: damping raised to {} of the mean diagonal before the Hessian had a \
                         Cholesky factor",
                        spec.name, damping.share
                    )),
                    Some(_) => {}
                }
                factor.map(|(factor, _)| factor)
            }
        };
        let mut linears = Vec::with_capacity(plan.linears.len());
        for (linear, linear_spec) in plan.linears.iter().zip(&spec.linears) {
            self.progress.check_stop()?;
            if linear.bits == 16 {
                linears.push(None);
                continue;
            }
            let weights = arranged(self.source, linear_spec, &format)?;
            let weight_format = plan.weights(linear);
            let quantized = match &factor {
                Some(factor) => self.backend.gptq(weights, &weight_format, factor),
                None => round_to_nearest(&weights.data, weights.rows, &weight_format),
            }
            .map_err(|error| error.context(format!("weights of {}", linear.name)))?;
            linears.push(Some(quantized));
        }
        // The factor is as large as the Hessian: free it before the errors need room.
        drop(factor);
        for ((linear, linear_spec), quantized) in
            plan.linears.iter().zip(&spec.linears).zip(&linears)
        {
            let Some(quantized) = quantized else { continue };
            let weights = arranged(self.source, linear_spec, &format)?;
            let error = match &hessian {
                Some(hessian) => self.backend.output_error(hessian, &weights, quantized)?,
                None => energy_error(&weights, quantized, &format, energy),
            };
            errors.push((linear.name.clone(), error));
        }
        Ok(QuantizedSite { format, linears })
    }
}

/// `sqrt(sum_j s_j |E_j|^2 / sum_j s_j |W_j|^2)` over channels j of energy s_j, with `E = W - Q`: the
/// relative output error if channels were uncorrelated, which is all that is known without a
/// Hessian.
fn energy_error(
    original: &Matrix,
    quantized: &QuantizedLinear,
    format: &SiteFormat,
    energy: &[f64],
) -> f64 {
    let mut error = dequantize(quantized);
    for (error, weight) in error.iter_mut().zip(&original.data) {
        *error -= weight;
    }
    let mut row = vec![0.0; format.width()];
    let mut sum = |weights: &[f32]| -> f64 {
        weights
            .chunks(format.width())
            .map(|arranged| {
                row.copy_from_slice(arranged);
                if format.transform == Transform::Hadamard {
                    // The transform is its own inverse: back to single channels.
                    for group in row[..format.grouped_channels()].chunks_mut(format.group_size) {
                        hadamard::transform(group);
                    }
                }
                row.iter()
                    .zip(&format.order)
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
