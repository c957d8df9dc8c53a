/*! The allocator of the program: the system's, with a sentence where memory runs out. */

use std::alloc::{GlobalAlloc, Layout, System};

use super::die;
use crate::Kind;

/// The system's allocator. A refused allocation ends the process with a sentence and the exit code of
/// the machine's faults instead of an abort. A finished block of an unfinished run is kept as after a
/// kill.
pub struct Allocator;

// SAFETY: every call goes to the system's allocator unchanged; a null pointer is not returned.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the layout is not of zero bytes, as this function's contract has it too.
        given(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the layout is not of zero bytes, as this function's contract has it too.
        given(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the pointer came from `System` with this layout, since all of ours do; `size` is not 0.
        given(unsafe { System.realloc(pointer, layout, size) }, size)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `System` with this layout, since all of ours do.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Returns freed memory to the system.
pub fn hand_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: it returns free pages and changes nothing else.
        unsafe {
            libc::malloc_trim(0);
        }
        // It leaves the free ends of all heaps but the first, and that of a thread which has tokenized a text is all of
        // it, tens of megabytes. A new thread takes over the heap of the one that ended last.
        let thread = std::thread::Builder::new().stack_size(64 << 10).spawn(release_end_of_heap);
        // Where no thread can be started, the memory stays.
        let _ = thread.map(std::thread::JoinHandle::join);
    }
}

/// Returns the free end of this thread's heap to the system.
#[cfg(target_env = "gnu")]
fn release_end_of_heap() {
    /// The end of a heap is looked at when so much is freed (glibc's `FASTBIN_CONSOLIDATION_THRESHOLD`).
    const LOOKED_AT: usize = 64 << 10;
    // SAFETY: mallopt sets a parameter of the allocator, under its lock; the memory is freed unused.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 20);
        libc::free(std::hint::black_box(libc::malloc(2 * LOOKED_AT)));
        libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_BYTES);
    }
}

/// Free bytes at the end of a heap that are kept for what comes next.
#[cfg(target_env = "gnu")]
const TRIM_BYTES: i32 = 256 << 20;

/// Lets the allocator keep what is freed up to 32 MB a piece (its largest setting), instead of handing
/// pages back and clearing new ones for every activation: 0.25 ms a megabyte.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets parameters of the allocator, before any thread is started.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_BYTES);
    }
}

#[inline]
fn given(pointer: *mut u8, bytes: usize) -> *mut u8 {
    if pointer.is_null() {
        refused(bytes);
    }
    pointer
}

#[cold]
fn refused(bytes: usize) -> ! {
    let mut digits = [0; 20];
    let number = decimal(bytes, &mut digits);
    const WHAT: &[u8] = b"memory ran out: ";
    const MORE: &[u8] = b" more bytes could not be allocated";
    const HINT: &[u8] = b"give fewer --samples, a shorter --seq-len or fewer --threads, raise the \
limit on memory (`ulimit -v`, the container's), or run it on a machine with more";
    let text = [b"error: ", WHAT, number, MORE, b"\n\nhint: ", HINT, b"\n"];
    let json = [
        b"{\n  \"error\": {\n    \"kind\": \"machine\",\n    \"message\": \"" as &[u8],
        WHAT,
        number,
        MORE,
        b"\",\n    \"causes\": [],\n    \"hint\": \"",
        HINT,
        b"\",\n    \"exit_code\": 4\n  }\n}\n",
    ];
    die(&text, &json, Kind::Machine as i32)
}

/// A number in decimal digits.
fn decimal(mut number: usize, digits: &mut [u8; 20]) -> &[u8] {
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[first..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_without_allocating() {
        for number in [0, 7, 10, 4096, usize::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string().as_bytes());
        }
    }
}
