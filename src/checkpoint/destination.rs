/*! Where results go: the one check that every output path of every command passes.

An output is never an input, holds none and lies in none; it replaces nothing without `--overwrite`, and with it only
a result of the same kind; of a directory it replaces only the files that the checkpoint there is made of. A
link is followed once, when the path is checked, and never when something is written. */

use std::io;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Access, access};

use super::card::CARD;
use super::envelope::{DirectoryKind, own_files};
use crate::{Error, Result};

/// Everything that a command reads from the disk.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// Absolute, links resolved, and as the user wrote it.
    paths: Vec<(PathBuf, String)>,
}

impl Inputs {
    /// Adds a file or a directory. What is not there is no input.
    pub fn add(&mut self, path: &Path) {
        let Ok(absolute) = fs_err::canonicalize(path) else { return };
        // Links in a directory lead to files that are read as well: those of the Hub's cache do.
        for entry in fs_err::read_dir(&absolute).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_symlink())
                && let Ok(target) = fs_err::canonicalize(entry.path())
            {
                self.paths.push((target, entry.path().display().to_string()));
            }
        }
        self.paths.push((absolute, path.display().to_string()));
    }

    /// These inputs and those.
    pub fn and(mut self, mut others: Self) -> Self {
        self.paths.append(&mut others.paths);
        self
    }

    /// These inputs and one more.
    pub fn with(mut self, path: Option<&Path>) -> Self {
        path.into_iter().for_each(|path| self.add(path));
        self
    }

    /// Refuses an output that is an input, holds one or lies in one.
    pub(super) fn refuse(&self, out: &Path, shown: &str) -> Result<()> {
        for (input, name) in &self.paths {
            let how = match (out == input, input.starts_with(out), out.starts_with(input)) {
                (true, _, _) => "is",
                (_, true, _) => "holds",
                (_, _, true) => "lies inside",
                _ => continue,
            };
            return Err(Error::usage(format!("output {shown} {how} {name}, which is read"))
                .hint("name another place with --out: no input is ever written to"));
        }
        Ok(())
    }
}

/// Where a checkpoint goes, and what may not be touched.
#[derive(Clone, Debug)]
pub struct Destination {
    /// Its directory.
    pub out: PathBuf,
    /// Replace the checkpoint that is there.
    pub overwrite: bool,
    /// What the command reads.
    pub inputs: Inputs,
}

impl Destination {
    /// The directory made absolute, if a checkpoint may be written there: it does not exist, is empty, or with
    /// `overwrite` holds an Atom checkpoint and nothing else.
    ///
    /// # Errors
    /// Usage: something else is there, or an input. Input: it cannot be created there.
    pub fn check(&self) -> Result<PathBuf> {
        self.check_for(DirectoryKind::Checkpoint)
    }

    /// The same for a directory of that kind, which replaces its own kind alone.
    ///
    /// # Errors
    /// Those of [`Destination::check`].
    pub fn check_for(&self, kind: DirectoryKind) -> Result<PathBuf> {
        let shown = self.out.display().to_string();
        let out = resolve(&self.out)?;
        self.inputs.refuse(&out, &shown)?;
        if !out.exists() {
            return Ok(out);
        }
        if out.file_name().is_none() || !out.is_dir() {
            let message = format!("output {shown} exists and is not a directory of its own");
            return Err(Error::usage(message).hint("name a new directory with --out"));
        }
        if fs_err::read_dir(&out)?.next().is_none() {
            return Ok(out);
        }
        if !self.overwrite {
            return Err(Error::usage(format!("output directory {shown} exists"))
                .hint("replace it with --overwrite, or name another one with --out"));
        }
        let is_own = own_files(&out, kind).map_err(|error| {
            let title = kind.title();
            let message = format!("output directory {shown} is not {title} and is not overwritten");
            Error::usage(error.to_string())
                .context(message)
                .hint("name another directory with --out")
        })?;
        let foreign = foreign_files(&out, is_own)?;
        if let Some(first) = foreign.first() {
            let more = match foreign.len() - 1 {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let why = match first.as_str() {
                CARD => "which is not as atom wrote it",
                _ => "which the checkpoint in it does not list",
            };
            return Err(Error::usage(format!(
                "output directory {shown} holds {first}{more}, {why}"
            ))
            .hint(
                "move what is not the checkpoint's elsewhere, or name another directory with --out",
            ));
        }
        Ok(out)
    }
}

/// What a directory holds besides plain files of its own, sorted.
pub(super) fn foreign_files(dir: &Path, is_own: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let mut foreign = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let own = name.to_str().is_some_and(&is_own) && entry.file_type()?.is_file();
        if !own {
            foreign.push(name.to_string_lossy().into_owned());
        }
    }
    foreign.sort();
    Ok(foreign)
}

/// An output path made absolute, its links resolved. Where it does not exist, it can be created.
pub(super) fn resolve(out: &Path) -> Result<PathBuf> {
    let shown = out.display();
    let elsewhere = "name another place with --out";
    match fs_err::symlink_metadata(out) {
        Ok(found) => fs_err::canonicalize(out).map_err(|error| {
            if found.is_symlink() && error.kind() == io::ErrorKind::NotFound {
                let target = fs_err::read_link(out).unwrap_or_default();
                let message = format!(
                    "output {shown} is a link to {}, which does not exist",
                    target.display()
                );
                return Error::usage(message)
                    .hint("name the place itself with --out, or remove the link");
            }
            Error::from(error).hint(elsewhere)
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let absolute = std::path::absolute(out).ok();
            let named = |path: &PathBuf| out.file_name().is_some() && path.file_name().is_some();
            let absolute = absolute.filter(named).ok_or_else(|| {
                Error::usage(format!("`{shown}` cannot be the output"))
                    .hint("name a new place with --out")
            })?;
            creatable(&absolute, out)
        }
        Err(error) => Err(Error::from(error).hint(elsewhere)),
    }
}

/// A path that does not exist, under the nearest directory that does, which can be written.
fn creatable(absolute: &Path, out: &Path) -> Result<PathBuf> {
    let there = absolute.ancestors().skip(1).find(|path| path.symlink_metadata().is_ok());
    let there = there.unwrap_or(Path::new("/"));
    let rest = absolute.strip_prefix(there).unwrap_or(absolute);
    if rest.components().any(|part| !matches!(part, Component::Normal(_))) {
        return Err(Error::usage(format!(
            "output {} leads through a directory that does not exist and back",
            out.display()
        ))
        .hint("name the place without `..`"));
    }
    let parent = fs_err::canonicalize(there)
        .map_err(|error| Error::from(error).hint("name another place with --out"))?;
    if !parent.is_dir() {
        let message =
            format!("{} is not a directory, so {} cannot be", parent.display(), out.display());
        return Err(Error::usage(message).hint("name another place with --out"));
    }
    may_write(&parent)?;
    Ok(parent.join(rest))
}

/// Whether entries may be made in a directory, asked without making one.
fn may_write(dir: &Path) -> Result<()> {
    access(dir, Access::WRITE_OK | Access::EXEC_OK).map_err(|error| {
        Error::input(format!("cannot write into {}: {error}", dir.display()))
            .hint("name a directory that can be written with --out")
    })
}

#[cfg(test)]
#[path = "destination_tests.rs"]
mod tests;
