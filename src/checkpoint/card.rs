/*! The file of a model card, which its owner may edit.

`atom.json` has no hash of it. Its own last line has one instead, over the lines above, which says whether it still is as a
run wrote it: only then another run replaces it. */

use std::io::Write;
use std::path::Path;

use super::fingerprint::sha256_hex;
use super::output::{failed, sync_directory};
use super::regular;
use crate::Result;

/// The file that the Hub shows as a model's page.
pub const CARD: &str = "README.md";

/// The longest card that is read.
const LIMIT: u64 = 16 << 20;

const MARK: &str = "<!-- Written by atom. SHA-256 of all above: ";
const END: &str = " -->\n";

/// A card with its last line.
pub fn signed_card(text: &str) -> String {
    format!("{text}\n{MARK}{}{END}", sha256_hex(text.as_bytes()))
}

/// Whether the card at `path` is a plain file and as a run wrote it.
pub(super) fn is_as_written(path: &Path) -> bool {
    !path.is_symlink() && regular::read(path, LIMIT).is_ok_and(|card| is_signed(&card))
}

fn is_signed(card: &[u8]) -> bool {
    let Ok(card) = str::from_utf8(card) else { return false };
    card.rfind(MARK)
        .is_some_and(|at| card[..at].strip_suffix('\n').map(signed_card).as_deref() == Some(card))
}

/// Puts a card in the place of the one in the directory of a finished checkpoint, in one step. One that was edited, or
/// removed, is left as it is; whether it was replaced.
///
/// # Errors
/// If it cannot be written.
pub fn replace_card(dir: &Path, text: &str) -> Result<bool> {
    let path = dir.join(CARD);
    if !is_as_written(&path) {
        return Ok(false);
    }
    let write_failed = |error: std::io::Error| failed("write", &path, &error);
    // Next to the directory: what a killed run leaves must not be taken for a part of the checkpoint.
    let mut file = tempfile::Builder::new()
        .prefix(".atom-card-")
        .permissions(fs_err::metadata(&path)?.permissions())
        .tempfile_in(dir.parent().unwrap_or(dir))
        .map_err(write_failed)?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.as_file().sync_all())
        .map_err(write_failed)?;
    file.persist(&path).map_err(|error| write_failed(error.error))?;
    sync_directory(dir)?;
    Ok(true)
}

#[cfg(test)]
#[path = "card_tests.rs"]
mod tests;
