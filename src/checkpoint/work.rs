/*! The work directory of an unfinished checkpoint: what a run was asked to do, and how far it got.

`.NAME.atom-work/` next to the output holds plain files and no links:

- `lock`, locked by the process that writes;
- `job.json`, everything that decides the output's bytes: the run is continued only where it is equal;
- `done.jsonl`, one line for each finished block, appended after the block's tensors are synced;
- `state.bin`, where a run has a state of its own between blocks, such as a training's;
- `checkpoint/`, the directory that becomes the output. */

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::destination::foreign_files;
use super::differences::{Difference, differences};
use super::envelope::{ATOM, DirectoryKind, EXPORT, is_checkpoint_file, own_files};
use super::output::{failed, open_plain, planted, sync_directory, write_synced};
use super::provenance::NOT_YET_KNOWN;
use super::shards::INDEX;
use crate::{Error, Result};

const LOCK: &str = "lock";
const JOB: &str = "job.json";
const NEW_JOB: &str = "job.json.new";
const DONE: &str = "done.jsonl";
const STATE: &str = "state.bin";
const NEW_STATE: &str = "state.bin.new";

/// A finished block: its name, what the caller noted about it, and what was written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DoneBlock {
    /// The block's name.
    pub block: String,
    /// SHA-256 of each of its tensors, by name.
    pub sha256: BTreeMap<String, String>,
    /// What the caller noted: errors, damping, times.
    pub extra: Value,
}

/// A locked work directory.
pub(super) struct Work {
    dir: PathBuf,
    done_log: File,
    /// Held open: closing it lets go of the lock.
    _lock: File,
}

impl Work {
    /// The work directory that belongs to the output directory `out`.
    pub(super) fn path_for(out: &Path) -> PathBuf {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        out.with_file_name(format!(".{name}.atom-work"))
    }

    /// Locks the work directory and opens the unfinished run in it, if it is one of the same `job`: its finished blocks
    /// are returned. Without a run to continue the list is `None`, and the caller fills `checkpoint/` and calls
    /// [`Work::begin`].
    ///
    /// # Errors
    /// Those of [`unfinished`]. Usage: another process holds the lock.
    pub(super) fn open(
        out: &Path,
        job: &Value,
        restart: Restart,
    ) -> Result<(Self, Option<Vec<DoneBlock>>)> {
        let dir = &Self::path_for(out);
        let lock = lock(out)?;
        let replaced = dir.join("replaced");
        if is_directory(&replaced)? && !out.exists() {
            fs_err::rename(&replaced, out)?;
        }
        let found = unfinished(out, job, restart)?;
        if found.is_none() {
            clear(dir)?;
            fs_err::create_dir(dir.join("checkpoint"))?;
        }
        let done_log = open_log(dir)?;
        if let Some(Unfinished { torn: Some(good), .. }) = found {
            let cut = done_log.set_len(good).and_then(|()| done_log.sync_all());
            cut.map_err(|error| failed("write", &dir.join(DONE), &error))?;
        }
        let work = Self { dir: dir.to_path_buf(), done_log, _lock: lock };
        Ok((work, found.map(|found| found.done)))
    }

    /// Throws away what an unfinished run has left; the lock is kept.
    pub(super) fn begin_again(&mut self) -> Result<()> {
        clear(&self.dir)?;
        fs_err::create_dir(self.checkpoint())?;
        self.done_log = open_log(&self.dir)?;
        Ok(())
    }

    /// Records the job; from here on the run can be resumed.
    pub(super) fn begin(&self, job: &Value) -> Result<()> {
        let temporary = self.dir.join(NEW_JOB);
        write_synced(&temporary, serde_json::to_string_pretty(job).unwrap_or_default().as_bytes())?;
        fs_err::rename(temporary, self.dir.join(JOB))?;
        sync_directory(&self.dir.join("checkpoint"))?;
        sync_directory(&self.dir)
    }

    /// Records a block whose tensors are on the disk.
    pub(super) fn finished(&mut self, block: &DoneBlock) -> Result<()> {
        let path = self.dir.join(DONE);
        let mut line = serde_json::to_vec(block)
            .map_err(|error| Error::input(format!("cannot note block {}: {error}", block.block)))?;
        line.push(b'\n');
        self.done_log
            .write_all(&line)
            .and_then(|()| self.done_log.sync_data())
            .map_err(|error| failed("write", &path, &error))
    }

    /// Keeps a state of the run in the place of the one before; it is on the disk when this returns.
    pub(super) fn save_state(&self, state: &[u8]) -> Result<()> {
        let temporary = self.dir.join(NEW_STATE);
        write_synced(&temporary, state)?;
        fs_err::rename(temporary, self.dir.join(STATE))?;
        sync_directory(&self.dir)
    }

