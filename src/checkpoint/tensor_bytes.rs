/*! The bytes of a tensor on their way into a file: hashed and written part by part. */

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::atom::compare_hashes;
use super::output::{failed, start_writeback};
use super::tensor::Tensor;
use crate::Result;

/// Bytes hashed and written together: they stay in a core's cache between the two.
const PART: usize = 1 << 20;

/// The little-endian bytes of a tensor to be written.
pub enum TensorBytes<'a> {
    /// Made in memory.
    Made(Vec<u8>),
    /// Those of a stored tensor.
    Stored(StoredBytes<'a>),
}

/// The bytes of a stored tensor, read once and given back as they are written.
pub struct StoredBytes<'a> {
    pub(super) tensor: Tensor<'a>,
    /// SHA-256 of the stored bytes, if it is known.
    pub(super) expected: Option<&'a str>,
    /// Bits that are turned in each byte.
    pub(super) flip: u8,
}

impl From<Vec<u8>> for TensorBytes<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Made(bytes)
    }
}

impl<'a> From<StoredBytes<'a>> for TensorBytes<'a> {
    fn from(stored: StoredBytes<'a>) -> Self {
        Self::Stored(stored)
    }
}

impl<'a> From<Tensor<'a>> for TensorBytes<'a> {
    fn from(tensor: Tensor<'a>) -> Self {
        StoredBytes { tensor, expected: None, flip: 0 }.into()
    }
}

impl TensorBytes<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Made(bytes) => bytes.len(),
            Self::Stored(stored) => stored.tensor.bytes.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes them to `file`, at `path`, from `offset` on; returns their SHA-256 in hexadecimal. One thread hashes a part
    /// while another one, if there is one that has nothing to do, writes it.
    ///
    /// # Errors
    /// A failed check if stored bytes have another hash than the expected one.
    pub(super) fn write(&self, path: &Path, file: &File, offset: u64) -> Result<String> {
        let mut output = Output { path, file, at: offset, hash: Sha256::new() };
        let StoredBytes { tensor, expected, flip } = match self {
            Self::Made(bytes) => {
                bytes.chunks(PART).try_for_each(|part| output.write(part))?;
                return Ok(output.hash());
            }
            Self::Stored(stored) => stored,
        };
        let mut read = Sha256::new();
        for part in tensor.bytes.chunks(PART) {
            let written = match flip {
                0 => Cow::Borrowed(part),
                _ => Cow::Owned(part.iter().map(|byte| byte ^ flip).collect()),
            };
            let hash_read = || {
                if *flip != 0 {
                    read.update(part)
                }
            };
            rayon::join(hash_read, || output.write(&written)).1?;
            tensor.release_part(part);
        }
        let written = output.hash();
        // Bytes that are written as they are read have one hash.
        let read = if *flip == 0 { written.clone() } else { hex::encode(read.finalize()) };
        expected.map_or(Ok(()), |expected| compare_hashes(tensor.name, &read, expected))?;
        Ok(written)
    }
}

/// Where parts are written one after another.
struct Output<'a> {
    path: &'a Path,
    file: &'a File,
    at: u64,
    hash: Sha256,
}

impl Output<'_> {
    fn write(&mut self, part: &[u8]) -> Result<()> {
        let Self { path, file, at, hash } = self;
        let write = || file.write_all_at(part, *at);
        let written = rayon::join(|| hash.update(part), write).1;
        written.map_err(|error| failed("write", path, &error))?;
        start_writeback(file, *at, part.len() as u64);
        *at += part.len() as u64;
        Ok(())
    }

    fn hash(self) -> String {
        hex::encode(self.hash.finalize())
    }
}
