/*! A device's kernels compared with the CPU's integer path, block by block, on the checkpoint's own activations.

The hidden states of a few tokens go through the blocks on the CPU. What enters each site there, rounded to f16
so that both sides can hold it, is quantized by both: codes and scales must be the same. So must they where the device
makes them in one step with the norm or SiLU before. The codes are then multiplied by both, and what attention is given goes
through both. Embedding, residual sums, head and loss are not compared: they show in the perplexity. */

mod bounds;

pub(crate) use bounds::{code_fault, product_error};

use half::f16;

use super::verify::Check;
use crate::Result;
use crate::backend::cpu::Cpu;
use crate::backend::{AttentionSpec, Backend, Forward, Matrix, Memory, Producer, Qkv, Tensor};
use crate::checkpoint::AtomCheckpoint;
use crate::model::AttentionSpecs;
use crate::model::architecture::Activation;
use crate::model::block::{Block, Linear, Observer, Seen};
use crate::model::sites::{ATTN_IN, ATTN_OUT, EMBEDDING, MLP_ACT, MLP_IN};
use crate::network::{
    BlockBuilder, LoadedBlock, QuantizedSite, Runnable, StoredBlock, expect, scale_embedding,
};
use crate::progress::Progress;
use crate::quant::linear::QuantizedLinear;
use crate::text::Evaluation;
use bounds::attention_error;

/// What was compared, and how it went.
#[derive(Clone, Debug, Default)]
pub(super) struct Findings {
    /// Sites whose codes were compared.
    pub(super) sites: usize,
    /// Linears whose products were compared.
    pub(super) linears: usize,
    /// The greatest error of a product beyond the rounding to f16, in units of its bound.
    pub(super) product: f64,
    /// The linear that has it.
    pub(super) worst: String,
    /// The greatest error of attention, in units of its tolerance.
    pub(super) attention: f64,
    /// What is wrong.
    pub(super) faults: Vec<String>,
}

impl Findings {
    /// Takes in those of another block.
    pub(super) fn add(&mut self, other: &Self) {
        self.sites += other.sites;
        self.linears += other.linears;
        if other.product > self.product {
            self.product = other.product;
            self.worst.clone_from(&other.worst);
        }
        self.attention = self.attention.max(other.attention);
    }

    /// What was found, where `wrong` blocks are.
    fn summary(&self, wrong: usize) -> String {
        let Self { sites, linears, product, worst, attention, .. } = self;
        if wrong > 0 {
            return format!("{wrong} are wrong, of {sites} sites and {linears} products");
        }
        let worst = if worst.is_empty() { String::new() } else { format!(" ({worst})") };
        format!(
            "codes of {sites} sites identical, {linears} products within {product:.2} of the bound{worst}, \
             attention within {attention:.2} of its tolerance"
        )
    }
}

/// A site on the device.
struct DeviceSite<B: Backend> {
    order: B::Site,
    linears: Vec<Option<B::Packed>>,
}

/// A block on both sides.
pub(super) struct Comparison<'a, B: Backend> {
    pub(super) reference: &'a Cpu,
    pub(super) device: &'a B,
    /// The block on the reference.
    pub(super) block: &'a Block<Cpu>,
    /// Its sites as the checkpoint has them.
    pub(super) sites: &'a [QuantizedSite<QuantizedLinear>],
    /// Names of each site's linears.
    pub(super) names: Vec<Vec<String>>,
    device_sites: Vec<Option<DeviceSite<B>>>,
    device_mean: Option<B::Hidden>,
}

impl<'a, B: Backend> Comparison<'a, B> {
    /// Brings the sites to the device.
    pub(super) fn new(
        reference: &'a Cpu,
        device: &'a B,
        block: &'a Block<Cpu>,
        sites: &'a [QuantizedSite<QuantizedLinear>],
        names: Vec<Vec<String>>,
        key_mean: Option<&[f32]>,
    ) -> Result<Self> {
        let device_sites = sites.iter().map(|site| Self::device_site(device, site));
        let device_sites = device_sites.collect::<Result<_>>()?;
        let device_mean = key_mean.map(|mean| {
            device.upload(Matrix { rows: 1, columns: mean.len(), data: mean.to_vec() })
        });
        let device_mean = device_mean.transpose()?;
        Ok(Self { reference, device, block, sites, names, device_sites, device_mean })
    }

    /// None for a site whose activations stay in floating point: no kernel of ours multiplies them.
    fn device_site(
        device: &B,
        site: &QuantizedSite<QuantizedLinear>,
    ) -> Result<Option<DeviceSite<B>>> {
        if site.format.row.numbers.bits == 16 {
            return Ok(None);
        }
        let packed = |linear: &QuantizedLinear| device.pack(&device.restore(linear.clone())?, None);
        let linears = site.linears.iter().map(|linear| linear.as_ref().map(packed).transpose());
        let linears = linears.collect::<Result<_>>()?;
        Ok(Some(DeviceSite { order: device.site(&site.format)?, linears }))
    }

