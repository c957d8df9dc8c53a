/*! A checkpoint of one shard as it lies in its files: every name, type and byte of it can be changed. */

use std::path::Path;

use fs_err as fs;
use half::f16;
use serde_json::{Map, Value, json};

/// A stored tensor.
#[derive(Clone)]
pub(crate) struct StoredTensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl StoredTensor {
    /// A tensor of F16 values.
    pub(crate) fn f16(name: &str, shape: &[usize], value: impl Fn(usize) -> f32) -> Self {
        let count = shape.iter().product();
        let bytes = (0..count).flat_map(|at| f16::from_f32(value(at)).to_le_bytes()).collect();
        Self { name: name.to_owned(), dtype: "F16".to_owned(), shape: shape.to_vec(), bytes }
    }
}

/// A checkpoint's configuration and tensors.
#[derive(Clone)]
pub(crate) struct StoredModel {
    pub config: Value,
    pub tensors: Vec<StoredTensor>,
}

impl StoredModel {
    /// The bundled tiny-llama.
    pub(crate) fn tiny_llama() -> Self {
        Self::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-llama"))
    }

    /// The checkpoint in a directory.
    pub(crate) fn read(dir: &Path) -> Self {
        let config = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let start = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let header: Map<String, Value> = serde_json::from_slice(&bytes[8..start]).unwrap();
        let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
        let tensors = tensors.map(|(name, entry)| {
            let offset = |at: usize| start + entry["data_offsets"][at].as_u64().unwrap() as usize;
            let shape = entry["shape"].as_array().unwrap().iter();
            StoredTensor {
                name,
                dtype: entry["dtype"].as_str().unwrap().to_owned(),
                shape: shape.map(|n| n.as_u64().unwrap() as usize).collect(),
                bytes: bytes[offset(0)..offset(1)].to_vec(),
            }
        });
        Self { config, tensors: tensors.collect() }
    }

    /// The tensor of this name.
    pub(crate) fn tensor(&mut self, name: &str) -> &mut StoredTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// The same with one tensor more.
    pub(crate) fn with(mut self, tensor: StoredTensor) -> Self {
        self.tensors.push(tensor);
        self
    }

    /// The same with other names.
    pub(crate) fn renamed(mut self, rename: impl Fn(&str) -> String) -> Self {
        self.tensors.iter_mut().for_each(|tensor| tensor.name = rename(&tensor.name));
        self
    }

    /// Writes it with the bundled tokenizer.
    pub(crate) fn write(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama/tokenizer.json");
        fs::copy(tokenizer, dir.join("tokenizer.json")).unwrap();
        fs::write(dir.join("model.safetensors"), shard(&self.tensors)).unwrap();
    }
}

/// A safetensors file.
pub(super) fn shard(tensors: &[StoredTensor]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for StoredTensor { name, dtype, shape, bytes } in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let offsets = [start, data.len()];
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}
