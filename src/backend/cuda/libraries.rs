/*! What of CUDA this machine has: the driver and a device for every run, NVRTC for the kernels,
cuBLASLt for products, cuSOLVER for factorizations.

cudarc panics on the first call into a library or a symbol that is not there, so nothing of it may
be called before the check here has passed. */

use std::fmt;

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{DriverError, result};
use cudarc::{cublaslt, driver, nvrtc};
use libloading::Library;

pub use super::search::{VARIABLE, opened};
use super::{cusolver, nccl, search};
use crate::{Error, Result};

/// The oldest driver that has every call we make: `cuEventElapsedTime_v2` is the youngest.
const OLDEST_DRIVER: Version = Version { major: 12, minor: 8 };
/// The name of that driver for users.
const OLDEST_DRIVER_RELEASE: &str = "570";
/// The oldest NVRTC that supports compute capability 9.0.
const OLDEST_NVRTC: Version = Version { major: 12, minor: 0 };
/// The oldest devices that have the instructions of the kernels: `cp.async` and integer
/// tensor-core products 32 deep.
const OLDEST_DEVICE: Version = Version { major: 8, minor: 0 };

/// What every message ends with.
const OR_CPU: &str = "or run with --device cpu";

/// Symbols of the driver that the program calls, by itself or through cudarc: the linker keeps no others of cudarc, and a test compares
/// these lists with what it kept.
const DRIVER_SYMBOLS: &[&str] = &[
    "cuCtxDestroy_v2",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetDefaultMemPool",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernelEx",
    "cuMemAllocAsync",
    "cuMemFreeAsync",
    "cuMemFreeHost",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemPoolSetAttribute",
    "cuMemPoolTrimTo",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuOccupancyMaxActiveClusters",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

const NVRTC_SYMBOLS: &[&str] = &[
    "nvrtcCompileProgram",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetCUBIN",
    "nvrtcGetCUBINSize",
    "nvrtcGetNumSupportedArchs",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
    "nvrtcGetSupportedArchs",
    "nvrtcVersion",
];

const CUBLASLT_SYMBOLS: &[&str] = &[
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
];

/// All symbols of cudarc's libraries that are looked up before the first call.
pub fn required_symbols() -> Vec<&'static str> {
    [DRIVER_SYMBOLS, NVRTC_SYMBOLS, CUBLASLT_SYMBOLS].concat()
}

/// A version of the driver or of NVRTC, or a device's compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// What changes when old programs stop working.
    pub major: i32,
    /// What changes when something is added.
    pub minor: i32,
}

impl Version {
    /// The driver's way of writing 12.8 as 12080.
    fn from_thousands(number: i32) -> Self {
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A driver that works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA it supports.
    pub version: Version,
    /// How many devices it shows; at least one.
    pub devices: usize,
}

/// A device that the kernels run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number, as in `cuda:0`.
    pub ordinal: usize,
    /// Its product name.
    pub name: String,
    /// Its compute capability.
    pub capability: Version,
    /// All of its memory, used or not.
    pub memory_bytes: usize,
    /// The newest CUDA that its driver supports.
    pub driver: Version,
}

impl Device {
    /// Shared memory that a thread block may take.
    pub fn block_shared_bytes(&self) -> usize {
        let Version { major, minor } = self.capability;
        match (major, minor) {
            (8, 0 | 7) => 163 << 10,
            (9..12, _) => 227 << 10,
            _ => 99 << 10,
        }
    }
}