    /// The state that was kept last, if one was.
    pub(super) fn state(&self) -> Result<Option<Vec<u8>>> {
        let path = self.dir.join(STATE);
        if path.symlink_metadata().is_err() {
            return Ok(None);
        }
        let mut state = Vec::new();
        let mut file = open_plain(&path, File::options().read(true))?;
        file.read_to_end(&mut state).map_err(|error| failed("read", &path, &error))?;
        Ok(Some(state))
    }

    /// The directory that becomes the output.
    pub(super) fn checkpoint(&self) -> PathBuf {
        self.dir.join("checkpoint")
    }

    /// Where a replaced output goes until it is deleted.
    pub(super) fn replaced(&self) -> PathBuf {
        self.dir.join("replaced")
    }

    /// Gives up a run that has not begun, and the room it reserved.
    pub(super) fn discard(self) {
        let _ = remove_files(&self.checkpoint(), is_checkpoint_file);
        self.remove();
    }

    /// Removes the work directory after its checkpoint has moved out; the lock last. What a failure leaves here is
    /// swept by the next run, so that it fails nothing; what the replaced output did not list stays.
    pub(super) fn remove(self) {
        let _ = remove_replaced(&self.replaced());
        for file in [JOB, NEW_JOB, DONE, STATE, NEW_STATE, LOCK] {
            let _ = fs_err::remove_file(self.dir.join(file));
        }
        let _ = fs_err::remove_dir(&self.dir);
    }
}

/// The log of finished blocks, which is made if need be.
fn open_log(dir: &Path) -> Result<File> {
    open_plain(&dir.join(DONE), File::options().append(true).read(true).create(true))
}

/// What a work directory holds of an unfinished run.
pub(super) struct Unfinished {
    /// Its finished blocks.
    pub(super) done: Vec<DoneBlock>,
    /// Bytes of the log that are whole, where a crash has torn its last line.
    torn: Option<u64>,
}

/// What becomes of an unfinished run of another job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Restart {
    /// It is kept, and the new run refused.
    Refuse,
    /// It is thrown away.
    Discard,
}

/// The unfinished run of the same `job` for the output `out`, if there is one. Changes nothing.
///
/// # Errors
/// Input: the work directory holds another job's run and `restart` does not discard it, or is damaged. Usage: another
/// process is writing there.
pub(super) fn unfinished(out: &Path, job: &Value, restart: Restart) -> Result<Option<Unfinished>> {
    let dir = &Work::path_for(out);
    if !is_directory(dir)? {
        return Ok(None);
    }
    let job_path = dir.join(JOB);
    if job_path.symlink_metadata().is_err() || !is_directory(&dir.join("checkpoint"))? {
        return Ok(None);
    }
    let found = same_job(dir, &job_path, job).and_then(|()| read_done(&dir.join(DONE)));
    match found {
        Err(_) if restart == Restart::Discard => Ok(None),
        found => found.map(Some),
    }
}

/// Whether another process writes the output `out` now; asked without making anything.
pub(super) fn is_locked(out: &Path) -> bool {
    let lock = Work::path_for(out).join(LOCK);
    let lock = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(lock);
    lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)))
}

/// The error of two runs with one output.
pub(super) fn locked_by_another(out: &Path) -> Error {
    let message = format!("another atom run is writing {}", Work::path_for(out).display());
    Error::usage(message).hint("wait until it has ended, or name another directory with --out")
}

