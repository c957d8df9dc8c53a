/*! A finished Atom checkpoint, opened for reading. */

use std::borrow::Cow;
use std::path::Path;

use serde_json::Value;

use super::dtype::{TensorSpec, form};
use super::envelope::{ATOM, Envelope, has_own_hash};
use super::files::Files;
use super::fingerprint::sha256_hex;
use super::shards::Shards;
use super::side_files::{self, SideFiles};
use super::tensor::Tensor;
use super::tensor_bytes::{StoredBytes, TensorBytes};
use super::{Manifest, Stored};
use crate::{Error, Result};

/// The version of the format that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u64 = 1;

/// Whether `dir` holds an Atom checkpoint: a directory is one once `atom.json` is in it.
pub fn is_atom(dir: &Path) -> bool {
    dir.join(ATOM).is_file()
}

/// An opened Atom checkpoint; tensors stay in their files until they are used.
pub struct AtomCheckpoint {
    files: Files,
    name: String,
    config: Value,
    atom: Value,
    envelope: Envelope,
    shards: Shards,
}

impl AtomCheckpoint {
    /// Opens the checkpoint in `dir`. Headers, lengths and the list of tensors are checked, their
    /// contents are not: see [`AtomCheckpoint::verify_tensor`].
    pub fn open(dir: &Path) -> Result<Self> {
        let files = Files::directory(dir)?;
        let path = files.path_of(ATOM);
        let Some(atom) = files.json(ATOM)? else {
            return Err(Error::input(format!("{} has no atom.json", dir.display()))
                .hint("give a directory that `atom quantize` has written"));
        };
        let envelope = Envelope::read(&atom, &path)?;
        let config = files.config()?;
        let shards = Shards::open(&files)?;
        shards.check_index()?;
        let listed = &envelope.tensors;
        let absent = listed.keys().find(|name| !shards.contains(name));
        let unlisted = shards.names().find(|name| !listed.contains_key(*name));
        let problem = match (absent, unlisted) {
            (Some(name), _) => format!("{path} lists tensor `{name}`, which no shard holds"),
            (None, Some(name)) => format!("{path} does not list tensor `{name}` of the shards"),
            (None, None) => {
                return Ok(Self { name: files.name(), files, config, atom, envelope, shards });
            }
        };
        Err(Error::input(problem).hint("copy the checkpoint again, all of its files"))
    }

    /// Whether `atom.json` has hashes of itself and of the files next to the shards. Checkpoints written before
    /// there were such hashes have none.
    pub fn covers_files(&self) -> bool {
        self.envelope.covers_files()
    }

    /// The names of the files that have a hash, `atom.json` first; none where there are no hashes.
    pub fn covered_files(&self) -> Vec<&str> {
        let own = self.envelope.sha256.as_ref().map(|_| ATOM);
        own.into_iter().chain(self.envelope.files.keys().map(String::as_str)).collect()
    }

    /// Compares a file with the hash that `atom.json` has of it.
    ///
    /// # Errors
    /// A difference, or a missing file, is a failed check (exit code 1).
    pub fn verify_file(&self, name: &str) -> Result<()> {
        let path = self.files.path_of(name);
        let again = "the file was changed or damaged: copy it again, or quantize the model again";
        let Some(content) = self.files.read(name)? else {
            return Err(Error::check(format!("{path} is missing")).hint(again));
        };
        let same = match (name, &self.envelope.sha256) {
            (ATOM, Some(expected)) => has_own_hash(&content, expected),
            (ATOM, None) => true,
            _ => {
                self.envelope.files.get(name).is_none_or(|hash| sha256_hex(&content) == hash.sha256)
            }
        };
        if same {
            return Ok(());
        }
        Err(Error::check(format!("{path} is not what was written: its SHA-256 is another"))
            .hint(again))
    }

    /// A short name: the directory's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What messages call it: its directory.
    pub fn title(&self) -> String {
        self.files.place()
    }

    /// The directory.
    pub fn dir(&self) -> Option<&Path> {
        self.files.dir()
    }

    /// The content of `atom.json`.
    ///
    /// # Errors
    /// Input: a field that is missing, of another type or out of its range, named.
    pub fn manifest(&self) -> Result<Manifest> {
        Manifest::parse(&self.atom)
    }

    /// SHA-256 of `atom.json`, which has hashes of everything else, in hexadecimal: it tells this checkpoint from others.
    ///
    /// # Errors
    /// Bad input if the file cannot be read any more.
    pub fn fingerprint(&self) -> Result<String> {
        Ok(sha256_hex(&self.files.read(ATOM)?.unwrap_or_default()))
    }

