/*! A single file as a result: a calibration, a plan, a picture. It is there whole or not at all, and replaces nothing but
its own kind. */

use std::fs::{File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::destination::{Inputs, resolve};
use super::output::failed;
use crate::{Error, Result};

/// A kind of file that the program writes.
pub struct FileKind {
    /// What messages call it: `a plan`.
    pub name: &'static str,
    /// Whether a file that exists is of this kind.
    pub recognizes: fn(&Path) -> bool,
}

/// A file that may be written.
pub struct OutputFile {
    /// Absolute, its links resolved.
    path: PathBuf,
    /// As the user wrote it.
    shown: PathBuf,
    kind: &'static FileKind,
    overwrite: bool,
    inputs: Inputs,
}

impl OutputFile {
    /// Checks that a file of this kind may be written at `path`: nothing is there, or with `overwrite` an empty
    /// file or one of the same kind. A pipe or a terminal is written to as it is.
    ///
    /// # Errors
    /// Usage: something else is there, or an input. Input: nothing can be created there.
    pub fn check(
        path: &Path,
        kind: &'static FileKind,
        overwrite: bool,
        inputs: Inputs,
    ) -> Result<Self> {
        let [shown, path] = [path.to_owned(), path.to_owned()];
        let mut file = Self { path, shown, kind, overwrite, inputs };
        if !is_stream(&file.shown) {
            file.path = resolve(&file.shown)?;
            file.recheck()?;
        }
        Ok(file)
    }

    /// The path, absolute, its links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path as the user wrote it.
    pub fn shown(&self) -> &Path {
        &self.shown
    }

    fn recheck(&self) -> Result<()> {
        let shown = self.shown.display();
        self.inputs.refuse(&self.path, &shown.to_string())?;
        let found = match fs_err::symlink_metadata(&self.path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = self.path.parent().unwrap_or(Path::new("/"));
                return match parent.is_dir() {
                    true => Ok(()),
                    false => {
                        let parent = self.shown.parent().unwrap_or(parent).display();
                        Err(Error::input(format!("directory {parent} does not exist"))
                            .hint("make it, or name a file in a directory that exists"))
                    }
                };
            }
            Err(error) => return Err(error.into()),
        };
        if !found.is_file() {
            let what = if found.is_dir() { "a directory" } else { "no regular file" };
            return Err(Error::usage(format!("output {shown} is {what}")).hint("name a new file"));
        }
        if !self.overwrite {
            return Err(Error::usage(format!("{shown} exists already"))
                .hint("choose another file, or replace it with --overwrite"));
        }
        if found.len() > 0 && !(self.kind.recognizes)(&self.path) {
            let message = format!("{shown} is not {} and is not overwritten", self.kind.name);
            return Err(Error::usage(message).hint("choose another file"));
        }
        Ok(())
    }

    /// Writes the file under a temporary name, syncs it and gives it its name. What may have appeared there since
    /// the check is looked at again.
    ///
    /// # Errors
    /// Those of the check, and those of the disk.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        self.write_with(|out| Ok(out.write_all(bytes)?))
    }

    /// The same with a content that `fill` writes.
    ///
    /// # Errors
    /// Likewise, and those of `fill`.
    pub fn write_with(&self, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        let named = |error: Error| error.context(format!("cannot write {}", self.shown.display()));
        if is_stream(&self.path) {
            let stream = File::options().write(true).open(&self.path);
            let stream = stream.map_err(|error| failed("open", &self.path, &error))?;
            return fill(&mut &stream).map_err(named);
        }
        self.recheck()?;
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        // A result and no secret: what the umask allows, and not the owner alone.
        let mode = Permissions::from_mode(0o666);
        let temporary =
            tempfile::Builder::new().prefix(".atom-").permissions(mode).tempfile_in(parent);
        let mut temporary = temporary.map_err(|error| named(error.into()))?;
        let mut buffered = BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
        fill(&mut buffered).and_then(|()| Ok(buffered.flush()?)).map_err(named)?;
        drop(buffered);
        let finish = || -> io::Result<()> {
            temporary.as_file().sync_all()?;
            match self.overwrite {
                true => temporary.persist(&self.path)?,
                false => temporary.persist_noclobber(&self.path)?,
            };
            File::open(parent)?.sync_all()
        };
        finish().map_err(|error| named(error.into()))
    }
}

/// Whether writing there replaces nothing: a terminal, `/dev/null`, a pipe.
fn is_stream(path: &Path) -> bool {
    fs_err::metadata(path).is_ok_and(|found| {
        let kind = found.file_type();
        kind.is_char_device() || kind.is_fifo()
    })
}

#[cfg(test)]
#[path = "output_file_tests.rs"]
mod tests;