/// Removes what an earlier run left in the work directory.
fn clear(dir: &Path) -> Result<()> {
    // job.json goes first: without it nothing else counts.
    for file in [JOB, NEW_JOB, DONE, STATE, NEW_STATE] {
        match fs_err::remove_file(dir.join(file)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    let replaced = dir.join("replaced");
    if is_directory(&replaced)? {
        remove_replaced(&replaced)?;
    }
    let checkpoint = dir.join("checkpoint");
    if is_directory(&checkpoint)? {
        remove_files(&checkpoint, is_checkpoint_file)?;
    }
    Ok(())
}

/// Removes a replaced output: an empty directory, a checkpoint or an export.
fn remove_replaced(dir: &Path) -> Result<()> {
    if fs_err::read_dir(dir)?.next().is_none() {
        return Ok(fs_err::remove_dir(dir)?);
    }
    remove_files(dir, own_files(dir, DirectoryKind::of(dir).unwrap_or_default())?)
}

/// Removes a directory's own files and the directory; where it holds anything else, nothing.
fn remove_files(dir: &Path, is_own: impl Fn(&str) -> bool) -> Result<()> {
    if let Some(first) = foreign_files(dir, is_own)?.first() {
        let message = format!("{} holds {first}, which no run of atom has made", dir.display());
        return Err(Error::input(message).hint("move it elsewhere, then run again"));
    }
    let names = fs_err::read_dir(dir)?.map(|entry| Ok(entry?.file_name()));
    let mut names = names.collect::<Result<Vec<_>>>()?;
    // Those that say what is the checkpoint's own go last: a removal that is cut short can be completed.
    names.sort_by_key(|name| (name == ATOM || name == EXPORT, name == INDEX));
    for name in names {
        fs_err::remove_file(dir.join(name))?;
    }
    Ok(fs_err::remove_dir(dir)?)
}

/// Whether a directory of ours is there; a link in its place is an error.
fn is_directory(path: &Path) -> Result<bool> {
    match fs_err::symlink_metadata(path) {
        Ok(found) if found.is_dir() => Ok(true),
        Ok(_) => Err(planted(path)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Creates the directory if need be and locks it against other processes.
fn lock(out: &Path) -> Result<File> {
    let dir = &Work::path_for(out);
    let path = dir.join(LOCK);
    loop {
        is_directory(dir)?;
        fs_err::create_dir_all(dir).map_err(|error| {
            let error = Error::from(error);
            match error.hint_text() {
                None => error.hint("name a directory that can be written with --out"),
                Some(_) => error,
            }
        })?;
        let opened = open_plain(&path, File::options().write(true).create(true));
        let file = match opened {
            Ok(file) => file,
            // The former holder has just removed the directory, or the file.
            Err(_) if !dir.exists() => continue,
            Err(_) if path.symlink_metadata().is_err() && is_directory(dir)? => continue,
            Err(error) => return Err(error),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(locked_by_another(out)),
            Err(TryLockError::Error(error)) => return Err(failed("lock", &path, &error)),
        }
        // The former holder may have removed the file between our open and our lock; then we hold
        // the lock of nothing, and try again.
        let ours = file.metadata().map_err(|error| failed("read", &path, &error))?.ino();
        if std::fs::metadata(&path).is_ok_and(|on_disk| on_disk.ino() == ours) {
            return Ok(file);
        }
    }
}

const BEGIN_AGAIN: &str = "--overwrite throws it away and begins at the first block";

/// Refuses to continue another job, and says what differs and how far that job is.
fn same_job(dir: &Path, path: &Path, job: &Value) -> Result<()> {
    let old: Value = serde_json::from_slice(&fs_err::read(path)?).map_err(|error| {
        Error::input(format!("{} is damaged: {error}", path.display())).hint(BEGIN_AGAIN)
    })?;
    // Through text and back, as the old one went, so that equal numbers stay equal.
    let new: Value = serde_json::from_str(&job.to_string())
        .map_err(|error| Error::input(format!("the job is no JSON: {error}")))?;
    let differences: Vec<String> = differences(&old, &new)
        .into_iter()
        .filter(|difference| difference.values[1] != format!("\"{NOT_YET_KNOWN}\""))
        .map(|Difference { key, values: [old, new] }| format!("{key} was {old}, now {new}"))
        .collect();
    if differences.is_empty() {
        return Ok(());
    }
    let shown = 6.min(differences.len());
    let more = match differences.len() - shown {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let done = read_done(&dir.join(DONE))
        .map_or(0, |found| found.done.iter().map(|block| block.sha256.len()).sum());
    let all = old["tensors"].as_object().map_or(0, serde_json::Map::len);
    let message = format!(
        "the unfinished run in {} differs: {}{more}; it has finished {done} of {all} tensors",
        dir.display(),
        differences[..shown].join("; ")
    );
    Err(Error::input(message).hint(format!(
        "give the settings of that run to continue it, or another --out; {BEGIN_AGAIN}"
    )))
}

/// Reads the finished blocks. The last line may be torn by a crash: then it does not count, since its block is not
/// known to be on the disk.
fn read_done(path: &Path) -> Result<Unfinished> {
    let mut text = Vec::new();
    match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        _ => {
            let mut file = open_plain(path, File::options().read(true))?;
            file.read_to_end(&mut text).map_err(|error| failed("read", path, &error))?;
        }
    }
    let mut done = Vec::new();
    let mut good = 0;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        match serde_json::from_slice(line) {
            Ok(block) if line.ends_with(b"\n") => done.push(block),
            _ if good + line.len() == text.len() => break,
            _ => {
                let message = format!("{} is damaged at byte {good}", path.display());
                return Err(Error::input(message).hint(BEGIN_AGAIN));
            }
        }
        good += line.len();
    }
    let torn = (good < text.len()).then_some(good as u64);
    Ok(Unfinished { done, torn })
}
