/*! Kernels by name: compiled and loaded at first use, launched on the main stream. */

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result;
use cudarc::driver::sys::{
    CUdeviceptr, CUfunction, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchConfig, CUmodule, cuLaunchKernelEx, cuOccupancyMaxActiveClusters,
};

use super::compile::Compiler;
use super::gpu::{Buffer, Gpu, Stream, failed};
use super::kernels::{FAMILIES, Family};
use crate::Result;

/// All kernels of a device.
pub struct Kernels {
    gpu: Arc<Gpu>,
    compiler: Compiler,
    loaded: Mutex<Loaded>,
    /// Whether the main stream's last kernel is of a family that overlaps.
    last_overlaps: Mutex<bool>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<String, Module>,
    functions: HashMap<String, Function>,
    /// How many clusters of a launch's shape the device holds, by function, threads, shared memory and blocks of a cluster.
    clusters: HashMap<(usize, usize, usize, usize), usize>,
}

#[derive(Clone, Copy)]
struct Module(CUmodule);
// SAFETY: a handle of the driver, whose calls may come from any thread. It is loaded as long as the
// program runs.
unsafe impl Send for Module {}

#[derive(Clone, Copy)]
struct Function(CUfunction);
// SAFETY: as above.
unsafe impl Send for Function {}

/// The blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Blocks in x, y, z.
    pub grid: (usize, usize, usize),
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: usize,
}

impl Geometry {
    /// `blocks` in one dimension, without dynamic shared memory.
    pub fn line(blocks: usize, threads: usize) -> Self {
        Self { grid: (blocks, 1, 1), threads, shared_bytes: 0 }
    }

    /// Enough blocks for `count` items, one a thread.
    pub fn over(count: usize, threads: usize) -> Self {
        Self::line(count.div_ceil(threads), threads)
    }
}

/// An argument of a kernel: at most eight bytes, as the kernel's type has them.
#[derive(Clone, Copy, Debug)]
pub struct Argument(u64);

impl From<i32> for Argument {
    fn from(value: i32) -> Self {
        Self(u64::from(value.cast_unsigned()))
    }
}
impl From<usize> for Argument {
    /// A C `int`.
    fn from(value: usize) -> Self {
        Self::from(i32::try_from(value).expect("a size that kernels count in 31 bits"))
    }
}
impl From<i64> for Argument {
    fn from(value: i64) -> Self {
        Self(value.cast_unsigned())
    }
}
impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self(u64::from(value.to_bits()))
    }
}
impl From<CUdeviceptr> for Argument {
    fn from(value: CUdeviceptr) -> Self {
        Self(value)
    }
}
impl From<&Buffer> for Argument {
    fn from(buffer: &Buffer) -> Self {
        Self(buffer.pointer())
    }
}
impl From<Option<&Buffer>> for Argument {
    fn from(buffer: Option<&Buffer>) -> Self {
        Self(buffer.map_or(0, Buffer::pointer))
    }
}

impl Kernels {
    /// The kernels of a device, none of them compiled yet.
    pub fn new(gpu: Arc<Gpu>, compiler: Compiler) -> Self {
        Self { gpu, compiler, loaded: Mutex::default(), last_overlaps: Mutex::new(false) }
    }

