/*! The work directory of an unfinished checkpoint: what a run was asked to do, and how far it got.

`.NAME.atom-work/` beside the output holds

- `lock`, locked by the process that writes;
- `job.json`, everything that decides the output's bytes: a run may go on only where it is equal;
- `done.jsonl`, one line for each finished block, appended after the block's tensors are synced;
- `checkpoint/`, the directory that becomes the output. */

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::output::{failed, sync_directory, write_synced};
use crate::{Error, Result};

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

    /// Locks the work directory, and finds out whether it can go on: with `resume` it returns the
    /// blocks done so far if there is an unfinished run of the same `job`. In every other case
    /// what was there is removed and the list is `None`; the caller fills `checkpoint/` and calls
    /// [`Work::begin`].
    pub(super) fn open(
        out: &Path,
        job: &Value,
        resume: bool,
    ) -> Result<(Self, Option<Vec<DoneBlock>>)> {
        let dir = &Self::path_for(out);
        let lock = lock(dir)?;
        let replaced = dir.join("replaced");
        if replaced.exists() && !out.exists() {
            fs_err::rename(&replaced, out)?;
        }
        let log_path = dir.join("done.jsonl");
        let open_log = || {
            OpenOptions::new()
                .append(true)
                .read(true)
                .create(true)
                .open(&log_path)
                .map_err(|error| failed("open", &log_path, &error))
        };
        let job_path = dir.join("job.json");
        if resume && job_path.exists() && dir.join("checkpoint").is_dir() {
            same_job(&job_path, job)?;
            let done = read_done(&log_path)?;
            return Ok((
                Self { dir: dir.to_path_buf(), done_log: open_log()?, _lock: lock },
                Some(done),
            ));
        }
        // job.json goes first: without it nothing else counts.
        for file in [&job_path, &log_path] {
            if file.exists() {
                fs_err::remove_file(file)?;
            }
        }
        for directory in [&dir.join("checkpoint"), &replaced] {
            if directory.exists() {
                fs_err::remove_dir_all(directory)?;
            }
        }
        fs_err::create_dir(dir.join("checkpoint"))?;
        Ok((Self { dir: dir.to_path_buf(), done_log: open_log()?, _lock: lock }, None))
    }

    /// Records the job; from here on the run can be resumed.
    pub(super) fn begin(&self, job: &Value) -> Result<()> {
        let temporary = self.dir.join("job.json.new");
        write_synced(&temporary, serde_json::to_string_pretty(job).unwrap_or_default().as_bytes())?;
        fs_err::rename(temporary, self.dir.join("job.json"))?;
        sync_directory(&self.dir.join("checkpoint"))?;
        sync_directory(&self.dir)
    }

    /// Records a block whose tensors are on the disk.
    pub(super) fn finished(&mut self, block: &DoneBlock) -> Result<()> {
        let path = self.dir.join("done.jsonl");
        let mut line = serde_json::to_vec(block)
            .map_err(|error| Error::input(format!("cannot note block {}: {error}", block.block)))?;
        line.push(b'\n');
        self.done_log
            .write_all(&line)
            .and_then(|()| self.done_log.sync_data())
            .map_err(|error| failed("write", &path, &error))
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
        let _ = fs_err::remove_dir_all(self.checkpoint());
        self.remove();
    }

    /// Removes the work directory after its checkpoint has moved out; the lock last. What is left
    /// by a failure here is swept by the next run, so that it fails nothing.
    pub(super) fn remove(self) {
        let _ = fs_err::remove_dir_all(self.replaced());
        for file in ["job.json", "done.jsonl", "lock"] {
            let _ = fs_err::remove_file(self.dir.join(file));
        }
        let _ = fs_err::remove_dir(&self.dir);
    }
}

/// Creates the directory if need be and locks it against other processes.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    loop {
        fs_err::create_dir_all(dir).map_err(|error| {
            let error = Error::from(error);
            match error.hint_text() {
                None => error.hint("name a directory that can be written with --out"),
                Some(_) => error,
            }
        })?;
        let opened = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let file = match opened {
            Ok(file) => file,
            // The former holder has just removed the directory.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !dir.exists() => continue,
            Err(error) => return Err(failed("open", &path, &error)),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let message = format!("another atom run is writing {}", dir.display());
                return Err(Error::usage(message)
                    .hint("wait until it has ended, or name another directory with --out"));
            }
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

/// Refuses to go on with another job, and says what differs.
fn same_job(path: &Path, job: &Value) -> Result<()> {
    let begin_anew = "leave out --resume to begin anew";
    let old: Value = serde_json::from_slice(&fs_err::read(path)?).map_err(|error| {
        Error::input(format!("{} is damaged: {error}", path.display())).hint(begin_anew)
    })?;
    // Through text and back, as the old one went, so that equal numbers stay equal.
    let new: Value = serde_json::from_str(&job.to_string())
        .map_err(|error| Error::input(format!("the job is no JSON: {error}")))?;
    let mut differences = Vec::new();
    compare("", &old, &new, &mut differences);
    if differences.is_empty() {
        return Ok(());
    }
    let shown = 6.min(differences.len());
    let more = match differences.len() - shown {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let work = path.parent().unwrap_or(path).display();
    let message =
        format!("the unfinished run in {work} differs: {}{more}", differences[..shown].join("; "));
    Err(Error::input(message).hint(format!("give the settings of that run, or {begin_anew}")))
}

/// Lists the dotted keys whose values differ, with both values.
fn compare(key: &str, old: &Value, new: &Value, differences: &mut Vec<String>) {
    if let (Value::Object(old), Value::Object(new)) = (old, new) {
        let keys = old.keys().chain(new.keys().filter(|key| !old.contains_key(*key)));
        for name in keys {
            let at =
                |map: &serde_json::Map<String, Value>| map.get(name).cloned().unwrap_or_default();
            let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            compare(&key, &at(old), &at(new), differences);
        }
    } else if old != new {
        differences.push(format!("{key} was {}, now {}", short(old), short(new)));
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

/// Reads the finished blocks. The last line may be torn by a crash: then it is cut off, since its
/// block is not known to be on the disk.
fn read_done(path: &Path) -> Result<Vec<DoneBlock>> {
    let text = match fs_err::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut done = Vec::new();
    let mut good = 0;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        match serde_json::from_slice(line) {
            Ok(block) if line.ends_with(b"\n") => done.push(block),
            _ if good + line.len() == text.len() => break,
            _ => {
                let message = format!("{} is damaged at byte {good}", path.display());
                return Err(Error::input(message).hint("leave out --resume to begin anew"));
            }
        }
        good += line.len();
    }
    if good < text.len() {
        let file = fs_err::OpenOptions::new().write(true).open(path)?;
        file.set_len(good as u64)?;
        file.sync_all()?;
    }
    Ok(done)
}
