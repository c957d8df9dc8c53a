/*! What the machine has, and what is said when it fails: memory that this process may still take, an
allocation that is refused, a mapped file that becomes shorter, signals that were ignored at the start. */

mod allocator;
mod cgroup;
mod mapped;
mod memory;
mod signals;
mod stdout;
mod usage;

pub use allocator::{Allocator, hand_back, keep_freed_memory};
pub use mapped::{Watched, watch};
pub use memory::{Bound, Memory, address_space_left, available, hands_out_huge_pages};
pub use signals::{guard, keep_ignored};
pub use stdout::{note_closed_stdout, stdout_was_closed};
pub use usage::{cpu_seconds, peak_rss_bytes};

use std::io::IsTerminal;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::stdio::{stderr, stdout};

/// Whether a reader of JSON still waits for its object on stdout.
static OWES_JSON: AtomicBool = AtomicBool::new(false);

/// Records whether an error that ends the process at once must be written to stdout as JSON too.
pub fn owe_json(owed: bool) {
    OWES_JSON.store(owed, Ordering::Relaxed);
}

/// Ends the process with an error whose text exists already: `text` on stderr, `json` on stdout if it is
/// owed. It allocates nothing, takes no lock and unwinds nothing: it is called where memory has run out
/// and from a signal handler. Of several threads that come here, the first one speaks.
fn die(text: &[&[u8]], json: &[&[u8]], code: i32) -> ! {
    static DYING: AtomicBool = AtomicBool::new(false);
    if DYING.swap(true, Ordering::SeqCst) {
        loop {
            // For a signal; the other thread ends the process.
            rustix::event::pause();
        }
    }
    if stderr().is_terminal() {
        // A progress bar may stand in this line.
        write_raw(stderr(), b"\r\x1b[2K");
    }
    text.iter().for_each(|part| write_raw(stderr(), part));
    if OWES_JSON.load(Ordering::Relaxed) {
        json.iter().for_each(|part| write_raw(stdout(), part));
    }
    // SAFETY: it ends the process without running anything else of it.
    unsafe { libc::_exit(code) }
}

/// Writes to a descriptor as much as it takes.
fn write_raw(descriptor: BorrowedFd<'_>, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match rustix::io::write(descriptor, bytes) {
            Ok(written) if written > 0 => bytes = &bytes[written..],
            _ => return,
        }
    }
}
