/*! Verification of an Atom checkpoint: that every byte is what was written and means something, that the device
computes with it what the CPU's integer path does, then what it costs in perplexity, on the integer path. */

use serde::Serialize;

use super::kernels::{Beside, Findings};
use super::perplexity::PerplexityOutcome;
use super::{Model, atom_perplexity, perplexity_of, windows};
use crate::Result;
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Forward, Memory};
use crate::checkpoint::linear::{from_tensors, order_spec, read_order, specs};
use crate::checkpoint::{AtomCheckpoint, TensorSpec};
use crate::model::Architecture;
use crate::model::sites::{EMBEDDING, FINAL_NORM};
use crate::pipeline::plan::{BlockPlan, SitePlan};
use crate::pipeline::{
    BlockWeights, Evaluation, Manifest, attention_spec, caution, check_levels, expect,
    key_mean_spec, quantized_block, read_key_mean, read_sites,
};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;

/// One line of `atom verify`.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// Whether it held.
    pub ok: bool,
    /// What was found.
    pub detail: String,
}

/// The result of `atom verify`.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyOutcome {
    /// Name of the checkpoint.
    pub model: String,
    /// Whether every check held.
    pub ok: bool,
    /// Every check.
    pub checks: Vec<Check>,
    /// Of the checkpoint, if it was measured.
    pub perplexity: Option<f64>,
    /// Of the reference, if there is one.
    pub reference_perplexity: Option<f64>,
    /// `perplexity / reference_perplexity - 1`.
    pub increase: Option<f64>,
    /// Why the device's kernels were not compared with the CPU's integer path, where they were not.
    pub kernels_unchecked: Option<String>,
    /// What it ran on.
    pub device: String,
}

/// Whether the device's kernels are compared with the CPU's integer path.
pub enum KernelCheck {
    /// On these windows.
    On(Evaluation),
    /// No, and why.
    Off(String),
}

/// Limits that make an evaluation a check.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Highest perplexity.
    pub max_ppl: Option<f64>,
    /// Highest relative increase over the reference, 0.1 for 10 %.
    pub max_ppl_increase: Option<f64>,
}

