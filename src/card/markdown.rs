/*! The part of a model card that a person reads. */

use super::Card;
use crate::checkpoint::plan::SitePlan;
use crate::checkpoint::{DistillationRecord, HubOrigin, Manifest, SetUsed};
use crate::printable::{printable, quoted};
use crate::recipe::{self, Recipe};
use crate::units;

impl Card<'_> {
    /// The text below the metadata.
    pub(super) fn body(&self) -> String {
        let title = escaped(&self.form.name);
        let sections = [
            self.introduction(),
            self.recipe(),
            self.calibration(),
            self.accuracy(),
            self.usage(),
            self.commands(),
        ];
        format!("\n# {title}\n\n{}", sections.join("\n"))
    }

    fn introduction(&self) -> String {
        let Manifest { source, bits_per_weight, tool_version, .. } = self.manifest;
        let origin = match &source.hub {
            Some(HubOrigin { repo, commit, .. })
                if [repo, commit].into_iter().all(|id| is_id(id)) =>
            {
                format!(
                    "[{repo}](https://huggingface.co/{repo}/tree/{commit}) at commit `{commit}`"
                )
            }
            Some(hub) => format!("{} at commit {}", code(&hub.repo), code(&hub.commit)),
            None => format!("{} (fingerprint {})", code(&source.name), code(&source.fingerprint)),
        };
        let sizes = format!(
            "{} -> {} ({:.2} x smaller)",
            units::bytes(source.bytes),
            units::bytes(self.bytes),
            source.bytes as f64 / self.bytes as f64
        );
        format!(
            "This is {} of {origin}, quantized with `atom` {}.\n\n\
             | | |\n|---|---|\n\
             | size of all tensors | {sizes} |\n\
             | bits per quantized weight | {bits_per_weight:.2}, with scales, outliers and channel orders |\n",
            self.form.title,
            code(tool_version)
        )
    }

    fn recipe(&self) -> String {
        let lines = recipe::lines(&self.manifest.recipe);
        let lines: String = lines.lines().map(|line| format!("- {}\n", escaped(line))).collect();
        let mixed = if self.is_mixed() {
            "\nThe bits of single linears and the outliers of single sites differ from these, where they matter more or less. \
             `atom.json` lists them.\n"
        } else {
            ""
        };
        format!("## Recipe\n\n{lines}{mixed}")
    }

    /// Whether the plan is another than the recipe alone would have made.
    fn is_mixed(&self) -> bool {
        let Recipe { bits, outliers, .. } = self.manifest.recipe;
        let differs = |site: &SitePlan| {
            site.outlier_channels != outliers.of(site.channels)
                || site.linears.iter().any(|linear| linear.bits != bits)
        };
        self.manifest.blocks.iter().flatten().any(differs)
    }

    fn calibration(&self) -> String {
        let calibration = &self.manifest.calibration;
        let windows = format!(
            "{} of {} tokens, seed {}",
            units::counted(calibration.samples, "window"),
            calibration.seq_len,
            calibration.seed
        );
        if calibration.sets.is_empty() {
            let dataset = set_name(&calibration.dataset);
            let text = match is_own(&dataset) {
                true => format!(
                    "## Calibration\n\n{windows}, which the model itself wrote at temperature 1 ({}).\n",
                    code(&dataset)
                ),
                false => format!("## Calibration\n\n{windows}, drawn from {}.\n", code(&dataset)),
            };
            return text + &self.distillation();
        }
        let rows: String = calibration.sets.iter().map(set_row).collect();
        let table = format!("| text | windows | file |\n|---|---:|---|\n{rows}");
        format!("## Calibration\n\n{windows}.\n\n{table}{}", self.distillation())
    }

    /// How the checkpoint was trained afterwards, if it was.
    fn distillation(&self) -> String {
        let Some(record) = &self.manifest.distillation else { return String::new() };
        let DistillationRecord { text, steps, windows_per_step, before, after, .. } = record;
        format!(
            "\nAfterwards scales, norms and clip ratios were trained by the source's predictions: {} of {} of {} tokens of {}. The \
             divergence from the source on windows held back fell from {before:.4} to {after:.4} nats a token.\n",
            units::counted(*steps, "step"),
            units::counted(*windows_per_step, "window"),
            text.seq_len,
            code(&set_name(&text.dataset))
        )
    }

    fn accuracy(&self) -> String {
        if self.perplexities.is_empty() {
            return "## Accuracy\n\nNot measured in the run that wrote this.\n".to_owned();
        }
        let mut text = "## Accuracy\n\n\
             | perplexity on | windows | source | quantized | change |\n|---|---:|---:|---:|---:|\n"
            .to_owned();
        for measured in self.perplexities {
            text += &format!(
                "| {} | {} of {} tokens | {:.3} | {:.3} | {} |\n",
                cell(&set_name(&measured.dataset)),
                units::count(measured.windows),
                measured.seq_len,
                measured.before,
                measured.after,
                units::change(measured.after / measured.before)
            );
        }
        text + "\nMeasured by the run that wrote this, source and result on the same windows; a few windows show that nothing \
             broke, and are no benchmark.\n"
    }

    fn usage(&self) -> String {
        let mut text = "## Use\n".to_owned();
        for (what, command) in &self.form.usage {
            text += &format!("\n{what}:\n\n{}", shell(std::slice::from_ref(command)));
        }
        text
    }

    fn commands(&self) -> String {
        let mut commands = vec![self.quantize_command()];
        commands.extend(self.form.steps.iter().cloned());
        let version = code(&self.manifest.tool_version);
        format!("## How it was made\n\nWith `atom` {version}:\n\n{}", shell(&commands))
    }

    /// The command that makes these tensors again, by what `atom.json` says. Of a mixed plan it makes the recipe only.
    fn quantize_command(&self) -> String {
        let Manifest { source, calibration, recipe, .. } = self.manifest;
        let model = match &source.hub {
            Some(hub) => format!("{}@{}", hub.repo, hub.commit),
            None => source.name.clone(),
        };
        let mut words: Vec<String> =
            ["atom", "quantize", "--model"].into_iter().map(str::to_owned).collect();
        words.push(model);
        words.extend(recipe.flags());
        let sets: Vec<String> = calibration.dataset.split(',').map(set_name).collect();
        let numbers = [
            ("--calib", sets.join(",")),
            ("--samples", calibration.samples.to_string()),
            ("--seq-len", calibration.seq_len.to_string()),
            ("--seed", calibration.seed.to_string()),
        ];
        words.extend(numbers.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
        let words: Vec<String> = words.iter().map(|word| quoted(&printable(word))).collect();
        let note = if self.is_mixed() { "  # and a plan of bits and outliers" } else { "" };
        words.join(" ") + note
    }
}

