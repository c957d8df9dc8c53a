/*! A checkpoint of random weights with a known model's widths, to measure `quantize` where the model
itself is not at hand. Its tokenizer is the bundled tiny model's. */

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::f16;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::model::Architecture;
use crate::{Error, Result, hub};

/// A synthetic model, and how it is calibrated.
#[derive(Clone, Debug)]
pub struct SyntheticModel {
    /// The model whose widths it has, one of [`SHAPES`].
    pub shape: String,
    /// Decoder blocks; none for as many as the model has.
    pub blocks: Option<usize>,
    /// Calibration windows.
    pub samples: usize,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Where checkpoint and result are left; none for a temporary directory.
    pub directory: Option<PathBuf>,
}

/// Widths of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Channels of the residual stream.
    pub hidden: usize,
    /// Channels between the MLP's projections.
    pub intermediate: usize,
    /// Decoder blocks.
    pub blocks: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
}

const fn shape(
    hidden: usize,
    intermediate: usize,
    blocks: usize,
    heads: usize,
    kv_heads: usize,
) -> Shape {
    Shape { hidden, intermediate, blocks, heads, kv_heads }
}

/// The known models.
pub const SHAPES: [(&str, Shape); 7] = [
    ("llama-7b", shape(4096, 11008, 32, 32, 32)),
    ("llama-13b", shape(5120, 13824, 40, 40, 40)),
    ("llama-30b", shape(6656, 17920, 60, 52, 52)),
    ("llama-65b", shape(8192, 22016, 80, 64, 64)),
    ("llama-2-7b", shape(4096, 11008, 32, 32, 32)),
    ("llama-2-13b", shape(5120, 13824, 40, 40, 40)),
    ("llama-2-70b", shape(8192, 28672, 80, 64, 8)),
];

impl SyntheticModel {
    /// The widths of the model it is named after.
    pub fn known_shape(&self) -> Result<Shape> {
        SHAPES.iter().find(|(name, _)| *name == self.shape).map(|(_, shape)| *shape).ok_or_else(
            || {
                let known: Vec<&str> = SHAPES.iter().map(|(name, _)| *name).collect();
                Error::usage(format!("there is no shape named `{}`", self.shape))
                    .hint(format!("the shapes are {}", known.join(", ")))
            },
        )
    }

    /// Its `config.json`.
    ///
    /// # Errors
    /// A usage error for a name that is not known.
    pub fn config(&self) -> Result<Value> {
        let Shape { hidden, intermediate, blocks, heads, kv_heads } = self.known_shape()?;
        Ok(json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": self.blocks.unwrap_or(blocks),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": 32000,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": false,
            "torch_dtype": "float16",
        }))
    }

    /// Writes the checkpoint into `directory`, a tensor at a time, and sees that it is read from the
    /// disk and not from the system's cache.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let config = self.config()?;
        fs_err::create_dir_all(directory)?;
        fs_err::write(directory.join("config.json"), config.to_string())?;
        fs_err::write(directory.join("tokenizer.json"), hub::tiny_llama()?.tokenizer()?)?;

        let tensors = Architecture::from_config(&config)?.tensors();
        let mut header = Map::new();
        let mut offset = 0;
        for (name, shape) in &tensors {
            let end = offset + 2 * shape.iter().product::<usize>();
            header.insert(
                name.clone(),
                json!({"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}),
            );
            offset = end;
        }
        let header = Value::Object(header).to_string();
        let file = fs_err::File::create(directory.join("model.safetensors"))?;
        let mut file = BufWriter::new(file);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for (seed, (_, shape)) in tensors.iter().enumerate() {
            // Norms are ones; weights keep a token's energy from layer to layer.
            match shape[..] {
                [len] => file.write_all(&f16::ONE.to_le_bytes().repeat(len))?,
                _ => write_random(&mut file, seed as u64, shape)?,
            }
        }
        let file = file.into_inner().map_err(|error| error.into_error())?;
        file.sync_all()?;
        // SAFETY: the descriptor is open. The call is advice.
        unsafe {
            use std::os::fd::AsRawFd;
            libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED);
        }
        Ok(())
    }
}

/// Uniform values of variance `1 / columns`, written in parts of a few megabytes.
fn write_random(file: &mut impl Write, seed: u64, shape: &[usize]) -> Result<()> {
    const PART: usize = 1 << 21;
    let columns = shape.last().copied().unwrap_or(1);
    let scale = (12.0 / columns as f32).sqrt();
    let count: usize = shape.iter().product();
    let mut bytes = Vec::new();
    for first in (0..count).step_by(PART) {
        let len = PART.min(count - first);
        (first..first + len)
            .into_par_iter()
            .map(|at| {
                // A multiplicative hash of the place: the same weights however they are made.
                let hash = (at as u64 ^ (seed << 40)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let uniform = ((hash ^ (hash >> 29)) as u32) as f32 / u32::MAX as f32 - 0.5;
                f16::from_f32(uniform * scale).to_le_bytes()
            })
            .collect_into_vec(&mut bytes);
        file.write_all(bytes.as_flattened())?;
    }
    Ok(())
}
