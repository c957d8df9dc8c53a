/*! Text sets: embedded in the program, on the Hub by name, or read from a file.

How rows become windows decides the token stream and with it every published perplexity, so it is done
in this one place, as the method's reference does it: rows joined with a blank line between them, empty
ones included, or windows drawn inside single rows. `calibration-data/` says which set is which. */

use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::documents::{Documents, Gathering};
use super::named::{self, Lines, NamedSet, Rows};
use super::rows::{Form, each_row, open, unreadable};
use super::{Tokenizer, calibration_windows, evaluation_windows};
use crate::checkpoint::sha256_hex;
use crate::hub::{DataFile, Hub};
use crate::{Error, Result};

/// What a text is wanted for: named sets have a different part for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Statistics and weights are fitted to it.
    Calibration,
    /// Perplexity is measured on it.
    Evaluation,
}

/// One text set, or for calibration a mix of several.
pub struct TextSet {
    /// What it was asked for by.
    pub name: String,
    /// SHA-256 of its text, lower-case hexadecimal: of the rows joined; of documents, each followed by
    /// a zero byte; of a mix, of the hashes of its sets, each followed by a line end.
    pub sha256: String,
    parts: Vec<Part>,
}

/// A text set by itself.
struct Part {
    name: String,
    sha256: String,
    content: Content,
    file: Option<DataFile>,
}

enum Content {
    Joined(String),
    Documents(Documents),
}

/// A set that calibration windows were drawn from; part of a checkpoint's provenance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetUsed {
    /// Its name or path.
    pub name: String,
    /// SHA-256 of its text.
    pub sha256: String,
    /// Windows drawn from it.
    pub samples: usize,
    /// The file on the Hub, if it came from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<DataFile>,
}

/// The set that needs no file: prose written for this project, in two parts that share no topic.
const SAMPLE: &str = "sample";
const SAMPLE_CALIBRATION: &str = include_str!("../../calibration-data/sample.txt");
const SAMPLE_EVALUATION: &str = include_str!("../../calibration-data/sample-heldout.txt");

/// Windows of an evaluation on documents, and the seed of their draw: the reference's.
const DOCUMENT_WINDOWS: usize = 256;
const DOCUMENT_SEED: u64 = 0;

const FORMS: &str = "pass plain text, or JSONL or Parquet with a `text` field";

impl TextSet {
    /// Loads `sample`, a named set from the Hub, `NAME=FILE` (a named set's own file, read as that set
    /// is), or a file: Parquet or JSONL, whose rows are joined, or plain text. For calibration several of
    /// them may stand side by side, with commas. A name wins over a file of that name (`./sample` is
    /// the file).
    ///
    /// # Errors
    /// Bad input if there is no such set or file, or it holds no text in UTF-8; wrong usage if several
    /// sets are to be evaluated at once; a machine error if a set cannot be fetched.
    pub fn load(spec: &str, split: Split, hub: &Hub<'_>) -> Result<Self> {
        let specs: Vec<&str> = if !spec.contains(',') || Path::new(spec).exists() {
            vec![spec]
        } else {
            spec.split(',').map(str::trim).collect()
        };
        if specs.len() > 1 && split == Split::Evaluation {
            return Err(Error::usage("--dataset takes one text set")
                .hint("measure on each by itself: a perplexity over several has no meaning"));
        }
        if let Some((index, twice)) =
            specs.iter().enumerate().find(|(index, spec)| specs[..*index].contains(spec))
        {
            return Err(Error::usage(format!("--calib names `{twice}` twice"))
                .hint(format!("leave out set {}, or raise --samples", index + 1)));
        }
        let parts = specs.iter().map(|spec| Part::load(spec, split, hub)).collect::<Result<_>>()?;
        Ok(Self::of(spec, parts))
    }

    /// The text that is part of the program.
    pub fn sample(split: Split) -> Self {
        let text = match split {
            Split::Calibration => SAMPLE_CALIBRATION,
            Split::Evaluation => SAMPLE_EVALUATION,
        };
        Self::of(SAMPLE, vec![Part::joined(SAMPLE, text.to_owned(), None)])
    }

    /// The sample again and again until it has as many bytes, for work whose content does not matter.
    pub fn sample_of_length(split: Split, bytes: usize) -> Self {
        let text = match split {
            Split::Calibration => SAMPLE_CALIBRATION,
            Split::Evaluation => SAMPLE_EVALUATION,
        };
        let text = text.repeat(bytes.div_ceil(text.len()).max(1));
        Self::of(SAMPLE, vec![Part::joined(SAMPLE, text, None)])
    }