    /// Carries `x` through the block on the reference and compares all that both sides do.
    pub(super) fn run(
        &self,
        attention: &AttentionSpecs,
        x: &mut <Cpu as Memory>::Hidden,
    ) -> Result<Findings> {
        let mut findings = Findings::default();
        let mut operands: Vec<Matrix> = Vec::new();
        let (reference, block) = (self.reference, self.block);
        self.after_norm(ATTN_IN, &reference.download(x)?, &mut findings)?;
        let mut see = |seen, x: &<Cpu as Memory>::Activation| {
            match seen {
                Seen::Entering(at) => {
                    self.site(at, rounded(self.reference.download_activation(x)?), &mut findings)?;
                }
                Seen::Queries | Seen::Keys | Seen::Values => {
                    operands.push(rounded(self.reference.download_activation(x)?));
                }
                Seen::Site(_) => {}
            }
            if seen == Seen::Values {
                let operands = std::mem::take(&mut operands);
                let operands = operands.try_into();
                let [q, k, v]: [Matrix; 3] = operands.expect("queries, keys and values");
                let spec = attention.of_block(block.index);
                self.attention(spec, &Qkv { q, k, v }, &mut findings)?;
            }
            Ok(())
        };
        let observer = &mut Observer::new(&mut see);
        let heads = block.heads(reference, attention, x, observer)?;
        block.sites[ATTN_OUT].apply_onto(reference, heads, x, observer)?;
        let hidden = reference.download(x)?;
        if block.router.is_some() {
            // Experts take rows of the norm, which is therefore made before their codes are.
            block.mlp(reference, x, observer)?;
            return Ok(findings);
        }
        let [gate, up] = block.gate_and_up(reference, x, observer)?;
        let [own_gate, own_up] = [&gate, &up].map(|x| reference.download_activation(x));
        let z = block.activated(reference, gate, &up)?;
        block.sites[MLP_ACT].apply_onto(reference, z, x, observer)?;
        self.after_norm(MLP_IN, &hidden, &mut findings)?;
        self.after_silu(rounded(own_gate?), rounded(own_up?), &mut findings)?;
        Ok(findings)
    }

    /// Where the device makes a site's codes in one step with the norm before it.
    fn after_norm(&self, at: usize, hidden: &Matrix, findings: &mut Findings) -> Result<()> {
        let (Some(on_device), Some(norm)) = (&self.device_sites[at], self.block.norm_before(at))
        else {
            return Ok(());
        };
        let (reference, device, epsilon) = (self.reference, self.device, self.block.epsilon);
        if !device.fuses(Producer::Norm, &on_device.order, hidden.rows) {
            return Ok(());
        }
        let (x, weight) =
            (device.upload(hidden.clone())?, device.upload(reference.download(norm)?)?);
        let name = &self.block.sites[at].name;
        let rows = device.norm_quantize(&x, &weight, epsilon, &on_device.order, name)?;
        let normed = reference.rms_norm(&reference.upload(hidden.clone())?, norm, epsilon)?;
        self.one_step(at, &rows, &normed, findings)
    }

    /// The same with SiLU, for mlp_act.
    fn after_silu(&self, gate: Matrix, up: Matrix, findings: &mut Findings) -> Result<()> {
        let Some(on_device) = &self.device_sites[MLP_ACT] else { return Ok(()) };
        if self.block.activation != Activation::Silu {
            return Ok(());
        }
        let (reference, device) = (self.reference, self.device);
        if !device.fuses(Producer::Silu, &on_device.order, gate.rows) {
            return Ok(());
        }
        let on = |x: &Matrix| device.upload_activation(x.clone());
        let (order, name) = (&on_device.order, &self.block.sites[MLP_ACT].name);
        let rows = device.silu_quantize(on(&gate)?, &on(&up)?, order, name)?;
        let [gate, up] = [gate, up].map(|x| reference.upload_activation(x));
        let product = reference.silu_mul(gate?, &up?)?;
        self.one_step(MLP_ACT, &rows, &product, findings)
    }

    fn one_step(
        &self,
        at: usize,
        rows: &B::Rows,
        x: &<Cpu as Memory>::Activation,
        findings: &mut Findings,
    ) -> Result<()> {
        let site = &self.block.sites[at];
        let expected = self.reference.quantize(x, site.order(), &site.name)?;
        if let Some(fault) = code_fault(&self.device.fetch_rows(rows)?, &expected) {
            findings
                .faults
                .push(format!("{}, in one step with what is before it: {fault}", site.name));
        }
        Ok(())
    }

