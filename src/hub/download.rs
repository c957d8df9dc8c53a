/*! Files in flight from the Hub into its cache: room for them, resumed where they were cut, checked.

What came is written as it comes, so a run that is cut loses at most one MiB; the next goes on from
there, whoever began. A file gets its name when its content has the hash that the Hub named. */

use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fs_err::File;

use super::Hub;
use super::attempts::Attempts;
use super::cache::{Repository, is_weights, open_lock, open_own, unwritable};
use super::client::{At, Metadata, Opened};
use super::content::{self, Condition, Expected, Hash};
use super::failure::Failure;
use crate::checkpoint::free_bytes;
use crate::units;
use crate::{Error, Result};

/// Bytes by which four requests in a row must bring a file further: a 256th of it, within these bounds.
const LITTLE: u64 = 4 << 10;
const MUCH: u64 = 1 << 20;
/// Bytes of one step of progress at least, and steps at most.
const STEP: u64 = 16 << 20;
const STEPS: u64 = 100;

/// A file that is to be in the cache.
pub(super) struct Wanted {
    pub(super) file: String,
    pub(super) metadata: Metadata,
    /// Whether its content is hashed however large it is, if it is in the cache.
    pub(super) thorough: bool,
}

/// Brings files into the cache that are not there, or damaged.
pub(super) fn fetch(
    hub: &Hub<'_>,
    at: At<'_>,
    cache: &Repository,
    wanted: &[Wanted],
) -> Result<()> {
    let mut missing = Vec::new();
    for wanted in wanted {
        match wanted.condition(hub, cache)? {
            Condition::Sound => continue,
            Condition::Damaged(why) => {
                let blob = cache.blob(&wanted.metadata.etag);
                let blob = blob.display();
                hub.progress.warn(&format!("{blob} is damaged: {why}; fetching it again"));
            }
            Condition::Absent => {}
        }
        missing.push(wanted);
    }
    if !missing.is_empty() {
        let partial =
            |blob: &Path| fs_err::symlink_metadata(incomplete(blob)).map_or(0, |m| m.len());
        let needed: u64 = missing
            .iter()
            .map(|wanted| {
                wanted.metadata.bytes.saturating_sub(partial(&cache.blob(&wanted.metadata.etag)))
            })
            .fold(0, u64::saturating_add);
        check_room(cache, at.repo, needed)?;
        let mut meter = Meter::begin(hub, at, needed);
        for wanted in missing {
            let Wanted { file, metadata, .. } = wanted;
            meter.file.clone_from(file);
            let _lock = locked(hub, &cache.lock(&metadata.etag), file)?;
            // Whoever held the lock may have fetched it.
            if wanted.condition(hub, cache)? != Condition::Sound {
                fetch_blob(hub, at, file, metadata, &cache.blob(&metadata.etag), &mut meter)?;
            }
        }
        drop(meter);
        hub.progress.end();
    }
    for Wanted { file, metadata, .. } in wanted {
        cache.link(&metadata.commit, file, &metadata.etag)?;
    }
    Ok(())
}

impl Wanted {
    /// What the cache has of its content.
    fn condition(&self, hub: &Hub<'_>, cache: &Repository) -> Result<Condition> {
        let Self { file, metadata, thorough } = self;
        let expected = Expected {
            etag: &metadata.etag,
            bytes: Some(metadata.bytes),
            weights: is_weights(file),
            thorough: *thorough,
        };
        content::condition(&cache.blob(&metadata.etag), expected, hub.progress)
    }
}

/// Refuses a download that the disk has no room for.
fn check_room(cache: &Repository, repo: &str, needed: u64) -> Result<()> {
    let blobs = cache.blob("");
    fs_err::create_dir_all(&blobs).map_err(unwritable)?;
    match free_bytes(&blobs) {
        Some(free) if free < needed => Err(Error::machine(format!(
            "{repo} needs {needed} bytes in the Hub's cache and the disk has {free} bytes free"
        ))
        .hint(format!(
            "free some disk space, or set HF_HUB_CACHE to a place with room ({} is full)",
            blobs.display()
        ))),
        _ => Ok(()),
    }
}

