/*! A device's kernels beside the CPU's integer path, block by block, on the checkpoint's own activations.

The hidden states of a few tokens go through the blocks on the CPU. What enters each site there, rounded to f16
so that both sides can hold it, is quantized by both: codes and scales must be the same. So must they where the device
makes them in one step with the norm or SiLU before. The codes are then multiplied by both, and what attention is given goes
through both. Embedding, residual sums, head and loss are not compared: they show in the perplexity.

**Products.** Sums in f32 depend on their order. With G terms `s p` (a group's scales times its exact sum, or an
outlier), two orders differ by no more than `(G + 2) 2^-24 sum |s p|`, beside half a unit in the last place where a device rounds
its results to f16.

**Attention** is in floating point on both sides. A result is a mean of the head's values, so that its error is
counted in units of the greatest of these. A device may round queries and keys to f16, which moves a score by up to
`d = 2^-10 |q| |k| / sqrt(head_dim)`, and a mean's weights by twice that: `2^-8 + 2 d` are allowed, the first for what
else is rounded. */

use half::f16;

use crate::Result;
use crate::backend::cpu::Cpu;
use crate::backend::{AttentionSpec, Backend, Forward, Matrix, Memory, Producer, Qkv, Tensor};
use crate::checkpoint::Dtype;
use crate::model::block::{Block, Linear, Observer, Seen};
use crate::model::sites::{ATTN_IN, ATTN_OUT, MLP_ACT, MLP_IN};
use crate::pipeline::QuantizedSite;
use crate::quant::float::e4m3_value;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::RowFormat;
use crate::quant::rows::{OutlierRows, QuantizedRows};

/// What attention may differ by where scores are small, in units of the head's greatest value: eight times what
/// rounding that to f16 costs.
const ATTENTION_TOLERANCE: f64 = 1.0 / 256.0;
/// What rounding queries and keys to f16 moves a score by, in units of the product of their lengths.
const SCORE_TOLERANCE: f64 = 1.0 / 1024.0;

/// Results out of bounds that are counted before a linear is given up.
const MANY: usize = 100;

/// What was compared, and how it went.
#[derive(Clone, Debug, Default)]
pub(super) struct Findings {
    /// Sites whose codes were compared.
    pub(super) sites: usize,
    /// Linears whose products were compared.
    pub(super) linears: usize,
    /// The greatest error of a product, in units of its bound and beside the rounding to f16.
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
}

/// A site on the device.
struct DeviceSite<B: Backend> {
    order: B::Site,
    linears: Vec<Option<B::Packed>>,
}

/// A block on both sides.
pub(super) struct Beside<'a, B: Backend> {
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

impl<'a, B: Backend> Beside<'a, B> {
    /// Brings the sites to the device.
    pub(super) fn new(
        (reference, device): (&'a Cpu, &'a B),
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
        attention: &AttentionSpec,
        x: &mut <Cpu as Memory>::Hidden,
    ) -> Result<Findings> {
        let mut findings = Findings::default();
        let mut operands: Vec<Matrix> = Vec::new();
        let (reference, block) = (self.reference, self.block);
        self.behind_norm(ATTN_IN, &reference.download(x)?, &block.attn_norm, &mut findings)?;
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
                let operands = operands.try_into().expect("queries, keys and values");
                self.attention(attention, operands, &mut findings)?;
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
        let z = reference.silu_mul(gate, &up)?;
        block.sites[MLP_ACT].apply_onto(reference, z, x, observer)?;
        self.behind_norm(MLP_IN, &hidden, &block.mlp_norm, &mut findings)?;
        self.behind_silu(rounded(own_gate?), rounded(own_up?), &mut findings)?;
        Ok(findings)
    }

