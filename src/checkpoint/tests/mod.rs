/*! The room from outside: what its readers and its writer do with good and bad directories. */

mod linear;
mod manifest;
mod resume;
mod source;
mod write;

use std::path::Path;

use serde_json::Value;

use manifest::manifest;

use super::{Destination, Dtype, Inputs, TensorSpec};
use crate::Error;

/// A safetensors file's bytes: `(name, dtype, shape, bytes)` for each tensor, in order.
fn safetensors(tensors: &[(&str, &str, &[usize], &[u8])]) -> Vec<u8> {
    let mut entries = serde_json::Map::new();
    let (mut offset, mut data) = (0, Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let end = offset + bytes.len();
        let entry =
            serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]});
        entries.insert((*name).to_string(), entry);
        data.extend_from_slice(bytes);
        offset = end;
    }
    let header = Value::Object(entries).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// The error of a result whose success cannot be printed.
#[track_caller]
fn error_of<T>(result: crate::Result<T>) -> Error {
    match result {
        Ok(_) => panic!("this must fail"),
        Err(error) => error,
    }
}

fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    fs_err::write(path, bytes).unwrap();
}

fn to(out: &Path, overwrite: bool) -> Destination {
    Destination { out: out.to_owned(), overwrite, inputs: Inputs::default() }
}

/// Two blocks of small tensors of several types.
fn specs() -> Vec<TensorSpec> {
    vec![
        TensorSpec::new("a.weight_codes", Dtype::U8, [3]),
        TensorSpec::new("a.weight_scales", Dtype::F16, [2]),
        TensorSpec::new("b.order", Dtype::I32, [4]),
    ]
}

fn block_a() -> Vec<(String, Vec<u8>)> {
    vec![
        ("a.weight_codes".to_string(), vec![1, 2, 3]),
        ("a.weight_scales".to_string(), vec![0, 0x3c, 0, 0x40]),
    ]
}

fn block_b() -> Vec<(String, Vec<u8>)> {
    vec![("b.order".to_string(), [3i32, -1, 0, 2].iter().flat_map(|v| v.to_le_bytes()).collect())]
}
