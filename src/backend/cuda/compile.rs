/*! Kernels from source to machine code: NVRTC, and a cache of what it made.

Kernels are compiled for the very device and shape, so nothing is shipped for every device there is,
and no compiler's version is fixed. One takes NVRTC a tenth of a second or more, hence the cache on
disk. It is a convenience: where it cannot be read or written, kernels are compiled again. */

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr;

use cudarc::nvrtc::sys::{self, nvrtcResult};
use fs_err as fs;
use sha2::{Digest, Sha256};

use super::libraries::{self, Device, Version};
use crate::{Error, Result};

/// The environment variable that names the cache's directory.
pub const CACHE_VARIABLE: &str = "ATOM_KERNEL_CACHE";

/// Bytes of a SHA-256, which a cached file begins with.
const DIGEST_BYTES: usize = 32;

/// NVRTC for one architecture.
#[derive(Clone, Debug)]
pub struct Compiler {
    version: Version,
    architecture: String,
    cache: Option<PathBuf>,
}

impl Compiler {
    /// The compiler for a device, with the user's cache.
    ///
    /// # Errors
    /// A machine error if NVRTC is not there, does not support the device, or makes code that the
    /// device's driver cannot load.
    pub fn for_device(device: &Device) -> Result<Self> {
        let version = libraries::nvrtc()?;
        libraries::loads(device.driver, version)?;
        let Some(architecture) = architecture(device.capability, &supported()?) else {
            return Err(Error::machine(format!(
                "NVRTC {version} does not support {} of compute capability {}",
                device.name, device.capability
            ))
            .hint("install a newer NVRTC, or run with --device cpu"));
        };
        Ok(Self { version, architecture, cache: cache_directory() })
    }

    /// The compiler for an architecture such as `sm_90a`, with no device and no cache.
    ///
    /// # Errors
    /// A machine error if NVRTC is not there.
    pub fn for_architecture(architecture: &str) -> Result<Self> {
        let version = libraries::nvrtc()?;
        Ok(Self { version, architecture: architecture.to_owned(), cache: None })
    }

    /// The same compiler with its cache in this directory, or with none.
    pub fn with_cache(self, directory: Option<PathBuf>) -> Self {
        Self { cache: directory, ..self }
    }

    /// NVRTC's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// What is compiled for, such as `sm_90a`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Machine code of `source`, out of the cache if it is there. `name` is for messages.
    ///
    /// # Errors
    /// A machine error, which shows the compiler's log, if the source does not compile.
    pub fn cubin(&self, name: &str, source: &str, defines: &[(&str, String)]) -> Result<Vec<u8>> {
        let Some(directory) = &self.cache else {
            return self.compile(name, source, defines).map(|(cubin, _)| cubin);
        };
        let path = directory.join(format!("{}.cubin", self.key(source, defines)));
        if let Some(cubin) = read_cached(&path) {
            return Ok(cubin);
        }
        let (cubin, _) = self.compile(name, source, defines)?;
        // A cache that cannot be written costs time at the next start and nothing else.
        let _ = write_cached(directory, &path, &cubin);
        Ok(cubin)
    }

    /// Machine code of `source` and the compiler's log, which reports each kernel's registers, stack
    /// and spills. The cache is neither read nor written.
    ///
    /// # Errors
    /// A machine error, which shows the log, if the source does not compile.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        defines: &[(&str, String)],
    ) -> Result<(Vec<u8>, String)> {
        let options = self.options(defines);
        let broken = |what: String| {
            Error::machine(what)
                .context(format!("internal error: the kernel `{name}` does not compile"))
                .hint("please report it with the output above, or run with --device cpu")
        };
        let c_string = |text: &str| {
            CString::new(text).map_err(|_| broken("a zero byte stands in it".to_owned()))
        };
        let program = NvrtcProgram::new(&c_string(source)?, &c_string(&format!("{name}.cu"))?)
            .map_err(|code| broken(format!("nvrtcCreateProgram failed: {code:?}")))?;
        let c_options =
            options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>>>()?;
        let compiled = program.compile(&c_options);
        let log = program.log().unwrap_or_else(|code| format!("there is no log: {code:?}"));
        match compiled {
            Ok(()) => {}
            Err(nvrtcResult::NVRTC_ERROR_BUILTIN_OPERATION_FAILURE) => {
                return Err(Error::machine(log.trim_end())
                    .context(format!("NVRTC {} is incomplete", self.version))
                    .hint(format!(
                        "name the directory that holds libnvrtc and libnvrtc-builtins in {}",
                        libraries::VARIABLE
                    )));
            }
            Err(code) => {
                let call = format!("nvrtcCompileProgram {} failed: {code:?}", options.join(" "));
                return Err(broken(format!("{call}\n{}", log.trim_end())));
            }
        }
        let cubin =
            program.cubin().map_err(|code| broken(format!("nvrtcGetCUBIN failed: {code:?}")))?;
        Ok((cubin, log))
    }

    /// NVRTC's command line.
    fn options(&self, defines: &[(&str, String)]) -> Vec<String> {
        let fixed = [
            format!("--gpu-architecture={}", self.architecture),
            "--std=c++17".to_owned(),
            // Results must not depend on what the compiler chooses to fuse.
            "--fmad=false".to_owned(),
            "--ptxas-options=-v".to_owned(),
        ];
        let defines = defines.iter().map(|(name, value)| format!("-D{name}={value}"));
        fixed.into_iter().chain(defines).collect()
    }

    /// SHA-256 of all that decides the machine code, in hexadecimal.
    fn key(&self, source: &str, defines: &[(&str, String)]) -> String {
        let mut hash = Sha256::new();
        let mut add = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        add(&format!("NVRTC {}", self.version));
        self.options(defines).iter().for_each(|option| add(option));
        add(source);
        hex::encode(hash.finalize())
    }
}