/// The lock that `hf` takes as well while it fetches this content.
fn locked(hub: &Hub<'_>, path: &Path, file: &str) -> Result<std::fs::File> {
    let parent = path.parent().expect("a lock lies in a directory");
    fs_err::create_dir_all(parent).map_err(unwritable)?;
    let lock = open_lock(path)?.into_parts().0;
    if let Err(std::fs::TryLockError::WouldBlock) = lock.try_lock() {
        hub.progress.info(&format!("waiting for another program that fetches {file}"));
        while let Err(std::fs::TryLockError::WouldBlock) = lock.try_lock() {
            hub.progress.check_stop()?;
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    // Where the file system has no locks, two programs would at worst write the same bytes twice.
    Ok(lock)
}

/// Fetches one content under its final name. Content with another hash is thrown away and fetched once
/// more: what lay there may not have been the beginning of this file.
fn fetch_blob(
    hub: &Hub<'_>,
    at: At<'_>,
    file: &str,
    metadata: &Metadata,
    blob: &Path,
    meter: &mut Meter<'_>,
) -> Result<()> {
    let path = incomplete(blob);
    let resumed = fs_err::metadata(&path).is_ok_and(|metadata| metadata.len() > 0);
    let mut found = fetch_bytes(hub, at, file, metadata, &path, meter)?;
    if found != metadata.etag {
        let what =
            if resumed { format!("what was left of {file} is") } else { format!("{file} arrived") };
        hub.progress.warn(&format!("{what} damaged: fetching it again"));
        fs_err::remove_file(&path).map_err(unwritable)?;
        found = fetch_bytes(hub, at, file, metadata, &path, meter)?;
    }
    if found != metadata.etag {
        fs_err::remove_file(&path).map_err(unwritable)?;
        return Err(Error::machine(format!(
            "{file} of {} arrived damaged: its hash is {found}, the Hub says {}",
            at.repo, metadata.etag
        ))
        .hint("run it again; if it stays so, look at the proxy and at HF_ENDPOINT"));
    }
    fs_err::rename(&path, blob).map_err(unwritable)
}

/// What of a file is here.
struct Part {
    out: File,
    hash: Hash,
    length: u64,
}

impl Part {
    /// Opens what is there, or begins with nothing.
    fn open(hub: &Hub<'_>, metadata: &Metadata, path: &Path) -> Result<Self> {
        let out = open_own(path)?;
        let length = out.metadata().map_err(unwritable)?.len();
        let mut part = Self { hash: Hash::new(&metadata.etag, metadata.bytes), length, out };
        if length > metadata.bytes {
            part.restart(metadata)?;
        } else {
            part.hash.add_file(&mut part.out, hub.progress)?;
        }
        Ok(part)
    }

    /// Forgets what is here.
    fn restart(&mut self, metadata: &Metadata) -> Result<()> {
        self.out.set_len(0).map_err(unwritable)?;
        self.out.rewind().map_err(unwritable)?;
        self.hash = Hash::new(&metadata.etag, metadata.bytes);
        self.length = 0;
        Ok(())
    }

    fn add(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(unwritable)?;
        self.hash.add(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }
}

/// Fills the file up to its length, in as many requests as it takes, and returns its hash.
fn fetch_bytes(
    hub: &Hub<'_>,
    at: At<'_>,
    file: &str,
    metadata: &Metadata,
    path: &Path,
    meter: &mut Meter<'_>,
) -> Result<String> {
    let commit = At { revision: &metadata.commit, ..at };
    let mut part = Part::open(hub, metadata, path)?;
    let mut attempts = Attempts::at_file();
    // The farthest that the file had come when an attempt last counted as a success.
    let mut farthest = part.length;
    let enough = (metadata.bytes / 256).clamp(LITTLE, MUCH);
    while part.length < metadata.bytes {
        let cut = match request(hub, commit, file, metadata, &mut part, meter) {
            Ok(()) if part.length == metadata.bytes => break,
            Ok(()) => Failure::passing(
                Error::machine("the connection was closed")
                    .hint("look at the network and the proxy"),
            ),
            Err(failure) => failure,
        };
        if !cut.is_the_networks() {
            return Err(cut.error);
        }
        if part.length >= farthest.saturating_add(enough) {
            farthest = part.length;
            attempts = Attempts::at_file();
            continue;
        }
        let length = part.length;
        attempts.pause(cut, &hub.client.waits, hub.progress).map_err(|failure| {
            if failure.error.kind() == crate::Kind::Interrupted {
                return failure.error;
            }
            let bytes = metadata.bytes;
            let mut hint = "run it again: it goes on from there".to_owned();
            if let Some(more) = failure.error.hint_text() {
                hint.push_str(&format!("; {more}"));
            }
            failure
                .error
                .context(format!("the download of {file} was cut at {length} of {bytes} bytes"))
                .hint(hint)
        })?;
    }
    part.out.sync_all().map_err(unwritable)?;
    Ok(part.hash.finish(&metadata.etag))
}

/// Makes one request and writes what comes, which may be less than what is missing.
fn request(
    hub: &Hub<'_>,
    at: At<'_>,
    file: &str,
    metadata: &Metadata,
    part: &mut Part,
    meter: &mut Meter<'_>,
) -> Result<(), Failure> {
    let Some(Opened { from, mut body }) = hub.client.open(at, file, part.length, hub.progress)?
    else {
        // The server knows the file to be shorter: the next request is for all of it.
        part.restart(metadata)?;
        return Err(Failure::passing(Error::machine("the Hub has nothing from there on")));
    };
    if from != part.length {
        // The server does not know ranges and begins at the beginning.
        part.restart(metadata)?;
    }
    while part.length < metadata.bytes {
        let Some(mut bytes) = body.next()? else { break };
        let missing = metadata.bytes - part.length;
        bytes.truncate(usize::try_from(missing).unwrap_or(usize::MAX));
        part.add(&bytes)?;
        meter.add(bytes.len() as u64);
    }
    Ok(())
}

fn incomplete(blob: &Path) -> PathBuf {
    let mut name = blob.as_os_str().to_owned();
    name.push(".incomplete");
    name.into()
}

/// Turns bytes into steps of progress.
struct Meter<'a> {
    hub: &'a Hub<'a>,
    file: String,
    step: u64,
    steps_left: u64,
    since_step: u64,
}

impl<'a> Meter<'a> {
    fn begin(hub: &'a Hub<'_>, at: At<'_>, bytes: u64) -> Self {
        let step = STEP.max(bytes.div_ceil(STEPS));
        let steps = bytes.div_ceil(step).max(1);
        hub.progress.info(&format!("fetching {} of {}", units::bytes(bytes), at.repo));
        hub.progress.begin("download", usize::try_from(steps).unwrap_or(usize::MAX));
        Self { hub, file: String::new(), step, steps_left: steps, since_step: 0 }
    }

    fn add(&mut self, bytes: u64) {
        self.since_step += bytes;
        // The last step is what is left of the others, and never more steps than were announced.
        while self.since_step >= self.step && self.steps_left > 0 {
            self.since_step -= self.step;
            self.steps_left -= 1;
            self.hub.progress.advance(&self.file);
        }
    }
}

impl Drop for Meter<'_> {
    fn drop(&mut self) {
        if self.steps_left > 0 && self.since_step > 0 {
            self.hub.progress.advance(&self.file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_file_lies_next_to_its_blob() {
        let path = incomplete(Path::new("/c/blobs/abc"));
        assert_eq!(path, Path::new("/c/blobs/abc.incomplete"));
    }
}
