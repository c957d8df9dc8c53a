/*! Results as one page of HTML that loads nothing: to look at, to print, to attach to a pipeline's run.

[`page`] is given the `--json` objects of commands and the manifest of a checkpoint, and shows what is in them. */

mod chart;
mod distillation;
mod evaluation;
mod linears;
mod page;
mod results;
mod run;

use serde_json::Value;

use crate::checkpoint::{AtomCheckpoint, Manifest};
use crate::{Error, Result};
use page::{Figure, Page};
use results::Outcome;

/// An Atom checkpoint as a page shows it.
pub(crate) struct Shown {
    name: String,
    manifest: Manifest,
    /// Bytes of its tensors.
    bytes: u64,
}

impl Shown {
    /// What a page needs of a checkpoint.
    ///
    /// # Errors
    /// Those of [`AtomCheckpoint::manifest`].
    pub(crate) fn of(checkpoint: &AtomCheckpoint) -> Result<Self> {
        let (manifest, bytes) = (checkpoint.manifest()?, checkpoint.total_bytes());
        Ok(Self { name: checkpoint.name().to_owned(), manifest, bytes })
    }
}

/// The page of a checkpoint and of results, each with the name of what it came from.
///
/// # Errors
/// Bad input: one of them is no result of a command that a page shows.
pub(crate) fn page(shown: Option<&Shown>, results: Vec<(String, Value)>) -> Result<String> {
    let mut outcomes = Vec::new();
    for (origin, object) in results {
        let outcome = Outcome::read(object);
        outcomes
            .push(outcome.map_err(|error: Error| error.context(format!("cannot show {origin}")))?);
    }
    let quantized = outcomes.iter().find_map(|outcome| match outcome {
        Outcome::Quantized(quantized) => Some(&**quantized),
        _ => None,
    });
    let mut page = Page::default();
    title(&mut page, shown, &outcomes);
    run::figures(&mut page, shown, quantized);
    evaluation::figures(&mut page, shown, &outcomes);
    evaluation::sections(&mut page, shown, &outcomes);
    linears::sections(&mut page, shown, quantized);
    distillation::section(&mut page, shown);
    run::sections(&mut page, shown, &outcomes);
    Ok(page.html())
}

/// Whether a file begins as a page of this program does.
pub(crate) fn is_page(start: &[u8]) -> bool {
    start.starts_with(page::START.as_bytes())
}

fn title(page: &mut Page, shown: Option<&Shown>, outcomes: &[Outcome]) {
    let model = |outcome: &Outcome| match outcome {
        Outcome::Quantized(quantized) => Some(quantized.model.clone()),
        Outcome::Verified(verified) => Some(verified.model.clone()),
        Outcome::Perplexity(perplexity) => Some(perplexity.model.clone()),
        Outcome::Tasks(tasks) => Some(tasks.model.clone()),
        Outcome::Bench(_) => None,
    };
    page.title = match shown {
        Some(shown) => shown.name.clone(),
        None => outcomes.iter().find_map(model).unwrap_or_else(|| "atom bench".to_owned()),
    };
    if let Some(Shown { manifest: Manifest { source, tool_version, .. }, .. }) = shown {
        let origin = match &source.hub {
            Some(hub) => format!("{} at commit {}", hub.repo, hub.commit),
            None => source.name.clone(),
        };
        page.subtitle = format!("{origin}, quantized with atom {tool_version}");
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
