/*! What it takes that the output is there whole or not at all: room on the disk reserved first,
every file and directory synced, and one rename that puts the finished directory in place. */

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

#[cfg(target_os = "linux")]
use rustix::fs::{CWD, FallocateFlags, RenameFlags, renameat_with};
#[cfg(target_os = "linux")]
use rustix::io::Errno;

use crate::{Error, Result};

/// An I/O error with the action and the path in its sentence; a full disk stays the machine's
/// fault.
pub(super) fn failed(action: &str, path: &Path, error: &io::Error) -> Error {
    io::Error::new(error.kind(), format!("cannot {action} {}: {error}", path.display())).into()
}

/// Bytes that an ordinary user can still write at `path`, or where it would be made; `None` if the system does not
/// say.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let path = path.ancestors().find(|path| path.exists()).unwrap_or(path);
    let status = rustix::fs::statvfs(path).ok()?;
    Some(status.f_bavail.saturating_mul(status.f_frsize))
}

/// Compares what is needed with what is free.
pub(super) fn check_space(place: &Path, needed: u64, free: Option<u64>) -> Result<()> {
    match free {
        Some(free) if free < needed => Err(Error::machine(format!(
            "{} needs {needed} bytes and its disk has {free} bytes free",
            place.display()
        ))
        .hint("free some disk space, or choose another place with --out")),
        _ => Ok(()),
    }
}

/// Sets a file's length and reserves its blocks, so that a full disk is found now and not after
/// hours of work.
pub(super) fn reserve(file: &File, path: &Path, bytes: u64) -> Result<()> {
    file.set_len(bytes).map_err(|error| failed("size", path, &error))?;
    #[cfg(target_os = "linux")]
    if bytes > 0 {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            // A file system that cannot reserve: the check of free space has to do.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(failed("reserve the space of", path, &error.into())),
        }
    }
    Ok(())
}

/// Asks the system to write a part of a file to the disk now, so that the disk works while the next part is made, and
/// a later sync has little to wait for.
pub(super) fn start_writeback(file: &File, offset: u64, bytes: u64) {
    #[cfg(target_os = "linux")]
    if let (Ok(offset), Ok(bytes)) = (offset.try_into(), bytes.try_into()) {
        // SAFETY: a system call on an open file, which reads no memory. It is advice: where it fails, the sync writes.
        let _ = unsafe {
            libc::sync_file_range(file.as_raw_fd(), offset, bytes, libc::SYNC_FILE_RANGE_WRITE)
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, offset, bytes);
}

/// Opens a plain file of the work directory. A link, hard or symbolic, may lead to somebody else's file and is refused.
pub(super) fn open_plain(path: &Path, options: &mut OpenOptions) -> Result<File> {
    let file = match options.custom_flags(libc::O_NOFOLLOW).open(path) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err(planted(path)),
        Err(error) => return Err(failed("open", path, &error)),
    };
    let found = file.metadata().map_err(|error| failed("read", path, &error))?;
    // None, where another process has removed it meanwhile.
    if found.is_file() && found.nlink() <= 1 { Ok(file) } else { Err(planted(path)) }
}

/// The error of a link where a run keeps its own files.
pub(super) fn planted(path: &Path) -> Error {
    Error::input(format!(
        "{} is a link or no plain file: no run of atom has made it",
        path.display()
    ))
    .hint("look at where it leads, and remove it; nothing was written through it")
}

/// Writes a file of the work directory and waits until the disk has it.
pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = open_plain(path, File::options().write(true).create(true))?;
    file.set_len(0)
        .and_then(|()| file.write_all(bytes))
        .and_then(|()| file.sync_all())
        .map_err(|error| failed("write", path, &error))
}

/// Waits until the disk has a directory's entries.
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    Ok(fs_err::File::open(path)?.sync_all()?)
}

/// Puts the directory `new` in the place of `out`. If `out` exists the two change places in one
/// step where the file system can, so that a reader finds the old or the new one at any moment;
/// the old one ends up at `old`.
pub(super) fn replace(new: &Path, out: &Path, old: &Path) -> Result<()> {
    if fs_err::symlink_metadata(out).is_err() {
        return Ok(fs_err::rename(new, out)?);
    }
    match exchange(new, out) {
        Ok(()) => Ok(fs_err::rename(new, old)?),
        Err(_) => {
            fs_err::rename(out, old)?;
            fs_err::rename(new, out).map_err(|error| {
                // Put the old one back; if that fails too, the message says where it is.
                let kept = if fs_err::rename(old, out).is_ok() { out } else { old };
                Error::from(error)
                    .context(format!("the former output is kept as {}", kept.display()))
            })
        }
    }
}

#[cfg(target_os = "linux")]
pub(super) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

#[cfg(not(target_os = "linux"))]
pub(super) fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