    /// The kernel `entry` of a family for given macros.
    fn function(
        &self,
        family: &Family,
        defines: &[(&'static str, String)],
        entry: &str,
    ) -> Result<CUfunction> {
        let mut module_key = family.name.to_owned();
        for (name, value) in defines {
            module_key.push_str(&format!(" {name}={value}"));
        }
        let key = format!("{module_key} {entry}");
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = loaded.functions.get(&key) {
            return Ok(function.0);
        }
        let module = match loaded.modules.get(&module_key) {
            Some(module) => *module,
            None => {
                let cubin = self.compiler.cubin(family.name, family.source, defines)?;
                // SAFETY: the image is a whole cubin, made for this device.
                let module = unsafe { result::module::load_data(cubin.as_ptr().cast::<c_void>()) }
                    .map_err(|error| failed(&format!("loading `{module_key}`"), error))?;
                loaded.modules.insert(module_key, Module(module));
                Module(module)
            }
        };
        let name = CString::new(entry).expect("names of kernels hold no zero byte");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(module.0, name) }
            .map_err(|error| failed(&format!("finding `{key}`"), error))?;
        loaded.functions.insert(key, Function(function));
        Ok(function)
    }

    /// Launches the kernel `entry` of the family named `family` on the main stream.
    pub fn launch(
        &self,
        family: &str,
        defines: &[(&'static str, String)],
        entry: &str,
        geometry: Geometry,
        arguments: &[Argument],
    ) -> Result<()> {
        self.launch_clusters(family, defines, entry, geometry, 1, arguments)
    }

    /// Launches on the main stream in clusters of `cluster` blocks along y.
    pub fn launch_clusters(
        &self,
        family: &str,
        defines: &[(&'static str, String)],
        entry: &str,
        geometry: Geometry,
        cluster: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        let attribute = (cluster > 1).then(|| clusters_of(cluster));
        let work =
            || self.start(Stream::Main, attribute, (family, defines, entry), geometry, arguments);
        self.gpu.traced(|| entry.to_owned(), work)
    }

    /// How many clusters of `cluster` blocks along y the device holds at once: fewer than its multiprocessors would, since a
    /// cluster stays within a part of the device.
    pub fn resident_clusters(
        &self,
        family: &str,
        defines: &[(&'static str, String)],
        entry: &str,
        geometry: Geometry,
        cluster: usize,
    ) -> Result<usize> {
        let function = self.ready(family_of(family), defines, entry, geometry)?;
        let Geometry { threads, shared_bytes, .. } = geometry;
        let key = (function as usize, threads, shared_bytes, cluster);
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = loaded.clusters.get(&key) {
            return Ok(*known);
        }
        let mut attributes = [clusters_of(cluster)];
        let shape = Geometry { grid: (1, cluster, 1), ..geometry };
        let config = self.config(Stream::Main, shape, &mut attributes);
        let mut count = 0;
        // SAFETY: the function is loaded; configuration and attributes outlive the call.
        unsafe { cuOccupancyMaxActiveClusters(&raw mut count, function, &raw const config) }
            .result()
            .map_err(|error| failed("cuOccupancyMaxActiveClusters", error))?;
        let count = usize::try_from(count).unwrap_or(0);
        loaded.clusters.insert(key, count);
        Ok(count)
    }

    /// A launch with attributes, which it points to.
    fn config(
        &self,
        stream: Stream,
        geometry: Geometry,
        attributes: &mut [CUlaunchAttribute],
    ) -> CUlaunchConfig {
        let Geometry { grid, threads, shared_bytes } = geometry;
        CUlaunchConfig {
            gridDimX: dimension(grid.0),
            gridDimY: dimension(grid.1),
            gridDimZ: dimension(grid.2),
            blockDimX: dimension(threads),
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: dimension(shared_bytes),
            hStream: self.gpu.stream(stream),
            attrs: attributes.as_mut_ptr(),
            numAttrs: dimension(attributes.len()),
        }
    }

    /// Launches on a given stream.
    pub fn launch_on(
        &self,
        stream: Stream,
        family: &str,
        defines: &[(&'static str, String)],
        entry: &str,
        geometry: Geometry,
        arguments: &[Argument],
    ) -> Result<()> {
        self.start(stream, None, (family, defines, entry), geometry, arguments)
    }

    /// Launches the kernel of a family's name, macros and entry, with an attribute if there is one.
    fn start(
        &self,
        stream: Stream,
        attribute: Option<CUlaunchAttribute>,
        (family, defines, entry): (&str, &[(&'static str, String)], &str),
        geometry: Geometry,
        arguments: &[Argument],
    ) -> Result<()> {
        let Geometry { grid, .. } = geometry;
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        let family = family_of(family);
        let function = self.ready(family, defines, entry, geometry)?;
        let mut slots: Vec<u64> = arguments.iter().map(|argument| argument.0).collect();
        let mut pointers: Vec<*mut c_void> =
            slots.iter_mut().map(|slot| (slot as *mut u64).cast()).collect();
        let mut attributes: Vec<_> = attribute.into_iter().collect();
        // Held over the launch: another thread's would come between.
        let mut last = self.last_overlaps.lock().unwrap_or_else(PoisonError::into_inner);
        if stream == Stream::Main {
            let overlaps = family.overlaps && self.gpu.device.capability.major >= 9;
            if overlaps && *last {
                attributes.push(overlapping());
            }
            *last = overlaps;
        }
        let config = self.config(stream, geometry, &mut attributes);
        // SAFETY: configuration, attributes and arguments outlive the call. The arguments are what the kernel takes: each launch
        // names them in the order of its source, and the tests compare what every kernel gives.
        unsafe {
            let none = std::ptr::null_mut();
            cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), none)
        }
        .result()
        .map_err(|error| failed(&format!("launching `{entry}`"), error))
    }

    /// A kernel that may take the shared memory of a launch.
    fn ready(
        &self,
        family: &Family,
        defines: &[(&'static str, String)],
        entry: &str,
        geometry: Geometry,
    ) -> Result<CUfunction> {
        let shared_bytes = geometry.shared_bytes;
        self.gpu.bind()?;
        let function = self.function(family, defines, entry)?;
        if shared_bytes > 48 << 10 {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            unsafe {
                result::function::set_function_attribute(function, attribute, shared_bytes as i32)
            }
            .map_err(|error| {
                failed(&format!("{entry} needs {shared_bytes} bytes of shared memory"), error)
            })?;
        }
        Ok(function)
    }
}

fn family_of(name: &str) -> &'static Family {
    FAMILIES
        .iter()
        .find(|known| known.name == name)
        .expect("every family that is launched is in FAMILIES")
}

/// The attribute of a launch that may begin when every block of the kernel before it has allowed it.
fn overlapping() -> CUlaunchAttribute {
    // SAFETY: zeros are a value of this plain structure.
    let mut attribute: CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    attribute
}

/// The attribute of a launch in clusters along y.
fn clusters_of(blocks: usize) -> CUlaunchAttribute {
    // SAFETY: zeros are a value of this plain structure.
    let mut attribute: CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim.x = 1;
    attribute.value.clusterDim.y = dimension(blocks);
    attribute.value.clusterDim.z = 1;
    attribute
}

fn dimension(size: usize) -> u32 {
    u32::try_from(size).expect("a grid of less than 2^32 blocks")
}

/// Arguments of a launch, each of its own type.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { &[$($crate::backend::cuda::launch::Argument::from($argument)),*] };
}
pub(super) use arguments;
