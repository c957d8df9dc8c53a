/*! Whether a content in the cache is what its name says.

The cache keeps a content under its hash. A small one is hashed whenever it is used. A large one is
measured: by the length that the Hub announces where that is known, and by the length that the header of
a safetensors file implies; only where these do not fit, or where the caller wants it, it is hashed. */

use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use fs_err::File;
use safetensors::tensor::Metadata;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::progress::Progress;
use crate::{Error, Kind, Result};

/// Contents up to so many bytes are hashed whenever they are used.
const SMALL_BYTES: u64 = 64 << 20;
/// Bytes of a safetensors header that are read, which is the format's own limit.
const HEADER_BYTES: u64 = 100_000_000;
/// Bytes that are hashed between two looks whether the run is to stop.
const CHUNK: usize = 1 << 20;

/// What lies where a content should.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Condition {
    Absent,
    Sound,
    /// What is wrong with it, to follow `PATH is damaged: `.
    Damaged(String),
}

/// What is known of a content.
#[derive(Clone, Copy)]
pub(super) struct Expected<'a> {
    /// Its hash: 64 digits of SHA-256 or 40 of git's SHA-1. With anything else only lengths count.
    pub(super) etag: &'a str,
    /// Its length, where the Hub was asked.
    pub(super) bytes: Option<u64>,
    /// Whether it is weights in safetensors.
    pub(super) weights: bool,
    /// Whether it is hashed however large it is.
    pub(super) thorough: bool,
}

/// Looks at the content at `path`; links are followed.
///
/// # Errors
/// If it cannot be read, or is no file; an interruption.
pub(super) fn condition(
    path: &Path,
    expected: Expected<'_>,
    progress: &dyn Progress,
) -> Result<Condition> {
    let metadata = match fs_err::metadata(path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Condition::Absent);
        }
        metadata => metadata.map_err(unreadable)?,
    };
    if !metadata.is_file() {
        let what = if metadata.is_dir() { "a directory" } else { "no file" };
        return Err(Error::machine(format!(
            "{} is {what}, where the Hub's cache keeps the content of a file",
            path.display()
        ))
        .hint("move it away, or set HF_HUB_CACHE to another place"));
    }
    let bytes = metadata.len();
    if let Some(right) = expected.bytes.filter(|right| *right != bytes) {
        return Ok(Condition::Damaged(format!("it has {bytes} bytes and the Hub says {right}")));
    }
    if !is_hash(expected.etag) {
        return Ok(Condition::Sound);
    }
    let mut file = File::open(path).map_err(unreadable)?;
    let fits = expected.weights && bytes > SMALL_BYTES && header_fits(&mut file, bytes);
    if bytes > SMALL_BYTES && (fits || !expected.weights) && !expected.thorough {
        return Ok(Condition::Sound);
    }
    let mut hash = Hash::new(expected.etag, bytes);
    hash.add_file(&mut file, progress)?;
    let found = hash.finish(expected.etag);
    Ok(if found == expected.etag {
        Condition::Sound
    } else {
        Condition::Damaged(format!("its hash is {found} and should be {}", expected.etag))
    })
}

/// What keeps a cache from being read is the machine's.
fn unreadable(error: std::io::Error) -> Error {
    Error::of(Kind::Machine, error)
        .context("the Hub's cache cannot be read")
        .hint("ask who owns it to let you read it, or set HF_HUB_CACHE to another place")
}

/// Whether a safetensors file ends where its header says.
fn header_fits(file: &mut File, bytes: u64) -> bool {
    let mut length = [0; 8];
    if file.read_exact(&mut length).is_err() {
        return false;
    }
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES.min(bytes.saturating_sub(8)) {
        return false;
    }
    let mut header = Vec::new();
    if file.take(header_bytes).read_to_end(&mut header).is_err() {
        return false;
    }
    let Ok(header) = serde_json::from_slice::<Metadata>(&header) else { return false };
    let ends = header.tensors().into_values().map(|tensor| tensor.data_offsets.1 as u64);
    (8 + header_bytes).checked_add(ends.max().unwrap_or(0)) == Some(bytes)
}

/// Whether an etag is a content's hash, as the Hub's are.
pub(super) fn is_hash(etag: &str) -> bool {
    matches!(etag.len(), 40 | 64) && is_hexadecimal(etag)
}

/// Whether a text has only the digits of hashes.
pub(super) fn is_hexadecimal(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// The hash by which the Hub names a content.
pub(super) enum Hash {
    Sha256(Sha256),
    /// Git's, of a header and the content; and of the content alone, by which some mirrors name it.
    Sha1 {
        git: Sha1,
        plain: Sha1,
    },
}

impl Hash {
    /// The kind of hash that `etag` is, for a content of so many bytes.
    pub(super) fn new(etag: &str, bytes: u64) -> Self {
        if etag.len() == 64 {
            return Self::Sha256(Sha256::new());
        }
        let mut git = Sha1::new();
        git.update(format!("blob {bytes}\0"));
        Self::Sha1 { git, plain: Sha1::new() }
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha1 { git, plain } => {
                git.update(bytes);
                plain.update(bytes);
            }
        }
    }

    /// Adds a file from its beginning and leaves it at its end.
    pub(super) fn add_file(&mut self, file: &mut File, progress: &dyn Progress) -> Result<()> {
        file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
        let mut chunk = vec![0; CHUNK];
        loop {
            progress.check_stop()?;
            match file.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(count) => self.add(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(unreadable(error)),
            }
        }
    }

    /// The hash: `etag` if the content has it.
    pub(super) fn finish(self, etag: &str) -> String {
        match self {
            Self::Sha256(hash) => hex::encode(hash.finalize()),
            Self::Sha1 { git, plain } => {
                let plain = hex::encode(plain.finalize());
                if plain == etag { plain } else { hex::encode(git.finalize()) }
            }
        }
    }
}

/// SHA-256 of a file.
pub(super) fn sha256_of(path: &Path, progress: &dyn Progress) -> Result<String> {
    let mut hash = Hash::Sha256(Sha256::new());
    hash.add_file(&mut File::open(path).map_err(unreadable)?, progress)?;
    Ok(hash.finish(""))
}

#[cfg(test)]
#[path = "content_tests.rs"]
mod tests;
