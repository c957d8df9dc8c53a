/*! One stored tensor, borrowed from a mapped file, and its conversion to f32. */

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::{Mmap, UncheckedAdvice};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::dtype::{Dtype, form};
use crate::{Error, Result};

/// Values converted by one task: 256 KiB of f32, which a core's L2 cache holds.
const VALUES_PER_TASK: usize = 1 << 16;

/// A tensor's description and its bytes, which stay in the file until they are touched.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// The name in the checkpoint.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// The shape, slowest dimension first.
    pub shape: &'a [usize],
    /// The elements, little-endian, row by row; of any alignment.
    pub bytes: &'a [u8],
    /// The file that holds it, as messages name it; empty if it lies in none.
    pub(super) file: &'a str,
    /// The map that `bytes` lies in, if it lies in one.
    pub(super) map: Option<&'a Mmap>,
    /// The row of the stored tensor where this one begins: not 0 where it is a range of its rows.
    pub(super) first_row: usize,
}

impl<'a> Tensor<'a> {
    /// A tensor whose bytes lie in memory and in no file.
    pub fn in_memory(name: &'a str, dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> Self {
        Self { name, dtype, shape, bytes, file: "", map: None, first_row: 0 }
    }

    /// What messages call it: tensor `name` of the path of its file.
    pub fn title(&self) -> String {
        match self.file {
            "" => format!("tensor `{}`", self.name),
            file => format!("tensor `{}` of {file}", self.name),
        }
    }

