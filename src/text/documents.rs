/*! Separate documents: windows are drawn as the reference draws C4's (datautils.py, get_c4).

A shard of C4 is 800 MB of text. It is in an unnamed temporary file that is mapped, so that memory
holds only what is drawn. */

use std::collections::HashMap;
use std::io::{BufWriter, Write};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::windows::{check_asked, check_size};
use super::{PythonRandom, Tokenizer};
use crate::progress::Progress;
use crate::{Error, Kind, Result};

/// The most documents of a set; each takes 8 bytes of memory for its end.
const MOST_DOCUMENTS: usize = 1 << 26;

/// Many separate texts.
pub(super) struct Documents {
    texts: Mmap,
    /// Where each text ends in `texts`.
    ends: Vec<usize>,
}

/// Gathers documents.
pub(super) struct Gathering {
    file: BufWriter<std::fs::File>,
    ends: Vec<usize>,
    end: usize,
    hash: Sha256,
}

impl Gathering {
    pub(super) fn begin() -> Result<Self> {
        let file = BufWriter::with_capacity(1 << 20, tempfile::tempfile().map_err(no_room)?);
        Ok(Self { file, ends: Vec::new(), end: 0, hash: Sha256::new() })
    }

    pub(super) fn add(&mut self, text: &str) -> Result<()> {
        if self.ends.len() == MOST_DOCUMENTS {
            return Err(Error::input(format!("there are more than {MOST_DOCUMENTS} documents"))
                .hint("give a part of the file"));
        }
        self.file.write_all(text.as_bytes()).map_err(no_room)?;
        self.end += text.len();
        self.ends.push(self.end);
        self.hash.update(text.as_bytes());
        self.hash.update([0]);
        Ok(())
    }

    /// The documents, and the SHA-256 of all of them, each followed by a zero byte.
    pub(super) fn finish(self) -> Result<(Documents, String)> {
        let file = self.file.into_inner().map_err(|error| no_room(error.into_error()))?;
        // SAFETY: the file has no name, so no other process can change it while it is mapped.
        let texts = unsafe { Mmap::map(&file) }.map_err(no_room)?;
        let hash = hex::encode(self.hash.finalize());
        Ok((Documents { texts, ends: self.ends }, hash))
    }
}

pub(super) fn no_room(error: std::io::Error) -> Error {
    Error::of(Kind::Machine, error)
        .context("the text cannot be laid out in a temporary file")
        .hint("free some disk space, or set TMPDIR to a place with room")
}

impl Documents {
    /// Their number.
    pub(super) fn count(&self) -> usize {
        self.ends.len()
    }

    fn text(&self, index: usize) -> &str {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        str::from_utf8(&self.texts[start..self.ends[index]]).expect("it was written from a str")
    }

    /// Draws windows, `[windows, seq_len]` flat: documents at random until one is longer than a window,
    /// then a place in it at random, as after `random.seed(seed)`.
    ///
    /// The reference also accepts a document of exactly a window's length, on which its next call
    /// fails; here such a document is skipped.
    ///
    /// # Errors
    /// If no document is long enough.
    pub(super) fn draw(
        &self,
        tokenizer: &Tokenizer,
        windows: usize,
        seq_len: usize,
        seed: u64,
        progress: &dyn Progress,
    ) -> Result<Vec<u32>> {
        check_asked(windows, seq_len)?;
        Draw { documents: self, tokenizer, seq_len, held: HashMap::new() }
            .windows(windows, seed, progress)
    }

    /// The same, but no more windows than the documents hold next to one another.
    ///
    /// # Errors
    /// If no document is long enough.
    pub(super) fn draw_held(
        &self,
        tokenizer: &Tokenizer,
        windows: usize,
        seq_len: usize,
        seed: u64,
        progress: &dyn Progress,
    ) -> Result<Vec<u32>> {
        check_asked(windows, seq_len)?;
        let mut draw = Draw { documents: self, tokenizer, seq_len, held: HashMap::new() };
        let mut drawn = draw.windows(windows, seed, progress)?;
        drawn.truncate(draw.held(windows, progress)? * seq_len);
        Ok(drawn)
    }
}

/// A draw of windows, and what it found out about documents.
struct Draw<'a> {
    documents: &'a Documents,
    tokenizer: &'a Tokenizer,
    seq_len: usize,
    /// How many windows each document that was looked at holds; none if it is too short to be drawn from.
    held: HashMap<usize, usize>,
}

impl Draw<'_> {
    fn windows(&mut self, windows: usize, seed: u64, progress: &dyn Progress) -> Result<Vec<u32>> {
        let (count, seq_len) = (self.documents.count(), self.seq_len);
        let mut random = PythonRandom::new(seed);
        let mut too_short = 0;
        let mut drawn = Vec::new();
        for _ in 0..windows {
            let tokens = loop {
                if too_short == count {
                    return Err(Error::input(format!(
                        "none of the {count} documents has more than {seq_len} tokens"
                    ))
                    .hint("use a smaller --seq-len or longer documents"));
                }
                let index = random.randint(0, count as u64 - 1) as usize;
                if self.held.get(&index) == Some(&0) {
                    continue;
                }
                let tokens = self.tokens(index, progress)?;
                if tokens.len() > seq_len {
                    break tokens;
                }
                too_short += 1;
            };
            check_size(windows, seq_len)?;
            let start = random.randint(0, (tokens.len() - seq_len - 1) as u64) as usize;
            drawn.extend_from_slice(&tokens[start..start + seq_len]);
        }
        Ok(drawn)
    }

    /// The tokens of a document.
    fn tokens(&mut self, index: usize, progress: &dyn Progress) -> Result<Vec<u32>> {
        let tokens = self.tokenizer.encode(self.documents.text(index), progress)?;
        let long = tokens.len() > self.seq_len;
        self.held.insert(index, if long { tokens.len() / self.seq_len } else { 0 });
        Ok(tokens)
    }

    /// How many windows all documents hold, counted up to `most`. Of a large set the documents that were drawn from
    /// hold enough, and the others are not tokenized.
    fn held(&mut self, most: usize, progress: &dyn Progress) -> Result<usize> {
        let mut held: usize = self.held.values().sum();
        for index in 0..self.documents.count() {
            if held >= most {
                return Ok(most);
            }
            if !self.held.contains_key(&index) {
                self.tokens(index, progress)?;
                held += self.held[&index];
            }
        }
        Ok(held.min(most))
    }
}
