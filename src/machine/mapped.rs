/*! Files that are mapped into memory. Where one becomes shorter, or its disk fails, a touched page raises
SIGBUS: the handler looks for the file that the page belongs to, says so and ends the process. */

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use serde_json::json;

use super::die;
use crate::Kind;
use crate::printable::printable;

/// A map of a file. Nodes are never freed, so that a signal handler may walk them at any time; one whose
/// map is gone is used again.
struct Node {
    /// Address of the first byte; 0 while the node is free.
    start: AtomicUsize,
    /// Bytes of the map.
    length: AtomicUsize,
    /// What is said, made in advance.
    words: AtomicPtr<Words>,
    next: *const Node,
}

/// What is said of a file, on stderr and as JSON.
struct Words {
    text: Vec<u8>,
    json: Vec<u8>,
}

static FIRST: AtomicPtr<Node> = AtomicPtr::new(ptr::null_mut());

/// A file's map is known to the handler until this is dropped, which must be before the map is.
pub struct Watched(&'static Node);

// SAFETY: a node's fields are atomic, and `next` is never changed after the node is published.
unsafe impl Send for Watched {}
// SAFETY: shared use is by those atomics alone.
unsafe impl Sync for Watched {}

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.start.store(0, Ordering::SeqCst);
    }
}

/// Makes the file at `path`, mapped at `bytes`, known to the handler, which the first call installs.
pub fn watch(path: &Path, bytes: &[u8]) -> Watched {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(install);
    let node = free_node().unwrap_or_else(new_node);
    // Words of an earlier file are not freed either: a handler may be reading them.
    node.words.store(Box::into_raw(Box::new(words(path))), Ordering::SeqCst);
    node.length.store(bytes.len(), Ordering::SeqCst);
    node.start.store(bytes.as_ptr() as usize, Ordering::SeqCst);
    Watched(node)
}

/// Stands in `start` of a node that is taken and not filled yet. No map begins there.
const TAKEN: usize = 1;

fn free_node() -> Option<&'static Node> {
    let take = |node: &&Node| {
        node.start.compare_exchange(0, TAKEN, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    };
    nodes().find(take)
}

fn new_node() -> &'static Node {
    let node = Box::leak(Box::new(Node {
        start: AtomicUsize::new(TAKEN),
        length: AtomicUsize::new(0),
        words: AtomicPtr::new(ptr::null_mut()),
        next: ptr::null(),
    }));
    let mut first = FIRST.load(Ordering::SeqCst);
    loop {
        node.next = first;
        match FIRST.compare_exchange(first, node, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => return node,
            Err(other) => first = other,
        }
    }
}

fn nodes() -> impl Iterator<Item = &'static Node> {
    let mut next: *const Node = FIRST.load(Ordering::SeqCst);
    std::iter::from_fn(move || {
        // SAFETY: nodes are leaked, and `next` is null or one of them.
        let node = unsafe { next.as_ref() }?;
        next = node.next;
        Some(node)
    })
}

fn words(path: &Path) -> Words {
    let path = String::from_utf8_lossy(path.as_os_str().as_bytes());
    let path = printable(&path);
    let message = format!("{path} became shorter while it was read, or its disk failed");
    let hint = "let nothing write to the model while it is read; if nothing did, look at the disk, or \
                download the file again";
    let error = json!({ "error": {
        "kind": "input",
        "message": message,
        "causes": [],
        "hint": hint,
        "exit_code": Kind::Input as u8,
    } });
    Words {
        text: format!("error: {message}\n\nhint: {hint}\n").into_bytes(),
        json: format!("{error:#}\n").into_bytes(),
    }
}

fn install() {
    // SAFETY: zeros are a value of `sigaction`. The handler has the signature that SA_SIGINFO asks for, and uses
    // only what is safe in a handler: atomics, write, isatty, _exit. Threads of the standard library have a
    // stack for handlers; on others it runs on their own.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, ptr::null_mut());
    }
}

extern "C" fn on_bus_error(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the system passes a valid siginfo, which holds the address for this signal.
    let address = unsafe { (*info).si_addr() } as usize;
    for node in nodes() {
        let (start, length) =
            (node.start.load(Ordering::SeqCst), node.length.load(Ordering::SeqCst));
        // A map's last page is touched as one, whatever its length.
        if start > TAKEN && (start..start + length.next_multiple_of(4096)).contains(&address) {
            // SAFETY: words are set before `start` and never freed.
            if let Some(words) = unsafe { node.words.load(Ordering::SeqCst).as_ref() } {
                die(&[&words.text], &[&words.json], Kind::Input as i32);
            }
        }
    }
    // It is not ours: what the system does by default happens when the instruction is tried again.
    // SAFETY: signal is on POSIX's list of functions that a handler may call, and SIG_DFL is no pointer to code.
    unsafe {
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_used_again_and_never_by_two() {
        let bytes = [0u8; 10];
        let first = watch(Path::new("/a\u{1b}[2J"), &bytes);
        let second = watch(Path::new("/b"), &bytes);
        assert!(!ptr::eq(first.0, second.0));
        // SAFETY: words are never freed.
        let said = unsafe { &*first.0.words.load(Ordering::SeqCst) };
        assert!(said.text.starts_with(b"error: /a\\u{1b}[2J became shorter"));
        let error: serde_json::Value = serde_json::from_slice(&said.json).unwrap();
        assert_eq!(error["error"]["exit_code"], 3);
        let many: Vec<Watched> = (0..20).map(|_| watch(Path::new("/c"), &bytes)).collect();
        let nodes_before = nodes().count();
        drop(many);
        let _again: Vec<Watched> = (0..20).map(|_| watch(Path::new("/d"), &bytes)).collect();
        assert!(nodes().count() <= nodes_before + 2, "other tests map files meanwhile");
    }
}
