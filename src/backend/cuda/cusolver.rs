/*! cuSOLVER's calls, as its header `cusolverDn.h` declares them. cudarc has them too, but compiles all of cuSOLVER, cuSPARSE
and cuBLAS for them: 20 s of a processor for six functions. */

use std::ffi::c_void;
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
use libloading::Library;

/// `cusolverDnHandle_t`.
pub(super) type Handle = *mut c_void;
/// `cusolverStatus_t`.
pub(super) type Status = i32;
/// `CUSOLVER_STATUS_SUCCESS`.
pub(super) const SUCCESS: Status = 0;
/// `CUBLAS_FILL_MODE_UPPER`.
pub(super) const UPPER: i32 = 1;

/// The library of CUDA 13 and that of CUDA 12.
const FILES: [&str; 3] = ["libcusolver.so", "libcusolver.so.12", "libcusolver.so.11"];
/// The statuses from 0 on that these calls return.
const STATUSES: [&str; 10] = [
    "SUCCESS",
    "NOT_INITIALIZED",
    "ALLOC_FAILED",
    "INVALID_VALUE",
    "ARCH_MISMATCH",
    "MAPPING_ERROR",
    "EXECUTION_FAILED",
    "INTERNAL_ERROR",
    "MATRIX_TYPE_NOT_SUPPORTED",
    "NOT_SUPPORTED",
];

/// Declares calls of the library, and `SYMBOLS`, the names of all of them.
macro_rules! calls {
    ($($name:ident = $symbol:literal ($($argument:ident: $kind:ty),*);)*) => {
        /// What must be in the library before anything of it is called.
        pub(super) const SYMBOLS: &[&str] = &[$($symbol),*];

        /// The calls; arguments are as the library's manual requires.
        pub(super) struct Calls {
            $(
                #[doc = concat!("`", $symbol, "`.")]
                pub(super) $name: unsafe extern "C" fn($($argument: $kind),*) -> Status,
            )*
        }

        impl Calls {
            fn of(library: &'static Library) -> Self {
                let message = "the library's symbols were looked for first";
                // SAFETY: the types are the header's for these symbols, and the library is never closed.
                unsafe { Self { $($name: *library.get($symbol).expect(message)),* } }
            }
        }
    };
}

calls! {
    create = "cusolverDnCreate"(handle: *mut Handle);
    destroy = "cusolverDnDestroy"(handle: Handle);
    set_stream = "cusolverDnSetStream"(handle: Handle, stream: CUstream);
    spotrf_buffer_size = "cusolverDnSpotrf_bufferSize"(
        handle: Handle, uplo: i32, n: i32, a: *mut f32, lda: i32, work: *mut i32
    );
    spotrf = "cusolverDnSpotrf"(
        handle: Handle, uplo: i32, n: i32, a: *mut f32, lda: i32, workspace: *mut f32, work: i32, info: *mut i32
    );
    spotrs = "cusolverDnSpotrs"(
        handle: Handle, uplo: i32, n: i32, right_sides: i32, a: *const f32, lda: i32, b: *mut f32, ldb: i32,
        info: *mut i32
    );
}

/// The calls of the library, which must have been looked for.
pub(super) fn calls() -> &'static Calls {
    static CALLS: OnceLock<Calls> = OnceLock::new();
    CALLS.get_or_init(|| Calls::of(library().expect("cuSOLVER was looked for first")))
}

/// The library, opened for the rest of the process; none where the loader does not find it.
pub(super) fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    // SAFETY: opening runs the initializers of NVIDIA's own library.
    let open = || FILES.iter().find_map(|file| unsafe { Library::new(*file) }.ok());
    LIBRARY.get_or_init(open).as_ref()
}

/// A status as the header names it.
pub(super) fn status_name(status: Status) -> String {
    let known = usize::try_from(status).ok().and_then(|status| STATUSES.get(status));
    known.map_or_else(|| status.to_string(), |name| format!("CUSOLVER_STATUS_{name}"))
}
