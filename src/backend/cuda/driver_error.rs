/*! Errors of a device that worked before. */

use cudarc::driver::DriverError;

use crate::Error;

/// A call of the driver that failed on a device that worked before.
pub(super) fn failed(what: &str, DriverError(code): DriverError) -> Error {
    Error::machine(format!("the GPU failed: {what}: {code:?}")).hint(
        "finished blocks are kept and --resume goes on after them, on this device or with \
         --device cpu; `nvidia-smi` and the system's log say what became of the GPU",
    )
}
