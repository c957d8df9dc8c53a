/*! Files on their way from the Hub into its cache: room for them, resumed where they were cut, checked.

What came is written as it comes, so a run that is cut loses at most one [`CHUNK`]; the next goes on
from there, whoever began. A file gets its name when its content has the hash that the Hub named. */

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fs_err::{File, OpenOptions};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::Hub;
use super::cache::Repository;
use super::client::{At, Metadata, may_pass};
use crate::checkpoint::free_bytes;
use crate::report::units;
use crate::{Error, Kind, Result};

/// Bytes that are written at once, and at most fetched again after a cut.
const CHUNK: usize = 1 << 20;
/// How often a file is asked for again without a byte having come.
const ATTEMPTS: u32 = 4;
/// Bytes of one step of progress at least, and steps at most.
const STEP: u64 = 16 << 20;
const STEPS: u64 = 100;

/// A file that is to be in the cache.
pub(super) struct Wanted {
    pub(super) file: String,
    pub(super) metadata: Metadata,
}

/// Brings files into the cache that are not there.
pub(super) fn fetch(
    hub: &Hub<'_>,
    at: At<'_>,
    cache: &Repository,
    wanted: &[Wanted],
) -> Result<()> {
    let missing = |wanted: &&Wanted| !cache.blob(&wanted.metadata.etag).is_file();
    let partial = |blob: &Path| fs_err::metadata(incomplete(blob)).map_or(0, |m| m.len());
    let needed: u64 = wanted
        .iter()
        .filter(missing)
        .map(|wanted| {
            wanted.metadata.bytes.saturating_sub(partial(&cache.blob(&wanted.metadata.etag)))
        })
        .fold(0, u64::saturating_add);
    if wanted.iter().any(|wanted| missing(&wanted)) {
        check_room(cache, at.repo, needed)?;
        let mut meter = Meter::begin(hub, at, needed);
        for Wanted { file, metadata } in wanted.iter().filter(missing) {
            meter.file.clone_from(file);
            let blob = cache.blob(&metadata.etag);
            let _lock = locked(hub, &cache.lock(&metadata.etag), file)?;
            // Whoever held the lock may have fetched it.
            if !blob.is_file() {
                fetch_blob(hub, at, file, metadata, &blob, &mut meter)?;
            }
        }
        drop(meter);
        hub.progress.end();
    }
    for Wanted { file, metadata } in wanted {
        cache.link(&metadata.commit, file, &metadata.etag)?;
    }
    Ok(())
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
    let lock = OpenOptions::new().create(true).append(true).open(path).map_err(unwritable)?;
    let lock = lock.into_parts().0;
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

/// Fetches one content under its final name.
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
    if found != metadata.etag && resumed {
        // What lay there was not the beginning of this file: the whole of it, once.
        hub.progress.warn(&format!("what was left of {file} is damaged: fetching it again"));
        fs_err::remove_file(&path)?;
        found = fetch_bytes(hub, at, file, metadata, &path, meter)?;
    }
    if found != metadata.etag {
        fs_err::remove_file(&path)?;
        return Err(Error::machine(format!(
            "{file} of {} arrived damaged: its hash is {found}, the Hub says {}",
            at.repo, metadata.etag
        ))
        .hint("run it again; if it stays so, look at the proxy and at HF_ENDPOINT"));
    }
    fs_err::rename(&path, blob).map_err(unwritable)
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
    let mut out = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(unwritable)?;
    let mut length = out.metadata()?.len();
    if length > metadata.bytes {
        out.set_len(0)?;
        length = 0;
    }
    let mut hash = Hash::new(metadata);
    hash.add_file(&mut out)?;
    let commit = At { revision: &metadata.commit, ..at };
    let mut fruitless = 0;
    while length < metadata.bytes {
        hub.progress.check_stop()?;
        let before = length;
        let cut = match hub.client.open(commit, file, length) {
            Err(error) if may_pass(&error) => Some(error),
            Err(error) => return Err(error),
            Ok(None) => Some(Error::machine("the Hub has nothing from there on")),
            Ok(Some(opened)) => {
                if opened.from != length {
                    // The server does not know ranges and begins at the beginning.
                    out.set_len(0)?;
                    out.rewind()?;
                    hash = Hash::new(metadata);
                    length = 0;
                }
                let body = opened.body.into_reader();
                take(hub, body, &mut out, &mut hash, &mut length, metadata.bytes, meter)?
            }
        };
        fruitless = if length > before { 0 } else { fruitless + 1 };
        if length < metadata.bytes && fruitless == ATTEMPTS {
            let error = cut.unwrap_or_else(|| Error::machine("the connection was closed"));
            return Err(error
                .context(format!(
                    "the download of {file} was cut at {length} of {} bytes",
                    metadata.bytes
                ))
                .hint("run it again: it goes on from there"));
        }
        if fruitless > 0 {
            std::thread::sleep(Duration::from_millis(250 << fruitless));
        }
    }
    out.sync_all().map_err(unwritable)?;
    Ok(hash.finish())
}