    /// What one of its files holds, as JSON, or `None` if there is no such file.
    ///
    /// # Errors
    /// As [`AtomCheckpoint::file`]'s; bad input if it is not valid JSON.
    pub fn json(&self, name: &str) -> Result<Option<Value>> {
        self.files.json(name)
    }

    /// What a user of the model needs besides configuration and weights: tokenizer, generation settings, chat template,
    /// licence.
    pub fn side_files(&self) -> Result<SideFiles> {
        side_files::find(&self.files)
    }

    /// The content of the model card, if there is one; or why it cannot be read. It is never needed.
    pub fn readme(&self) -> std::result::Result<Option<Vec<u8>>, String> {
        side_files::readme(&self.files)
    }

    /// What messages call one of its files.
    pub fn path_of(&self, file: &str) -> String {
        self.files.path_of(file)
    }

    /// The content of `config.json`, an object.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// What messages call its `config.json`: the path, or the bundled model's.
    pub fn config_file(&self) -> String {
        self.files.path_of("config.json")
    }

    /// The tensor of this name, of any type.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.shards.tensor(name)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.shards.contains(name)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shards.names()
    }

    /// Refuses weights that were written to since the checkpoint was opened: for the end of a run.
    ///
    /// # Errors
    /// Bad input that names the file.
    pub fn check_unchanged(&self) -> Result<()> {
        self.shards.check_unchanged(&self.files)
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.shards.total_bytes()
    }

    /// The content of `tokenizer.json`.
    pub fn tokenizer(&self) -> Result<Cow<'_, [u8]>> {
        self.files.tokenizer()
    }

    /// What errors call the file that [`AtomCheckpoint::tokenizer`] reads.
    pub fn tokenizer_path(&self) -> String {
        self.files.path_of("tokenizer.json")
    }

    /// The content of one of its files, if there is one of this name.
    pub fn file(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        self.files.read(name)
    }

    /// Compares a tensor's bytes with the hash that `atom.json` has of them. A difference is a
    /// failed check (exit code 1). `check_stop` is asked between parts.
    pub fn verify_tensor(&self, name: &str, check_stop: &dyn Fn() -> Result<()>) -> Result<()> {
        self.compare(name, check_stop, |_| ())
    }

    /// A copy of a tensor's bytes, read once: compared with the hash that `atom.json` has of them, and the bits of `flip`
    /// turned in each. `check_stop` is asked between parts.
    ///
    /// # Errors
    /// A difference is a failed check.
    pub fn verified_copy(
        &self,
        name: &str,
        flip: u8,
        check_stop: &dyn Fn() -> Result<()>,
    ) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.tensor(name)?.bytes.len());
        self.compare(name, check_stop, |part| bytes.extend(part.iter().map(|byte| byte ^ flip)))?;
        Ok(bytes)
    }

    /// The bytes of `tensor`, a tensor of this checkpoint, with the bits of `flip` turned in each. They are compared with
    /// the hash that `atom.json` has of them as they are written.
    pub fn verified_bytes<'a>(&'a self, tensor: Tensor<'a>, flip: u8) -> TensorBytes<'a> {
        StoredBytes { tensor, expected: Some(self.listed_hash(tensor.name)), flip }.into()
    }

    fn compare(
        &self,
        name: &str,
        check_stop: &dyn Fn() -> Result<()>,
        take: impl FnMut(&[u8]),
    ) -> Result<()> {
        let found = self.tensor(name)?.sha256(check_stop, take)?;
        compare_hashes(name, &found, self.listed_hash(name))
    }

    fn listed_hash(&self, name: &str) -> &str {
        self.envelope.tensors.get(name).map_or("no hash", |hash| &hash.sha256)
    }
}

/// Compares a tensor's hash with the one that `atom.json` has.
///
/// # Errors
/// A difference is a failed check.
pub(super) fn compare_hashes(name: &str, found: &str, expected: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let message = format!("tensor `{name}` has SHA-256 {found}, atom.json says {expected}");
    Err(Error::check(message).hint("the file is damaged: copy it again"))
}

impl Stored for AtomCheckpoint {
    fn fetch(&self, spec: &TensorSpec) -> Result<Cow<'_, [u8]>> {
        let tensor = self.tensor(&spec.name)?;
        if tensor.dtype != spec.dtype || tensor.shape != spec.shape {
            return Err(Error::input(format!(
                "tensor `{}` of {} is {}, expected {}",
                spec.name,
                self.files.place(),
                form(tensor.dtype.name(), tensor.shape),
                spec.form()
            ))
            .hint("atom.json and the shards do not belong together: copy the checkpoint again"));
        }
        Ok(Cow::Borrowed(tensor.bytes))
    }
}