    /// Where the device makes a site's codes in one step with the norm before it.
    fn behind_norm(
        &self,
        at: usize,
        hidden: &Matrix,
        norm: &<Cpu as Memory>::Hidden,
        findings: &mut Findings,
    ) -> Result<()> {
        let Some(on_device) = &self.device_sites[at] else { return Ok(()) };
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
    fn behind_silu(&self, gate: Matrix, up: Matrix, findings: &mut Findings) -> Result<()> {
        let Some(on_device) = &self.device_sites[MLP_ACT] else { return Ok(()) };
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
            let operands = (&expected, quantized);
            let half = B::Activation::DTYPE == Dtype::F16;
            let (error, fault) = product_error(operands, &product.data, &right.data, half);
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
        operands: [Matrix; 3],
        findings: &mut Findings,
    ) -> Result<()> {
        let (reference, device) = (self.reference, self.device);
        let mean = self.block.key_mean.as_ref();
        let own = on_backend(reference, &operands)?;
        let expected = reference.attention(spec, None, own, mean)?;
        let theirs = on_backend(device, &operands)?;
        let found = device.attention(spec, None, theirs, self.device_mean.as_ref())?;
        let (found, expected) =
            (device.download_activation(&found)?, reference.download_activation(&expected)?);
        let mean = mean.map(|mean| mean.values());
        let error = attention_error(
            spec,
            operands.each_ref().map(|x| &x.data[..]),
            mean,
            (&found.data, &expected.data),
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

fn on_backend<B: Backend>(backend: &B, [q, k, v]: &[Matrix; 3]) -> Result<Qkv<B::Activation>> {
    let on = |x: &Matrix| backend.upload_activation(x.clone());
    Ok(Qkv { q: on(q)?, k: on(k)?, v: on(v)? })
}

/// Values as f16 has them.
fn rounded(mut matrix: Matrix) -> Matrix {
    matrix.data.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32());
    matrix
}

/// What is different in `found`, in a few words.
pub(crate) fn code_fault(found: &QuantizedRows, expected: &QuantizedRows) -> Option<String> {
    fn differences<T: PartialEq>(what: &str, found: &[T], expected: &[T]) -> Option<String> {
        if found.len() != expected.len() {
            return Some(format!("{} {what} where there are {}", found.len(), expected.len()));
        }
        let mut differ = (0..found.len()).filter(|&at| found[at] != expected[at]);
        let first = differ.next()?;
        Some(format!(
            "{} of {} {what} differ, the first at {first}",
            1 + differ.count(),
            found.len()
        ))
    }
    let outliers = match (&found.outliers, &expected.outliers) {
        (OutlierRows::None, OutlierRows::None) => None,
        (
            OutlierRows::Int8 { codes: found, scales: found_scales },
            OutlierRows::Int8 { codes: expected, scales: expected_scales },
        ) => differences("outliers' codes", found, expected)
            .or_else(|| differences("outliers' scales", found_scales, expected_scales)),
        (OutlierRows::Fp8(found), OutlierRows::Fp8(expected))
        | (OutlierRows::F16(found), OutlierRows::F16(expected)) => {
            differences("outliers", found, expected)
        }
        _ => Some("outliers are of another kind".to_owned()),
    };
    let faults = [
        differences("codes", &found.codes, &expected.codes),
        differences("scales", &found.scales, &expected.scales),
        outliers,
    ];
    let faults: Vec<String> = faults.into_iter().flatten().collect();
    (!faults.is_empty()).then(|| faults.join(", "))
}

/// The greatest error of a product in units of its bound, and what is wrong if that is more than 1.
pub(crate) fn product_error(
    (x, weight): (&QuantizedRows, &QuantizedLinear),
    found: &[f32],
    expected: &[f32],
    half: bool,
) -> (f64, Option<String>) {
    let (mut worst, mut wrong, mut first) = (0f64, 0, 0);
    if found.len() != expected.len() {
        return (f64::INFINITY, Some(format!("{} results", found.len())));
    }
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let best = if half { f16::from_f32(expected).to_f32() } else { expected };
        if found == best {
            continue;
        }
        let rounding = if half { half_ulp(found.abs().max(expected.abs())) } else { 0.0 };
        let error = (f64::from(found) - f64::from(expected)).abs() - rounding;
        if error <= 0.0 {
            continue;
        }
        // The sum is no greater than the sum of magnitudes: most results need no closer look.
        let unit = (terms(x) + 2) as f64 * 2f64.powi(-24);
        if error / (unit * f64::from(expected.abs())) <= worst.min(1.0) {
            continue;
        }
        let (token, row) = (at / weight.rows, at % weight.rows);
        let share = error / (unit * magnitude(x, weight, token, row));
        let share = if share.is_nan() { f64::INFINITY } else { share };
        worst = worst.max(share);
        if share > 1.0 {
            first = if wrong == 0 { at } else { first };
            wrong += 1;
            if wrong == MANY {
                break;
            }
        }
    }
    let fault = (wrong > 0).then(|| {
        let count = if wrong == MANY { format!("{MANY} or more") } else { wrong.to_string() };
        let (token, row) = (first / weight.rows, first % weight.rows);
        format!(
            "{count} of {} results are out of bounds, the first, of token {token} and row {row}, is {} where the \
             CPU has {}",
            found.len(),
            found[first],
            expected[first]
        )
    });
    (worst, fault)
}

/// How many products a result is the sum of, a group's sum of codes being one.
fn terms(x: &QuantizedRows) -> usize {
    x.format.groups
        + match x.outliers {
            OutlierRows::None => 0,
            OutlierRows::Int8 { .. } => 1,
            OutlierRows::Fp8(_) | OutlierRows::F16(_) => x.format.outlier_channels,
        }
}

/// The sum of these products' magnitudes, for one result.
fn magnitude(x: &QuantizedRows, weight: &QuantizedLinear, token: usize, row: usize) -> f64 {
    let RowFormat { numbers, groups, outlier_channels, .. } = x.format;
    let (group_size, own) = (numbers.group_size, weight.format.row.numbers);
    let dot = |x: &[i8], w: &[i8], x_value: &dyn Fn(i8) -> f32, w_value: &dyn Fn(i8) -> f32| {
        x.iter().zip(w).map(|(x, w)| f64::from(x_value(*x)) * f64::from(w_value(*w))).sum::<f64>()
    };
    let mut sum = 0.0;
    for group in 0..groups {
        let of_x = &x.codes[(token * groups + group) * group_size..][..group_size];
        let of_w = &weight.codes[(row * groups + group) * group_size..][..group_size];
        let values = (|code| numbers.levels.value(code), |code| own.levels.value(code));
        let scales = x.scales[token * groups + group] * weight.scale(row, group);
        sum += (f64::from(scales) * dot(of_x, of_w, &values.0, &values.1)).abs();
    }
    let of_x = token * outlier_channels..(token + 1) * outlier_channels;
    let of_w = row * outlier_channels..(row + 1) * outlier_channels;
    let floats = |x: &[f32], weight: &dyn Fn(usize) -> f32| {
        let products =
            x.iter().zip(of_w.clone()).map(|(x, at)| f64::from(*x) * f64::from(weight(at)));
        products.map(f64::abs).sum::<f64>()
    };
    sum + match (&x.outliers, &weight.outliers) {
        (
            OutlierRows::Int8 { codes, scales },
            OutlierBlock::Int8 { codes: own, scales: of_rows },
        ) => {
            let scales = f64::from(scales[token]) * of_rows[row].to_f64();
            (scales * dot(&codes[of_x], &own[of_w], &f32::from, &f32::from)).abs()
        }
        (OutlierRows::Fp8(values), OutlierBlock::Fp8 { codes, scales }) => {
            floats(&values[of_x], &|at| e4m3_value(codes[at]) * scales[row].to_f32())
        }
        (OutlierRows::F16(values), OutlierBlock::F16(weights)) => {
            floats(&values[of_x], &|at| weights[at].to_f32())
        }
        _ => 0.0,
    }
}

/// Half a unit in the last place that an f16 of this magnitude has.
fn half_ulp(magnitude: f32) -> f64 {
    let exponent = f64::from(magnitude).max(f64::from(f16::MIN_POSITIVE)).log2().floor();
    2f64.powf(exponent - 11.0)
}

/// The greatest error of attention on these queries, keys and values, each in units of what is allowed there.
fn attention_error(
    spec: &AttentionSpec,
    [q, k, v]: [&[f32]; 3],
    mean: Option<&[f32]>,
    (found, expected): (&[f32], &[f32]),
) -> f64 {
    let AttentionSpec { heads, kv_heads, head_dim, .. } = *spec;
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let greatest = |head: &[f32]| head.iter().fold(0f32, |most, x| most.max(x.abs()));
    let length = |head: &[f32]| head.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    // Of each head over all tokens: its greatest value, and its longest key.
    let mut values = vec![0f32; kv_heads];
    let mut keys = vec![0f64; kv_heads];
    for (at, (k, v)) in k.chunks(head_dim).zip(v.chunks(head_dim)).enumerate() {
        let head = at % kv_heads;
        values[head] = values[head].max(greatest(v));
        let centre = mean.map_or(0.0, |mean| length(&mean[head * head_dim..][..head_dim]));
        keys[head] = keys[head].max(length(k) + centre);
    }
    let mut worst = 0f64;
    let results = found.chunks(head_dim).zip(expected.chunks(head_dim)).zip(q.chunks(head_dim));
    for (at, ((found, expected), q)) in results.enumerate() {
        let head = at % heads / (heads / kv_heads);
        let score = SCORE_TOLERANCE * length(q) * keys[head] / (head_dim as f64).sqrt();
        let allowed = (ATTENTION_TOLERANCE + 2.0 * score) * f64::from(values[head]);
        for (found, expected) in found.iter().zip(expected).filter(|(x, y)| x != y) {
            let share = f64::from((found - expected).abs()) / allowed;
            worst = if share.is_nan() { f64::INFINITY } else { worst.max(share) };
        }
    }
    worst
}

#[cfg(test)]
mod tests;
