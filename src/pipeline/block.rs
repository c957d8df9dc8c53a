/*! Quantizing one block: Hessians of its sites on the quantized stream, then every linear by GPTQ, or
rounding to nearest without a Hessian. */

use super::calibrate::Energies;
use super::load::{BlockWeights, QuantizedSite, hessian_block};
use super::plan::SitePlan;
use super::progress::Progress;
use super::stream::Stream;
use super::timing::Timing;
use crate::Result;
use crate::backend::{AttentionSpec, Backend, Unquantized};
use crate::model::Architecture;
use crate::model::sites::{SITES, SiteSpec};
use crate::quant::site::SiteFormat;

/// A block's quantized sites and the relative output error of each of its quantized linears.
pub struct QuantizedBlock<B: Backend> {
    /// attn_in, attn_out, mlp_in, mlp_act.
    pub sites: Vec<QuantizedSite<B::Quantized>>,
    /// `(linear, error)`.
    pub errors: Vec<(String, f64)>,
}

/// What stays the same from block to block.
pub struct BlockQuantizer<'a, B: Backend> {
    /// Does the arithmetic.
    pub backend: &'a B,
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
    /// Quantizes a block by `plan`. With `stream`, the hidden states that the quantized blocks before
    /// it gave, by GPTQ; without, by rounding.
    pub fn quantize(
        &self,
        weights: &BlockWeights<B>,
        plan: &[SitePlan],
        energies: &Energies,
        stream: Option<&Stream<B>>,
        timing: &mut Timing,
    ) -> Result<QuantizedBlock<B>> {
        let backend = self.backend;
        let formats: Vec<SiteFormat> = plan
            .iter()
            .zip(energies)
            .map(|(site, energy)| site.format(site.order(energy)))
            .collect();
        let mut hessians = match stream {
            None => vec![None, None, None, None],
            Some(stream) => timing.measure("hessians", || {
                let hessians = self.hessians(weights, &formats, stream)?;
                backend.wait()?;
                Ok::<_, crate::Error>(hessians)
            })?,
        };
        backend.trim();
        let mut sites = Vec::with_capacity(plan.len());
        let mut errors = Vec::new();
        let specs = self.architecture.sites(weights.index);
        for (at, format) in formats.into_iter().enumerate() {
            self.progress.check_stop()?;
            let hessian = hessians[at].take();
            let name = if hessian.is_some() { "gptq" } else { "round" };
            let work = SiteWork {
                spec: &specs[at],
                plan: &plan[at],
                weights: &weights.sites[at],
                energy: &energies[at],
            };
            let linears = timing.measure(name, || {
                let linears = self.quantize_site(&work, &format, hessian, &mut errors)?;
                backend.wait()?;
                Ok::<_, crate::Error>(linears)
            })?;
            sites.push(QuantizedSite { format, linears });
        }
        Ok(QuantizedBlock { sites, errors })
    }

    /// `sum x^T x` at every site, with quantized activations and the source's weights, as the
    /// reference collects them: all of a block at once.
    fn hessians(
        &self,
        weights: &BlockWeights<B>,
        formats: &[SiteFormat],
        stream: &Stream<B>,
    ) -> Result<Vec<Option<B::Hessian>>> {
        let backend = self.backend;
        let block = hessian_block(backend, self.architecture, weights, formats)?;
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
        work: &SiteWork<B>,
        format: &SiteFormat,
        mut hessian: Option<B::Hessian>,
        errors: &mut Vec<(String, f64)>,
    ) -> Result<Vec<Option<B::Quantized>>> {
        let backend = self.backend;
        let site = backend.site(format)?;
        let factor = match &mut hessian {
            None => None,
            Some(hessian) => self.factor(hessian, &work.spec.name)?,
        };
        let planned = work.plan.linears.iter().zip(work.weights);
        let unquantized: Vec<Unquantized<B::Weight<'_>>> = planned
            .filter(|(linear, _)| linear.bits < 16)
            .map(|(linear, weight)| Unquantized {
                name: &linear.name,
                weight: weight.as_ref().expect("every weight is loaded to be quantized"),
                format: work.plan.weights(linear),
            })
            .collect();
        let quantized = match &factor {
            Some(factor) => backend.gptq(&unquantized, &site, factor)?,
            None => unquantized
                .iter()
                .map(|linear| backend.round(linear, &site))
                .collect::<Result<_>>()?,
        };
        // The factor is as large as the Hessian: free it before the errors need room.
        drop(factor);
        for (linear, quantized) in unquantized.iter().zip(&quantized) {
            let error = match &hessian {
                Some(hessian) => backend.output_error(hessian, &site, linear.weight, quantized)?,
                None => backend.energy_error(work.energy, &site, linear.weight, quantized)?,
            };
            errors.push((linear.name.to_owned(), error));
        }
        let mut quantized = quantized.into_iter();
        let linears = work.plan.linears.iter();
        Ok(linears.map(|linear| if linear.bits < 16 { quantized.next() } else { None }).collect())
    }

    /// The Hessian's factor; none, with a warning, if it has none.
    fn factor(&self, hessian: &mut B::Hessian, site: &str) -> Result<Option<B::Factor>> {
        let factor = self.backend.factor(hessian, self.damping)?;
        match &factor {
            None => self.progress.warn(&format!(
                "{site}: the Hessian has no Cholesky factor at any damping; its linears are \
                 rounded to nearest instead of GPTQ"
            )),
            Some((_, damping)) if damping.failures > 0 => self.progress.warn(&format!(
                "{site}: damping raised to {} of the mean diagonal before the Hessian had a \
                 Cholesky factor",
                damping.share
            )),
            Some(_) => {}
        }
        Ok(factor.map(|(factor, _)| factor))
    }
}

/// What one site's linears are quantized from.
struct SiteWork<'a, 'w, B: Backend> {
    spec: &'a SiteSpec,
    plan: &'a SitePlan,
    weights: &'a [Option<B::Weight<'w>>],
    energy: &'a [f64],
}