/// Verifies a checkpoint: integrity, the device's kernels, then with `evaluation` its perplexity beside
/// `reference`'s.
pub fn verify<B: Backend>(
    backend: &B,
    checkpoint: &AtomCheckpoint,
    kernels: &KernelCheck,
    reference: Option<&Model>,
    evaluation: Option<&Evaluation>,
    limits: Limits,
    progress: &dyn Progress,
) -> Result<VerifyOutcome> {
    let mut checks = vec![check("files", files(checkpoint))];
    let whole = checks[0].ok;
    let architecture = match Architecture::read(checkpoint.config(), &checkpoint.config_file()) {
        Ok(architecture) => architecture,
        Err(error) if whole => return Err(error),
        // A changed config.json is a failed check, whatever else it is.
        Err(error) => {
            checks.push(check("config", Err::<String, _>(error)));
            return Ok(unmeasured(checkpoint, backend, checks));
        }
    };
    // What a changed tokenizer makes of the text says nothing.
    let texts = match kernels {
        KernelCheck::On(text) => [evaluation, Some(text)],
        KernelCheck::Off(_) => [evaluation, None],
    };
    for text in texts.into_iter().flatten() {
        let tokenizer = checkpoint.tokenizer()?;
        if whole {
            // A text that is too short is found before gigabytes are hashed.
            windows(&tokenizer, &checkpoint.tokenizer_path(), text, progress)?;
        }
    }
    let seq_len = evaluation.map_or(0, |evaluation| evaluation.seq_len);
    caution(checkpoint, &architecture, seq_len, progress);
    let manifest = Manifest::read(checkpoint, &architecture);
    let planned = manifest.as_ref().map(|Manifest { blocks, .. }| {
        let sites = blocks.iter().flatten().count();
        format!("{} blocks, {sites} sites, as config.json has them", blocks.len())
    });
    checks.push(check("plan", planned));
    if let Ok(Manifest { kv, blocks, .. }) = &manifest {
        progress.begin("verify", blocks.len());
        checks.push(check("shapes", shapes(checkpoint, &architecture, kv, blocks)));
        checks.push(check("checksums", checksums(checkpoint, progress)));
        checks.push(check("orders", orders(checkpoint, blocks, progress)));
        checks.push(check("codes", codes(checkpoint, blocks, progress)));
        if kv.is_centered() {
            checks.push(check("mean keys", mean_keys(checkpoint, &architecture, kv)));
        }
        checks.push(check("kept tensors", kept(checkpoint, &architecture, blocks, progress)));
        progress.end();
    }
    progress.check_stop()?;

    let sound = checks.iter().all(|check| check.ok);
    let mut outcome = unmeasured(checkpoint, backend, checks);
    // What a damaged checkpoint computes says nothing.
    match (kernels, &manifest) {
        (KernelCheck::On(text), Ok(Manifest { kv, blocks, .. })) if sound => {
            match check_levels(backend, blocks) {
                Ok(()) => {
                    let found = kernel_checks(backend, checkpoint, (*kv, blocks), text, progress)?;
                    outcome.checks.extend(found);
                    outcome.ok = outcome.checks.iter().all(|check| check.ok);
                }
                Err(why) => outcome.kernels_unchecked = Some(why.to_string()),
            }
        }
        (KernelCheck::On(_), _) => {
            outcome.kernels_unchecked = Some("the checkpoint is not sound".to_owned());
        }
        (KernelCheck::Off(why), _) => outcome.kernels_unchecked = Some(why.clone()),
    }
    if let Some(evaluation) = evaluation.filter(|_| sound) {
        let measured = atom_perplexity(backend, checkpoint, evaluation, progress)?;
        outcome.perplexity = Some(measured.perplexity);
        if let Some(reference) = reference {
            let reference = perplexity_of(backend, reference, evaluation, progress)?;
            outcome.reference_perplexity = Some(reference.perplexity);
            outcome.increase = Some(measured.perplexity / reference.perplexity - 1.0);
        }
        outcome.checks.extend(perplexity_checks(&measured, &outcome, limits));
        outcome.ok = outcome.checks.iter().all(|check| check.ok);
    }
    Ok(outcome)
}

/// The outcome of these checks alone.
fn unmeasured<B: Backend>(
    checkpoint: &AtomCheckpoint,
    backend: &B,
    checks: Vec<Check>,
) -> VerifyOutcome {
    VerifyOutcome {
        model: checkpoint.name().to_owned(),
        ok: checks.iter().all(|check| check.ok),
        checks,
        perplexity: None,
        reference_perplexity: None,
        increase: None,
        kernels_unchecked: None,
        device: backend.device(),
    }
}

/// A check of all blocks' kernels, behind one for each block in which they are wrong.
fn kernel_checks<B: Backend>(
    device: &B,
    checkpoint: &AtomCheckpoint,
    (kv, blocks): (KvFormat, &[BlockPlan]),
    text: &Evaluation,
    progress: &dyn Progress,
) -> Result<Vec<Check>> {
    let reference = &Cpu::new()?;
    let architecture = Architecture::read(checkpoint.config(), &checkpoint.config_file())?;
    let attention = attention_spec(&architecture, kv, text.seq_len);
    let tokens = windows(&checkpoint.tokenizer()?, &checkpoint.tokenizer_path(), text, progress)?;
    let embedding = expect(checkpoint, EMBEDDING, &[architecture.vocabulary, architecture.hidden])?;
    let mut x = reference.embed(&reference.load(embedding)?, &tokens)?;
    let (mut all, mut checks) = (Findings::default(), Vec::new());
    progress.begin("verify kernels", blocks.len());
    for (index, plan) in blocks.iter().enumerate() {
        progress.check_stop()?;
        let kept = |site: usize, linear: usize| plan[site].linears[linear].bits == 16;
        let weights = BlockWeights::load(reference, checkpoint, &architecture, index, kept)?;
        let key_mean = read_key_mean(checkpoint, &architecture, index, &kv)?;
        let (key_mean, sites) = (key_mean.as_deref(), read_sites(checkpoint, plan)?);
        let block = quantized_block(reference, &architecture, &weights, &sites, key_mean)?;
        let names = architecture.sites(index).into_iter();
        let names = names.map(|site| site.linears.into_iter().map(|linear| linear.name).collect());
        let names = names.collect();
        let beside = Beside::new((reference, device), &block, &sites, names, key_mean)?;
        let found = beside.run(&attention, &mut x);
        let found = found.map_err(|error| error.context(format!("kernels of block {index}")))?;
        if !found.faults.is_empty() {
            checks.push(Check {
                name: format!("block {index}"),
                ok: false,
                detail: found.faults.join("; "),
            });
        }
        all.add(&found);
        progress.advance("");
    }
    progress.end();
    device.trim();
    let wrong = checks.len();
    let mut detail = format!("{} blocks on {} tokens: ", blocks.len(), tokens.len());
    let Findings { sites, linears, .. } = all;
    if wrong > 0 {
        detail.push_str(&format!("{wrong} are wrong, of {sites} sites and {linears} products"));
    } else {
        detail.push_str(&format!("codes of {sites} sites identical, {linears} products"));
        let worst = if all.worst.is_empty() { String::new() } else { format!(" ({})", all.worst) };
        detail.push_str(&format!(
            " within {:.2} of the bound{worst}, attention within {:.2} of its tolerance",
            all.product, all.attention
        ));
    }
    checks.push(Check { name: "kernels".to_owned(), ok: wrong == 0, detail });
    Ok(checks)
}

