/*! Writes an Atom checkpoint, block by block, so that it can be interrupted at any moment.

The shards are laid out and their room on the disk is reserved before the first block; a block's
tensors are written at their places and synced before the block counts as done; the finished
directory takes its name in one rename. The bytes depend on the tensors and the job only: no time
stamp, no hash map's order. */

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::atom::is_atom;
use super::dtype::TensorSpec;
use super::fingerprint::sha256_hex;
use super::layout::{Layout, Place};
use super::output::{
    check_space, failed, free_bytes, replace, reserve, sync_directory, writable, write_synced,
};
use super::shards::INDEX;
use super::side_files::SideFile;
use super::work::{DoneBlock, Work};
use super::{FORMAT_VERSION, Stored};
use crate::{Error, Result};

/// The largest shard unless told otherwise: 5 GB of tensors, as the Hub's tools write them.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// Room kept for what stands beside the shards: tokenizer, index, `atom.json`.
const SIDE_FILES_BYTES: u64 = 8 << 20;

/// How to write.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Replace the output if it is an Atom checkpoint already.
    pub overwrite: bool,
    /// Go on with an unfinished run of the same job, if there is one.
    pub resume: bool,
    /// Bytes of tensors in a shard, at most; a larger tensor has a shard of its own.
    pub max_shard_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { overwrite: false, resume: false, max_shard_bytes: DEFAULT_SHARD_BYTES }
    }
}

/// A checkpoint being written.
pub struct Writer {
    out: PathBuf,
    overwrite: bool,
    layout: Layout,
    shards: Vec<(PathBuf, File)>,
    work: Work,
    done: Vec<DoneBlock>,
    /// SHA-256 of each tensor written so far.
    hashes: BTreeMap<String, String>,
}

impl Writer {
    /// Prepares the output `out` for the given tensors. `job` is everything else that decides
    /// their bytes: recipe, fingerprints of source and calibration. It is compared on resume.
    ///
    /// # Errors
    /// Usage: `out` exists, or another process writes it. Machine: not enough disk. Input: with
    /// `resume`, an unfinished run of another job.
    pub fn create(
        out: &Path,
        tensors: Vec<TensorSpec>,
        job: &Value,
        options: Options,
    ) -> Result<Self> {
        let out = writable(out, options.overwrite)?;
        let specs: Map<String, Value> =
            tensors.iter().map(|spec| (spec.name.clone(), spec.form().into())).collect();
        let job = json!({
            "format_version": FORMAT_VERSION,
            "job": job,
            "max_shard_bytes": options.max_shard_bytes,
            "tensors": specs,
        });
        let layout = Layout::new(tensors, options.max_shard_bytes)?;
        let (work, done) = Work::open(&out, &job, options.resume)?;
        // A run that was killed while it replaced the output may have left it to be put back.
        let out = writable(&out, options.overwrite)?;
        let mut writer = Self {
            out,
            overwrite: options.overwrite,
            layout,
            shards: Vec::new(),
            work,
            done: Vec::new(),
            hashes: BTreeMap::new(),
        };
        match done {
            Some(done) => writer.go_on(done)?,
            None => {
                if let Err(error) = writer.reserve_shards() {
                    writer.work.discard();
                    return Err(error);
                }
                writer.work.begin(&job)?;
            }
        }
        Ok(writer)
    }

