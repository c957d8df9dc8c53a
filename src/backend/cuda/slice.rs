/*! Device memory as kernels take it: of elements of one type, as long as they are borrowed, and with a known end. */

use std::fmt;
use std::marker::PhantomData;

use super::gpu::Buffer;

/// An element of device memory.
pub(super) trait Element {
    /// Its names in the kernels' sources.
    const NAMES: &'static [&'static str];
}

/// Bytes of whatever type: half, bf16 or float, as a kernel's macros or its name say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Any;

macro_rules! elements {
    ($($type:ty: $($name:literal)+),* $(,)?) => {
        $(impl Element for $type { const NAMES: &'static [&'static str] = &[$($name),+]; })*
    };
}
elements! {
    f32: "float", f64: "double", half::f16: "half", i8: "i8", u8: "u8", i32: "int", u32: "u32", u64: "u64",
    [u32; 2]: "uint2", [u32; 4]: "uint4", Any: "half" "bf16" "float" "IN" "In" "Output" "void",
}

/// Bytes of an element; of [`Any`] one.
fn element_bytes<T>() -> usize {
    size_of::<T>().max(1)
}

/// Elements that a kernel reads.
pub struct In<'a, T> {
    pointer: u64,
    bytes: usize,
    memory: PhantomData<&'a T>,
}

/// Elements that a kernel writes. Several may be of one buffer: kernels of one stream follow one another.
pub(super) struct Out<'a, T> {
    pointer: u64,
    bytes: usize,
    memory: PhantomData<&'a T>,
}

macro_rules! slices {
    ($($slice:ident),*) => {$(
        impl<T> Clone for $slice<'_, T> {
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<T> Copy for $slice<'_, T> {}

        impl<T> fmt::Debug for $slice<'_, T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} bytes at {:#x}", self.bytes, self.pointer)
            }
        }

        impl<'a, T> From<&'a Buffer> for $slice<'a, T> {
            fn from(buffer: &'a Buffer) -> Self {
                Self { pointer: buffer.pointer(), bytes: buffer.bytes(), memory: PhantomData }
            }
        }

        impl<T> $slice<'_, T> {
            /// Without the first `count` elements.
            pub(super) fn skip(self, count: usize) -> Self {
                let skipped = count * element_bytes::<T>();
                assert!(skipped <= self.bytes, "{count} elements are skipped of {} bytes", self.bytes);
                Self { pointer: self.pointer + skipped as u64, bytes: self.bytes - skipped, ..self }
            }

            /// Its address on the device.
            pub(super) fn pointer(self) -> u64 {
                self.pointer
            }

            /// Whether it holds so many elements.
            pub(super) fn holds(self, count: usize) -> bool {
                count.checked_mul(element_bytes::<T>()).is_some_and(|bytes| bytes <= self.bytes)
            }
        }
    )*};
}
slices!(In, Out);

impl<'a, T> In<'a, T> {
    /// The same bytes as elements of another type.
    pub(super) fn cast<U>(self) -> In<'a, U> {
        In { pointer: self.pointer, bytes: self.bytes, memory: PhantomData }
    }
}

impl<'a, T> Out<'a, T> {
    /// The element at an address of the device.
    ///
    /// # Safety
    /// It holds one element until `'a` ends.
    pub(super) unsafe fn one(pointer: u64) -> Self {
        Self { pointer, bytes: size_of::<T>(), memory: PhantomData }
    }
}

#[cfg(test)]
#[path = "slice_tests.rs"]
mod tests;
