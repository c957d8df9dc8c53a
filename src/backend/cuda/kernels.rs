/*! The kernels' sources, and the shapes each is compiled for. */

/// Macros and their values.
pub type Defines = Vec<(&'static str, String)>;

/// A file of kernels: one source for every shape, told apart by macros.
pub struct Family {
    /// The file's name without `.cu`.
    pub name: &'static str,
    /// What NVRTC compiles: `common.cuh`, then the file.
    pub source: &'static str,
    /// The tensor-core instruction that the machine code must contain, such as `HMMA`.
    pub tensor_core: Option<&'static str>,
    /// Macro sets that stand for all others: each is compiled for every architecture in the tests.
    pub variants: fn() -> Vec<Defines>,
}

/// The source of a family. Line numbers in the compiler's messages are those of its own file.
#[allow(unused_macros, reason = "FAMILIES is empty until the kernels are merged")]
macro_rules! source {
    ($name:literal) => {
        concat!(
            "#line 1 \"common.cuh\"\n",
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/common.cuh")),
            "\n#line 1 \"",
            $name,
            ".cu\"\n",
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/", $name, ".cu")),
        )
    };
}

/// Every file in `kernels/`.
pub const FAMILIES: &[Family] = &[];
