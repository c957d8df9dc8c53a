/*! SHA-256 of bytes, and a source checkpoint's fingerprint.

The fingerprint answers "is this the model that the other run saw?" in well under a second, for
70B as well, so it samples: whole headers, and both ends of every tensor. Two checkpoints that
differ in training differ at the ends of their tensors; it is no defence against forgery. */

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::output::{failed, open_plain};
use super::shards::Shard;
use crate::Result;

/// Bytes hashed at each end of a tensor.
const SAMPLE_BYTES: usize = 4096;

/// SHA-256 of `bytes` in hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// SHA-256 of a whole file, in hexadecimal.
pub(super) fn sha256_of_file(path: &Path) -> Result<String> {
    let file = open_plain(path, File::options().read(true))?;
    let bytes = file.metadata().map_err(|error| failed("read", path, &error))?.len();
    sha256_of(path, &file, 0, bytes, &|| Ok(()))
}

/// SHA-256 of `bytes` bytes of the file at `path` from `offset` on, in hexadecimal; a megabyte at a time, before each
/// of which `check_stop` is asked.
pub(super) fn sha256_of(
    path: &Path,
    file: &File,
    offset: u64,
    bytes: u64,
    check_stop: &dyn Fn() -> Result<()>,
) -> Result<String> {
    let mut hash = Sha256::new();
    let mut part = vec![0; (1 << 20).min(usize::try_from(bytes).unwrap_or(usize::MAX))];
    let mut at = 0;
    while at < bytes {
        let length = part.len().min(usize::try_from(bytes - at).unwrap_or(usize::MAX));
        check_stop()?;
        file.read_exact_at(&mut part[..length], offset + at)
            .map_err(|error| failed("read", path, &error))?;
        hash.update(&part[..length]);
        at += length as u64;
    }
    Ok(hex::encode(hash.finalize()))
}

/// SHA-256 over `config.json`, `tokenizer.json` (if there is one), then each shard in name order.
/// Every file begins with its name, a zero byte and its length (8 bytes, little-endian). Of the
/// first two the whole content follows; of a shard its header with the 8 bytes before it, then the
/// first and last 4 KiB of each tensor in the file's order (a tensor of at most 8 KiB whole).
pub(super) fn fingerprint(config: &[u8], tokenizer: Option<&[u8]>, shards: &[Shard]) -> String {
    let mut hash = Sha256::new();
    let begin = |hash: &mut Sha256, name: &str, length: usize| {
        hash.update(name.as_bytes());
        hash.update([0]);
        hash.update((length as u64).to_le_bytes());
    };
    begin(&mut hash, "config.json", config.len());
    hash.update(config);
    if let Some(tokenizer) = tokenizer {
        begin(&mut hash, "tokenizer.json", tokenizer.len());
        hash.update(tokenizer);
    }
    for shard in shards {
        begin(&mut hash, &shard.name, shard.bytes.len());
        hash.update(&shard.bytes[..shard.data_start]);
        for range in &shard.ranges {
            let tensor = &shard.bytes[range.clone()];
            if tensor.len() <= 2 * SAMPLE_BYTES {
                hash.update(tensor);
            } else {
                hash.update(&tensor[..SAMPLE_BYTES]);
                hash.update(&tensor[tensor.len() - SAMPLE_BYTES..]);
            }
        }
    }
    hex::encode(hash.finalize())
}