/// Whether a text set is what the model wrote.
fn is_own(dataset: &str) -> bool {
    dataset == "self" || dataset.starts_with("self=")
}

/// What a text set is called in public: of a file its name, without the directories that it lies in.
fn set_name(name: &str) -> String {
    let public = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
    match name.split_once('=') {
        Some((set, file)) => format!("{set}={}", public(file)),
        None => public(name),
    }
}

fn set_row(set: &SetUsed) -> String {
    let file = match &set.file {
        Some(file) => cell(&format!("{}/{} at {}", file.repo, file.file, file.commit)),
        None => "-".to_owned(),
    };
    format!("| {} | {} | {file} |\n", cell(&set_name(&set.name)), units::count(set.samples))
}

/// Whether a text has the characters of the Hub's names only, which mean nothing in Markdown.
fn is_id(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte))
}

/// A block of commands.
fn shell(commands: &[String]) -> String {
    format!("```sh\n{}\n```\n", commands.join("\n"))
}

/// Foreign text as a span of code.
fn code(text: &str) -> String {
    format!("`{}`", printable(text).replace('`', "'"))
}

/// The same in a table, whose cells end at a bar.
fn cell(text: &str) -> String {
    code(text).replace('|', "\\|")
}

/// Foreign text as a part of a sentence.
fn escaped(text: &str) -> String {
    let mut safe = String::new();
    for c in printable(text).chars() {
        match c {
            '<' => safe.push_str("&lt;"),
            '&' => safe.push_str("&amp;"),
            '\\' | '`' | '*' | '[' | ']' | '|' | '#' | '!' => safe.extend(['\\', c]),
            _ => safe.push(c),
        }
    }
    safe
}
