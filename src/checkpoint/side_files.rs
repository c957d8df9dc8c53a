/*! The files that a user of a model needs besides configuration and weights, and their way into the output.

They are copied as a stream and never read whole. A link is followed only inside the checkpoint: its
directory, or its repository in the Hub's cache. What a link of a downloaded model may reach
elsewhere on this machine is nobody else's to have. */

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::card::CARD;
use super::files::Files;
use super::output::failed;
use super::regular;
use crate::{Error, Result};

/// The most bytes that a side file may have; the largest tokenizers have some 40 MB.
const LIMIT: u64 = 512 << 20;

/// One file that is copied into the output as it is.
pub struct SideFile {
    /// Its name, in the source and in the output.
    pub name: String,
    content: Content,
    bytes: u64,
}

enum Content {
    File(PathBuf),
    Memory(Vec<u8>),
}

/// The side files of a checkpoint.
pub struct SideFiles {
    /// What is copied, by name.
    pub copied: Vec<SideFile>,
    /// Why others are not, a sentence each.
    pub left_out: Vec<String>,
}

impl SideFile {
    /// A file of this content.
    pub fn in_memory(name: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        let content = content.into();
        let bytes = content.len() as u64;
        Self { name: name.into(), content: Content::Memory(content), bytes }
    }

    /// Its length when it was found.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes the content to `path` and syncs it.
    ///
    /// # Errors
    /// Bad input if the file cannot be read any more; a machine error if the disk is full.
    pub fn copy_to(&self, path: &Path) -> Result<()> {
        let write_failed = |error: std::io::Error| failed("write", path, &error);
        // An interrupted copy may be there. A link in its place is removed and never followed.
        if path.is_symlink() || path.exists() {
            fs_err::remove_file(path)?;
        }
        let mut out = File::create_new(path).map_err(write_failed)?;
        match &self.content {
            Content::Memory(content) => out.write_all(content).map_err(write_failed)?,
            Content::File(source) => copy(source, &mut out, path)?,
        }
        out.sync_all().map_err(write_failed)
    }
}

/// Copies at most [`LIMIT`] bytes.
fn copy(source: &Path, out: &mut File, path: &Path) -> Result<()> {
    let (mut file, _) = regular::open(source)?;
    let mut part = vec![0; 1 << 20];
    let mut copied = 0;
    loop {
        let count = file.read(&mut part).map_err(|error| failed("read", source, &error))?;
        copied += count as u64;
        if count == 0 {
            return Ok(());
        }
        if copied > LIMIT {
            return Err(Error::input(format!("{} grew while it was copied", source.display()))
                .hint("run again once nothing else writes to the model's directory"));
        }
        out.write_all(&part[..count]).map_err(|error| failed("write", path, &error))?;
    }
}

/// Whether a user of the model needs this file besides configuration and weights.
pub(crate) fn is_side_file(name: &str) -> bool {
    const NAMES: [&str; 5] = [
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    ];
    const PREFIXES: [&str; 2] = ["tokenizer", "chat_template"];
    NAMES.contains(&name)
        || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || is_legal_file(name)
}

/// Whether a file says what may be done with the model.
pub(crate) fn is_legal_file(name: &str) -> bool {
    ["LICENSE", "NOTICE", "USE_POLICY"].iter().any(|prefix| name.starts_with(prefix))
}

/// Finds the side files, sorted by name.
pub(super) fn find(files: &Files) -> Result<SideFiles> {
    let mut found = SideFiles { copied: Vec::new(), left_out: Vec::new() };
    let mut names = match files {
        Files::Directory(dir) => every_name(dir)?,
        Files::Embedded { .. } => files.names()?,
    };
    names.retain(|name| is_side_file(name));
    names.sort();
    for name in names {
        match files {
            Files::Directory(dir) => match look_at(dir, &name)? {
                Ok(file) => found.copied.push(file),
                Err(None) => {}
                Err(Some(why)) => found.left_out.push(why),
            },
            Files::Embedded { .. } => {
                let content = files.read(&name)?.unwrap_or_default();
                found.copied.push(SideFile::in_memory(name, content));
            }
        }
    }
    Ok(found)
}

/// The content of the model card, if there is one; or why it cannot be read.
pub(super) fn readme(files: &Files) -> std::result::Result<Option<Vec<u8>>, String> {
    if let Files::Directory(dir) = files {
        if dir.join(CARD).symlink_metadata().is_err() {
            return Ok(None);
        }
        match look_at(dir, CARD).map_err(|error| error.to_string())? {
            Ok(_) => {}
            Err(None) => return Ok(None),
            Err(Some(why)) => return Err(why),
        }
    }
    let content = files.read(CARD).map_err(|error| error.to_string())?;
    Ok(content.map(std::borrow::Cow::into_owned))
}

fn every_name(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

/// The file of this name, or why it is left out; directories are left out without a word.
fn look_at(dir: &Path, name: &str) -> Result<std::result::Result<SideFile, Option<String>>> {
    let path = dir.join(name);
    let left_out = |why: String| Ok(Err(Some(format!("{} is not copied: {why}", path.display()))));
    let Ok(target) = fs_err::canonicalize(&path) else {
        return left_out("it is a link that leads to no file".to_owned());
    };
    let metadata = fs_err::metadata(&target)?;
    if metadata.is_dir() {
        return Ok(Err(None));
    }
    if !metadata.is_file() {
        return left_out("it is not a regular file".to_owned());
    }
    // The run itself reads the tokenizer, and refuses what is none.
    if name != "tokenizer.json" && !is_inside(dir, &target)? {
        return left_out(format!("it is a link to {}, outside the model", target.display()));
    }
    if metadata.len() > LIMIT {
        let (bytes, limit) = (metadata.len(), LIMIT >> 20);
        return left_out(format!("it is {bytes} bytes long, more than {limit} MiB"));
    }
    let (name, bytes) = (name.to_owned(), metadata.len());
    Ok(Ok(SideFile { name, content: Content::File(target), bytes }))
}

/// Whether a file lies in the checkpoint's directory, or among the blobs of its repository in the
/// Hub's cache (`models--org--name/snapshots/commit` and `models--org--name/blobs`).
fn is_inside(dir: &Path, target: &Path) -> Result<bool> {
    let dir = fs_err::canonicalize(dir)?;
    let snapshots = dir.parent().filter(|parent| parent.ends_with("snapshots"));
    let blobs = snapshots.and_then(Path::parent).map(|repository| repository.join("blobs"));
    Ok(target.starts_with(&dir) || blobs.is_some_and(|blobs| target.starts_with(blobs)))
}
