/*! Accounting of a source: every stored tensor is used by the network, known to change nothing, ignored at
the user's request, or the reason to stop before any work.

A tensor that is silently left out changes the network: biases without their flag,
norms of queries and keys, a fifth layer of four, a separate output head. */

mod kinds;
mod refusal;

use std::collections::{BTreeMap, HashSet};

use super::tensors::expect;
use crate::checkpoint::{Source, fits};
use crate::model::Architecture;
use crate::model::sites::{EMBEDDING, FINAL_NORM};
use crate::progress::Progress;
use crate::{Error, Result};
use kinds::Unused;
use refusal::Group;

const HEAD: &str = "lm_head.weight";

/// The network of a source, with every tensor accounted for.
#[derive(Clone, Debug)]
pub struct Network {
    /// The network; its head is the embedding only if no other head is stored.
    pub architecture: Architecture,
    /// Stored names of the tensors that are left out: at the user's request, or because they belong to
    /// other parts of a larger model.
    pub ignored: Vec<String>,
    /// Warnings for the user, a sentence each.
    pub warnings: Vec<String>,
}

/// `source` with names for linears that its family stores as one tensor.
///
/// # Errors
/// As [`Architecture::read`]'s.
pub fn split_fused(source: Source) -> Result<Source> {
    let architecture = Architecture::read(source.config(), &source.config_file())?;
    Ok(source.with_row_ranges(architecture.row_ranges()))
}

/// Accounts for every tensor of `source`. It reads no weights except an output head that the configuration
/// does not expect, the embedding that it is compared with, and unexpected biases.
///
/// # Errors
/// Bad input for a tensor that is missing, has another shape or type, or has no part in the network;
/// wrong usage for a pattern that fits no tensor which could be ignored; an interruption if the user
/// asked the run to stop.
pub fn network(source: &Source, progress: &dyn Progress) -> Result<Network> {
    let mut architecture = Architecture::read(source.config(), &source.config_file())?;
    let mut warnings = Vec::new();
    if architecture.tied
        && source.contains(HEAD)
        && !source.ignores(&source.stored_name(HEAD))
        && !source.head_is_embedding(&|| progress.check_stop())?
    {
        architecture.tied = false;
        warnings.push(format!(
            "{} ties the output head to the embedding, but the stored `{}` differs from it: the stored head \
             is used",
            source.config_file(),
            source.stored_name(HEAD)
        ));
    }
    let used = used(source, &architecture)?;
    let unused = unused(source, &architecture, &used);
    let mut ignored = Vec::new();
    let mut groups: BTreeMap<Unused, Vec<&str>> = BTreeMap::new();
    let (mut zero_biases, mut other_parts, mut predicting) = (Vec::new(), Vec::new(), Vec::new());
    for (stored, kind) in unused {
        if source.ignores(stored) {
            ignored.push(stored.to_owned());
        } else if kind == Unused::Bias && source.is_zero(stored) {
            zero_biases.push(stored);
        } else if kinds::predicts(source, &architecture, stored, kind) {
            predicting.push(stored);
        } else if source.is_part() && is_other_part(source, stored, kind) {
            other_parts.push(stored);
        } else {
            groups.entry(kind).or_default().push(stored);
        }
    }
    if !groups.is_empty() {
        let groups = groups.into_iter().map(|(kind, names)| Group { kind, names });
        return Err(refusal::refusal(source, &architecture, &groups.collect::<Vec<_>>()));
    }
    check_patterns(source, &ignored)?;
    if let [first, ..] = zero_biases[..] {
        warnings.push(format!(
            "{} of {} are all zero and left out, the first is `{first}`",
            counted(zero_biases.len(), "bias"),
            source.title()
        ));
    }
    if let [first, ..] = predicting[..] {
        warnings.push(format!(
            "the blocks of {} that predict further tokens are left out: {}, the first is `{first}`",
            source.title(),
            counted(predicting.len(), "tensor")
        ));
        ignored.extend(predicting.into_iter().map(str::to_owned));
    }
    if let [first, ..] = other_parts[..] {
        warnings.push(format!(
            "only the text network of {} is read: {} of other parts are left out, the first is `{first}`",
            source.title(),
            counted(other_parts.len(), "tensor")
        ));
        ignored.extend(other_parts.into_iter().map(str::to_owned));
    }
    Ok(Network { architecture, ignored, warnings })
}