    /// Refuses a tensor of another shape than the network's.
    ///
    /// # Errors
    /// Bad input that names both shapes.
    pub fn check_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(Error::input(format!(
            "{} has shape {:?}, config.json makes it {shape:?}",
            self.title(),
            self.shape
        ))
        .hint("config.json and the weights do not belong together: fetch the checkpoint again"))
    }

    /// The rows from `first` on as a tensor of `shape`, whose bytes stay where they are.
    ///
    /// # Panics
    /// If there are no such rows.
    pub(super) fn row_range(self, first: usize, shape: &'a [usize]) -> Self {
        assert_eq!(self.shape[1..], shape[1..], "{}", self.title());
        let row_bytes = self.dtype.size_bytes() * shape[1..].iter().product::<usize>();
        let bytes = &self.bytes[first * row_bytes..(first + shape[0]) * row_bytes];
        Self { shape, bytes, first_row: self.first_row + first, ..self }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size_bytes()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// All values as f32, in the tensor's order. A NaN or infinity is an error that says where it
    /// is, and so is a type that holds no real numbers (U8, I8, I32).
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        self.values_f32(0..self.len())
    }

    /// An error that says where, if a value is a NaN or infinity. `check_stop` is asked between parts.
    pub fn check_finite(&self, check_stop: &dyn Fn() -> Result<()>) -> Result<()> {
        self.by_parts(check_stop, |_| ())
    }

    /// The greatest magnitude; 0 of no values. Pages are given back on the way, and `check_stop` is asked between parts.
    ///
    /// # Errors
    /// As [`Tensor::check_finite`].
    pub fn absmax(&self, check_stop: &dyn Fn() -> Result<()>) -> Result<f32> {
        let mut greatest = 0.0f32;
        self.by_parts(check_stop, |values| {
            greatest = values.iter().fold(greatest, |greatest, value| greatest.max(value.abs()));
        })?;
        Ok(greatest)
    }

    fn by_parts(
        &self,
        check_stop: &dyn Fn() -> Result<()>,
        mut take: impl FnMut(Vec<f32>),
    ) -> Result<()> {
        const PART: usize = 1 << 22;
        let size = self.dtype.size_bytes();
        let mut parts = (0..self.len()).step_by(PART);
        parts.try_for_each(|at| {
            check_stop()?;
            let end = (at + PART).min(self.len());
            take(self.values_f32(at..end)?);
            Tensor { bytes: &self.bytes[at * size..end * size], ..*self }.release();
            Ok(())
        })
    }

    /// SHA-256 of the bytes in hexadecimal. Each part of them is passed to `take` after it was hashed, while a core's cache
    /// holds it. Pages are given back on the way, and `check_stop` is asked between parts.
    pub(super) fn sha256(
        &self,
        check_stop: &dyn Fn() -> Result<()>,
        mut take: impl FnMut(&[u8]),
    ) -> Result<String> {
        const PART: usize = 1 << 20;
        let mut hash = Sha256::new();
        for part in self.bytes.chunks(PART) {
            check_stop()?;
            hash.update(part);
            take(part);
            self.release_part(part);
        }
        Ok(hex::encode(hash.finalize()))
    }

    /// A copy of the bytes. Pages are given back as they are copied.
    pub fn copied(&self) -> Vec<u8> {
        const PART: usize = 16 << 20;
        let mut bytes = Vec::with_capacity(self.bytes.len());
        for part in self.bytes.chunks(PART) {
            bytes.extend_from_slice(part);
            Tensor { bytes: part, ..*self }.release();
        }
        bytes
    }

    /// The values of the given rows (indices of the first dimension) as f32, row by row, with the
    /// errors of [`Tensor::to_f32`].
    pub fn rows_f32(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        let count = self.shape.first().copied().unwrap_or(1);
        if rows.start > rows.end || rows.end > count {
            let message =
                format!("{} has {count} rows, but rows {rows:?} are asked for", self.title());
            return Err(Error::input(message));
        }
        let width = self.len().checked_div(count).unwrap_or(0);
        self.values_f32(rows.start * width..rows.end * width)
    }

    /// Whether both hold the same values in the same shape. Equal types are compared byte by byte.
    /// `check_stop` is asked between parts.
    ///
    /// # Errors
    /// As [`Tensor::to_f32`], where the types differ; those of `check_stop`.
    pub fn same_values(
        &self,
        other: &Tensor<'_>,
        check_stop: &dyn Fn() -> Result<()>,
    ) -> Result<bool> {
        const PART: usize = 1 << 22;
        if self.shape != other.shape {
            return Ok(false);
        }
        if self.dtype == other.dtype {
            // Pages are given back on the way, a part at a time.
            for (own, other_part) in self.bytes.chunks(PART).zip(other.bytes.chunks(PART)) {
                check_stop()?;
                let same = own == other_part;
                self.release_part(own);
                other.release_part(other_part);
                if !same {
                    return Ok(false);
                }
            }
            return Ok(true);
        }
        for at in (0..self.len()).step_by(PART) {
            check_stop()?;
            let range = at..(at + PART).min(self.len());
            if self.values_f32(range.clone())? != other.values_f32(range)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Asks the system to read the tensor's pages before they are touched.
    pub fn read_ahead(&self) {
        let Some(map) = self.map else { return };
        let offset = self.bytes.as_ptr() as usize - map.as_ptr() as usize;
        // Advice: where it is not taken, the pages are read when they are touched.
        let _ = map.advise_range(memmap2::Advice::WillNeed, offset, self.bytes.len());
    }

    /// Gives the tensor's pages back to the system, so that a pass over the model holds one
    /// block's pages at a time. They are read from the file again if touched again.
    pub fn release(&self) {
        self.release_part(self.bytes);
    }

    /// Gives back the pages of `part`, a part of the tensor's bytes.
    pub(super) fn release_part(&self, part: &[u8]) {
        let Some(map) = self.map else { return };
        if part.is_empty() {
            return;
        }
        let offset = part.as_ptr() as usize - map.as_ptr() as usize;
        // SAFETY: the map is a read-only map of a file, so a page dropped here comes back with
        // the same content; pages shared with a neighbouring tensor as well. The call is advice:
        // its failure changes nothing that could be wrong.
        let _ =
            unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, part.len()) };
    }

    fn values_f32(&self, range: Range<usize>) -> Result<Vec<f32>> {
        let convert: fn(&[u8], &mut [f32]) = match self.dtype {
            Dtype::F16 => convert_f16,
            Dtype::BF16 => convert_bf16,
            Dtype::F32 => convert_f32,
            Dtype::U8 | Dtype::I8 | Dtype::F8E4m3 | Dtype::I32 | Dtype::I64 => {
                let found = form(self.dtype.name(), self.shape);
                let message = format!("{} is {found}, not F16, BF16 or F32", self.title());
                return Err(Error::input(message));
            }
        };
        let size = self.dtype.size_bytes();
        let bytes = &self.bytes[range.start * size..range.end * size];
        let mut values = vec![0f32; range.len()];
        let damaged = values
            .par_chunks_mut(VALUES_PER_TASK)
            .zip(bytes.par_chunks(VALUES_PER_TASK * size))
            .enumerate()
            .filter_map(|(task, (values, bytes))| {
                convert(bytes, values);
                first_not_finite(values).map(|at| task * VALUES_PER_TASK + at)
            })
            .min();
        match damaged {
            None => Ok(values),
            Some(at) => Err(self.not_finite(range.start + at, values[at])),
        }
    }

    fn not_finite(&self, index: usize, value: f32) -> Error {
        let mut position = vec![0; self.shape.len()];
        let mut rest = index;
        for (p, &n) in position.iter_mut().zip(self.shape).rev() {
            *p = rest % n;
            rest /= n;
        }
        if let Some(row) = position.first_mut() {
            *row += self.first_row;
        }
        Error::input(format!("{} holds {value} at {position:?}", self.title()))
            .hint("the weights are damaged or overflowed their type: download them again")
    }
}

/// The first NaN or infinity. The scan is a maximum over bits, which compilers vectorize: a float
/// is finite exactly if its bits without the sign are below those of infinity.
fn first_not_finite(values: &[f32]) -> Option<usize> {
    let largest = values.iter().fold(0, |largest, v| u32::max(largest, v.to_bits() & 0x7fff_ffff));
    if largest < f32::INFINITY.to_bits() {
        return None;
    }
    values.iter().position(|v| !v.is_finite())
}

fn convert_f16(bytes: &[u8], values: &mut [f32]) {
    // The slice conversion uses the processor's instruction (F16C) where there is one.
    match bytemuck::try_cast_slice::<u8, f16>(bytes) {
        Ok(halves) => halves.convert_to_f32_slice(values),
        Err(_) => {
            for (value, pair) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*pair).to_f32();
            }
        }
    }
}

fn convert_bf16(bytes: &[u8], values: &mut [f32]) {
    for (value, pair) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *value = f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16);
    }
}

fn convert_f32(bytes: &[u8], values: &mut [f32]) {
    for (value, word) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*word);
    }
}

#[cfg(test)]
#[path = "tensor_tests.rs"]
mod tests;
