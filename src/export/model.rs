/*! The checkpoint that is exported, and what is known of it before a tensor is read. */

use serde_json::Value;

use super::cast;
use super::format::Part;
use super::gguf::MatrixType;
use crate::checkpoint::linear::{from_tensors, order_spec, specs};
use crate::checkpoint::plan::{BlockPlan, LinearPlan, SitePlan};
use crate::checkpoint::{AtomCheckpoint, Dtype, Manifest, Stored, Tensor, TensorSpec};
use crate::model::{Architecture, read_manifest};
use crate::network::expect;
use crate::progress::Progress;
use crate::quant::linear::QuantizedLinear;
use crate::recipe::Recipe;
use crate::{Error, Kind, Result};

/// A checkpoint as its plan describes it. It can be asked about before the checkpoint exists.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// Its network.
    pub architecture: &'a Architecture,
    /// What becomes of every site and linear.
    pub blocks: &'a [BlockPlan],
    /// The settings.
    pub recipe: &'a Recipe,
    /// The type that the model's `config.json` gives its weights, to which engines cast all floating-point tensors.
    pub dtype: Dtype,
}

impl<'a> Subject<'a> {
    /// All sites.
    pub fn sites(&self) -> impl Iterator<Item = &'a SitePlan> {
        self.blocks.iter().flatten()
    }

    /// All linears that are quantized, with their sites.
    pub fn quantized(&self) -> impl Iterator<Item = (&'a SitePlan, &'a LinearPlan)> {
        let linears = |site: &'a SitePlan| site.linears.iter().map(move |linear| (site, linear));
        self.sites().flat_map(linears).filter(|(_, linear)| linear.bits < 16)
    }
}

/// An opened checkpoint that is exported.
pub struct ExportedModel<'a> {
    /// The checkpoint.
    pub checkpoint: &'a AtomCheckpoint,
    /// Its network.
    pub architecture: Architecture,
    /// What `atom.json` says.
    pub manifest: Manifest,
    /// The type of the model's weights in the export: what was asked for, or that of `config.json`.
    pub dtype: Dtype,
    /// What embedding and head become in a GGUF file.
    pub embedding: MatrixType,
    /// Whether floating-point tensors become of that type. Otherwise they stay as they are.
    pub casts: bool,
    /// Told of work, and asked whether to stop.
    pub progress: &'a dyn Progress,
}

/// What stands in the place of a tensor of the source.
pub enum Piece<'a> {
    /// The tensor itself.
    Unquantized(Tensor<'a>),
    /// A quantized linear.
    Quantized(&'a SitePlan, &'a LinearPlan),
}

impl<'a> ExportedModel<'a> {
    /// The model of a checkpoint whose configuration, tokenizer and manifest are as they were written, of weights of
    /// the type `dtype`, or else that of `config.json`.
    ///
    /// # Errors
    /// Input: a network that this program does not know, or a damaged file.
    pub fn open(
        checkpoint: &'a AtomCheckpoint,
        dtype: Option<Dtype>,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let architecture = Architecture::read(checkpoint.config(), &checkpoint.config_file())?;
        for file in checkpoint.covered_files() {
            checkpoint.verify_file(file).map_err(as_input)?;
        }
        let manifest = read_manifest(checkpoint, &architecture)?;
        let stored = checkpoint.tensor(architecture.outer_tensors()[0].name)?.dtype;
        let casts = dtype.is_some();
        let dtype = dtype.or(model_dtype(checkpoint.config())).unwrap_or(stored);
        let embedding = MatrixType::default();
        Ok(Self { checkpoint, architecture, manifest, dtype, embedding, casts, progress })
    }

