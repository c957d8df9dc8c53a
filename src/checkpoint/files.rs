/*! The files of a checkpoint, in a directory or built into the program.

The bundled model has to work like a directory on disk; every reader asks [`Files`] and cannot
tell the two apart. */

use std::borrow::Cow;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;
use serde_json::Value;

use super::card::CARD;
use super::{foreign, json, regular};
use crate::machine::{Watched, watch};
use crate::{Error, Result};

/// Files built into the program: `(file name, bytes)`.
pub(super) type Embedded = &'static [(&'static str, &'static [u8])];

/// A checkpoint's files by name.
pub(super) enum Files {
    Directory(PathBuf),
    Embedded { name: &'static str, files: Embedded },
}

/// The bytes of one file: mapped, or part of the program.
pub(super) enum Bytes {
    Mapped {
        /// It is dropped first: it must end before the map does.
        _watch: Watched,
        map: Mmap,
    },
    Static(&'static [u8]),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped { map, .. } => map,
            Self::Static(bytes) => bytes,
        }
    }
}

/// The most bytes that a file of this name is read into memory for.
fn limit(file: &str) -> u64 {
    const MEBIBYTE: u64 = 1 << 20;
    match file {
        "config.json" => 16 * MEBIBYTE,
        "tokenizer.json" => 512 * MEBIBYTE,
        CARD => 16 * MEBIBYTE,
        _ => 256 * MEBIBYTE,
    }
}

/// Length and time of the last change of a file: different once somebody has written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Files {
    /// The files in `dir`, which must be a directory: the checkpoint's own, or its repository's in the
    /// Hub's cache, of which the snapshot of `main` is taken.
    pub(super) fn directory(dir: &Path) -> Result<Self> {
        let hint = "give --model a directory that holds config.json and *.safetensors";
        match fs_err::metadata(dir) {
            Ok(metadata) if metadata.is_dir() => Ok(Self::Directory(snapshot(dir)?)),
            Ok(_) => {
                Err(Error::input(format!("{} is a file, not a directory", dir.display()))
                    .hint(hint))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::input(format!("directory {} does not exist", dir.display())).hint(hint))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The directory, if there is one.
    pub(super) fn dir(&self) -> Option<&Path> {
        match self {
            Self::Directory(dir) => Some(dir),
            Self::Embedded { .. } => None,
        }
    }

    /// What messages call the whole: the directory, or the bundled model's name.
    pub(super) fn place(&self) -> String {
        match self {
            Self::Directory(dir) => dir.display().to_string(),
            Self::Embedded { name, .. } => format!("the bundled {name}"),
        }
    }

    /// What messages call one file.
    pub(super) fn path_of(&self, file: &str) -> String {
        match self {
            Self::Directory(dir) => dir.join(file).display().to_string(),
            Self::Embedded { .. } => format!("{file} of {}", self.place()),
        }
    }

    /// A short name of the model. In the Hub's cache (`models--org--name/snapshots/commit`) it is
    /// the repository's, not the commit.
    pub(super) fn name(&self) -> String {
        let dir = match self {
            Self::Embedded { name, .. } => return (*name).to_string(),
            Self::Directory(dir) => fs_err::canonicalize(dir).unwrap_or_else(|_| dir.clone()),
        };
        let part = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let parent = dir.parent();
        if parent.and_then(part).as_deref() == Some("snapshots")
            && let Some(repo) = parent.and_then(Path::parent).and_then(part)
            && let Some(name) = repo.strip_prefix("models--").and_then(|r| r.rsplit("--").next())
        {
            return name.to_string();
        }
        part(&dir).unwrap_or_else(|| "model".to_string())
    }

    /// The names of all plain files, sorted.
    pub(super) fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        match self {
            Self::Embedded { files, .. } => names.extend(files.iter().map(|f| f.0.to_string())),
            Self::Directory(dir) => {
                for entry in fs_err::read_dir(dir)? {
                    let entry = entry?;
                    // The Hub's cache holds links: ask what they lead to.
                    if entry.path().is_file() {
                        names.extend(entry.file_name().into_string());
                    }
                }
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether there is a file of this name.
    pub(super) fn contains(&self, file: &str) -> bool {
        match self {
            Self::Directory(dir) => dir.join(file).is_file(),
            Self::Embedded { files, .. } => files.iter().any(|f| f.0 == file),
        }
    }

    /// The file's content, or `None` if there is no such file.
    ///
    /// # Errors
    /// Bad input if it is no regular file, a link to nothing, or longer than such a file can be.
    pub(super) fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Embedded { files, .. } => {
                Ok(files.iter().find(|f| f.0 == file).map(|f| Cow::Borrowed(f.1)))
            }
            Self::Directory(dir) => {
                let path = dir.join(file);
                let absent = fs_err::symlink_metadata(&path)
                    .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
                (!absent).then(|| regular::read(&path, limit(file)).map(Cow::Owned)).transpose()
            }
        }
    }

    /// The file parsed as JSON, or `None` if there is no such file.
    pub(super) fn json(&self, file: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.read(file)? else { return Ok(None) };
        json::parse(&bytes, &self.path_of(file)).map(Some)
    }

    /// The content of `config.json`, an object.
    pub(super) fn config(&self) -> Result<Value> {
        let path = self.path_of("config.json");
        match self.json("config.json")? {
            Some(config) if config.is_object() => Ok(config),
            Some(_) => Err(Error::input(format!("{path} is not a JSON object"))
                .hint("download the file again")),
            None => Err(foreign::without_config(self)),
        }
    }

    /// The content of `tokenizer.json`, without a byte order mark.
    pub(super) fn tokenizer(&self) -> Result<Cow<'static, [u8]>> {
        let content = self.read("tokenizer.json")?.ok_or_else(|| {
            Error::input(format!("{} has no tokenizer.json", self.place())).hint(
                "download it from the model's repository, or make it from tokenizer.model: \
                 python -c \"from transformers import AutoTokenizer as T; \
                 T.from_pretrained('DIR', use_fast=True).save_pretrained('DIR')\"",
            )
        })?;
        let text = json::text(&content, &self.path_of("tokenizer.json"))?;
        match content.len() - text.len() {
            0 => Ok(content),
            mark => Ok(Cow::Owned(content[mark..].to_vec())),
        }
    }

    /// The file mapped into memory, not read.
    pub(super) fn map(&self, file: &str) -> Result<Bytes> {
        match self {
            Self::Embedded { files, .. } => files
                .iter()
                .find(|f| f.0 == file)
                .map(|f| Bytes::Static(f.1))
                .ok_or_else(|| Error::input(format!("{} does not exist", self.path_of(file)))),
            Self::Directory(dir) => {
                let path = dir.join(file);
                let (file, _) = regular::open(&path)?;
                // SAFETY: the map is only read. Another process that shortens the file meanwhile
                // raises SIGBUS, which ends the process with a sentence that names the file.
                let map = unsafe { Mmap::map(&file) }.map_err(|error| {
                    Error::machine(format!("cannot map {}: {error}", path.display()))
                        .hint("raise the limit on memory (`ulimit -v`), which counts mapped files")
                })?;
                Ok(Bytes::Mapped { _watch: watch(&path, &map), map })
            }
        }
    }

    /// Length and time of the last change of a file; none for one that is part of the program.
    pub(super) fn stamp(&self, file: &str) -> Result<Option<Stamp>> {
        let Self::Directory(dir) = self else { return Ok(None) };
        let metadata = fs_err::metadata(dir.join(file))?;
        Ok(Some(Stamp { bytes: metadata.len(), modified: metadata.modified().ok() }))
    }
}

