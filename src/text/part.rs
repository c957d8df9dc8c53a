/*! One text set by itself: its rows, read as a stream, and the windows that are cut from them. */

use std::borrow::Cow;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::documents::{Documents, Gathering};
use super::file::DataPath;
use super::ids::Ids;
use super::named::{self, LineSplit, NamedSet, Windowing};
use super::pieces::{PIECE_BYTES, Pieces};
use super::rows::{FileFormat, each_row};
use super::windows::{WindowDraw, calibration_starts, check_size, evaluation_count};
use super::{Split, Tokenizer};
use crate::checkpoint::{DataFile, NOT_YET_KNOWN, sha256_hex};
use crate::hub::Hub;
use crate::progress::Progress;
use crate::{Error, Kind, Result};

/// A text set by itself.
pub(super) struct Part {
    /// Its name or path.
    pub(super) name: String,
    content: Content,
    /// The file on the Hub, if it came from there.
    pub(super) file: Option<DataFile>,
}

enum Content {
    /// A text that is part of the program, repeated this many times.
    Builtin(&'static str, usize),
    /// A file, read by the rules of a named set if it belongs to one.
    File(DataPath, Option<NamedSet>),
    /// What the model itself writes: a file of beginnings, and the windows once they are there.
    Own(Option<PathBuf>, Option<Vec<u32>>),
}

/// The set that needs no file, written for this project in two parts that share no topic. Calibration has prose, code,
/// data, mathematics, markup and some 30 languages; evaluation has prose.
pub(super) const SAMPLE: &str = "sample";
const SAMPLE_CALIBRATION: &str = include_str!("../../calibration-data/sample.txt");
const SAMPLE_EVALUATION: &str = include_str!("../../calibration-data/sample-heldout.txt");

/// What the model that is calibrated writes itself.
pub(super) const OWN: &str = "self";

/// Windows of an evaluation on documents, and the seed of their draw: the reference's.
const DOCUMENT_WINDOWS: usize = 256;
const DOCUMENT_SEED: u64 = 0;

/// The longest text that is read to its end; tokenizing it takes an hour.
const TEXT_BYTES: u64 = 4 << 30;

/// The most bytes of documents together; only the drawn ones are tokenized.
const DOCUMENT_BYTES: u64 = 64 << 30;

pub(super) const FORMS: &str = "pass plain text, or JSONL, CSV or Parquet with a `text` field";

impl Part {
    /// Opens one set: `sample`, a named set, `NAME=FILE` or a file.
    pub(super) fn load(spec: &str, split: Split, hub: &Hub<'_>) -> Result<Self> {
        if spec == SAMPLE {
            return Ok(Self::sample(split, 0));
        }
        if let Some(own) = Self::own(spec, split)? {
            return Ok(own);
        }
        if let Some(set) = named::set(spec) {
            let file = set.file(split);
            let found = hub.dataset_file(&set.repo, &set.revision, file);
            let file = found.map_err(|error| or_own_file(error, spec, file))?;
            return Self::open(spec, &file.path.clone(), Some(set), Some(file), hub.progress());
        }
        if let Some((name, path)) = spec.split_once('=')
            && let Some(set) = named::set(name)
        {
            return Self::open(spec, Path::new(path), Some(set), None, hub.progress());
        }
        Self::open(spec, Path::new(spec), None, None, hub.progress())
    }

    /// What the model writes, for `self` and `self=FILE`.
    fn own(spec: &str, split: Split) -> Result<Option<Self>> {
        let beginnings = match spec.split_once('=') {
            _ if spec == OWN => None,
            Some((OWN, file)) => Some(PathBuf::from(file)),
            _ => return Ok(None),
        };
        if split == Split::Evaluation {
            return Err(Error::usage(format!(
                "`{OWN}` is a text to calibrate on: the model writes it"
            ))
            .hint(format!("measure on a text that people wrote, such as `{SAMPLE}`")));
        }
        let content = Content::Own(beginnings, None);
        Ok(Some(Self { name: spec.to_owned(), content, file: None }))
    }

    /// The file of beginnings, if this is what the model writes and it has not yet.
    pub(super) fn unwritten(&self) -> Option<Option<&Path>> {
        match &self.content {
            Content::Own(beginnings, None) => Some(beginnings.as_deref()),
            _ => None,
        }
    }

