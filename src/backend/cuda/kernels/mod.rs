/*! The kernels: for each file of `kernels/` one here, with the arguments of its kernels, their blocks and threads, and the constants
that the file is compiled with.

A constant that both sides need is declared here and given to NVRTC as a macro; a file that lacks one does not compile. */

pub(super) mod attention;
pub(super) mod cache;
pub(super) mod decode;
pub(super) mod elementwise;
pub(super) mod few;
pub(super) mod fused;
pub(super) mod gptq;
pub(super) mod heads;
pub(super) mod hopper_layout;
pub(super) mod integer;
pub(super) mod measure;
pub(super) mod permute;
pub(super) mod prepare;
pub(super) mod product;
pub(super) mod reduce;
pub(super) mod train;
pub(super) mod train_heads;

use super::libraries::Version;
use crate::quant::scale::ScaleGrid;

/// Macros and their values.
pub type Defines = Vec<(&'static str, String)>;

/// Threads of a block in the kernels that do not say otherwise.
const THREADS: usize = 256;

/// A file of kernels: one source for every shape, with macros.
pub struct Family {
    /// The file's name without `.cu`.
    pub name: &'static str,
    /// What NVRTC compiles: `ptx.cuh`, `common.cuh`, then the file.
    pub source: &'static str,
    /// The one architecture it is for; none for any.
    pub only: Option<&'static str>,
    /// The tensor-core instruction that the machine code must contain, such as `HMMA`; of products by `mma.sync` another.
    pub tensor_core: Option<&'static str>,
    /// Whether its kernels use programmatic dependent launch (PDL): each may begin while a kernel of such a family ends, on Hopper and
    /// later ones. It calls `pdl_wait` (ptx.cuh) before it touches what others write, and writes nothing that another one reads
    /// before that: weights, orders.
    pub pdl: bool,
    /// Macro sets that stand for all others on a device of this compute capability: each is compiled for every architecture in the
    /// tests.
    pub variants: fn(Version) -> Vec<Defines>,
    /// Its kernels.
    pub kernels: fn() -> Vec<Declared>,
}

/// A kernel as it is declared here: the tests compare it with its source.
pub struct Declared {
    /// The kernels of these parameters.
    pub entries: &'static [&'static str],
    /// Names of the parameters and what their types may be called.
    pub parameters: Vec<(&'static str, Vec<String>)>,
}

impl Family {
    /// The tensor-core instruction that the machine code must contain with these macros.
    pub fn tensor_core_with(&self, defines: &Defines) -> Option<&'static str> {
        let by_warps = defines.iter().any(|(name, value)| *name == "BY_WARPS" && value == "1");
        if by_warps { Some("IMMA") } else { self.tensor_core }
    }
}

/// The type of a kernel's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Float {
    Half,
    Bf16,
    Single,
}

impl Float {
    /// Its name in the kernels' sources.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Half => "half",
            Self::Bf16 => "bf16",
            Self::Single => "float",
        }
    }

    /// Bytes of a value.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Half | Self::Bf16 => 2,
            Self::Single => 4,
        }
    }
}

/// Macros from their values.
macro_rules! defines {
    ($($name:literal: $value:expr),* $(,)?) => { vec![$(($name, $value.to_string())),*] };
}
use defines;

fn flag(set: bool) -> u8 {
    u8::from(set)
}

/// The name of a grid of scales in `common.cuh`.
fn grid_name(grid: ScaleGrid) -> &'static str {
    match grid {
        ScaleGrid::F16 => "F16_GRID",
        ScaleGrid::Bf16 => "BF16_GRID",
        ScaleGrid::E4m3 => "E4M3_GRID",
        ScaleGrid::PowerOfTwo => "POWER_OF_TWO_GRID",
    }
}

/// Declares the arguments of kernels: a struct whose fields are the parameters in order, with the elements that each pointer's memory
/// must hold, and after `launch` what else the launch depends on.
macro_rules! kernel {
    (
        $(#[$meta:meta])*
        $name:ident<$life:lifetime> = [$($entry:literal),+] {
            $($field:ident: $type:ty $([$elements:expr])?),* $(,)?
        }
        $(launch { $($(#[$extra_meta:meta])* $extra:ident: $extra_type:ty),* $(,)? })?
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy)]
        pub(in crate::backend::cuda) struct $name<$life> {
            $(pub(in crate::backend::cuda) $field: $type,)*
            $($($(#[$extra_meta])* pub(in crate::backend::cuda) $extra: $extra_type,)*)?
        }

        impl<$life> $crate::backend::cuda::launch::Arguments for $name<$life> {
            const ENTRIES: &'static [&'static str] = &[$($entry),+];

            fn parameters() -> Vec<(&'static str, Vec<String>)> {
                use $crate::backend::cuda::launch::Parameter;
                vec![$((stringify!($field), <$type as Parameter>::types())),*]
            }

            fn arguments(&self) -> Vec<$crate::backend::cuda::launch::Argument> {
                use $crate::backend::cuda::launch::Parameter;
                let Self { $($field,)* $($($extra,)*)? } = *self;
                let _ = ($($field,)* $($($extra,)*)?);
                $($(
                    assert!(
                        Parameter::holds($field, $elements),
                        "`{}` of `{}` is too small",
                        stringify!($field),
                        stringify!($name)
                    );
                )?)*
                vec![$(Parameter::argument($field)),*]
            }
        }
    };
}
use kernel;

/// What tests compare with a file: `declared![A, B]`.
macro_rules! declared {
    ($($name:ident),* $(,)?) => {
        || {
            use $crate::backend::cuda::launch::Arguments;
            vec![$($crate::backend::cuda::kernels::Declared {
                entries: <$name<'_> as Arguments>::ENTRIES,
                parameters: <$name<'_> as Arguments>::parameters(),
            }),*]
        }
    };
}
use declared;

/// The source of a family, after what it has in common with others. Line numbers in the compiler's messages are those of
/// its own file.
macro_rules! source {
    ($name:literal $(, $common:literal)*) => {
        concat!(
            "#line 1 \"ptx.cuh\"\n",
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/ptx.cuh")),
            "\n#line 1 \"common.cuh\"\n",
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/common.cuh")),
            $(
                "\n#line 1 \"",
                $common,
                ".cuh\"\n",
                include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/", $common, ".cuh")),
            )*
            "\n#line 1 \"",
            $name,
            ".cu\"\n",
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/", $name, ".cu")),
        )
    };
}
use source;

/// Every file in `kernels/`.
pub const FAMILIES: &[Family] = &[
    attention::FAMILY,
    cache::FAMILY,
    decode::FAMILY,
    elementwise::FAMILY,
    few::FAMILY,
    fused::FAMILY,
    gptq::FAMILY,
    hopper_layout::FAMILY,
    integer::FAMILY,
    measure::FAMILY,
    permute::FAMILY,
    prepare::FAMILY,
    product::STREAM,
    product::TILES,
    reduce::FAMILY,
    train::FAMILY,
    train_heads::FAMILY,
];