fn check(name: &str, found: std::result::Result<String, impl std::fmt::Display>) -> Check {
    let (ok, detail) = match found {
        Ok(detail) => (true, detail),
        Err(error) => (false, error.to_string()),
    };
    Check { name: name.to_owned(), ok, detail }
}

fn perplexity_checks(
    measured: &PerplexityOutcome,
    outcome: &VerifyOutcome,
    limits: Limits,
) -> Vec<Check> {
    let found = measured.perplexity;
    let against = outcome.reference_perplexity.map_or(String::new(), |reference| {
        format!(", reference {reference:.4} ({:+.2} %)", 100.0 * (found / reference - 1.0))
    });
    let mut checks = vec![Check {
        name: "perplexity".to_owned(),
        ok: found.is_finite(),
        detail: format!(
            "{found:.4} on {} window{} of {}{against}",
            measured.windows,
            if measured.windows == 1 { "" } else { "s" },
            measured.dataset
        ),
    }];
    if let Some(limit) = limits.max_ppl {
        checks.push(Check {
            name: "max-ppl".to_owned(),
            ok: found <= limit,
            detail: format!("{found:.4} against a limit of {limit}"),
        });
    }
    if let (Some(limit), Some(increase)) = (limits.max_ppl_increase, outcome.increase) {
        checks.push(Check {
            name: "max-ppl-increase".to_owned(),
            ok: increase <= limit,
            detail: format!(
                "{:+.2} % against a limit of {:+.2} %",
                100.0 * increase,
                100.0 * limit
            ),
        });
    }
    checks
}

/// `atom.json`, `config.json`, the tokenizer and every other file next to the shards are what was written.
fn files(checkpoint: &AtomCheckpoint) -> Result<String> {
    let covered = checkpoint.covered_files();
    covered.iter().try_for_each(|name| checkpoint.verify_file(name))?;
    if checkpoint.covers_files() {
        return Ok(format!("SHA-256 of {}", covered.join(", ")));
    }
    Ok("not covered: this checkpoint was written before atom.json, config.json and the tokenizer had hashes".to_owned())
}

/// Every tensor the plan asks for is there with its type and shape, and none besides.
fn shapes(
    checkpoint: &AtomCheckpoint,
    architecture: &Architecture,
    kv: &KvFormat,
    blocks: &[BlockPlan],
) -> Result<String> {
    let mut expected: Vec<TensorSpec> = Vec::new();
    if kv.is_centered() {
        expected.extend((0..blocks.len()).map(|block| key_mean_spec(architecture, block)));
    }
    for site in blocks.iter().flatten() {
        expected.push(order_spec(&site.name, site.width()));
        for linear in quantized(site) {
            expected.extend(specs(&linear.name, linear.rows, &site.weights(linear)));
        }
    }
    for spec in &expected {
        crate::checkpoint::Stored::fetch(checkpoint, spec)?;
    }
    let kept = kept_tensors(architecture, blocks);
    for (name, shape) in &kept {
        expect(checkpoint, name, shape)?;
    }
    let (needed, found) = (expected.len() + kept.len(), checkpoint.names().count());
    if needed == found {
        Ok(format!("{found} tensors"))
    } else {
        Err(crate::Error::check(format!("{found} tensors where the plan has {needed}")))
    }
}