    /// Takes what the model wrote, `[windows, seq_len]` flat.
    pub(super) fn fill(&mut self, tokens: Vec<u32>) {
        if let Content::Own(_, written) = &mut self.content {
            *written = Some(tokens);
        }
    }

    /// A file, to be read by the rules of a named set if it is one.
    fn open(
        name: &str,
        path: &Path,
        set: Option<NamedSet>,
        file: Option<DataFile>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        if let Err(error) = fs_err::metadata(path) {
            let absent = error.kind() == ErrorKind::NotFound;
            return Err(if absent { unknown(name, set.as_ref(), path) } else { error.into() });
        }
        let documents = set.as_ref().is_some_and(|set| set.rows == Windowing::Documents);
        if documents && FileFormat::of(path) == FileFormat::Plain {
            return Err(Error::input(format!(
                "{} is plain text, in which no document ends",
                path.display()
            ))
            .hint(format!("give `{name}` a file of rows: .parquet, .jsonl or .json.gz")));
        }
        let data = DataPath::open(path, progress)?;
        if data.bytes()? == 0 {
            return Err(empty(path));
        }
        let content = Content::File(data, set);
        Ok(Self { name: name.to_owned(), content, file })
    }

    /// The sample, repeated until it has at least `bytes` bytes.
    pub(super) fn sample(split: Split, bytes: usize) -> Self {
        let text = match split {
            Split::Calibration => SAMPLE_CALIBRATION,
            Split::Evaluation => SAMPLE_EVALUATION,
        };
        let content = Content::Builtin(text, bytes.div_ceil(text.len()).max(1));
        Self { name: SAMPLE.to_owned(), content, file: None }
    }

    /// An upper bound of the bytes of its text, if it is known before reading.
    pub(super) fn length(&self) -> Option<u64> {
        match &self.content {
            Content::Builtin(text, times) => Some((text.len() * times) as u64),
            Content::Own(..) => Some(0),
            Content::File(data, _)
                if data.is_gzip() || FileFormat::of(data.path()) == FileFormat::Parquet =>
            {
                None
            }
            Content::File(data, _) => data.bytes().ok(),
        }
    }

    /// Draws calibration windows, in one round no more than the text holds next to one another, and hashes the text.
    pub(super) fn draw(
        &self,
        tokenizer: &Tokenizer,
        draw: &WindowDraw,
        progress: &dyn Progress,
    ) -> Result<(Vec<u32>, String)> {
        let WindowDraw { samples, seq_len, seed, .. } = *draw;
        if let Content::Own(_, written) = &self.content {
            check_size(samples, seq_len)?;
            return Ok(match written {
                None => (vec![0; samples * seq_len], NOT_YET_KNOWN.to_owned()),
                Some(tokens) => {
                    let bytes: Vec<u8> = tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
                    (tokens.clone(), sha256_hex(&bytes))
                }
            });
        }
        let in_text = |error: Error| in_text(error, "calibration", &self.name);
        if let Some((documents, sha256)) = self.documents(progress)? {
            let drawn = documents.draw_held(tokenizer, samples, seq_len, seed, progress);
            let drawn = drawn.map_err(in_text)?;
            return Ok((drawn, sha256));
        }
        self.check_file(progress)?;
        let mut ids = Ids::new();
        let sha256 = self.tokenize(tokenizer, progress, &mut |some| {
            ids.append(some)?;
            Ok(ControlFlow::Continue(()))
        })?;
        let starts = calibration_starts(ids.count(), draw).map_err(in_text)?;
        let mut tokens = Vec::new();
        for start in starts {
            ids.read(start, seq_len, &mut tokens)?;
        }
        Ok((tokens, sha256))
    }

