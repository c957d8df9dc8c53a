/*! Opens files that a text or rows are read from, and reads plain text from them part by part.

The user may name anything: directories, endless devices, pipes that can be read once, a few kilobytes of gzip
that hold gigabytes. Everything is read as a stream, and no further than needed. */

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flate2::read::MultiGzDecoder;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::progress::Progress;
use crate::{Error, Result};

/// The longest line of a file.
pub(super) const LINE_BYTES: usize = 256 << 20;

/// The most bytes of a pipe.
const PIPE_BYTES: u64 = 4 << 30;

/// A file that exists and can be read more than once.
pub(super) struct DataPath {
    path: PathBuf,
    /// The content of a pipe.
    copy: Option<File>,
}

impl DataPath {
    /// Checks a file. The content of a pipe is copied, because it can be read only once.
    ///
    /// # Errors
    /// Bad input if there is no such file, or it is a directory, a device or a pipe without a writer; an
    /// interruption if the user asked the run to stop while a pipe is read.
    pub(super) fn open(path: &Path, progress: &dyn Progress) -> Result<Self> {
        let kind = fs_err::metadata(path)?.file_type();
        let refused = |what: &str, hint: &str| {
            Err(Error::input(format!("{} is {what}", path.display())).hint(hint))
        };
        if kind.is_dir() {
            return refused("a directory, not a file", "give one of the files in it");
        }
        if kind.is_char_device() || kind.is_block_device() || kind.is_socket() {
            return refused("a device, not a file", "give a file, or pipe it in with /dev/stdin");
        }
        let copy = kind.is_fifo().then(|| copy_of_pipe(path, progress)).transpose()?;
        Ok(Self { path: path.to_owned(), copy })
    }

    /// The path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file itself, from its beginning.
    pub(super) fn file(&self) -> Result<File> {
        match &self.copy {
            None => Ok(fs_err::File::open(&self.path)?.into_parts().0),
            Some(copy) => {
                // A duplicated descriptor would share the file offset.
                let name = format!("/proc/self/fd/{}", copy.as_raw_fd());
                Ok(File::open(name).map_err(|error| unreadable(&self.path, &error))?)
            }
        }
    }

    /// The content, decompressed if the name ends in `.gz`.
    pub(super) fn content(&self) -> Result<Box<dyn Read>> {
        let file = self.file()?;
        if self.is_gzip() {
            Ok(Box::new(MultiGzDecoder::new(BufReader::with_capacity(1 << 16, file))))
        } else {
            Ok(Box::new(file))
        }
    }

    /// Whether the name ends in `.gz`.
    pub(super) fn is_gzip(&self) -> bool {
        let extension = self.path.extension();
        extension.is_some_and(|extension| extension.eq_ignore_ascii_case("gz"))
    }

    /// The length of the file on the disk.
    pub(super) fn bytes(&self) -> Result<u64> {
        Ok(self.file()?.metadata()?.len())
    }

    /// Calls `take` with the text of the file, a part at a time, until it breaks. A byte order mark is left out.
    ///
    /// # Errors
    /// If the file cannot be read or is not text in UTF-8.
    pub(super) fn each_part(
        &self,
        take: &mut dyn FnMut(&str) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let mut content = self.content()?;
        let mut bytes = vec![0; 64 << 10];
        // Bytes of the file before `bytes`, and valid bytes in it.
        let (mut before, mut len) = (0_u64, 0);
        loop {
            let count = fill(&mut content, &mut bytes[len..], &self.path)?;
            len += count;
            let start = if before == 0 { self.after_mark(&bytes[..len])? } else { 0 };
            let valid = match str::from_utf8(&bytes[start..len]) {
                Ok(_) => len,
                // A character that continues in the next part.
                Err(error) if error.error_len().is_none() && count > 0 => {
                    start + error.valid_up_to()
                }
                Err(error) => {
                    let at = before + (start + error.valid_up_to()) as u64;
                    return Err(not_utf8(&self.path, at));
                }
            };
            let text = str::from_utf8(&bytes[start..valid]).expect("it was just found valid");
            if take(text)?.is_break() || count == 0 {
                return Ok(());
            }
            bytes.copy_within(valid..len, 0);
            (before, len) = (before + valid as u64, len - valid);
        }
    }

    /// Where the text begins, after a byte order mark.
    pub(super) fn after_mark(&self, bytes: &[u8]) -> Result<usize> {
        if is_utf16(bytes) {
            return Err(Error::input(format!(
                "{} is not UTF-8 text: it looks like UTF-16",
                self.path.display()
            ))
            .hint("convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"));
        }
        Ok(if bytes.starts_with(MARK) { MARK.len() } else { 0 })
    }

