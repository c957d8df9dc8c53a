/*! Element types and the promise of a tensor: its name, type and shape before it has bytes. */

use std::fmt;

/// The element types that `atom` reads or writes. All are little-endian on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// Packed codes: the bytes of a bit stream.
    U8,
    /// INT8 codes.
    I8,
    /// FP8 codes: 4 bits of exponent, 3 of mantissa, no infinities.
    F8E4m3,
    /// Channel orders, and codes as exports pack them.
    I32,
    /// Shapes in exports; written only.
    I64,
    /// IEEE half precision.
    F16,
    /// The upper half of an F32.
    BF16,
    /// IEEE single precision.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::F8E4m3 => 1,
            Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::F32 => 4,
            Self::I64 => 8,
        }
    }

    /// The name that a safetensors header uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8E4m3 => "F8_E4M3",
            Self::I32 => "I32",
            Self::I64 => "I64",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F32 => "F32",
        }
    }

    /// Our type for one of safetensors', where there is one.
    pub(super) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        use safetensors::Dtype as Theirs;
        match dtype {
            Theirs::U8 => Some(Self::U8),
            Theirs::I8 => Some(Self::I8),
            Theirs::F8_E4M3 => Some(Self::F8E4m3),
            Theirs::I32 => Some(Self::I32),
            Theirs::F16 => Some(Self::F16),
            Theirs::BF16 => Some(Self::BF16),
            Theirs::F32 => Some(Self::F32),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor that will be written or is expected: what is known of it before its bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name in the checkpoint.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The shape, slowest dimension first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor `name` of `dtype` elements and the given shape.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }

    /// Bytes of the whole tensor; saturates where the shape is absurd.
    pub fn bytes(&self) -> u64 {
        self.shape
            .iter()
            .fold(self.dtype.size_bytes() as u64, |bytes, &n| bytes.saturating_mul(n as u64))
    }

    /// Type and shape as messages show them: `F16 [4096, 32]`.
    pub fn form(&self) -> String {
        form(self.dtype.name(), &self.shape)
    }
}

/// A type and a shape as messages show them.
pub(super) fn form(dtype: &str, shape: &[usize]) -> String {
    format!("{dtype} {shape:?}")
}