/// Checks that there is a driver that we can use and that it shows a device.
///
/// # Errors
/// A machine error that says what is missing.
pub fn driver() -> Result<Driver> {
    let update = || format!("install NVIDIA's driver {OLDEST_DRIVER_RELEASE} or newer, {OR_CPU}");
    search::preload_driver();
    // SAFETY: the check opens the library, whose initializers are the driver's own.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(
            Error::machine("the CUDA driver's library libcuda.so.1 was not found").hint(update())
        );
    }
    // SAFETY: it panics where there is no library, and `is_culib_present` has just opened it.
    let library = unsafe { driver::sys::culib() };
    // The version first: an old driver is better named by its age than by a symbol it lacks.
    let lacking =
        |symbol| Error::machine(format!("the CUDA driver lacks `{symbol}`")).hint(update());
    if let Some(symbol) = missing(library, &["cuDriverGetVersion"]) {
        return Err(lacking(symbol));
    }
    let mut number = 0;
    // SAFETY: the symbol is there; the call needs no initialization and writes one integer.
    let asked = unsafe { driver::sys::cuDriverGetVersion(&mut number) }.result();
    asked.map_err(|error| failed("cuDriverGetVersion", error))?;
    let version = Version::from_thousands(number);
    if version < OLDEST_DRIVER {
        return Err(Error::machine(format!(
            "the CUDA driver supports CUDA {version}, {OLDEST_DRIVER} is needed"
        ))
        .hint(update()));
    }
    if let Some(symbol) = missing(library, DRIVER_SYMBOLS) {
        return Err(lacking(symbol));
    }
    result::init().map_err(|error| failed("cuInit", error))?;
    let devices = result::device::get_count().map_err(|error| failed("cuDeviceGetCount", error))?;
    match usize::try_from(devices) {
        Ok(devices) if devices > 0 => Ok(Driver { version, devices }),
        _ => Err(Error::machine("the CUDA driver shows no device").hint(see_devices())),
    }
}

/// Checks that there is a device of this number and that the kernels can run on it.
///
/// # Errors
/// A machine error that says what is missing, of the driver or of the device.
pub fn device(ordinal: usize) -> Result<Device> {
    let Driver { version, devices } = driver()?;
    let number = match i32::try_from(ordinal) {
        Ok(number) if ordinal < devices => number,
        _ => {
            let (there, choice) = match devices {
                1 => ("is 1 device".to_owned(), "run with --device cuda:0".to_owned()),
                _ => (
                    format!("are {devices} devices"),
                    format!("choose from cuda:0 to cuda:{}", devices - 1),
                ),
            };
            return Err(Error::machine(format!("cuda:{ordinal} was asked for, but there {there}"))
                .hint(format!("{choice}; see `nvidia-smi -L` and CUDA_VISIBLE_DEVICES")));
        }
    };
    let handle = result::device::get(number).map_err(|error| failed("cuDeviceGet", error))?;
    let name =
        result::device::get_name(handle).map_err(|error| failed("cuDeviceGetName", error))?;
    let attribute = |attribute| {
        // SAFETY: the handle is the driver's own.
        unsafe { result::device::get_attribute(handle, attribute) }
            .map_err(|error| failed("cuDeviceGetAttribute", error))
    };
    let capability = Version {
        major: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        minor: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    };
    if capability < OLDEST_DEVICE {
        return Err(Error::machine(format!(
            "{name} has compute capability {capability}, {OLDEST_DEVICE} is needed"
        ))
        .hint(if devices > 1 {
            format!("choose another device with --device cuda:N, {OR_CPU}")
        } else {
            "run with --device cpu".to_owned()
        }));
    }
    // SAFETY: the handle is the driver's own.
    let memory_bytes = unsafe { result::device::total_mem(handle) }
        .map_err(|error| failed("cuDeviceTotalMem", error))?;
    Ok(Device { ordinal, name, capability, memory_bytes, driver: version })
}

/// Checks that the compiler of kernels is there; its version.
///
/// # Errors
/// A machine error that says what is missing.
pub fn nvrtc() -> Result<Version> {
    let hint = || toolkit_hint("nvidia-cuda-nvrtc");
    // NVRTC opens its builtins by name and fails to compile where it does not find them.
    search::preload(&["nvrtc-builtins", "nvrtc"]);
    // SAFETY: the checks open NVIDIA's own library.
    unsafe {
        check("NVRTC", "libnvrtc", "nvidia-cuda-nvrtc", NVRTC_SYMBOLS, || {
            nvrtc::sys::is_culib_present().then(|| nvrtc::sys::culib())
        })?;
    }
    let mut version = Version { major: 0, minor: 0 };
    // SAFETY: the symbol is there; the call writes two integers.
    let asked = unsafe { nvrtc::sys::nvrtcVersion(&mut version.major, &mut version.minor) };
    asked
        .result()
        .map_err(|error| Error::machine(format!("nvrtcVersion failed: {error}")).hint(hint()))?;
    if version < OLDEST_NVRTC {
        return Err(
            Error::machine(format!("NVRTC is {version}, {OLDEST_NVRTC} is needed")).hint(hint())
        );
    }
    Ok(version)
}

