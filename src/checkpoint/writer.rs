/*! Writes an Atom checkpoint or an export, block by block, so that it can be interrupted at any moment.

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
use serde::Serialize;
use serde_json::Value;

use super::Stored;
use super::card::CARD;
use super::destination::Destination;
use super::dtype::TensorSpec;
use super::envelope::{ATOM, DirectoryKind, EXPORT, Envelope, Hash, record_text};
use super::fingerprint::{sha256_hex, sha256_of, sha256_of_file};
use super::layout::{Layout, Place, TensorFiles};
use super::options::{Options, output_job};
use super::output::{
    check_space, exchange, failed, free_bytes, open_plain, replace, reserve, sync_directory,
    write_synced,
};
use super::shards::INDEX;
use super::side_files::SideFile;
use super::tensor_bytes::TensorBytes;
use super::work::{DoneBlock, Restart, Work, is_locked, locked_by_another, unfinished};
use crate::{Error, Kind, Result};

/// An error once the user asked the run to stop.
type CheckStop<'a> = &'a (dyn Fn() -> Result<()> + Sync);

/// Room reserved for `atom.json`, `config.json` and the index of shards.
const JSON_BYTES: u64 = 8 << 20;

/// What a [`Writer`] would find, asked without writing anything.
pub struct Preview {
    /// The output directory, absolute.
    pub out: PathBuf,
    /// Bytes of disk that are still to be reserved.
    pub needed_bytes: u64,
    /// Bytes that are free where they are needed, if the system says so.
    pub free_bytes: Option<u64>,
    /// Blocks that an unfinished run of the same job has finished.
    pub done: Vec<DoneBlock>,
}

/// A checkpoint being written.
pub struct Writer {
    out: PathBuf,
    destination: Destination,
    options: Options,
    layout: Layout,
    shards: Vec<(PathBuf, File)>,
    work: Work,
    done: Vec<DoneBlock>,
    /// SHA-256 of each tensor written so far.
    hashes: BTreeMap<String, String>,
}

/// Whether a run of another job may be thrown away.
fn restart(destination: &Destination, options: Options) -> Restart {
    if destination.overwrite && !options.resume { Restart::Discard } else { Restart::Refuse }
}

impl Writer {
    /// Everything that [`Writer::create`] would refuse, and what it would find.
    ///
    /// # Errors
    /// Those of [`Writer::create`].
    pub fn preview(
        destination: &Destination,
        tensors: impl Into<TensorFiles>,
        job: &Value,
        options: Options,
    ) -> Result<Preview> {
        let tensors = tensors.into();
        let out = destination.check_for(options.kind)?;
        if is_locked(&out) {
            return Err(locked_by_another(&out));
        }
        let job = output_job(&tensors, job, options);
        let layout = Layout::new(tensors, options.max_shard_bytes)?;
        let found = unfinished(&out, &job, restart(destination, options))?;
        // The unfinished run has reserved its room already.
        let needed_bytes = if found.is_some() { 0 } else { needed_bytes(&layout, options) };
        let free_bytes = out.parent().and_then(free_bytes);
        check_space(&out, needed_bytes, free_bytes)?;
        let done = found.map_or_else(Vec::new, |found| found.done);
        Ok(Preview { out, needed_bytes, free_bytes, done })
    }

    /// Prepares the output of the given tensors. `job` is everything else that decides
    /// their bytes: recipe, fingerprints of source and calibration. An unfinished run of the same job is
    /// continued, after all of its tensors were compared with their hashes; `check_stop` is asked on the way.
    ///
    /// # Errors
    /// Usage: the destination cannot be written, or another process writes it. Machine: not enough disk. Input: an
    /// unfinished run of another job that may not be thrown away, or one that is damaged.
    pub fn create(
        destination: &Destination,
        tensors: impl Into<TensorFiles>,
        job: &Value,
        options: Options,
        check_stop: CheckStop<'_>,
    ) -> Result<Self> {
        let tensors = tensors.into();
        let out = destination.check_for(options.kind)?;
        let job = output_job(&tensors, job, options);
        let layout = Layout::new(tensors, options.max_shard_bytes)?;
        let (work, done) = Work::open(&out, &job, restart(destination, options))?;
        // A run that was killed while it replaced the output may have left it to be put back.
        destination.check_for(options.kind)?;
        let mut writer = Self {
            out,
            destination: destination.clone(),
            options,
            layout,
            shards: Vec::new(),
            work,
            done: Vec::new(),
            hashes: BTreeMap::new(),
        };
        if let Some(done) = done {
            match writer.go_on(done, check_stop) {
                Ok(()) => return Ok(writer),
                Err(error)
                    if error.kind() == Kind::Interrupted
                        || restart(destination, options) == Restart::Refuse =>
                {
                    return Err(error);
                }
                // It is damaged, and may be thrown away.
                Err(_) => writer.work.begin_again()?,
            }
            writer.shards.clear();
            writer.done.clear();
            writer.hashes.clear();
        }
        if let Err(error) = writer.reserve_shards() {
            writer.work.discard();
            return Err(error);
        }
        writer.work.begin(&job)?;
        Ok(writer)
    }

    fn reserve_shards(&mut self) -> Result<()> {
        let directory = self.work.checkpoint();
        check_space(&self.out, needed_bytes(&self.layout, self.options), free_bytes(&directory))?;
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

    fn go_on(&mut self, done: Vec<DoneBlock>, check_stop: CheckStop<'_>) -> Result<()> {
        self.open_shards()?;
        for block in done {
            for (name, hash) in &block.sha256 {
                self.place(name)?;
                self.hashes.insert(name.clone(), hash.clone());
            }
            self.done.push(block);
        }
        let directory = self.work.checkpoint();
        let written = |dir: &Path| DirectoryKind::of(dir).is_some();
        match self.verify_written(check_stop) {
            // The run got as far as the last step, the exchange with the output to be replaced, and was killed
            // before that one was put aside: the two change places again.
            Err(error) if written(&directory) && written(&self.out) => {
                exchange(&directory, &self.out).map_err(|_| error)?;
                self.open_shards()
                    .and_then(|()| self.verify_written(check_stop))
                    .inspect_err(|_| drop(exchange(&directory, &self.out)))
            }
            verified => verified,
        }
    }

    /// Opens the shards that an earlier run has laid out.
    fn open_shards(&mut self) -> Result<()> {
        self.shards.clear();
        for shard in &self.layout.shards {
            let path = self.work.checkpoint().join(&shard.name);
            let file = open_plain(&path, File::options().read(true).write(true))?;
            let mut header = vec![0; shard.header.len()];
            let intact = file.metadata().is_ok_and(|data| data.len() == shard.file_bytes)
                && file.read_exact_at(&mut header, 0).is_ok()
                && header == shard.header;
            if !intact {
                let message = format!("{} is not as the unfinished run left it", path.display());
                return Err(Error::input(message).hint(BEGIN_AGAIN));
            }
            self.shards.push((path, file));
        }
        Ok(())
    }

    /// Compares every tensor that was written with its hash.
    fn verify_written(&self, check_stop: CheckStop<'_>) -> Result<()> {
        self.hashes.par_iter().try_for_each(|(name, hash)| {
            let place = self.place(name)?;
            let (path, file) = &self.shards[place.shard];
            let found = sha256_of(path, file, place.offset, place.spec.bytes(), check_stop)?;
            if found == *hash { Ok(()) } else { Err(not_as_written(name, path)) }
        })
    }

    /// The output directory, absolute.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Whether a writer of another process has begun the output `out`, as its [`out`](Self::out) has it, where this one
    /// sees it too.
    pub fn is_begun(out: &Path) -> bool {
        Work::path_for(out).is_dir()
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
    /// the disk. `extra` is stored next to the block for a run that continues from here.
    pub fn write_block<'t>(
        &mut self,
        block: &str,
        tensors: Vec<(String, impl Into<TensorBytes<'t>>)>,
        extra: Value,
    ) -> Result<()> {
        let tensors = tensors.into_iter().map(|(name, bytes)| (name, bytes.into()));
        let tensors: Vec<(String, TensorBytes<'_>)> = tensors.collect();
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
        let write = |(name, bytes): &(String, TensorBytes<'_>)| {
            let place = self.place(name)?;
            let (path, file) = &self.shards[place.shard];
            Ok((name.clone(), bytes.write(path, file, place.offset)?))
        };
        let sha256 = tensors.par_iter().map(write).collect::<Result<BTreeMap<_, _>>>()?;
        let mut touched = vec![false; self.shards.len()];
        for name in sha256.keys() {
            touched[self.place(name)?.shard] = true;
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

    /// Keeps a state of the run for one that continues it, in the place of the state before.
    pub fn save_state(&self, state: &[u8]) -> Result<()> {
        self.work.save_state(state)
    }

    /// The state that a run of the same job has kept last, if it kept one.
    pub fn state(&self) -> Result<Option<Vec<u8>>> {
        self.work.state()
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
            return Err(not_as_written(name, path));
        }
        Ok(bytes)
    }

    /// Gives up, and leaves nothing: for a run that failed before a block was finished, or whose source changed.
    pub fn discard(self) {
        self.work.discard();
    }

    /// Completes the directory and gives it its name; returns its size in bytes. `config`, if there is one, becomes
    /// `config.json`; `manifest` becomes `atom.json` or `atom-export.json`, with hashes of all tensors, of every other
    /// file and of itself added; the side files are copied as they are. The model card has no hash.
    pub fn finish<'c>(
        self,
        config: impl Into<Option<&'c Value>>,
        manifest: &impl Serialize,
        side_files: &[SideFile],
    ) -> Result<u64> {
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
        let directory = self.work.checkpoint();
        let mut files = BTreeMap::new();
        for side_file in side_files {
            let name = &side_file.name;
            if ["config.json", ATOM, EXPORT, INDEX].contains(&name.as_str())
                || name.contains('/')
                || self.layout.shards.iter().any(|shard| shard.name == *name)
            {
                return Err(Error::input(format!("`{name}` cannot be a side file's name")));
            }
            let path = directory.join(name);
            side_file.copy_to(&path)?;
            // The card's owner may edit it.
            if name != CARD {
                files.insert(name.clone(), Hash { sha256: sha256_of_file(&path)? });
            }
        }
        let mut write = |name: &str, bytes: &[u8]| {
            files.insert(name.to_owned(), Hash { sha256: sha256_hex(bytes) });
            write_synced(&directory.join(name), bytes)
        };
        if let Some(index) = self.layout.index() {
            write(INDEX, format!("{index:#}\n").as_bytes())?;
        }
        if let Some(config) = config.into() {
            write("config.json", format!("{config:#}\n").as_bytes())?;
        }
        let hashes = self.hashes.iter();
        let tensors = hashes.map(|(name, hash)| (name.clone(), Hash { sha256: hash.clone() }));
        let envelope = Envelope { tensors: tensors.collect(), files, sha256: None };
        let record = directory.join(self.options.kind.record());
        write_synced(&record, record_text(manifest, &envelope).as_bytes())?;
        for (path, file) in &self.shards {
            file.sync_all().map_err(|error| failed("write", path, &error))?;
        }
        sync_directory(&directory)?;
        let mut bytes = 0;
        for entry in fs_err::read_dir(&directory)? {
            bytes += entry?.metadata()?.len();
        }

        // The output may have appeared, or changed, while this run worked.
        self.destination.check_for(self.options.kind)?;
        replace(&directory, &self.out, &self.work.replaced())?;
        sync_directory(self.out.parent().unwrap_or(Path::new("/")))?;
        self.work.remove();
        Ok(bytes)
    }
}

const BEGIN_AGAIN: &str =
    "--overwrite throws the unfinished run away and begins at the first block";

fn not_as_written(name: &str, path: &Path) -> Error {
    let message = format!("tensor `{name}` in {} is not what was written", path.display());
    Error::input(message).hint(BEGIN_AGAIN)
}

/// Bytes of disk that a whole checkpoint takes.
fn needed_bytes(layout: &Layout, options: Options) -> u64 {
    layout.file_bytes().saturating_add(options.side_bytes).saturating_add(JSON_BYTES)
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