/// The snapshot that is meant where `dir` is a repository in the Hub's cache (`models--org--name`):
/// that of `main`, or else the only one. Every other directory is meant itself.
fn snapshot(dir: &Path) -> Result<PathBuf> {
    let snapshots = dir.join("snapshots");
    if dir.join("config.json").exists() || !snapshots.is_dir() {
        return Ok(dir.to_path_buf());
    }
    if let Ok(commit) = regular::read(&dir.join("refs/main"), 1 << 10)
        && let Ok(commit) = str::from_utf8(&commit)
        && is_plain_file_name(commit.trim())
        && snapshots.join(commit.trim()).is_dir()
    {
        return Ok(snapshots.join(commit.trim()));
    }
    let mut found = Vec::new();
    for entry in fs_err::read_dir(&snapshots)? {
        found.extend(Some(entry?.path()).filter(|path| path.is_dir()));
    }
    found.sort();
    match &found[..] {
        [only] => Ok(only.clone()),
        [] => Err(Error::input(format!("{} holds no snapshot of the model", dir.display()))
            .hint("download the model, for example with `hf download ORG/NAME`")),
        [first, ..] => Err(Error::input(format!(
            "{} is a repository in the Hub's cache with {} snapshots, and refs/main names none of them",
            dir.display(),
            found.len()
        ))
        .hint(format!("give --model one of them, such as {}", first.display()))),
    }
}

/// Whether `name` stays inside its directory: downloaded text must not reach other files.
pub(super) fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}