    /// The lines of the file.
    pub(super) fn lines(&self) -> Result<Lines<'_>> {
        let content = BufReader::with_capacity(1 << 16, self.content()?);
        Ok(Lines { data: self, content, line: Vec::new(), number: 0 })
    }
}

/// UTF-8's byte order mark, which some editors write.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// Whether text is in UTF-16: its byte order mark, or every other byte zero, as in what is mostly ASCII.
fn is_utf16(bytes: &[u8]) -> bool {
    let bytes = &bytes[..bytes.len().min(4096)];
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return true;
    }
    let zeros = |odd: usize| bytes.iter().skip(odd).step_by(2).filter(|byte| **byte == 0).count();
    let (even, odd, half) = (zeros(0), zeros(1), bytes.len() / 2);
    half >= 8 && even.max(odd) > half * 4 / 5 && even.min(odd) < half / 5
}

/// Reads until the buffer is full or the file ends.
fn fill(content: &mut dyn Read, buffer: &mut [u8], path: &Path) -> Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match content.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(unreadable(path, &error)),
        }
    }
    Ok(len)
}

/// The lines of a file, one at a time.
pub(super) struct Lines<'d> {
    data: &'d DataPath,
    content: BufReader<Box<dyn Read>>,
    line: Vec<u8>,
    number: usize,
}

impl Lines<'_> {
    /// The next line with its end, and its number from 1 on. A byte order mark before the first is left out.
    ///
    /// # Errors
    /// If the file cannot be read, or the line is too long or not text in UTF-8.
    pub(super) fn next(&mut self) -> Result<Option<(usize, &str)>> {
        let path = self.data.path();
        self.line.clear();
        let mut limited = (&mut self.content).take(LINE_BYTES as u64 + 1);
        let count = limited.read_until(b'\n', &mut self.line);
        if count.map_err(|error| unreadable(path, &error))? == 0 {
            return Ok(None);
        }
        self.number += 1;
        let number = self.number;
        if self.line.len() > LINE_BYTES {
            return Err(Error::input(format!(
                "{}, line {number} is longer than {} MB",
                path.display(),
                LINE_BYTES >> 20
            ))
            .hint("give a file whose lines end, one row a line"));
        }
        let start = if number == 1 { self.data.after_mark(&self.line)? } else { 0 };
        let line = str::from_utf8(&self.line[start..]).map_err(|error| {
            let at = error.valid_up_to();
            Error::input(format!(
                "{}, line {number} is not UTF-8 text: the byte at offset {at} is not valid",
                path.display()
            ))
            .hint("convert the file to UTF-8, for example with iconv")
        })?;
        Ok(Some((number, line)))
    }
}

fn not_utf8(path: &Path, at: u64) -> Error {
    let what = format!("is not UTF-8 text: the byte at offset {at} is not valid");
    Error::input(format!("{} {what}", path.display())).hint(super::part::FORMS)
}

/// An error while the content of a file is read.
pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::input(error.to_string())
        .context(format!("{} cannot be read", path.display()))
        .hint("the file may be cut or damaged: fetch it again")
}

/// The content of a pipe, in a temporary file.
fn copy_of_pipe(path: &Path, progress: &dyn Progress) -> Result<File> {
    let fault = |error: std::io::Error| unreadable(path, &error);
    // Without O_NONBLOCK, opening or reading a pipe blocks until it has a writer.
    let pipe = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let mut pipe = pipe.map_err(fault)?;
    let mut copy = tempfile::tempfile().map_err(super::documents::no_room)?;
    let mut bytes = vec![0; 64 << 10];
    let begin = Instant::now();
    let (mut total, mut has_writer) = (0, false);
    loop {
        progress.check_stop()?;
        match pipe.read(&mut bytes) {
            Ok(0) if has_writer => return Ok(copy),
            Ok(0) if begin.elapsed() > Duration::from_secs(5) => {
                return Err(Error::input(format!(
                    "{} is a pipe that nobody writes to",
                    path.display()
                ))
                .hint("start what writes to it first, or give a file"));
            }
            Ok(0) => std::thread::sleep(Duration::from_millis(20)),
            Ok(count) => {
                has_writer = true;
                total += count as u64;
                if total > PIPE_BYTES {
                    return Err(Error::input(format!(
                        "{} holds more than {} GB",
                        path.display(),
                        PIPE_BYTES >> 30
                    ))
                    .hint("give less of it, for example through head -c 1G"));
                }
                copy.write_all(&bytes[..count]).map_err(super::documents::no_room)?;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                has_writer = true;
                wait_for_bytes(&pipe);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(fault(error)),
        }
    }
}

/// Waits until there is something to read, for at most a tenth of a second.
fn wait_for_bytes(pipe: &File) {
    let tenth = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    // The caller reads again for any result.
    let _ = poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&tenth));
}