    fn reserve_shards(&mut self) -> Result<()> {
        let directory = self.work.checkpoint();
        let needed = self.layout.file_bytes().saturating_add(SIDE_FILES_BYTES);
        check_space(&self.out, needed, free_bytes(&directory))?;
        for shard in &self.layout.shards {
            let path = directory.join(&shard.name);
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)
                .map_err(|error| failed("create", &path, &error))?;
            reserve(&file, &path, shard.file_bytes)?;
            file.write_all_at(&shard.header, 0)
                .and_then(|()| file.sync_all())
                .map_err(|error| failed("write", &path, &error))?;
            self.shards.push((path, file));
        }
        Ok(())
    }

    fn go_on(&mut self, done: Vec<DoneBlock>) -> Result<()> {
        let directory = self.work.checkpoint();
        for shard in &self.layout.shards {
            let path = directory.join(&shard.name);
            let file = File::options()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(|error| failed("go on with", &path, &error))?;
            let mut header = vec![0; shard.header.len()];
            let intact = file.metadata().is_ok_and(|data| data.len() == shard.file_bytes)
                && file.read_exact_at(&mut header, 0).is_ok()
                && header == shard.header;
            if !intact {
                let message = format!("{} is not as the unfinished run left it", path.display());
                return Err(Error::input(message).hint("leave out --resume to begin anew"));
            }
            self.shards.push((path, file));
        }
        for block in done {
            for (name, hash) in &block.sha256 {
                self.place(name)?;
                self.hashes.insert(name.clone(), hash.clone());
            }
            self.done.push(block);
        }
        // The run got as far as the last step, the exchange with an output to be replaced. Which
        // of the two lies here, the hashes tell.
        if is_atom(&directory) {
            self.hashes.keys().try_for_each(|name| self.read_back(name).map(drop))?;
        }
        Ok(())
    }

    /// The output directory, absolute.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// The blocks that are on the disk, in the order they were written.
    pub fn done(&self) -> &[DoneBlock] {
        &self.done
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.layout.places.get(name).ok_or_else(|| {
            Error::input(format!("tensor `{name}` is not part of {}", self.out.display()))
        })
    }

    /// Writes the tensors of a block, `(name, little-endian bytes)`, and returns when they are on
    /// the disk. `extra` is kept beside the block for a run that goes on from here.
    pub fn write_block(
        &mut self,
        block: &str,
        tensors: Vec<(String, Vec<u8>)>,
        extra: Value,
    ) -> Result<()> {
        if self.done.iter().any(|done| done.block == block) {
            return Err(Error::input(format!("block `{block}` is written already")));
        }
        let mut names = std::collections::BTreeSet::new();
        for (name, bytes) in &tensors {
            let spec = &self.place(name)?.spec;
            if bytes.len() as u64 != spec.bytes() {
                return Err(Error::input(format!(
                    "tensor `{name}` is {} and needs {} bytes, but block `{block}` gives {}",
                    spec.form(),
                    spec.bytes(),
                    bytes.len()
                )));
            }
            if self.hashes.contains_key(name) || !names.insert(name) {
                return Err(Error::input(format!("tensor `{name}` is written already")));
            }
        }
        let sha256: BTreeMap<String, String> =
            tensors.par_iter().map(|(name, bytes)| (name.clone(), sha256_hex(bytes))).collect();
        let mut touched = vec![false; self.shards.len()];
        for (name, bytes) in &tensors {
            let place = self.place(name)?;
            let (path, file) = &self.shards[place.shard];
            file.write_all_at(bytes, place.offset)
                .map_err(|error| failed("write", path, &error))?;
            touched[place.shard] = true;
        }
        for ((path, file), _) in self.shards.iter().zip(touched).filter(|(_, touched)| *touched) {
            file.sync_data().map_err(|error| failed("write", path, &error))?;
        }
        let block = DoneBlock { block: block.to_string(), sha256, extra };
        self.work.finished(&block)?;
        self.hashes.extend(block.sha256.clone());
        self.done.push(block);
        Ok(())
    }

    /// The bytes of a tensor that has been written, checked against its hash.
    pub fn read_back(&self, name: &str) -> Result<Vec<u8>> {
        let place = self.place(name)?;
        let (path, file) = &self.shards[place.shard];
        let hash = self
            .hashes
            .get(name)
            .ok_or_else(|| Error::input(format!("tensor `{name}` is not written yet")))?;
        let mut bytes = vec![0; place.spec.bytes() as usize];
        file.read_exact_at(&mut bytes, place.offset)
            .map_err(|error| failed("read", path, &error))?;
        if sha256_hex(&bytes) != *hash {
            let message = format!("tensor `{name}` in {} is not what was written", path.display());
            return Err(Error::input(message).hint("leave out --resume to begin anew"));
        }
        Ok(bytes)
    }

    /// Gives up, and leaves nothing behind: for a run that failed before a block was finished.
    pub fn discard(self) {
        self.work.discard();
    }

    /// Completes the checkpoint and gives it its name; returns its size in bytes. `config` becomes
    /// `config.json`, `atom` becomes `atom.json` with a `tensors` map of hashes added, and the side
    /// files are copied as they are.
    pub fn finish(self, config: &Value, mut atom: Value, side_files: &[SideFile]) -> Result<u64> {
        let mut missing: Vec<&String> =
            self.layout.places.keys().filter(|name| !self.hashes.contains_key(*name)).collect();
        missing.sort();
        if let Some(first) = missing.first() {
            return Err(Error::input(format!(
                "{} of {} tensors were not written, the first is `{first}`",
                missing.len(),
                self.layout.places.len()
            )));
        }
        let hashes: Map<String, Value> = self
            .hashes
            .iter()
            .map(|(name, hash)| (name.clone(), json!({ "sha256": hash })))
            .collect();
        match atom.as_object_mut() {
            Some(atom) => atom.insert("tensors".to_string(), hashes.into()),
            None => return Err(Error::input("the content of atom.json is not an object")),
        };

        let directory = self.work.checkpoint();
        let ours = ["config.json", "atom.json", INDEX];
        for side_file in side_files {
            let name = &side_file.name;
            if ours.contains(&name.as_str())
                || name.contains('/')
                || self.layout.shards.iter().any(|shard| shard.name == *name)
            {
                return Err(Error::input(format!("`{name}` cannot be a side file's name")));
            }
            side_file.copy_to(&directory.join(name))?;
        }
        let index = self.layout.index();
        let json_files =
            [(INDEX, index.as_ref()), ("config.json", Some(config)), ("atom.json", Some(&atom))];
        for (name, value) in json_files {
            let Some(value) = value else { continue };
            let text = format!("{value:#}\n");
            write_synced(&directory.join(name), text.as_bytes())?;
        }
        for (path, file) in &self.shards {
            file.sync_all().map_err(|error| failed("write", path, &error))?;
        }
        sync_directory(&directory)?;
        let mut bytes = 0;
        for entry in fs_err::read_dir(&directory)? {
            bytes += entry?.metadata()?.len();
        }

        // The output may have appeared while this run worked.
        writable(&self.out, self.overwrite)?;
        replace(&directory, &self.out, &self.work.replaced())?;
        sync_directory(self.out.parent().unwrap_or(Path::new("/")))?;
        self.work.remove();
        Ok(bytes)
    }
}

impl Stored for Writer {
    fn fetch(&self, spec: &TensorSpec) -> Result<Cow<'_, [u8]>> {
        let found = &self.place(&spec.name)?.spec;
        if found != spec {
            return Err(Error::input(format!(
                "tensor `{}` is {}, expected {}",
                spec.name,
                found.form(),
                spec.form()
            )));
        }
        self.read_back(&spec.name).map(Cow::Owned)
    }
}
