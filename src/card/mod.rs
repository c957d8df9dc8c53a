/*! The model card of an output: the README.md that the Hub shows, with metadata in front.

A card is made of what `atom.json` says and of what the run measured, so the same run gives the same bytes: no date, no
path of this machine, no time. Exports write theirs by the same function. */

mod front_matter;
mod markdown;

use std::path::Path;

use crate::checkpoint::{CARD, Manifest, SideFile, signed_card};
use crate::printable::quoted;

pub use front_matter::SourceCard;

/// Perplexity on one text.
#[derive(Clone, Debug, PartialEq)]
pub struct Perplexity {
    /// The text set.
    pub dataset: String,
    /// Windows measured.
    pub windows: usize,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Of the source.
    pub before: f64,
    /// Of the output.
    pub after: f64,
}

/// What an output is, and how it is used.
#[derive(Clone, Debug)]
pub struct Form {
    /// What it is called where it is published: `SmolLM2-atom-w4a4-g128`.
    pub name: String,
    /// What it is, after "This is": `an Atom checkpoint`.
    pub title: String,
    /// The Hub's `library_name`.
    pub library: String,
    /// More tags for the Hub than those that follow from the manifest.
    pub tags: Vec<String>,
    /// How it is used: what a command does, and the command. `ORG/NAME` stands for the published repository.
    pub usage: Vec<(String, String)>,
    /// Commands that followed `atom quantize`.
    pub steps: Vec<String>,
}

impl Form {
    /// An Atom checkpoint.
    pub fn atom(manifest: &Manifest) -> Self {
        let name = format!("{}-atom-{}", manifest.source.name, manifest.recipe.tag());
        let usage = [
            ("Write text", "atom generate --model ORG/NAME --prompt 'Once upon a time'"),
            ("Measure perplexity", "atom eval-ppl --model ORG/NAME --dataset wikitext2"),
            ("Look at what is in it", "hf download ORG/NAME && atom inspect ORG/NAME"),
        ];
        Self {
            name,
            title: "an Atom checkpoint".to_owned(),
            library: "atom".to_owned(),
            tags: vec!["atom".to_owned()],
            usage: usage.map(|(what, command)| (what.to_owned(), command.to_owned())).into(),
            steps: Vec::new(),
        }
    }
}

/// All that a card says.
pub struct Card<'a> {
    /// What was quantized, and how.
    pub manifest: &'a Manifest,
    /// What the source's card says.
    pub source: &'a SourceCard,
    /// Bytes of the output's tensors.
    pub bytes: u64,
    /// What was measured.
    pub perplexities: &'a [Perplexity],
    /// What the output is.
    pub form: &'a Form,
}

impl Card<'_> {
    /// The file, to be written next to the shards.
    pub fn file(&self) -> SideFile {
        SideFile::in_memory(CARD, self.text())
    }

    /// The content of the file.
    pub fn text(&self) -> String {
        signed_card(&(self.metadata() + &self.body()))
    }

    /// The metadata that the Hub reads, between lines of `---`.
    fn metadata(&self) -> String {
        use front_matter::{field, list};
        let SourceCard { license, license_name, license_link, language } = self.source;
        let Manifest { source, recipe, calibration, .. } = self.manifest;
        let mut yaml = match &license[..] {
            [license] => field("license", license),
            licenses => list("license", licenses),
        };
        for (key, value) in [("license_name", license_name), ("license_link", license_link)] {
            yaml += &value.as_ref().map(|value| field(key, value)).unwrap_or_default();
        }
        yaml += &list("language", language);
        if let Some(hub) = &source.hub {
            yaml += &field("base_model", &hub.repo);
            yaml += &field("base_model_relation", "quantized");
        }
        yaml += &field("library_name", &self.form.library);
        yaml += &field("pipeline_tag", "text-generation");
        let mut tags = self.form.tags.clone();
        let activations = format!("w{}a{}", recipe.bits, recipe.act_bits);
        tags.extend(["quantized".to_owned(), format!("{}-bit", recipe.bits), activations]);
        yaml += &list("tags", &tags);
        let files = calibration.sets.iter().filter_map(|set| set.file.as_ref());
        let mut repos: Vec<String> = files.map(|file| file.repo.clone()).collect();
        repos.dedup();
        yaml += &list("datasets", &repos);
        format!("---\n{yaml}---\n")
    }
}

/// The command that publishes an output directory; `ORG` stands for the user or organization.
pub fn upload_command(out: &Path) -> String {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let repository = quoted(&format!("ORG/{name}"));
    format!("hf upload {repository} {}", quoted(&out.to_string_lossy()))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