/// Checks that a driver can load what an NVRTC makes.
///
/// # Errors
/// A machine error if NVRTC is of a newer CUDA than the driver; within one major version each
/// driver loads machine code of any.
pub fn loads(driver: Version, nvrtc: Version) -> Result<()> {
    if nvrtc.major <= driver.major {
        return Ok(());
    }
    Err(Error::machine(format!(
        "NVRTC is of CUDA {nvrtc}, but the CUDA driver supports CUDA {driver} only"
    ))
    .hint(format!(
        "update NVIDIA's driver, or install NVRTC {}.{} and name its directory in {VARIABLE}",
        driver.major, driver.minor
    )))
}

/// Checks that cuBLASLt is there.
///
/// # Errors
/// A machine error that says what is missing.
pub fn cublaslt() -> Result<()> {
    search::preload(&["cublasLt"]);
    // SAFETY: the checks open NVIDIA's own library.
    unsafe {
        check("cuBLASLt", "libcublasLt", "nvidia-cublas", CUBLASLT_SYMBOLS, || {
            cublaslt::sys::is_culib_present().then(|| cublaslt::sys::culib())
        })
    }
}

/// Checks that cuSOLVER is there, with the libraries it needs.
///
/// # Errors
/// A machine error that says what is missing.
pub fn cusolver() -> Result<()> {
    search::preload(&["nvJitLink", "cublasLt", "cublas", "cusparse", "cusolver"]);
    check("cuSOLVER", "libcusolver", "nvidia-cusolver", cusolver::SYMBOLS, cusolver::library)
}

/// Checks that NCCL is there, which several GPUs need; its version.
///
/// # Errors
/// A machine error that says what is missing.
pub fn nccl() -> Result<String> {
    nccl::version()
}

/// Checks a library of the toolkit, of which `open` returns a handle.
fn check(
    name: &str,
    file: &str,
    package: &str,
    symbols: &[&'static str],
    open: impl FnOnce() -> Option<&'static Library>,
) -> Result<()> {
    let Some(library) = open() else {
        return Err(Error::machine(format!("{name} was not found: no {file}.so can be opened"))
            .hint(toolkit_hint(package)));
    };
    match missing(library, symbols) {
        None => Ok(()),
        Some(symbol) => {
            Err(Error::machine(format!("{name} lacks `{symbol}`")).hint(toolkit_hint(package)))
        }
    }
}

/// The first symbol that a library does not have.
fn missing(library: &Library, symbols: &[&'static str]) -> Option<&'static str> {
    symbols.iter().copied().find(|symbol| {
        // SAFETY: the symbol is looked up, and neither called nor kept.
        unsafe { library.get::<unsafe extern "C" fn()>(*symbol) }.is_err()
    })
}

/// How to get a library of the toolkit.
fn toolkit_hint(package: &str) -> String {
    format!(
        "install the CUDA toolkit or run `pip install {package}`, name the directory of the \
         libraries in {VARIABLE} if they are installed elsewhere, {OR_CPU}"
    )
}

/// How to see what the driver sees.
fn see_devices() -> String {
    format!("see what `nvidia-smi -L` lists and what CUDA_VISIBLE_DEVICES allows, {OR_CPU}")
}

/// A call of the driver that failed. The code is named by the bindings: asking the driver for a
/// sentence is one more call into a driver that does not work.
fn failed(call: &str, DriverError(code): DriverError) -> Error {
    Error::machine(format!("{call} failed: {code:?}")).hint(see_devices())
}

#[cfg(test)]
#[path = "libraries_tests.rs"]
mod tests;
