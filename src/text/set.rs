/*! Text sets: embedded in the program, on the Hub by name, or read from a file.

How rows become windows decides the token stream and with it every published perplexity. It follows the method's
reference: rows are joined with a blank line between them, empty ones included, or windows are drawn inside single
rows. `calibration-data/` describes each set.

A text is read as a stream and as far as its windows need: all of it for calibration, whose windows lie
anywhere, and its beginning for an evaluation of few windows. The windows of an evaluation are stored, so that
those before and after a long run are the same even if the file changes. */

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::part::{Part, SAMPLE};
use super::windows::{WindowDraw, check_asked};
use super::{Split, Tokenizer};
use crate::checkpoint::{SetUsed, sha256_hex};
use crate::hub::Hub;
use crate::progress::Progress;
use crate::units::counted;
use crate::{Error, Result};

/// One text set, or for calibration a mix of several.
pub struct TextSet {
    /// As the user named it.
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

/// Calibration windows and where they come from.
#[derive(Debug)]
pub struct CalibrationWindows {
    /// `[windows, seq_len]` flat.
    pub tokens: Vec<u32>,
    /// SHA-256 of the text, lower-case hexadecimal: of the rows joined; of documents, each followed by
    /// a zero byte; of a mix, of the hashes of its sets, each followed by a line end.
    pub sha256: String,
    /// The sets, if there are several or one came from the Hub; else empty.
    pub sets: Vec<SetUsed>,
}

/// Upper bound of the memory for tokenizing a text of any length that can be cut into pieces (`pieces.rs`): two
/// pieces with their tokens, and ids that wait for the disk. 90 MB for English, 165 MB where
/// every byte is a token.
const TOKENIZING_BYTES: u64 = 180_000_000;

/// Memory per byte of a text that is shorter than a piece.
const TOKENIZING_PER_BYTE: u64 = 170;

impl TextSet {
    /// Loads `sample`, a named set from the Hub, `NAME=FILE` (a named set's own file, read as that set
    /// is), or a file: Parquet, JSONL or CSV, whose rows are joined, or plain text. For calibration, several of
    /// them separated by commas. A name takes precedence over a file of that name (`./sample` is
    /// the file).
    ///
    /// # Errors
    /// Bad input if there is no such set or file, or it cannot be one; wrong usage for an evaluation on
    /// several sets; a machine error if a set cannot be fetched.
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
        let parts: Vec<Part> =
            specs.iter().map(|spec| Part::load(spec, split, hub)).collect::<Result<_>>()?;
        if parts.iter().filter(|part| part.unwritten().is_some()).count() > 1 {
            return Err(Error::usage("--calib names the model itself twice")
                .hint("put all lines to begin with into one file: self=FILE"));
        }
        Ok(Self::of(spec, parts))
    }

    /// The text that is part of the program.
    pub fn sample(split: Split) -> Self {
        Self::of(SAMPLE, vec![Part::sample(split, 0)])
    }

    /// The sample, repeated until it has this many bytes, for work whose content does not matter.
    pub fn sample_of_length(split: Split, bytes: usize) -> Self {
        Self::of(SAMPLE, vec![Part::sample(split, bytes)])
    }

    fn of(name: &str, parts: Vec<Part>) -> Self {
        Self { name: name.to_owned(), parts, evaluated: Mutex::default() }
    }

    /// What the model is still to write of it, of `samples` windows: how many, and the file of what they begin with.
    ///
    /// # Errors
    /// Wrong usage: fewer samples than sets.
    pub fn unwritten(&self, samples: usize) -> Result<Option<(usize, Option<&Path>)>> {
        let counts = self.samples_by_set(samples)?;
        let found = self
            .parts
            .iter()
            .zip(counts)
            .find_map(|(part, count)| part.unwritten().map(|beginnings| (count, beginnings)));
        Ok(found)
    }

    /// The same with what the model wrote, `[windows, seq_len]` flat.
    pub fn with_own(mut self, tokens: Vec<u32>) -> Self {
        if let Some(part) = self.parts.iter_mut().find(|part| part.unwritten().is_some()) {
            part.fill(tokens);
        }
        self
    }

    /// Peak memory of tokenizing, by the length of the longest text, or the upper bound if its length is unknown.
    pub fn tokenizing_bytes(&self) -> u64 {
        let lengths = self.parts.iter().map(Part::length);
        let longest = lengths.map(|length| length.unwrap_or(u64::MAX)).max().unwrap_or(0);
        longest.saturating_mul(TOKENIZING_PER_BYTE).min(TOKENIZING_BYTES)
    }

    /// Draws calibration windows, the same number from each set of a mix, and one more from the first sets where the
    /// number does not divide. Sets follow one another, each drawn as if it were alone, after
    /// `random.seed(seed)`. A set that holds fewer windows gives those, which `progress` is told.
    ///
    /// # Errors
    /// If a text cannot be read or there is too little of it, there are fewer samples than sets, or the user asked the
    /// run to stop.
    pub fn calibration_windows(
        &self,
        tokenizer: &Tokenizer,
        draw: &WindowDraw,
        progress: &dyn Progress,
    ) -> Result<CalibrationWindows> {
        let WindowDraw { samples, seq_len, .. } = *draw;
        check_asked(samples, seq_len)?;
        let mut tokens = Vec::new();
        let mut sets = Vec::new();
        let mut short = Vec::new();
        for (part, wanted) in self.parts.iter().zip(self.samples_by_set(samples)?) {
            let (drawn, sha256) =
                part.draw(tokenizer, &WindowDraw { samples: wanted, ..*draw }, progress)?;
            let samples = drawn.len() / seq_len;
            tokens.extend(drawn);
            let (name, file) = (part.name.clone(), part.file.clone());
            if samples < wanted {
                short.push(format!("`{name}` holds {samples}"));
            }
            sets.push(SetUsed { name, sha256, samples, file });
        }
        if !short.is_empty() {
            progress.info(&format!(
                "calibrating on {} of {seq_len} tokens instead of {samples}: {}",
                counted(tokens.len() / seq_len, "window"),
                short.join(", ")
            ));
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

    /// The evaluation windows, `[windows, seq_len]` flat: consecutive ones of a joined text; of documents
    /// 256, drawn after `random.seed(0)`. Only the first `limit` of them. A second call returns the same windows.
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

    /// How many of the samples are drawn from each set.
    fn samples_by_set(&self, samples: usize) -> Result<Vec<usize>> {
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

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
