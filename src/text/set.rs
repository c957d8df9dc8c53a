/*! Text sets: embedded in the program, on the Hub by name, or read from a file.

How rows become windows decides the token stream and with it every published perplexity, so it is done
in this one place, as the method's reference does it: rows joined with a blank line between them, empty
ones included, or windows drawn inside single rows. `calibration-data/` says which set is which.

A text is read as a stream and as far as its windows need: all of it for calibration, whose windows lie
anywhere, and its beginning for an evaluation of few windows. The windows of an evaluation are kept, so that
those before and after a long run are the same whatever has become of the file. */

use std::borrow::Cow;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::documents::{Documents, Gathering};
use super::file::DataPath;
use super::ids::Ids;
use super::named::{self, Lines, NamedSet, Rows};
use super::pieces::{PIECE_BYTES, Pieces};
use super::rows::{Form, each_row};
use super::windows::{calibration_starts, check_asked, check_size, evaluation_count};
use super::{Split, Tokenizer};
use crate::checkpoint::{hex, sha256_hex};
use crate::hub::{DataFile, Hub};
use crate::progress::Progress;
use crate::{Error, Kind, Result};

/// One text set, or for calibration a mix of several.
pub struct TextSet {
    /// What it was asked for by.
    pub name: String,
    parts: Vec<Part>,
    /// The evaluation windows that were cut last.
    evaluated: Mutex<Option<(Evaluated, Vec<u32>)>>,
}

/// What evaluation windows depend on besides the text.
#[derive(PartialEq, Eq)]
struct Evaluated {
    tokenizer: String,
    seq_len: usize,
    limit: Option<usize>,
}

/// A text set by itself.
struct Part {
    name: String,
    content: Content,
    file: Option<DataFile>,
}

enum Content {
    /// A text that is part of the program, so many times.
    Builtin(&'static str, usize),
    File(DataPath, Option<NamedSet>),
}

/// Calibration windows and where they come from.
#[derive(Debug)]
pub struct CalibrationWindows {
    /// `[samples, seq_len]` flat.
    pub tokens: Vec<u32>,
    /// SHA-256 of the text, lower-case hexadecimal: of the rows joined; of documents, each followed by
    /// a zero byte; of a mix, of the hashes of its sets, each followed by a line end.
    pub sha256: String,
    /// The sets, where there is more to say than the name and hash of one: several, or one of the Hub.
    pub sets: Vec<SetUsed>,
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

/// A text that is read to its end must not be longer: to tokenize so much takes an hour.
const TEXT_BYTES: u64 = 4 << 30;

/// Documents, of which only those drawn are tokenized, must not be longer together.
const DOCUMENT_BYTES: u64 = 64 << 30;

/// Memory that tokenizing takes at most, whatever the length of the text, as long as it has places where it can be
/// cut (`pieces.rs`): two pieces with their tokens, and ids that wait for the disk. 90 MB for English, 165 MB where
/// every byte is a token.
const TOKENIZING_BYTES: u64 = 180_000_000;

/// Memory that a byte of a text takes that is shorter than a piece.
const TOKENIZING_PER_BYTE: u64 = 170;

pub(super) const FORMS: &str = "pass plain text, or JSONL, CSV or Parquet with a `text` field";

impl TextSet {
    /// Loads `sample`, a named set from the Hub, `NAME=FILE` (a named set's own file, read as that set
    /// is), or a file: Parquet, JSONL or CSV, whose rows are joined, or plain text. For calibration several of
    /// them may stand side by side, with commas. A name wins over a file of that name (`./sample` is
    /// the file).
    ///
    /// # Errors
    /// Bad input if there is no such set or file, or it cannot be one; wrong usage if several sets are to be
    /// evaluated at once; a machine error if a set cannot be fetched.
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
        Self::of(SAMPLE, vec![Part::builtin(text, 1)])
    }

    /// The sample again and again until it has as many bytes, for work whose content does not matter.
    pub fn sample_of_length(split: Split, bytes: usize) -> Self {
        let text = match split {
            Split::Calibration => SAMPLE_CALIBRATION,
            Split::Evaluation => SAMPLE_EVALUATION,
        };
        Self::of(SAMPLE, vec![Part::builtin(text, bytes.div_ceil(text.len()).max(1))])
    }

    fn of(name: &str, parts: Vec<Part>) -> Self {
        Self { name: name.to_owned(), parts, evaluated: Mutex::default() }
    }