    /// What formats are asked about.
    pub fn subject(&self) -> Subject<'_> {
        let Self { architecture, manifest, dtype, .. } = self;
        let Manifest { blocks, recipe, .. } = manifest;
        Subject { architecture, blocks, recipe, dtype: *dtype }
    }

    /// The tensors of the source in the order of its network, each as it is stored here. All are there and of the
    /// form that the plan says.
    ///
    /// # Errors
    /// Input: a tensor that is missing or of another form.
    pub fn pieces(&self) -> Result<Vec<Piece<'_>>> {
        let mut pieces = Vec::new();
        let unquantized = |name: &str, shape: &[usize]| {
            expect(self.checkpoint, name, shape).map(Piece::Unquantized)
        };
        let outer = self.architecture.outer_tensors();
        let (embedding, last) = outer.split_first().expect("the embedding is always there");
        pieces.push(unquantized(embedding.name, &embedding.shape)?);
        for (index, block) in self.manifest.blocks.iter().enumerate() {
            for (name, shape) in self.architecture.unquantized_tensors(index) {
                pieces.push(unquantized(&name, &shape)?);
            }
            for site in block {
                self.checkpoint.fetch(&order_spec(&site.name, site.width()))?;
                for linear in &site.linears {
                    if linear.bits == 16 {
                        let shape = [linear.rows, site.channels];
                        pieces.push(unquantized(&format!("{}.weight", linear.name), &shape)?);
                        continue;
                    }
                    for spec in specs(&linear.name, linear.rows, &site.weights(linear)) {
                        self.checkpoint.fetch(&spec)?;
                    }
                    pieces.push(Piece::Quantized(site, linear));
                }
            }
        }
        for outer in last {
            pieces.push(unquantized(outer.name, &outer.shape)?);
        }
        Ok(pieces)
    }

    /// Compares a tensor with its hash, so that damage is not copied.
    ///
    /// # Errors
    /// Input: the tensor is not what was written.
    pub fn verify(&self, name: &str) -> Result<()> {
        let check_stop = || self.progress.check_stop();
        self.checkpoint.verify_tensor(name, &check_stop).map_err(as_input)
    }

    /// A copy of a tensor's bytes with the bits of `flip` turned in each, compared with their hash.
    ///
    /// # Errors
    /// Input: the tensor is missing or not what was written.
    pub fn copy(&self, name: &str, flip: u8) -> Result<Vec<u8>> {
        let check_stop = || self.progress.check_stop();
        self.checkpoint.verified_copy(name, flip, &check_stop).map_err(as_input)
    }

    /// A quantized linear, its tensors compared with their hashes and their pages given back.
    ///
    /// # Errors
    /// Input: a tensor is missing, of another form, or not what was written.
    pub fn quantized(&self, site: &SitePlan, linear: &LinearPlan) -> Result<QuantizedLinear> {
        let format = site.weights(linear);
        let stored = specs(&linear.name, linear.rows, &format);
        stored.iter().try_for_each(|spec| self.verify(&spec.name))?;
        let quantized = from_tensors(self.checkpoint, &linear.name, linear.rows, &format)?;
        for spec in &stored {
            self.checkpoint.tensor(&spec.name)?.release();
        }
        Ok(quantized)
    }

    /// A part that holds an unquantized tensor, of the type that was asked for.
    pub fn unquantized(&'a self, tensor: Tensor<'a>) -> Part<'a> {
        if self.casts { cast::part(self, tensor, self.dtype) } else { self.copied(tensor) }
    }

    /// A part that copies a stored tensor.
    pub fn copied(&'a self, tensor: Tensor<'a>) -> Part<'a> {
        let Tensor { name, dtype, shape, .. } = tensor;
        Part {
            tensors: vec![TensorSpec::new(name, dtype, shape)],
            make: Box::new(move || Ok(vec![self.checkpoint.verified_bytes(tensor, 0)])),
        }
    }
}

/// A failed check of the checkpoint, which is this command's input.
pub(super) fn as_input(error: Error) -> Error {
    if error.kind() != Kind::Check {
        return error;
    }
    let hint = error.hint_text().unwrap_or_default().to_owned();
    Error::input(error.to_string()).hint(hint)
}

/// The type of weights that a `config.json` names.
pub(super) fn model_dtype(config: &Value) -> Option<Dtype> {
    let named = ["dtype", "torch_dtype"].into_iter().find_map(|key| config.get(key)?.as_str());
    match named?.trim_start_matches("torch.") {
        "float16" | "half" => Some(Dtype::F16),
        "bfloat16" => Some(Dtype::BF16),
        "float32" | "float" => Some(Dtype::F32),
        _ => None,
    }
}
