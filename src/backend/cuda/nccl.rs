/*! NCCL: bytes from the memory of one GPU to that of another. Its calls are declared here, as its header `nccl.h` does, and
the library is opened at run time. It adds nothing up: sums are made by kernels of our own, in an order of our own. */

use std::ffi::{CStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::CUstream;
use libloading::Library;

use super::gpu::{Buffer, Gpu, Stream};
use super::search::preload;
use crate::ranks::Collectives;
use crate::{Error, Result};

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// `ncclComm_t`.
type Handle = *mut c_void;
/// `ncclResult_t`.
type Status = i32;

const SUCCESS: Status = 0;
/// `ncclUint8`.
const BYTES: i32 = 1;
/// The name that distributions and Python packages give the library.
const FILE: &str = "libnccl.so.2";

/// Declares calls of the library.
macro_rules! calls {
    ($($name:ident = $symbol:literal ($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        /// The calls; arguments are as the library's header requires.
        struct Calls {
            $(
                #[doc = concat!("`", $symbol, "`.")]
                $name: unsafe extern "C" fn($($argument: $kind),*) -> $result,
            )*
        }

        impl Calls {
            /// Those of a library; the name of one that it lacks.
            fn of(library: &'static Library) -> Result<Self, &'static str> {
                // SAFETY: the types are the header's for these symbols, and the library is never closed.
                unsafe { Ok(Self { $($name: *library.get($symbol).map_err(|_| $symbol)?),* }) }
            }
        }
    };
}

calls! {
    version = "ncclGetVersion"(version: *mut i32) -> Status;
    unique_id = "ncclGetUniqueId"(id: *mut UniqueId) -> Status;
    init = "ncclCommInitRank"(handle: *mut Handle, ranks: i32, id: UniqueId, rank: i32) -> Status;
    abort = "ncclCommAbort"(handle: Handle) -> Status;
    send = "ncclSend"(
        from: *const c_void, count: usize, kind: i32, peer: i32, handle: Handle, stream: CUstream
    ) -> Status;
    receive = "ncclRecv"(
        to: *mut c_void, count: usize, kind: i32, peer: i32, handle: Handle, stream: CUstream
    ) -> Status;
    broadcast = "ncclBroadcast"(
        from: *const c_void, to: *mut c_void, count: usize, kind: i32, root: i32, handle: Handle, stream: CUstream
    ) -> Status;
    last_error = "ncclGetLastError"(handle: Handle) -> *const c_char;
}

/// The calls of the library, opened for the rest of the process.
fn calls() -> Result<&'static Calls> {
    static CALLS: OnceLock<Result<Calls, String>> = OnceLock::new();
    let open = || {
        preload(&["nccl"]);
        // SAFETY: opening runs the initializers of NVIDIA's own library.
        let library = unsafe { Library::new(FILE) }.map_err(|_| format!("{FILE} was not found"))?;
        let calls = Calls::of(Box::leak(Box::new(library)));
        calls.map_err(|symbol| format!("{FILE} lacks `{symbol}`"))
    };
    CALLS.get_or_init(open).as_ref().map_err(|why| {
        Error::machine(format!("several GPUs exchange data through NCCL, and {why}")).hint(
            "install NCCL 2.18 or newer (`pip install nvidia-nccl-cu13`, or the distribution's libnccl2), name its \
             directory with ATOM_CUDA_LIB, or exchange through the host's memory with ATOM_NCCL=0",
        )
    })
}

/// The library's version, such as `2.27.7`.
///
/// # Errors
/// A machine error if there is none.
pub(super) fn version() -> Result<String> {
    let calls = calls()?;
    let mut version = 0;
    // SAFETY: the call writes one integer.
    check(calls, "ncclGetVersion", unsafe { (calls.version)(&raw mut version) })?;
    Ok(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

/// This GPU among those of a run.
pub(super) struct Communicator {
    gpu: Arc<Gpu>,
    calls: &'static Calls,
    handle: Handle,
}

// SAFETY: the library's calls on a communicator may come from any thread, one at a time; only the thread that computes
// makes them.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Connects the GPUs of all ranks; called by each of them.
    ///
    /// # Errors
    /// A machine error if the library is not there or cannot connect them.
    pub(super) fn connect(gpu: &Arc<Gpu>, ranks: &dyn Collectives) -> Result<Self> {
        // Whoever lacks the library says so before the others wait for it inside of theirs.
        let calls = calls();
        ranks.barrier()?;
        let calls = calls?;
        gpu.bind()?;
        let mut id = UniqueId([0; 128]);
        if ranks.is_first() {
            // SAFETY: the pointer is that of an id.
            check(calls, "ncclGetUniqueId", unsafe { (calls.unique_id)(&raw mut id) })?;
        }
        let message = ranks.broadcast(0, id.0.to_vec())?;
        id.0.copy_from_slice(&message);
        let (count, rank) = (ranks.ranks() as i32, ranks.rank() as i32);
        let mut handle = MaybeUninit::uninit();
        // SAFETY: the context of the GPU is current, and the handle is written before it is read.
        let status = unsafe { (calls.init)(handle.as_mut_ptr(), count, id, rank) };
        check(calls, "ncclCommInitRank", status)?;
        // SAFETY: the call has succeeded.
        let handle = unsafe { handle.assume_init() };
        Ok(Self { gpu: Arc::clone(gpu), calls, handle })
    }

    /// Sends the first bytes of a buffer, after all work of the main stream so far.
    pub(super) fn send(&self, to: usize, from: &Buffer, bytes: usize) -> Result<()> {
        assert!(bytes <= from.bytes());
        self.gpu.bind()?;
        let pointer = from.pointer() as *const c_void;
        // SAFETY: the buffer holds so many bytes, and is freed in stream order, so after this.
        let status = unsafe {
            (self.calls.send)(pointer, bytes, BYTES, to as i32, self.handle, self.stream())
        };
        check(self.calls, "ncclSend", status)
    }

    /// Overwrites the first bytes of a buffer, in the main stream's order.
    pub(super) fn receive(&self, from: usize, to: &Buffer, bytes: usize) -> Result<()> {
        assert!(bytes <= to.bytes());
        self.gpu.bind()?;
        let pointer = to.pointer() as *mut c_void;
        // SAFETY: as for `send`; no other work on the buffer runs at the same time.
        let status = unsafe {
            (self.calls.receive)(pointer, bytes, BYTES, from as i32, self.handle, self.stream())
        };
        check(self.calls, "ncclRecv", status)
    }

    /// Sends `bytes` from an offset of rank `root`'s buffer to the beginning of the others'.
    pub(super) fn broadcast(
        &self,
        root: usize,
        buffer: &Buffer,
        offset: usize,
        bytes: usize,
    ) -> Result<()> {
        assert!(offset + bytes <= buffer.bytes());
        self.gpu.bind()?;
        let pointer = (buffer.pointer() + offset as u64) as *mut c_void;
        // SAFETY: as for `send` and `receive`; in place on both sides.
        let status = unsafe {
            let stream = self.stream();
            (self.calls.broadcast)(pointer, pointer, bytes, BYTES, root as i32, self.handle, stream)
        };
        check(self.calls, "ncclBroadcast", status)
    }

    fn stream(&self) -> CUstream {
        self.gpu.stream(Stream::Main)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: the handle is this communicator's, and nothing uses it any more. All of its work is done, or its run
            // has failed.
            let _ = unsafe { (self.calls.abort)(self.handle) };
        }
    }
}

/// The error of a call that failed.
fn check(calls: &Calls, what: &str, status: Status) -> Result<()> {
    if status == SUCCESS {
        return Ok(());
    }
    // SAFETY: the library returns a string of its own, for any or no communicator.
    let why = unsafe {
        let text = (calls.last_error)(std::ptr::null_mut());
        if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into() }
    };
    let why = why.trim();
    let error = Error::machine(format!("{what} failed with status {status}: {why}"));
    Err(error.hint("NCCL says more with NCCL_DEBUG=INFO"))
}