/// Writes what comes. A body that ends early or fails is no error of ours: it is returned.
fn take(
    hub: &Hub<'_>,
    mut body: impl Read,
    out: &mut File,
    hash: &mut Hash,
    length: &mut u64,
    bytes: u64,
    meter: &mut Meter<'_>,
) -> Result<Option<Error>> {
    let mut chunk = vec![0; CHUNK];
    while *length < bytes {
        hub.progress.check_stop()?;
        let room = usize::try_from(bytes - *length).unwrap_or(CHUNK).min(CHUNK);
        let count = match body.read(&mut chunk[..room]) {
            Ok(0) => return Ok(None),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Ok(Some(Error::machine(error.to_string()))),
        };
        out.write_all(&chunk[..count]).map_err(unwritable)?;
        hash.add(&chunk[..count]);
        *length += count as u64;
        meter.add(count as u64);
    }
    Ok(None)
}

fn incomplete(blob: &Path) -> PathBuf {
    let mut name = blob.as_os_str().to_owned();
    name.push(".incomplete");
    name.into()
}

/// Whatever keeps the cache from being written is the machine's.
fn unwritable(error: std::io::Error) -> Error {
    Error::new(Kind::Machine, error.to_string())
        .context("the Hub's cache cannot be written")
        .hint("free some disk space, or set HF_HUB_CACHE to a place with room that you may write")
}

/// The hash by which the Hub names a content.
enum Hash {
    Sha256(Sha256),
    /// Git's: of a header and the content.
    Git(Sha1),
}

impl Hash {
    fn new(metadata: &Metadata) -> Self {
        if metadata.etag.len() == 64 {
            return Self::Sha256(Sha256::new());
        }
        let mut hash = Sha1::new();
        hash.update(format!("blob {}\0", metadata.bytes));
        Self::Git(hash)
    }

    fn add(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
        }
    }

    /// Adds a file from its beginning and leaves it at its end.
    fn add_file(&mut self, file: &mut File) -> Result<()> {
        file.seek(SeekFrom::Start(0))?;
        let mut chunk = vec![0; CHUNK];
        loop {
            match file.read(&mut chunk)? {
                0 => return Ok(()),
                count => self.add(&chunk[..count]),
            }
        }
    }

    fn finish(self) -> String {
        match self {
            Self::Sha256(hash) => hexadecimal(&hash.finalize()),
            Self::Git(hash) => hexadecimal(&hash.finalize()),
        }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of a file.
pub(super) fn hash_of(path: &Path) -> Result<String> {
    let mut hash = Hash::Sha256(Sha256::new());
    hash.add_file(&mut File::open(path)?)?;
    Ok(hash.finish())
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

    fn hash(etag_length: usize, content: &[u8]) -> String {
        let etag = "0".repeat(etag_length);
        let commit = String::new();
        let mut hash = Hash::new(&Metadata { commit, etag, bytes: content.len() as u64 });
        hash.add(content);
        hash.finish()
    }

    #[test]
    fn hashes_are_those_of_the_hub() {
        // `git hash-object` and `sha256sum` of the same bytes.
        assert_eq!(hash(40, b"abc\n"), "8baef1b4abc478178b004d62031cf7fe6db6f903");
        assert_eq!(
            hash(64, b"abc\n"),
            "edeaaff3f1774ad2888673770c6d64097e391bc362d7d6fb34982ddf0efd18cb"
        );
    }

    #[test]
    fn a_partial_file_lies_beside_its_blob() {
        let path = incomplete(Path::new("/c/blobs/abc"));
        assert_eq!(path, Path::new("/c/blobs/abc.incomplete"));
    }
}