    /// Memory that tokenizing takes at the peak, by the length of the longest text, or at most where its length is not
    /// that of its file.
    pub fn tokenizing_bytes(&self) -> u64 {
        let lengths = self.parts.iter().map(Part::length);
        let longest = lengths.map(|length| length.unwrap_or(u64::MAX)).max().unwrap_or(0);
        longest.saturating_mul(TOKENIZING_PER_BYTE).min(TOKENIZING_BYTES)
    }

    /// Draws calibration windows. Each set of a mix gives as many as the others, the first ones one more where the
    /// number does not divide; sets come one behind the other, each drawn as if it were alone, after
    /// `random.seed(seed)`.
    ///
    /// # Errors
    /// If a text cannot be read or there is too little of it, there are fewer samples than sets, or the user asked the
    /// run to stop.
    pub fn calibration_windows(
        &self,
        tokenizer: &Tokenizer,
        samples: usize,
        seq_len: usize,
        seed: u64,
        progress: &dyn Progress,
    ) -> Result<CalibrationWindows> {
        check_asked(samples, seq_len)?;
        let mut tokens = Vec::new();
        let mut sets = Vec::new();
        for (part, samples) in self.parts.iter().zip(self.shares(samples)?) {
            let (drawn, sha256) = part.draw(tokenizer, samples, seq_len, seed, progress)?;
            tokens.extend(drawn);
            let (name, file) = (part.name.clone(), part.file.clone());
            sets.push(SetUsed { name, sha256, samples, file });
        }
        let sha256 = match &sets[..] {
            [set] => set.sha256.clone(),
            sets => {
                let hashes = sets.iter().map(|set| format!("{}\n", set.sha256));
                sha256_hex(hashes.collect::<String>().as_bytes())
            }
        };
        if let [SetUsed { file: None, .. }] = sets[..] {
            sets.clear();
        }
        Ok(CalibrationWindows { tokens, sha256, sets })
    }

    /// The evaluation windows, `[windows, seq_len]` flat: side by side over a joined text; of documents
    /// 256, drawn after `random.seed(0)`. At most `limit` of them, the first ones. Asked for again, they are the same.
    ///
    /// # Errors
    /// If the text cannot be read, there is too little of it, or the user asked the run to stop.
    pub fn evaluation_windows(
        &self,
        tokenizer: &Tokenizer,
        seq_len: usize,
        limit: Option<usize>,
        progress: &dyn Progress,
    ) -> Result<Vec<u32>> {
        check_asked(limit.unwrap_or(usize::MAX), seq_len)?;
        let wanted = Evaluated { tokenizer: tokenizer.sha256().to_owned(), seq_len, limit };
        let mut evaluated = self.evaluated.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((found, windows)) = &*evaluated
            && *found == wanted
        {
            return Ok(windows.clone());
        }
        let mut windows = Vec::new();
        for part in &self.parts {
            windows.extend(part.evaluate(tokenizer, seq_len, limit, progress)?);
        }
        *evaluated = Some((wanted, windows.clone()));
        Ok(windows)
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
            return Self::open(spec, &file.path.clone(), Some(set), Some(file), hub.progress());
        }
        if let Some((name, path)) = spec.split_once('=')
            && let Some(set) = named::set(name)
        {
            return Self::open(spec, Path::new(path), Some(set), None, hub.progress());
        }
        Self::open(spec, Path::new(spec), None, None, hub.progress())
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
        let documents = set.as_ref().is_some_and(|set| set.rows == Rows::Documents);
        if documents && Form::of(path) == Form::Plain {
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

    fn builtin(text: &'static str, times: usize) -> Self {
        Self { name: SAMPLE.to_owned(), content: Content::Builtin(text, times), file: None }
    }

    /// Bytes of its text at most, where they are known before it is read.
    fn length(&self) -> Option<u64> {
        match &self.content {
            Content::Builtin(text, times) => Some((text.len() * times) as u64),
            Content::File(data, _) if data.is_gzip() || Form::of(data.path()) == Form::Parquet => {
                None
            }
            Content::File(data, _) => data.bytes().ok(),
        }
    }

    /// Draws calibration windows, and hashes the text.
    fn draw(
        &self,
        tokenizer: &Tokenizer,
        samples: usize,
        seq_len: usize,
        seed: u64,
        progress: &dyn Progress,
    ) -> Result<(Vec<u32>, String)> {
        let whence = |error: Error| whence(error, "calibration", &self.name);
        if let Some((documents, sha256)) = self.documents(progress)? {
            let drawn = documents.draw(tokenizer, samples, seq_len, seed, progress);
            let drawn = drawn.map_err(whence)?;
            return Ok((drawn, sha256));
        }
        self.check_file(progress)?;
        let mut ids = Ids::new();
        let sha256 = self.tokenize(tokenizer, progress, &mut |some| {
            ids.append(some)?;
            Ok(ControlFlow::Continue(()))
        })?;
        let starts = calibration_starts(ids.count(), samples, seq_len, seed).map_err(whence)?;
        let mut tokens = Vec::new();
        for start in starts {
            ids.read(start, seq_len, &mut tokens)?;
        }
        Ok((tokens, sha256))
    }

    /// Cuts evaluation windows, and reads no more of the text than they need.
    fn evaluate(
        &self,
        tokenizer: &Tokenizer,
        seq_len: usize,
        limit: Option<usize>,
        progress: &dyn Progress,
    ) -> Result<Vec<u32>> {
        let whence = |error: Error| whence(error, "evaluation", &self.name);
        if let Some((documents, _)) = self.documents(progress)? {
            let count = limit.unwrap_or(DOCUMENT_WINDOWS).min(DOCUMENT_WINDOWS);
            let drawn = documents.draw(tokenizer, count, seq_len, DOCUMENT_SEED, progress);
            return drawn.map_err(whence);
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
        let count = evaluation_count(ids.len(), seq_len, limit).map_err(whence)?;
        ids.truncate(count * seq_len);
        Ok(ids)
    }

    /// Gives the ids of a joined text to `sink`, until it breaks. The SHA-256 is that of the text read until then.
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
            // White space alone is no text, however long.
            Ok(if blank { ControlFlow::Continue(()) } else { flow })
        })?;
        if blank && let Content::File(data, _) = &self.content {
            return Err(empty(data.path()));
        }
        pieces.finish()?;
        Ok(hex(&hash.finalize()))
    }