    fn site(&self, at: usize, x: Matrix, findings: &mut Findings) -> Result<()> {
        let Some(on_device) = &self.device_sites[at] else { return Ok(()) };
        let (reference, device) = (self.reference, self.device);
        let site = &self.block.sites[at];
        let expected = reference.quantize(
            &reference.upload_activation(x.clone())?,
            site.order(),
            &site.name,
        )?;
        let rows = device.quantize(&device.upload_activation(x)?, &on_device.order, &site.name)?;
        let found = device.fetch_rows(&rows)?;
        findings.sites += 1;
        // The same codes as the device has them, in the layout that its products read; others, where they are wrong.
        let rows = match code_fault(&found, &expected) {
            None => rows,
            Some(fault) => {
                findings.faults.push(format!("{}: {fault}", site.name));
                device.restore_rows(&expected)?
            }
        };
        let linears = site.linears.iter().zip(&on_device.linears).zip(&self.sites[at].linears);
        for (((linear, packed), quantized), name) in linears.zip(&self.names[at]) {
            let (Linear::Packed(own), Some(packed), Some(quantized)) = (linear, packed, quantized)
            else {
                continue;
            };
            let right =
                reference.download_activation(&reference.integer_product(&expected, own)?)?;
            let product = device.download_activation(&device.integer_product(&rows, packed)?)?;
            let results = B::Activation::DTYPE;
            let (error, fault) =
                product_error(&expected, quantized, &product.data, &right.data, results);
            findings.linears += 1;
            if error > findings.product {
                (findings.product, findings.worst) = (error, name.clone());
            }
            if let Some(fault) = fault {
                findings.faults.push(format!("{name}: {fault}"));
            }
        }
        Ok(())
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        operands: &Qkv<Matrix>,
        findings: &mut Findings,
    ) -> Result<()> {
        let (reference, device) = (self.reference, self.device);
        let mean = self.block.key_mean.as_ref();
        let own = on_backend(reference, operands)?;
        let expected = reference.attention(spec, None, own, mean)?;
        let theirs = on_backend(device, operands)?;
        let found = device.attention(spec, None, theirs, self.device_mean.as_ref())?;
        let (found, expected) =
            (device.download_activation(&found)?, reference.download_activation(&expected)?);
        let mean = mean.map(|mean| mean.values());
        let error = attention_error(
            spec,
            Qkv { q: &operands.q.data[..], k: &operands.k.data, v: &operands.v.data },
            mean,
            &found.data,
            &expected.data,
        );
        findings.attention = findings.attention.max(error);
        if error > 1.0 {
            let name = &self.block.sites[ATTN_OUT].name;
            let fault = format!("attention before {name} is off by {error:.2} times its tolerance");
            findings.faults.push(fault);
        }
        Ok(())
    }
}

fn on_backend<B: Backend>(backend: &B, operands: &Qkv<Matrix>) -> Result<Qkv<B::Activation>> {
    let Qkv { q, k, v } = operands;
    let on = |x: &Matrix| backend.upload_activation(x.clone());
    Ok(Qkv { q: on(q)?, k: on(k)?, v: on(v)? })
}

/// Values as f16 has them.
fn rounded(mut matrix: Matrix) -> Matrix {
    matrix.data.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32());
    matrix
}

/// A check of all blocks' kernels, after one for each block in which they are wrong.
pub(super) fn kernel_checks<B: Backend>(
    device: &B,
    checkpoint: &AtomCheckpoint,
    text: &Evaluation,
    progress: &dyn Progress,
) -> Result<Vec<Check>> {
    let cpu = Cpu::new()?;
    let reference = Runnable::atom(&cpu, checkpoint)?;
    let architecture = &reference.architecture;
    let attention = AttentionSpecs::of(architecture, reference.kv, text.seq_len);
    let tokens = text.tokens(&checkpoint.tokenizer()?, &checkpoint.tokenizer_path(), progress)?;
    let embedding = expect(checkpoint, EMBEDDING, &[architecture.vocabulary, architecture.hidden])?;
    let mut x = cpu.embed(&cpu.load(embedding)?, &tokens)?;
    scale_embedding(&cpu, architecture, &mut x)?;
    let (mut all, mut checks) = (Findings::default(), Vec::new());
    progress.begin("verify kernels", architecture.blocks);
    for index in 0..architecture.blocks {
        progress.check_stop()?;
        let LoadedBlock { weights, stored } = reference.load(index)?;
        let StoredBlock { sites, key_mean } = stored.expect("a checkpoint stores its blocks");
        let key_mean = key_mean.as_deref();
        let builder = BlockBuilder::new(&cpu, architecture, &weights).with_key_mean(key_mean);
        let block = builder.quantized(&sites)?;
        let names = architecture.sites(index).into_iter();
        let names = names.map(|site| site.linears.into_iter().map(|linear| linear.name).collect());
        let names = names.collect();
        let comparison = Comparison::new(&cpu, device, &block, &sites, names, key_mean)?;
        let found = comparison.run(&attention, &mut x);
        let found = found.map_err(|error| error.context(format!("kernels of block {index}")))?;
        if !found.faults.is_empty() {
            let detail = found.faults.join("; ");
            checks.push(Check { name: format!("block {index}"), ok: false, detail });
        }
        all.add(&found);
        progress.advance("");
    }
    progress.end();
    device.trim();
    let wrong = checks.len();
    let detail = format!(
        "{} blocks on {} tokens: {}",
        architecture.blocks,
        tokens.len(),
        all.summary(wrong)
    );
    checks.push(Check { name: "kernels".to_owned(), ok: wrong == 0, detail });
    Ok(checks)
}

#[cfg(test)]
mod tests;
