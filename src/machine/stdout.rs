/*! Whether the program was started without a stdout (`>&-`). The standard library opens `/dev/null` in its
place before `main`, so that the question must be asked before that. */

use std::sync::atomic::{AtomicBool, Ordering};

static CLOSED: AtomicBool = AtomicBool::new(false);

/// Looks whether stdout is open. The program calls it before the standard library starts.
pub extern "C" fn note_closed_stdout() {
    let closed = rustix::io::fcntl_getfd(rustix::stdio::stdout()).is_err();
    CLOSED.store(closed, Ordering::Relaxed);
}

/// Whether stdout was closed at the start.
pub fn stdout_was_closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}
