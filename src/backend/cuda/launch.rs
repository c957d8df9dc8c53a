/*! Kernels by name: compiled and loaded at first use, launched on the main stream. */

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result;
use cudarc::driver::sys::{
    CUfunction, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchConfig,
    CUmodule, cuLaunchKernelEx, cuOccupancyMaxActiveClusters,
};

use super::compile::Compiler;
use super::driver_error::failed;
use super::gpu::{Gpu, Stream};
use super::kernels::{Defines, Family};
use super::slice::{Element, In, Out};
use crate::Result;

/// Dynamic shared memory that a launch gets unasked. The driver's limit of 48 KiB counts a kernel's static memory as well.
const UNASKED_BYTES: usize = 32 << 10;

/// All kernels of a device.
pub(super) struct Kernels {
    gpu: Arc<Gpu>,
    compiler: Compiler,
    loaded: Mutex<Loaded>,
    /// Whether the main stream's last kernel has programmatic dependent launch (PDL).
    last_has_pdl: Mutex<bool>,
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
// SAFETY: a handle of the driver, whose calls may come from any thread. Its module is never unloaded.
unsafe impl Send for Function {}

/// The blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// Blocks in x, y, z.
    pub grid: (usize, usize, usize),
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: usize,
    /// Blocks of a cluster, along y.
    pub cluster: usize,
}

impl Geometry {
    /// Blocks in x, y and z, without dynamic shared memory.
    pub(super) fn grid(grid: (usize, usize, usize), threads: usize) -> Self {
        Self { grid, threads, shared_bytes: 0, cluster: 1 }
    }

    /// `blocks` in one dimension, without dynamic shared memory.
    pub(super) fn line(blocks: usize, threads: usize) -> Self {
        Self::grid((blocks, 1, 1), threads)
    }

    /// Enough blocks for `count` items, one a thread.
    pub(super) fn over(count: usize, threads: usize) -> Self {
        Self::line(count.div_ceil(threads), threads)
    }
}

/// An argument of a kernel: at most eight bytes, as the kernel's type has them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Argument(u64);

/// A value that a kernel takes.
pub(super) trait Parameter: Copy {
    /// What the kernel's source may call its type.
    fn types() -> Vec<String>;
    /// The value as the kernel reads it.
    fn argument(self) -> Argument;
    /// Whether it has room for so many elements, where it is memory and there.
    fn holds(self, _elements: usize) -> bool {
        true
    }
}

macro_rules! numbers {
    ($($type:ty = $name:literal: |$value:ident| $bits:expr;)*) => {$(
        impl Parameter for $type {
            fn types() -> Vec<String> {
                vec![$name.to_owned()]
            }
            fn argument(self) -> Argument {
                let $value = self;
                Argument($bits)
            }
        }
    )*};
}
numbers! {
    i32 = "int": |value| u64::from(value.cast_unsigned());
    bool = "int": |value| u64::from(value);
    usize = "int": |value| u64::from(i32::try_from(value).expect("a size that kernels count in 31 bits").cast_unsigned());
    u32 = "u32": |value| u64::from(value);
    i64 = "long long": |value| value.cast_unsigned();
    f32 = "float": |value| u64::from(value.to_bits());
}

impl<T: Element> Parameter for In<'_, T> {
    fn types() -> Vec<String> {
        T::NAMES.iter().map(|name| format!("const {name}*")).collect()
    }
    fn argument(self) -> Argument {
        Argument(self.pointer())
    }
    fn holds(self, elements: usize) -> bool {
        In::holds(self, elements)
    }
}

impl<T: Element> Parameter for Out<'_, T> {
    fn types() -> Vec<String> {
        T::NAMES.iter().map(|name| format!("{name}*")).collect()
    }
    fn argument(self) -> Argument {
        Argument(self.pointer())
    }
    fn holds(self, elements: usize) -> bool {
        Out::holds(self, elements)
    }
}

/// A null pointer where there is none.
impl<P: Parameter> Parameter for Option<P> {
    fn types() -> Vec<String> {
        P::types()
    }
    fn argument(self) -> Argument {
        self.map_or(Argument(0), P::argument)
    }
    fn holds(self, elements: usize) -> bool {
        self.is_none_or(|memory| memory.holds(elements))
    }
}

/// A launch of a kernel: its arguments, and what they say of the program and the blocks. Implemented by the structs of
/// `kernels/`, whose fields are the kernel's parameters.
pub(super) trait Launch: Arguments {
    /// The file of the kernel.
    const FAMILY: Family;

    /// Which of [`ENTRIES`](Arguments::ENTRIES) it is.
    fn entry(&self) -> usize {
        0
    }

    /// What the file is compiled with.
    fn constants(&self) -> Defines;

    /// Its blocks and threads.
    fn geometry(&self) -> Geometry;
}

/// What [`kernel!`](super::kernels::kernel) makes of a kernel's parameters.
pub(super) trait Arguments {
    /// The names of the kernels that take them.
    const ENTRIES: &'static [&'static str];
    /// Names of the parameters and what their types may be called, in order.
    fn parameters() -> Vec<(&'static str, Vec<String>)>;
    /// The parameters' values, in order.
    ///
    /// # Panics
    /// If memory is too small for what the kernel reads or writes.
    fn arguments(&self) -> Vec<Argument>;
}