/// The architecture to compile for: the device's own; else the next older of its generation, whose
/// code it runs.
fn architecture(capability: Version, supported: &[i32]) -> Option<String> {
    let Version { major, minor } = capability;
    let own = 10 * major + minor;
    let chosen = supported.iter().copied().filter(|sm| (10 * major..=own).contains(sm)).max()?;
    // Warpgroup products and their kin are only in the code that is for 9.0 alone.
    let alone = if chosen == 90 && own == 90 { "a" } else { "" };
    Some(format!("sm_{chosen}{alone}"))
}

/// Architectures that NVRTC supports: 90 is `sm_90`.
fn supported() -> Result<Vec<i32>> {
    let failed = |code: nvrtcResult| {
        Error::machine(format!("NVRTC does not report what it compiles for: {code:?}"))
            .hint("install a newer NVRTC, or run with --device cpu")
    };
    let mut count = 0;
    // SAFETY: `libraries::nvrtc` has found the symbols; the calls write one integer, and as many as
    // were announced.
    unsafe {
        success(sys::nvrtcGetNumSupportedArchs(&mut count)).map_err(failed)?;
        let mut architectures = vec![0; usize::try_from(count).unwrap_or(0)];
        success(sys::nvrtcGetSupportedArchs(architectures.as_mut_ptr())).map_err(failed)?;
        Ok(architectures)
    }
}

/// A program of NVRTC's, destroyed when dropped.
struct NvrtcProgram(sys::nvrtcProgram);

impl NvrtcProgram {
    fn new(source: &CStr, name: &CStr) -> Result<Self, nvrtcResult> {
        let mut program = ptr::null_mut();
        // SAFETY: both strings end with a zero and are copied; there are no headers.
        let code = unsafe {
            let (source, name) = (source.as_ptr(), name.as_ptr());
            sys::nvrtcCreateProgram(&mut program, source, name, 0, ptr::null(), ptr::null())
        };
        success(code).map(|()| Self(program))
    }

    fn compile(&self, options: &[CString]) -> Result<(), nvrtcResult> {
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive, and the strings that the pointers refer to outlive the call.
        let code =
            unsafe { sys::nvrtcCompileProgram(self.0, options.len() as c_int, options.as_ptr()) };
        success(code)
    }

    fn log(&self) -> Result<String, nvrtcResult> {
        let mut bytes = self.read(sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog)?;
        bytes.retain(|byte| *byte != 0); // the one that ends it
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn cubin(&self) -> Result<Vec<u8>, nvrtcResult> {
        self.read(sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN)
    }

    /// What a pair of calls returns: the size of a buffer, then its content.
    fn read(
        &self,
        size: unsafe fn(sys::nvrtcProgram, *mut usize) -> nvrtcResult,
        content: unsafe fn(sys::nvrtcProgram, *mut c_char) -> nvrtcResult,
    ) -> Result<Vec<u8>, nvrtcResult> {
        let mut bytes = 0;
        // SAFETY: the program is alive; the first call writes one integer, the second so many bytes.
        unsafe {
            success(size(self.0, &mut bytes))?;
            let mut buffer = vec![0; bytes];
            success(content(self.0, buffer.as_mut_ptr().cast()))?;
            Ok(buffer)
        }
    }
}

impl Drop for NvrtcProgram {
    fn drop(&mut self) {
        // SAFETY: the program is alive, and this is its end.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn success(code: nvrtcResult) -> Result<(), nvrtcResult> {
    if code == nvrtcResult::NVRTC_SUCCESS { Ok(()) } else { Err(code) }
}

/// `$ATOM_KERNEL_CACHE`, or `atom/kernels` where the user's caches are.
pub(crate) fn cache_directory() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    variable(CACHE_VARIABLE)
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("atom/kernels")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/atom/kernels")))
}

/// A cached cubin, unless it is not there or damaged.
fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let cubin = (bytes.len() > DIGEST_BYTES).then(|| bytes.split_off(DIGEST_BYTES))?;
    (Sha256::digest(&cubin)[..] == bytes[..]).then_some(cubin)
}

/// Writes a cubin, after its SHA-256, entirely or not at all: another process may read it meanwhile.
fn write_cached(directory: &Path, path: &Path, cubin: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    fs::create_dir_all(directory)?;
    let mut file = tempfile::Builder::new().prefix(".atom-").tempfile_in(directory)?;
    file.write_all(&Sha256::digest(cubin))?;
    file.write_all(cubin)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
