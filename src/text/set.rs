/*! Text sets: one long string each, embedded in the program or read from a file.

How rows are joined decides the token stream and with it every published perplexity, so it is done
in this one place, as the method's reference does it: rows of a JSONL file, empty ones included, with
a blank line between them. `calibration-data/README.md` says what the named sets are. */

use std::borrow::Cow;
use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// What a text is wanted for: named sets have a different part for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Statistics and weights are fitted to it.
    Calibration,
    /// Perplexity is measured on it.
    Evaluation,
}

/// A text and its fingerprint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextSet {
    /// The name or path it was asked for by.
    pub name: String,
    /// The whole text, rows joined.
    pub text: String,
    /// SHA-256 of `text`, lower-case hexadecimal.
    pub sha256: String,
}

/// A published text set: known by name, to be fetched by the user.
struct Published {
    name: &'static str,
    calibration_file: &'static str,
    evaluation_file: &'static str,
}

const PUBLISHED: [Published; 3] = [
    Published {
        name: "wikitext2",
        calibration_file: "wiki.train.raw",
        evaluation_file: "wiki.test.raw",
    },
    Published { name: "ptb", calibration_file: "ptb.train.txt", evaluation_file: "ptb.valid.txt" },
    Published {
        name: "c4",
        calibration_file: "c4-train.00000-of-01024.json",
        evaluation_file: "c4-validation.00000-of-00008.json",
    },
];

/// The set that needs no file: prose written for this project, in two parts that share no topic.
const SAMPLE: &str = "sample";
const SAMPLE_CALIBRATION: &str = include_str!("../../calibration-data/sample.txt");
const SAMPLE_EVALUATION: &str = include_str!("../../calibration-data/sample-heldout.txt");

/// One line of a JSONL file; other fields are ignored.
#[derive(Deserialize)]
struct Row<'a> {
    #[serde(borrow)]
    text: Cow<'a, str>,
}

impl TextSet {
    /// Loads `sample`, or the file at `spec`: plain text, or one row a line where the name ends in
    /// `.jsonl` or `.json`. A name wins over a file of that name (`./sample` is the file).
    ///
    /// # Errors
    /// If the set is not on this machine, the file cannot be read, is not UTF-8, has a line without
    /// a `text`, or holds no text at all.
    pub fn load(spec: &str, split: Split, _hub: &crate::hub::Hub<'_>) -> Result<Self> {
        if spec == SAMPLE {
            return Ok(Self::sample(split));
        }
        if let Some(published) = PUBLISHED.iter().find(|set| set.name == spec) {
            return Err(not_here(published, split));
        }
        let bytes = match fs_err::read(spec) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(unknown(spec)),
            read => read?,
        };
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            Error::input(format!("{spec} is not UTF-8 text: the byte at offset {at} is not valid"))
                .hint("pass plain text, or JSONL with a `text` field")
        })?;
        let text = if holds_rows(spec) { join_rows(&text, spec)? } else { text };
        if text.trim().is_empty() {
            return Err(Error::input(format!("{spec} holds no text"))
                .hint("pass plain text, or JSONL with a `text` field"));
        }
        Ok(Self::new(spec, text))
    }

    /// The text that is part of the program.
    pub fn sample(split: Split) -> Self {
        let text = match split {
            Split::Calibration => SAMPLE_CALIBRATION,
            Split::Evaluation => SAMPLE_EVALUATION,
        };
        Self::new(SAMPLE, text.to_owned())
    }

    fn new(name: &str, text: String) -> Self {
        use std::fmt::Write;
        let mut sha256 = String::with_capacity(64);
        for byte in Sha256::digest(text.as_bytes()) {
            let _ = write!(sha256, "{byte:02x}"); // writing to a String cannot fail
        }
        Self { name: name.to_owned(), text, sha256 }
    }
}

/// Whether the file's name says that it holds one JSON object a line. C4's own files are called
/// `.json` and are such files.
fn holds_rows(path: &str) -> bool {
    let extension = Path::new(path).extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|e| e.eq_ignore_ascii_case("jsonl") || e.eq_ignore_ascii_case("json"))
}

/// The `text` of every line, `"\n\n".join`ed as the reference does.
fn join_rows(lines: &str, path: &str) -> Result<String> {
    let mut joined = String::with_capacity(lines.len());
    for (index, line) in lines.lines().enumerate() {
        let row: Row = serde_json::from_str(line).map_err(|error| bad_line(path, index, &error))?;
        if index > 0 {
            joined.push_str("\n\n");
        }
        joined.push_str(&row.text);
    }
    Ok(joined)
}

fn bad_line(path: &str, index: usize, error: &serde_json::Error) -> Error {
    let cause = error.to_string();
    // The parser saw one line only; its "at line 1" would contradict ours.
    let cause = cause.rsplit_once(" at line ").map_or(cause.as_str(), |(what, _)| what);
    Error::input(format!("{path}, line {}: {cause} (at column {})", index + 1, error.column()))
        .hint("every line must be a JSON object with a `text` string, like {\"text\": \"...\"}")
}

fn flag(split: Split) -> &'static str {
    match split {
        Split::Calibration => "--calib",
        Split::Evaluation => "--dataset",
    }
}

fn not_here(set: &Published, split: Split) -> Error {
    let file = match split {
        Split::Calibration => set.calibration_file,
        Split::Evaluation => set.evaluation_file,
    };
    Error::input(format!("the text set `{}` cannot be downloaded by this version", set.name)).hint(
        format!(
            "pass the file instead: `{flag} {file}`, or the hub's rows exported to JSONL with a \
             `text` field; `{flag} sample` needs no file",
            flag = flag(split)
        ),
    )
}

fn unknown(spec: &str) -> Error {
    let names: Vec<_> = PUBLISHED.iter().map(|set| format!("`{}`", set.name)).collect();
    Error::input(format!("`{spec}` is neither a known text set nor a file that exists"))
        .hint(format!("known text sets are `{SAMPLE}`, {}", names.join(", ")))
}

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