/// Refuses counts that are impossible for this number of tensors and bytes, before anything is allocated for them.
///
/// # Errors
/// What is wrong, in words.
pub fn check_counts(
    architecture: &Architecture,
    tensors: usize,
    bytes: u64,
) -> std::result::Result<(), String> {
    let experts = architecture.experts.as_ref();
    for (what, count) in [
        ("num_hidden_layers", architecture.blocks),
        ("the number of experts", experts.map_or(0, |experts| experts.count)),
    ] {
        if count > tensors {
            return Err(format!("{what} is {count}, but there are {}", counted(tensors, "tensor")));
        }
    }
    for (what, channels) in [
        ("hidden_size", architecture.hidden),
        ("intermediate_size", architecture.intermediate),
        ("moe_intermediate_size", experts.map_or(0, |experts| experts.intermediate)),
        (
            "head_dim times the number of heads",
            architecture.heads.saturating_mul(architecture.head_dim),
        ),
    ] {
        if channels as u64 > bytes {
            return Err(format!("{what} is {channels}, but there are {bytes} bytes"));
        }
    }
    Ok(())
}

/// The stored names of all tensors that the network uses. Each exists, with its shape and a type
/// that can be read.
fn used(source: &Source, architecture: &Architecture) -> Result<HashSet<String>> {
    let missing = |name: &str| refusal::missing(source, architecture, name);
    check_counts(architecture, source.names().count(), source.total_bytes()).map_err(|what| {
        Error::input(format!("{}: {what}", source.config_file()))
            .hint("take the config.json that was published with the weights")
    })?;
    let mut used = HashSet::new();
    let mut needs = |name: String, shape: &[usize]| {
        if !source.contains(&name) {
            return Err(missing(&name));
        }
        expect(source, &name, shape)?;
        used.insert(source.stored_name(&name));
        Ok(())
    };
    let table = [architecture.vocabulary, architecture.hidden];
    needs(EMBEDDING.to_owned(), &table)?;
    // Block by block, so that the first missing tensor ends the search.
    for block in 0..architecture.blocks {
        for (name, shape) in architecture.unquantized_tensors(block) {
            needs(name, &shape)?;
        }
        for linear in architecture.sites(block).iter().flat_map(|site| &site.linears) {
            needs(linear.weight(), &[linear.rows, linear.columns])?;
        }
    }
    needs(FINAL_NORM.to_owned(), &[architecture.hidden])?;
    if !architecture.tied {
        needs(HEAD.to_owned(), &table)?;
    }
    Ok(used)
}

/// The stored names and kinds of the tensors that the network does not use, without those that are known to
/// change nothing.
fn unused<'a>(
    source: &'a Source,
    architecture: &Architecture,
    used: &HashSet<String>,
) -> Vec<(&'a str, Unused)> {
    let head = source.stored_name(HEAD);
    // A tied head that is stored at this point equals the embedding.
    let copy = |stored: &str| architecture.tied && stored == head && !source.ignores(stored);
    source
        .names()
        .filter(|stored| !used.contains(*stored) && !kinds::is_buffer(stored) && !copy(stored))
        .map(|stored| (stored, kinds::kind_of(source, architecture, used, stored)))
        .collect()
}

/// Whether a tensor belongs to another part of a larger model than its text network.
fn is_other_part(source: &Source, stored: &str, kind: Unused) -> bool {
    let embedding = source.stored_name(EMBEDDING);
    let body = embedding.strip_suffix("embed_tokens.weight").unwrap_or(&embedding);
    let head = source.stored_name(HEAD);
    let of_text = stored.starts_with(body) || stored.starts_with(head.trim_end_matches("weight"));
    match kind {
        Unused::Adapter | Unused::Classifier => false,
        Unused::Modality => !of_text || body.is_empty(),
        // Only a prefix of its own distinguishes the text network from other parts.
        _ => !of_text && body != "model.",
    }
}

/// Refuses a pattern that ignores nothing: it is mistyped, or fits only tensors that the network needs.
fn check_patterns(source: &Source, ignored: &[String]) -> Result<()> {
    for pattern in source.ignored_patterns() {
        if ignored.iter().any(|stored| fits(pattern, stored)) {
            continue;
        }
        let needed = source.names().find(|stored| fits(pattern, stored));
        return Err(match needed {
            Some(needed) => Error::usage(format!(
                "--ignore-tensors {pattern} fits `{needed}`, which the network needs, and none that it does \
                 not use"
            )),
            None => Error::usage(format!(
                "--ignore-tensors {pattern} fits no tensor of {}",
                source.title()
            )),
        }
        .hint("leave it out, or write the stored names as the error without it shows them"));
    }
    Ok(())
}

/// `1 tensor`, `2 tensors`; `bias` becomes `biases`.
fn counted(count: usize, what: &str) -> String {
    match (count, what) {
        (1, what) => format!("1 {what}"),
        (count, "bias") => format!("{count} biases"),
        (count, what) => format!("{count} {what}s"),
    }
}

#[cfg(test)]
mod tests;