    /// Cuts evaluation windows, and reads only as much of the text as they need.
    pub(super) fn evaluate(
        &self,
        tokenizer: &Tokenizer,
        seq_len: usize,
        limit: Option<usize>,
        progress: &dyn Progress,
    ) -> Result<Vec<u32>> {
        let in_text = |error: Error| in_text(error, "evaluation", &self.name);
        if let Some((documents, _)) = self.documents(progress)? {
            let count = limit.unwrap_or(DOCUMENT_WINDOWS).min(DOCUMENT_WINDOWS);
            let drawn = documents.draw(tokenizer, count, seq_len, DOCUMENT_SEED, progress);
            return drawn.map_err(in_text);
        }
        if limit.is_none() {
            self.check_file(progress)?;
        }
        let wanted = limit.map_or(usize::MAX, |limit| limit.saturating_mul(seq_len));
        let mut ids = Vec::new();
        self.tokenize(tokenizer, progress, &mut |some| {
            ids.extend_from_slice(some);
            check_size(ids.len().min(wanted), 1)?;
            Ok(if ids.len() < wanted { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        let count = evaluation_count(ids.len(), seq_len, limit).map_err(in_text)?;
        ids.truncate(count * seq_len);
        Ok(ids)
    }

    /// Passes the ids of a joined text to `sink` until it breaks. Returns the SHA-256 of the text read until then.
    fn tokenize(
        &self,
        tokenizer: &Tokenizer,
        progress: &dyn Progress,
        sink: &mut dyn FnMut(&[u32]) -> Result<ControlFlow<()>>,
    ) -> Result<String> {
        let mut pieces = Pieces::begin(tokenizer, PIECE_BYTES, progress, sink)?;
        let mut hash = Sha256::new();
        let (mut bytes, mut blank) = (0, true);
        let mut flow = ControlFlow::Continue(());
        self.each_part(&mut |text| {
            progress.check_stop()?;
            bytes += text.len() as u64;
            self.check_length(bytes, TEXT_BYTES)?;
            blank &= text.trim().is_empty();
            hash.update(text.as_bytes());
            if flow.is_continue() {
                flow = pieces.push(text)?;
            }
            // White space alone is no text, at any length.
            Ok(if blank { ControlFlow::Continue(()) } else { flow })
        })?;
        if blank && let Content::File(data, _) = &self.content {
            return Err(empty(data.path()));
        }
        pieces.finish()?;
        Ok(hex::encode(hash.finalize()))
    }

    /// Refuses a text that is too long to be read to its end, before it is tokenized.
    fn check_file(&self, progress: &dyn Progress) -> Result<()> {
        let Content::File(data, _) = &self.content else { return Ok(()) };
        if FileFormat::of(data.path()) == FileFormat::Plain && !data.is_gzip() {
            return self.check_length(data.bytes()?, TEXT_BYTES);
        }
        // A small file may hold a long text.
        let mut bytes = 0;
        self.each_part(&mut |text| {
            progress.check_stop()?;
            bytes += text.len() as u64;
            self.check_length(bytes, TEXT_BYTES)?;
            Ok(ControlFlow::Continue(()))
        })
    }

    fn check_length(&self, bytes: u64, most: u64) -> Result<()> {
        if bytes <= most {
            return Ok(());
        }
        let name = match &self.content {
            Content::Builtin(..) | Content::Own(..) => Cow::Borrowed(SAMPLE),
            Content::File(data, _) => data.path().to_string_lossy(),
        };
        let what = format!("{name} holds more than {} GB of text", most >> 30);
        Err(Error::input(what).hint("give a part of it, such as its first gigabyte"))
    }

    /// Calls `take` with the joined text, a part at a time, until it breaks.
    pub(super) fn each_part(
        &self,
        take: &mut dyn FnMut(&str) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let (data, set) = match &self.content {
            Content::Builtin(text, times) => {
                for _ in 0..*times {
                    if take(text)?.is_break() {
                        break;
                    }
                }
                return Ok(());
            }
            Content::Own(..) => return Ok(()),
            Content::File(data, set) => (data, set.as_ref()),
        };
        match (FileFormat::of(data.path()), set.map(|set| set.lines)) {
            (FileFormat::Plain, None | Some(LineSplit::None)) => data.each_part(take),
            (FileFormat::Plain, Some(lines)) => {
                let mut joined = Joined { take, begun: false };
                let mut rows = data.lines()?;
                while let Some((_, row)) = rows.next()? {
                    let row = match lines {
                        LineSplit::Trimmed => row.trim(),
                        _ if row.trim().is_empty() => "",
                        _ => row,
                    };
                    if joined.push(row)?.is_break() {
                        break;
                    }
                }
                Ok(())
            }
            _ => {
                let mut joined = Joined { take, begun: false };
                each_text(data, set, &mut |text| joined.push(text))
            }
        }
    }

    /// The documents of a set whose rows are separate, and their SHA-256.
    fn documents(&self, progress: &dyn Progress) -> Result<Option<(Documents, String)>> {
        let Content::File(data, Some(set)) = &self.content else { return Ok(None) };
        if set.rows != Windowing::Documents {
            return Ok(None);
        }
        let mut gathering = Gathering::begin()?;
        let mut bytes = 0;
        each_text(data, Some(set), &mut |text| {
            progress.check_stop()?;
            bytes += text.len() as u64;
            self.check_length(bytes, DOCUMENT_BYTES)?;
            gathering.add(text)?;
            Ok(ControlFlow::Continue(()))
        })?;
        if bytes == 0 {
            return Err(empty(data.path()));
        }
        gathering.finish().map(Some)
    }
}

/// Rows with a blank line between them, as the reference's `"\n\n".join`.
struct Joined<'t> {
    take: &'t mut dyn FnMut(&str) -> Result<ControlFlow<()>>,
    begun: bool,
}

impl Joined<'_> {
    fn push(&mut self, row: &str) -> Result<ControlFlow<()>> {
        if self.begun && (self.take)("\n\n")?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        self.begun = true;
        (self.take)(row)
    }
}

/// Calls `take` with the text of each row, the set's field or `text`, until it breaks.
fn each_text(
    data: &DataPath,
    set: Option<&NamedSet>,
    take: &mut dyn FnMut(&str) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let field = set.map_or("text", |set| set.field.as_str());
    let of_row = |place: &str, row: Value| match row.get(field).or_else(|| row.get("text")) {
        Some(Value::String(text)) => take(text),
        found => {
            let names = || row.as_object().into_iter().flat_map(|row| row.keys());
            let what = match found {
                None if names().count() == 0 => format!("it has no field `{field}`"),
                None => {
                    let names: Vec<_> = names().take(20).map(String::as_str).collect();
                    format!("it has no field `{field}`; its fields are {}", names.join(", "))
                }
                Some(_) => format!("its field `{field}` is no string"),
            };
            let what = format!("{}, {place}: {what}", data.path().display());
            Err(Error::input(what).hint(format!(
                "every row must have a `{field}` string, like {{\"{field}\": \"...\"}}"
            )))
        }
    };
    let mut of_row = of_row;
    each_row(data, Some(&[field, "text"]), &mut of_row)
}

/// Adds the name of the text to an error, unless the user asked the run to stop.
fn in_text(error: Error, what: &str, name: &str) -> Error {
    match error.kind() {
        Kind::Interrupted => error,
        _ => error.context(format!("{what} text `{name}`")),
    }
}

fn empty(path: &Path) -> Error {
    Error::input(format!("{} holds no text", path.display())).hint(FORMS)
}

/// An error of the Hub, with the alternative in its hint.
pub(super) fn or_own_file(error: Error, name: &str, file: &str) -> Error {
    let own = file.rsplit('/').next().unwrap_or(file);
    let way = format!("`{name}=FILE` reads {own} from where you have it; `{SAMPLE}` needs no file");
    let hint = match error.hint_text() {
        Some(hint) => format!("{hint}\n{way}"),
        None => way,
    };
    error.context(format!("the text set `{name}` cannot be fetched")).hint(hint)
}

fn unknown(spec: &str, set: Option<&NamedSet>, path: &Path) -> Error {
    if path.as_os_str().is_empty() {
        return Error::input(format!("`{spec}` names no file"))
            .hint("give a text set, such as `sample`, the path of a file, or NAME=FILE");
    }
    if set.is_some() {
        return Error::input(format!("{} of `{spec}` does not exist", path.display()))
            .hint("write the path of a file of that set after `=`");
    }
    let names: Vec<_> = named::sets().into_keys().map(|name| format!("`{name}`")).collect();
    Error::input(format!("`{spec}` is neither a known text set nor a file that exists"))
        .hint(format!("known text sets are `{SAMPLE}`, {}", names.join(", ")))
}