    /// Refuses a text that has to be read to its end and is too long, before it is tokenized.
    fn check_file(&self, progress: &dyn Progress) -> Result<()> {
        let Content::File(data, _) = &self.content else { return Ok(()) };
        if Form::of(data.path()) == Form::Plain && !data.is_gzip() {
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
            Content::Builtin(..) => Cow::Borrowed(SAMPLE),
            Content::File(data, _) => data.path().to_string_lossy(),
        };
        let what = format!("{name} holds more than {} GB of text", most >> 30);
        Err(Error::input(what).hint("give a part of it, such as its first gigabyte"))
    }

    /// Calls `take` with the joined text, a part at a time, until it breaks.
    fn each_part(&self, take: &mut dyn FnMut(&str) -> Result<ControlFlow<()>>) -> Result<()> {
        let (data, set) = match &self.content {
            Content::Builtin(text, times) => {
                for _ in 0..*times {
                    if take(text)?.is_break() {
                        break;
                    }
                }
                return Ok(());
            }
            Content::File(data, set) => (data, set.as_ref()),
        };
        match (Form::of(data.path()), set.map(|set| set.lines)) {
            (Form::Plain, None | Some(Lines::None)) => data.each_part(take),
            (Form::Plain, Some(lines)) => {
                let mut joined = Joined { take, begun: false };
                let mut rows = data.lines()?;
                while let Some((_, row)) = rows.next()? {
                    let row = match lines {
                        Lines::Trimmed => row.trim(),
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

    /// The documents of a set whose rows stay apart, and their SHA-256.
    fn documents(&self, progress: &dyn Progress) -> Result<Option<(Documents, String)>> {
        let Content::File(data, Some(set)) = &self.content else { return Ok(None) };
        if set.rows != Rows::Documents {
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

/// An error of a text, which is named unless the user asked the run to stop.
fn whence(error: Error, what: &str, name: &str) -> Error {
    match error.kind() {
        Kind::Interrupted => error,
        _ => error.context(format!("{what} text `{name}`")),
    }
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
    if path.as_os_str().is_empty() {
        return Error::input(format!("`{spec}` names no file"))
            .hint("give a text set, such as `sample`, the path of a file, or NAME=FILE");
    }
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