    fn of(name: &str, parts: Vec<Part>) -> Self {
        let sha256 = match &parts[..] {
            [part] => part.sha256.clone(),
            parts => {
                let hashes = parts.iter().map(|part| format!("{}\n", part.sha256));
                sha256_hex(hashes.collect::<String>().as_bytes())
            }
        };
        Self { name: name.to_owned(), sha256, parts }
    }

    /// Draws calibration windows, `[samples, seq_len]` flat. Each set of a mix gives as many as the
    /// others, the first ones one more where the number does not divide; sets come one behind the
    /// other, each drawn as if it were alone, after `random.seed(seed)`.
    ///
    /// # Errors
    /// If there is too little text, or fewer samples than sets.
    pub fn calibration_windows(
        &self,
        tokenizer: &Tokenizer,
        samples: usize,
        seq_len: usize,
        seed: u64,
    ) -> Result<Vec<u32>> {
        let mut windows = Vec::with_capacity(samples.saturating_mul(seq_len));
        for (part, samples) in self.parts.iter().zip(self.shares(samples)?) {
            let drawn = match &part.content {
                Content::Joined(text) => {
                    calibration_windows(&tokenizer.encode(text)?, samples, seq_len, seed)
                }
                Content::Documents(documents) => documents.draw(tokenizer, samples, seq_len, seed),
            };
            let whence = || format!("calibration text `{}`", part.name);
            windows.extend(drawn.map_err(|error| error.context(whence()))?);
        }
        Ok(windows)
    }

    /// The evaluation windows, `[windows, seq_len]` flat: side by side over a joined text; of documents
    /// 256, drawn after `random.seed(0)`. At most `limit` of them, the first ones.
    ///
    /// # Errors
    /// If there is too little text.
    pub fn evaluation_windows(
        &self,
        tokenizer: &Tokenizer,
        seq_len: usize,
        limit: Option<usize>,
    ) -> Result<Vec<u32>> {
        let mut windows = Vec::new();
        for part in &self.parts {
            let cut = match &part.content {
                Content::Joined(text) => {
                    evaluation_windows(&tokenizer.encode(text)?, seq_len, limit)
                        .map(|windows| windows.concat())
                }
                Content::Documents(documents) => {
                    let count = limit.unwrap_or(DOCUMENT_WINDOWS).min(DOCUMENT_WINDOWS);
                    documents.draw(tokenizer, count, seq_len, DOCUMENT_SEED)
                }
            };
            let whence = || format!("evaluation text `{}`", part.name);
            windows.extend(cut.map_err(|error| error.context(whence()))?);
        }
        Ok(windows)
    }

    /// The sets that `samples` windows are drawn from, where there is more to say than the name and
    /// hash of one: several, or one of the Hub.
    ///
    /// # Errors
    /// If there are fewer samples than sets.
    pub fn used(&self, samples: usize) -> Result<Vec<SetUsed>> {
        if self.parts.len() == 1 && self.parts[0].file.is_none() {
            return Ok(Vec::new());
        }
        let used = |(part, samples): (&Part, usize)| SetUsed {
            name: part.name.clone(),
            sha256: part.sha256.clone(),
            samples,
            file: part.file.clone(),
        };
        Ok(self.parts.iter().zip(self.shares(samples)?).map(used).collect())
    }

    /// How many of the samples each set gives.
    fn shares(&self, samples: usize) -> Result<Vec<usize>> {
        let sets = self.parts.len();
        if sets > 1 && samples < sets {
            return Err(Error::usage(format!(
                "--samples {samples} are fewer than the {sets} text sets"
            ))
            .hint("draw at least one window from each"));
        }
        Ok((0..sets).map(|set| samples / sets + usize::from(set < samples % sets)).collect())
    }
}

impl Part {
    fn load(spec: &str, split: Split, hub: &Hub<'_>) -> Result<Self> {
        if spec == SAMPLE {
            return Ok(TextSet::sample(split).parts.remove(0));
        }
        if let Some(set) = named::set(spec) {
            let file = set.file(split);
            let found = hub.dataset_file(&set.repo, &set.revision, file);
            let file = found.map_err(|error| or_own_file(error, spec, file))?;
            return Self::read(spec, &file.path.clone(), Some(&set), Some(file));
        }
        if let Some((name, path)) = spec.split_once('=')
            && let Some(set) = named::set(name)
        {
            return Self::read(spec, Path::new(path), Some(&set), None);
        }
        Self::read(spec, Path::new(spec), None, None)
    }