impl Kernels {
    /// The kernels of a device, none of them compiled yet.
    pub(super) fn new(gpu: Arc<Gpu>, compiler: Compiler) -> Self {
        Self { gpu, compiler, loaded: Mutex::default(), last_has_pdl: Mutex::new(false) }
    }

    /// A kernel of a family for these macros, which may take `shared_bytes` of shared memory.
    fn function(
        &self,
        family: &Family,
        defines: &[(&'static str, String)],
        entry: &str,
        shared_bytes: usize,
    ) -> Result<CUfunction> {
        self.gpu.bind()?;
        let mut program = family.name.to_owned();
        for (name, value) in defines {
            program.push_str(&format!(" {name}={value}"));
        }
        let key = format!("{program} {entry}");
        let known = self.loaded().functions.get(&key).copied();
        let function = match known {
            Some(function) => function,
            None => {
                let module = self.module(family, defines, program)?;
                let name = CString::new(entry).expect("names of kernels hold no zero byte");
                // SAFETY: the module is loaded.
                let function = unsafe { result::module::get_function(module.0, name) }
                    .map_err(|error| failed(&format!("finding `{key}`"), error))?;
                self.loaded().functions.insert(key, Function(function));
                Function(function)
            }
        };
        if shared_bytes > UNASKED_BYTES {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            unsafe {
                result::function::set_function_attribute(function.0, attribute, shared_bytes as i32)
            }
            .map_err(|error| {
                failed(&format!("{entry} needs {shared_bytes} bytes of shared memory"), error)
            })?;
        }
        Ok(function.0)
    }

    /// A program, loaded. No lock is held while it is compiled: two threads may compile the same, and the first one loads it.
    fn module(
        &self,
        family: &Family,
        defines: &[(&'static str, String)],
        program: String,
    ) -> Result<Module> {
        if let Some(module) = self.loaded().modules.get(&program) {
            return Ok(*module);
        }
        let cubin = self.compiler.cubin(family.name, family.source, defines)?;
        let mut loaded = self.loaded();
        if let Some(module) = loaded.modules.get(&program) {
            return Ok(*module);
        }
        // SAFETY: the image is an entire cubin, made for this device.
        let module = unsafe { result::module::load_data(cubin.as_ptr().cast::<c_void>()) }
            .map_err(|error| failed(&format!("loading `{program}`"), error))?;
        loaded.modules.insert(program, Module(module));
        Ok(Module(module))
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Launches a kernel on the main stream.
    pub(super) fn launch<K: Launch>(&self, kernel: &K) -> Result<()> {
        let entry = K::ENTRIES[kernel.entry()];
        self.gpu.traced(|| entry.to_owned(), || self.launch_on(Stream::Main, kernel))
    }

    /// How many clusters of a launch the device holds simultaneously: fewer than its multiprocessors would, since a cluster stays within
    /// a part of the device.
    pub(super) fn active_clusters<K: Launch>(&self, kernel: &K) -> Result<usize> {
        let geometry = kernel.geometry();
        let Geometry { threads, shared_bytes, cluster, .. } = geometry;
        let entry = K::ENTRIES[kernel.entry()];
        let function = self.function(&K::FAMILY, &kernel.constants(), entry, shared_bytes)?;
        let key = (function as usize, threads, shared_bytes, cluster);
        if let Some(known) = self.loaded().clusters.get(&key) {
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
        self.loaded().clusters.insert(key, count);
        Ok(count)
    }

    /// A launch with attributes, which it points to.
    fn config(
        &self,
        stream: Stream,
        geometry: Geometry,
        attributes: &mut [CUlaunchAttribute],
    ) -> CUlaunchConfig {
        let Geometry { grid, threads, shared_bytes, .. } = geometry;
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

    /// Launches a kernel on a stream.
    pub(super) fn launch_on<K: Launch>(&self, stream: Stream, kernel: &K) -> Result<()> {
        let geometry = kernel.geometry();
        let Geometry { grid, shared_bytes, cluster, .. } = geometry;
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        let entry = K::ENTRIES[kernel.entry()];
        let arguments = kernel.arguments();
        let function = self.function(&K::FAMILY, &kernel.constants(), entry, shared_bytes)?;
        let mut slots: Vec<u64> = arguments.iter().map(|argument| argument.0).collect();
        let mut pointers: Vec<*mut c_void> =
            slots.iter_mut().map(|slot| (slot as *mut u64).cast()).collect();
        let mut attributes = Vec::new();
        attributes.extend((cluster > 1).then(|| clusters_of(cluster)));
        // Held over the launch: another thread's would come between.
        let mut last = self.last_has_pdl.lock().unwrap_or_else(PoisonError::into_inner);
        if stream == Stream::Main {
            let pdl = K::FAMILY.pdl && self.gpu.device.capability.major >= 9;
            if pdl && *last {
                attributes.push(enable_pdl());
            }
            *last = pdl;
        }
        let config = self.config(stream, geometry, &mut attributes);
        // SAFETY: configuration, attributes and arguments outlive the call. The arguments are the kernel's, which a test compares with
        // its source, and their memory is large enough.
        unsafe {
            let none = std::ptr::null_mut();
            cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), none)
        }
        .result()
        .map_err(|error| failed(&format!("launching `{entry}`"), error))
    }
}

/// The attribute of a launch that may begin when every block of the kernel before it has allowed it.
fn enable_pdl() -> CUlaunchAttribute {
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
