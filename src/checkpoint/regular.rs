/*! Reading files that other people made: regular files only, and never more bytes than a bound.

A downloaded directory may hold a pipe, a device or a link under any name, and a file of any
length. Opening a pipe would wait for a writer, and reading a sparse file of 50 GB would end in the
system's out-of-memory killer; both are refused here instead. */

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use fs_err::os::unix::fs::OpenOptionsExt;

use crate::{Error, Result};

/// Opens a file for reading, without waiting, if it is a regular file; also returns its length in bytes.
///
/// # Errors
/// Bad input if there is no such file, or it is a directory, a pipe, a socket or a device.
pub(super) fn open(path: &Path) -> Result<(File, u64)> {
    let opened = fs_err::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound && path.is_symlink() => {
            return Err(dangling(path));
        }
        Err(error) => match fs_err::metadata(path) {
            // A socket cannot be opened at all.
            Ok(metadata) if !metadata.is_file() => {
                return Err(not_regular(path, metadata.file_type()));
            }
            _ => return Err(error.into()),
        },
    };
    let metadata = file.metadata()?;
    match metadata.is_file() {
        true => Ok((file.into_parts().0, metadata.len())),
        false => Err(not_regular(path, metadata.file_type())),
    }
}

/// The content of a regular file of at most `limit` bytes.
///
/// # Errors
/// As [`open`]; a longer file is bad input.
pub(super) fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let (file, length) = open(path)?;
    if length > limit {
        return Err(too_long(path, &format!("is {length} bytes long"), limit));
    }
    read_at_most(file, path, limit)
}

/// The content of a file that the user named, a pipe included, of at most `limit` bytes.
///
/// # Errors
/// Bad input if it cannot be read or is longer.
pub(crate) fn read_named(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = fs_err::File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(Error::input(format!("{} is a directory, not a file", path.display())));
    }
    if metadata.is_file() && metadata.len() > limit {
        return Err(too_long(path, &format!("is {} bytes long", metadata.len()), limit));
    }
    read_at_most(file, path, limit)
}

/// Reads to the end; the length may have changed since it was looked at.
fn read_at_most(file: impl Read, path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = file.take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|error| Error::from(error).context(format!("cannot read {}", path.display())))?;
    match bytes.len() as u64 > limit {
        true => Err(too_long(path, "does not end", limit)),
        false => Ok(bytes),
    }
}

fn too_long(path: &Path, what: &str, limit: u64) -> Error {
    let mebibytes = limit >> 20;
    Error::input(format!("{} {what}; such a file has at most {mebibytes} MiB", path.display()))
        .hint("is it the right file? If it is damaged, download it again")
}

/// A link whose target is not there.
pub(super) fn dangling(path: &Path) -> Error {
    let target = std::fs::read_link(path).unwrap_or_default();
    let message =
        format!("{} is a link to {}, which does not exist", path.display(), target.display());
    Error::input(message).hint(
        "the file was removed or its download is incomplete: download the model again, for \
         example with `hf download ORG/NAME`",
    )
}

fn not_regular(path: &Path, found: std::fs::FileType) -> Error {
    let what = if found.is_dir() {
        "a directory"
    } else if found.is_fifo() {
        "a named pipe"
    } else if found.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    Error::input(format!("{} is {what}, not a regular file", path.display()))
        .hint("put the model's own file in its place")
}