    /// Reads a file, by the rules of a named set if it is one.
    fn read(
        name: &str,
        path: &Path,
        set: Option<&NamedSet>,
        file: Option<DataFile>,
    ) -> Result<Self> {
        if let Err(error) = fs_err::metadata(path) {
            let absent = error.kind() == ErrorKind::NotFound;
            return Err(if absent { unknown(name, set, path) } else { error.into() });
        }
        let form = Form::of(path);
        if set.is_some_and(|set| set.rows == Rows::Documents) {
            if form == Form::Plain {
                return Err(Error::input(format!(
                    "{} is plain text, in which no document ends",
                    path.display()
                ))
                .hint(format!("give `{name}` a file of rows: .parquet, .jsonl or .json.gz")));
            }
            let mut gathering = Gathering::begin()?;
            each_text(path, set, |text| gathering.add(text))?;
            let (documents, sha256) = gathering.finish()?;
            if documents.bytes() == 0 {
                return Err(empty(path));
            }
            let content = Content::Documents(documents);
            return Ok(Self { name: name.to_owned(), sha256, content, file });
        }
        let mut joined = Joined::default();
        match (form, set.map(|set| set.lines)) {
            (Form::Plain, None | Some(Lines::None)) => joined.push(&plain(path)?),
            (Form::Plain, Some(Lines::Kept)) => {
                let text = plain(path)?;
                let rows = text.split_inclusive('\n');
                rows.for_each(|row| joined.push(if row.trim().is_empty() { "" } else { row }));
            }
            (Form::Plain, Some(Lines::Trimmed)) => {
                plain(path)?.lines().for_each(|row| joined.push(row.trim()));
            }
            (Form::Lines | Form::Parquet, _) => each_text(path, set, |text| {
                joined.push(text);
                Ok(())
            })?,
        }
        if joined.text.trim().is_empty() {
            return Err(empty(path));
        }
        Ok(Self::joined(name, joined.text, file))
    }

    fn joined(name: &str, text: String, file: Option<DataFile>) -> Self {
        let sha256 = sha256_hex(text.as_bytes());
        Self { name: name.to_owned(), sha256, content: Content::Joined(text), file }
    }
}

/// Rows with a blank line between them, as the reference's `"\n\n".join`.
#[derive(Default)]
struct Joined {
    text: String,
    begun: bool,
}

impl Joined {
    fn push(&mut self, row: &str) {
        if self.begun {
            self.text.push_str("\n\n");
        }
        self.begun = true;
        self.text.push_str(row);
    }
}

/// Calls `take` with the text of each row: the set's field, or `text`.
fn each_text(
    path: &Path,
    set: Option<&NamedSet>,
    mut take: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let field = set.map_or("text", |set| set.field.as_str());
    each_row(path, |place, row| match row.get(field).or_else(|| row.get("text")) {
        Some(Value::String(text)) => take(text),
        found => {
            let what = match found {
                None => format!("it has no field `{field}`"),
                Some(_) => format!("its field `{field}` is no string"),
            };
            Err(Error::input(format!("{}, {place}: {what}", path.display())).hint(format!(
                "every row must have a `{field}` string, like {{\"{field}\": \"...\"}}"
            )))
        }
    })
}

/// A file that is one text.
fn plain(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(|error| unreadable(path, &error))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let what = format!("is not UTF-8 text: the byte at offset {at} is not valid");
        Error::input(format!("{} {what}", path.display())).hint(FORMS)
    })
}

fn empty(path: &Path) -> Error {
    Error::input(format!("{} holds no text", path.display())).hint(FORMS)
}

/// An error of the Hub, with the way around it.
fn or_own_file(error: Error, name: &str, file: &str) -> Error {
    let own = file.rsplit('/').next().unwrap_or(file);
    let way = format!("`{name}=FILE` reads {own} from where you have it; `{SAMPLE}` needs no file");
    let hint = match error.hint_text() {
        Some(hint) => format!("{hint}\n{way}"),
        None => way,
    };
    error.context(format!("the text set `{name}` cannot be fetched")).hint(hint)
}

fn unknown(spec: &str, set: Option<&NamedSet>, path: &Path) -> Error {
    if set.is_some() {
        return Error::input(format!("{} of `{spec}` does not exist", path.display()))
            .hint("after the name of a text set and `=` stands a file of it");
    }
    let names: Vec<_> = named::sets().into_keys().map(|name| format!("`{name}`")).collect();
    Error::input(format!("`{spec}` is neither a known text set nor a file that exists"))
        .hint(format!("known text sets are `{SAMPLE}`, {}", names.join(", ")))
}

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