fn mean_keys(
    checkpoint: &AtomCheckpoint,
    architecture: &Architecture,
    kv: &KvFormat,
) -> Result<String> {
    for block in 0..architecture.blocks {
        read_key_mean(checkpoint, architecture, block, kv)?;
    }
    Ok(format!("{} blocks' mean keys are finite", architecture.blocks))
}

fn checksums(checkpoint: &AtomCheckpoint, progress: &dyn Progress) -> Result<String> {
    for name in checkpoint.names() {
        checkpoint.verify_tensor(name, &|| progress.check_stop())?;
    }
    Ok(format!(
        "SHA-256 of {} tensors, {} bytes",
        checkpoint.names().count(),
        checkpoint.total_bytes()
    ))
}

fn orders(
    checkpoint: &AtomCheckpoint,
    blocks: &[BlockPlan],
    progress: &dyn Progress,
) -> Result<String> {
    let mut sites = 0;
    for site in blocks.iter().flatten() {
        let grouped = site.groups() * site.group_size;
        progress.check_stop()?;
        read_order(checkpoint, &site.name, site.channels, grouped, site.outlier_channels)?;
        sites += 1;
    }
    Ok(format!("{sites} channel orders are permutations and padding"))
}

fn codes(
    checkpoint: &AtomCheckpoint,
    blocks: &[BlockPlan],
    progress: &dyn Progress,
) -> Result<String> {
    let mut linears = 0;
    for block in blocks {
        for site in block {
            for linear in quantized(site) {
                progress.check_stop()?;
                let format = site.weights(linear);
                let codes = from_tensors(checkpoint, &linear.name, linear.rows, &format)?;
                let may_be_signed = format.row.numbers.has_signs();
                let negative = codes.scales.iter().position(|scale| scale.to_f32() < 0.0);
                if let Some(scale) = negative.filter(|_| !may_be_signed) {
                    return Err(crate::Error::check(format!(
                        "{}.weight_scales holds a negative scale at {scale}",
                        linear.name
                    )));
                }
                linears += 1;
            }
        }
        progress.advance("");
    }
    Ok(format!("{linears} linears: codes, scales and outliers in range"))
}

/// Tensors that stayed as they were hold numbers only.
fn kept(
    checkpoint: &AtomCheckpoint,
    architecture: &Architecture,
    blocks: &[BlockPlan],
    progress: &dyn Progress,
) -> Result<String> {
    let kept = kept_tensors(architecture, blocks);
    for (name, _) in &kept {
        let tensor = checkpoint.tensor(name)?;
        tensor.check_finite(&|| progress.check_stop())?;
        tensor.release();
    }
    Ok(format!("{} tensors in full precision are finite", kept.len()))
}

fn kept_tensors(architecture: &Architecture, blocks: &[BlockPlan]) -> Vec<(String, Vec<usize>)> {
    let hidden = architecture.hidden;
    let table = vec![architecture.vocabulary, hidden];
    let mut kept =
        vec![(EMBEDDING.to_owned(), table.clone()), (FINAL_NORM.to_owned(), vec![hidden])];
    if !architecture.tied {
        kept.push((architecture.head_name().to_owned(), table));
    }
    for (index, block) in blocks.iter().enumerate() {
        kept.extend(architecture.beside_linears(index));
        for site in block {
            let whole = site.linears.iter().filter(|linear| linear.bits == 16);
            kept.extend(whole.map(|linear| {
                (format!("{}.weight", linear.name), vec![linear.rows, site.channels])
            }));
        }
    }
    kept
}

fn quantized(site: &SitePlan) -> impl Iterator<Item = &crate::pipeline::plan::LinearPlan> {
    site.linears.iter().filter(|linear| linear.bits < 16)
}
