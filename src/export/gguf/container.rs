/*! The GGUF container, version 3: a header, metadata as key-values, a description of every tensor, then the tensors' bytes, each
at a multiple of the alignment. All numbers are little-endian, and shapes are written fastest dimension first
(ggml's docs/gguf.md). */

use std::ops::Range;

/// Tensors begin at multiples of it, counted from the end of the header; the default of the format.
pub(super) const ALIGNMENT: u64 = 32;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;

/// The value of a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Ints(Vec<i32>),
    Floats(Vec<f32>),
    Texts(Vec<String>),
}

/// The format's number of a type of values.
mod kind {
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const TEXT: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
}

/// Keys and values, in the order of the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Metadata(Vec<(String, Value)>);

impl Metadata {
    /// Adds a key.
    pub(super) fn add(&mut self, key: impl Into<String>, value: Value) {
        self.0.push((key.into(), value));
    }

    /// Adds a key that holds a count.
    ///
    /// # Panics
    /// If the count is beyond u32; the bounds of a network's sizes are below it.
    pub(super) fn count(&mut self, key: impl Into<String>, count: usize) {
        self.add(key, Value::U32(u32::try_from(count).expect("counts of a network fit u32")));
    }

    /// Adds a key that holds a text.
    pub(super) fn text(&mut self, key: impl Into<String>, text: impl Into<String>) {
        self.add(key, Value::Text(text.into()));
    }

    /// Adds all keys of `other`.
    pub(super) fn append(&mut self, mut other: Self) {
        self.0.append(&mut other.0);
    }

    /// The value of a key.
    #[cfg(test)]
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(own, _)| own == key).map(|(_, value)| value)
    }
}

/// What unquantized matrices, embedding and head, become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MatrixType {
    /// f16.
    #[default]
    F16,
    /// Rounded to blocks of 32 codes of 8 bits.
    Q8_0,
}

/// How the numbers of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TensorType {
    F32,
    F16,
    /// Blocks of 32 codes of 4 bits with one f16 scale.
    Q4_0,
    /// Blocks of 32 codes of 8 bits with one f16 scale.
    Q8_0,
}

impl TensorType {
    /// ggml's number of the type.
    fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
        }
    }

    /// Bytes of a row of `columns` numbers, a multiple of 32 for blocks.
    pub(super) fn row_bytes(self, columns: usize) -> usize {
        match self {
            Self::F32 => 4 * columns,
            Self::F16 => 2 * columns,
            Self::Q4_0 => columns / 32 * 18,
            Self::Q8_0 => columns / 32 * 34,
        }
    }
}

/// What the file says of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TensorInfo {
    /// Its name in llama.cpp.
    pub(super) name: String,
    /// Its shape, slowest dimension first: `[out, in]`, `[experts, out, in]` or `[channels]`.
    pub(super) shape: Vec<usize>,
    /// Its type.
    pub(super) kind: TensorType,
}

impl TensorInfo {
    /// Bytes of the tensor.
    pub(super) fn bytes(&self) -> u64 {
        let (columns, rows) = self.shape.split_last().expect("no tensor is a scalar");
        let rows: usize = rows.iter().product();
        rows as u64 * self.kind.row_bytes(*columns) as u64
    }
}

/// A file before its tensors are written.
#[derive(Debug)]
pub(super) struct Layout {
    /// Everything before the tensors, padded to the alignment.
    pub(super) header: Vec<u8>,
    /// Where each tensor lies in the file, in bytes from its beginning.
    pub(super) places: Vec<Range<u64>>,
    /// Length of the file in bytes.
    pub(super) bytes: u64,
}

/// Lays out a file of this metadata and these tensors, in their order.
pub(super) fn lay_out(metadata: &Metadata, tensors: &[TensorInfo]) -> Layout {
    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.0.len() as u64).to_le_bytes());
    for (key, value) in &metadata.0 {
        push_text(&mut header, key);
        push_value(&mut header, value);
    }
    let mut end = 0;
    let mut offsets = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let start: u64 = end;
        push_text(&mut header, &tensor.name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&n| header.extend((n as u64).to_le_bytes()));
        header.extend(tensor.kind.number().to_le_bytes());
        header.extend(start.to_le_bytes());
        offsets.push(start..start + tensor.bytes());
        // The last tensor is padded as well.
        end = (start + tensor.bytes()).next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
    let first = header.len() as u64;
    let places = offsets.into_iter().map(|place| first + place.start..first + place.end);
    Layout { places: places.collect(), bytes: first + end, header }
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn push_value(out: &mut Vec<u8>, value: &Value) {
    let array = |out: &mut Vec<u8>, kind: u32, length: usize| {
        out.extend(kind::ARRAY.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((length as u64).to_le_bytes());
    };
    let single = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    match value {
        Value::U32(value) => {
            single(out, kind::U32);
            out.extend(value.to_le_bytes());
        }
        Value::F32(value) => {
            single(out, kind::F32);
            out.extend(value.to_le_bytes());
        }
        Value::Bool(value) => {
            single(out, kind::BOOL);
            out.push(u8::from(*value));
        }
        Value::Text(value) => {
            single(out, kind::TEXT);
            push_text(out, value);
        }
        Value::Ints(values) => {
            array(out, kind::I32, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        Value::Floats(values) => {
            array(out, kind::F32, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        Value::Texts(values) => {
            array(out, kind::TEXT, values.len());
            values.iter().for_each(|value| push_text(out, value));
        }
    }
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
