/*! Deferred error flags: what kernels find wrong with activations is written to the host's memory, which the host reads when it
waits anyway.

To synchronize after each kernel would leave the device idle until the host issues work again. */

use std::sync::{Mutex, PoisonError};

use cudarc::driver::result;

use super::driver_error::failed;
use super::slice::Out;
use crate::{Error, Result};

/// Kernels that may be in flight.
const FLAGS: usize = 1024;
/// What a flag holds of a kernel that has found nothing.
const NOTHING: u32 = u32::MAX;

/// A flag for each kernel that checks rows of activations: the least row with a value or a scale beyond f16, or no number.
pub(super) struct DeferredErrors {
    /// Pinned memory, which kernels lower with `atomicMin`.
    flags: Flags,
    state: Mutex<State>,
}

struct State {
    free: Vec<usize>,
    pending: Vec<Pending>,
}

/// A kernel's flag and the site whose activations it quantizes.
pub(super) struct Pending {
    flag: usize,
    site: String,
}

/// Pinned memory of the flags.
struct Flags(*mut u32);

// SAFETY: flags are read and reset by who has taken them out of `state`, when their kernels are done.
unsafe impl Send for Flags {}
// SAFETY: one flag is touched by one thread alone, which has taken it out of `state`.
unsafe impl Sync for Flags {}

impl DeferredErrors {
    /// Nothing found. The context is current.
    pub(super) fn new() -> Result<Self> {
        // SAFETY: the context is current.
        let flags = unsafe { result::malloc_host(4 * FLAGS, 0) }
            .map_err(|error| failed("allocating pinned host memory", error))?
            .cast::<u32>();
        for flag in 0..FLAGS {
            // SAFETY: the memory is ours and holds so many.
            unsafe { flags.add(flag).write(NOTHING) };
        }
        let state = State { free: (0..FLAGS).rev().collect(), pending: Vec::new() };
        Ok(Self { flags: Flags(flags), state: Mutex::new(state) })
    }

    /// Where a kernel that quantizes a site's activations writes, by its address on the device, which is the host's; none if
    /// too many are in flight.
    pub(super) fn flag(&self, site: &str) -> Option<Out<'_, u32>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let flag = state.free.pop()?;
        state.pending.push(Pending { flag, site: site.to_owned() });
        // SAFETY: the flag holds one number as long as this lives.
        Some(unsafe { Out::one(self.flags.0.wrapping_add(flag) as u64) })
    }

    /// The kernels in flight.
    pub(super) fn take(&self) -> Vec<Pending> {
        std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).pending)
    }

    /// Resets the flags of kernels that are done, for reuse.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub(super) fn settle(&self, done: Vec<Pending>) -> Result<()> {
        let first = self.check(&done);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.free.extend(done.into_iter().map(|pending| pending.flag));
        first
    }

    /// Resets the flags of kernels that are done, and that will run again.
    ///
    /// # Errors
    /// An input error that names the first site and row with an error, if there is one.
    pub(super) fn check(&self, done: &[Pending]) -> Result<()> {
        let mut first = Ok(());
        for Pending { flag, site } in done {
            let at = self.flags.0.wrapping_add(*flag);
            // SAFETY: the kernel that writes it is done; the compiler does not see the device's writes.
            let row = unsafe { at.read_volatile() };
            if row != NOTHING && first.is_ok() {
                first = Err(Error::input(format!(
                    "activations of {site}: the activation of token {row} is not finite or beyond the range of f16"
                ))
                .hint("the model overflows f16 on this text: try --device cpu"));
            }
            // SAFETY: the kernel that writes it is done, and `at` is a flag of ours.
            unsafe { at.write_volatile(NOTHING) };
        }
        first
    }
}

impl Drop for DeferredErrors {
    fn drop(&mut self) {
        // SAFETY: the memory is ours. Without a context there is nothing left to free.
        let _ = unsafe { result::free_host(self.flags.0.cast()) };
    }
}
