/*! The bytes of a tensor on their way into a file: hashed and written part by part. */

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::output::failed;
use super::tensor::Tensor;
use crate::Result;

/// Bytes hashed and then written: they stay in a core's cache between the two.
const PART: usize = 1 << 20;

/// The little-endian bytes of a tensor to be written.
pub enum TensorBytes<'a> {
    /// Made in memory.
    Made(Vec<u8>),
    /// Those of a stored tensor, whose pages are given back as they are copied.
    Stored(Tensor<'a>),
}

impl From<Vec<u8>> for TensorBytes<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Made(bytes)
    }
}

impl<'a> From<Tensor<'a>> for TensorBytes<'a> {
    fn from(tensor: Tensor<'a>) -> Self {
        Self::Stored(tensor)
    }
}

impl TensorBytes<'_> {
    /// All bytes.
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Made(bytes) => bytes,
            Self::Stored(tensor) => tensor.bytes,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.bytes().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bytes().is_empty()
    }

    /// Writes them to `file`, at `path`, from `offset` on; returns their SHA-256 in hexadecimal.
    pub(super) fn write(&self, path: &Path, file: &File, offset: u64) -> Result<String> {
        let mut hash = Sha256::new();
        let mut at = offset;
        for part in self.bytes().chunks(PART) {
            hash.update(part);
            file.write_all_at(part, at).map_err(|error| failed("write", path, &error))?;
            at += part.len() as u64;
            if let Self::Stored(tensor) = self {
                tensor.release_part(part);
            }
        }
        Ok(hex::encode(hash.finalize()))
    }
}
