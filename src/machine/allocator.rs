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
