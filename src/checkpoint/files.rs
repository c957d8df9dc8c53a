/*! The files of a checkpoint, in a directory or built into the program.

The bundled model has to work like a directory on disk; every reader asks [`Files`] and cannot
tell the two apart. */

use std::borrow::Cow;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde_json::Value;

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

impl Files {
    /// The files in `dir`, which must be a directory.
    pub(super) fn directory(dir: &Path) -> Result<Self> {
        let hint = "give --model a directory that holds config.json and *.safetensors";
        match fs_err::metadata(dir) {
            Ok(metadata) if metadata.is_dir() => Ok(Self::Directory(dir.to_path_buf())),
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
    pub(super) fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Embedded { files, .. } => {
                Ok(files.iter().find(|f| f.0 == file).map(|f| Cow::Borrowed(f.1)))
            }
            Self::Directory(_) if !self.contains(file) => Ok(None),
            Self::Directory(dir) => Ok(Some(Cow::Owned(fs_err::read(dir.join(file))?))),
        }
    }

    /// The file parsed as JSON, or `None` if there is no such file.
    pub(super) fn json(&self, file: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.read(file)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            Error::input(format!("{} is not valid JSON: {error}", self.path_of(file)))
                .hint("download the file again")
        })
    }

    /// The content of `config.json`, an object.
    pub(super) fn config(&self) -> Result<Value> {
        let path = self.path_of("config.json");
        match self.json("config.json")? {
            Some(config) if config.is_object() => Ok(config),
            Some(_) => Err(Error::input(format!("{path} is not a JSON object"))
                .hint("download the file again")),
            None => Err(Error::input(format!("{} has no config.json", self.place())).hint(
                "give --model the directory of a Hugging Face checkpoint: config.json, \
                 tokenizer.json and *.safetensors lie side by side in it",
            )),
        }
    }

    /// The content of `tokenizer.json`.
    pub(super) fn tokenizer(&self) -> Result<Cow<'static, [u8]>> {
        self.read("tokenizer.json")?.ok_or_else(|| {
            Error::input(format!("{} has no tokenizer.json", self.place())).hint(
                "download it from the model's repository, or make it from tokenizer.model: \
                 python -c \"from transformers import AutoTokenizer as T; \
                 T.from_pretrained('DIR', use_fast=True).save_pretrained('DIR')\"",
            )
        })
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
                let file = fs_err::File::open(dir.join(file))?;
                // SAFETY: the map is only read. Another process that shortens the file meanwhile
                // raises SIGBUS, which ends the process with a sentence that names the file.
                let map = unsafe { Mmap::map(&file) }.map_err(|error| {
                    Error::machine(format!("cannot map {}: {error}", file.path().display()))
                        .hint("raise the limit on memory (`ulimit -v`), which counts mapped files")
                })?;
                Ok(Bytes::Mapped { _watch: watch(file.path(), &map), map })
            }
        }
    }
}
