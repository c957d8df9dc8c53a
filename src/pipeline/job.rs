/*! What a run is decided by, and what follows from it: the tensors of the output, its configuration and its
manifest. */

use std::collections::HashMap;

use serde::Serialize;
use serde_json::Value;

use super::output::Output;
use crate::Result;
use crate::checkpoint::plan::{BlockPlan, bits_per_weight};
use crate::checkpoint::{
    DoneBlock, FORMAT_VERSION, Manifest, Options, Provenance, SideFile, Source, SourceRecord,
    TensorSpec,
};
use crate::model::Architecture;
use crate::network::memory::Windows;
use crate::network::{PlannedTensor, expect, planned_tensors};
use crate::progress::Progress;
use crate::quant::codebook::Codebook;
use crate::recipe::{Group, Outliers, Recipe};

/// A model, and the windows it is calibrated on.
pub(super) struct CalibrationInput<'a> {
    /// The model.
    pub source: &'a Source,
    /// Its network.
    pub architecture: Architecture,
    /// Stored names of the tensors that have no part in it and are left out.
    pub ignored: Vec<String>,
    /// Calibration windows, `[samples, seq_len]`.
    pub tokens: Vec<u32>,
    /// Where they came from.
    pub provenance: Provenance,
}

impl CalibrationInput<'_> {
    /// How many tokens there are, and how they are cut.
    pub(super) fn windows(&self) -> Windows {
        Windows { tokens: self.tokens.len(), seq_len: self.provenance.seq_len }
    }

    /// Refuses a source whose tensors are not what its config says, before any work.
    pub(super) fn check_tensors(&self) -> Result<()> {
        for (name, shape) in self.architecture.tensors() {
            expect(self.source, &name, &shape)?;
        }
        Ok(())
    }

    /// Refuses a NaN or infinity in a tensor that is never quantized: such tensors are few, and the output head
    /// would otherwise be looked at after all the work.
    pub(super) fn check_unquantized(&self, progress: &dyn Progress) -> Result<()> {
        for name in self.never_quantized() {
            let tensor = self.source.tensor(&name)?;
            tensor.check_finite(&|| progress.check_stop())?;
            tensor.release();
        }
        Ok(())
    }

    /// Bytes of what is in the output whatever the plan: the tensors that are not linears, and the files
    /// next to the shards.
    pub(super) fn unquantized_bytes(&self) -> Result<u64> {
        let mut bytes = self.source.side_files()?.copied.iter().map(SideFile::bytes).sum();
        for name in self.never_quantized() {
            bytes += self.unquantized(&name)?.bytes();
        }
        Ok(bytes)
    }

    /// The names of the tensors that no plan quantizes: all but the linears' weights.
    fn never_quantized(&self) -> Vec<String> {
        let outer = self.architecture.outer_tensors().into_iter();
        let blocks = 0..self.architecture.blocks;
        let others = blocks.flat_map(|block| self.architecture.unquantized_tensors(block));
        outer.map(|outer| outer.name.to_owned()).chain(others.map(|(name, _)| name)).collect()
    }

    /// A tensor that stays as the source has it.
    fn unquantized(&self, name: &str) -> Result<TensorSpec> {
        let tensor = self.source.tensor(name)?;
        Ok(TensorSpec::new(name, tensor.dtype, tensor.shape))
    }

    /// The name and bytes of a tensor that stays as the source has it.
    pub(super) fn copy(&self, name: &str, progress: &dyn Progress) -> Result<(String, Vec<u8>)> {
        let tensor = self.source.tensor(name)?;
        // A NaN here would spoil the model as surely as one in a linear.
        tensor.check_finite(&|| progress.check_stop())?;
        Ok((name.to_owned(), tensor.copied()))
    }
}

/// What decides the bytes of an output besides its tensors' names and shapes.
#[derive(Serialize)]
struct Identity<'a> {
    tool_version: &'static str,
    source: String,
    recipe: &'a Recipe,
    calibration: &'a Provenance,
    blocks: &'a [BlockPlan],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    ignored_tensors: &'a [String],
}

/// The part of the output's `config.json` by which other programs recognize a quantized checkpoint.
#[derive(Serialize)]
struct QuantizationConfig {
    quant_method: &'static str,
    format_version: u64,
    bits: u8,
    act_bits: u8,
    kv_bits: u8,
    format: Codebook,
    group: Group,
    outliers: Outliers,
}

/// Everything a run is decided by.
pub(super) struct Job<'a> {
    /// The model and its calibration windows.
    pub input: CalibrationInput<'a>,
    /// The resolved recipe.
    pub recipe: Recipe,
    /// What becomes of every block.
    pub blocks: Vec<BlockPlan>,
}

impl Job<'_> {
    /// The output's tensors, in the order they are stored.
    pub(super) fn tensor_specs(&self) -> Result<Vec<TensorSpec>> {
        let planned = planned_tensors(&self.input.architecture, &self.blocks, &self.recipe.kv());
        let specs = planned.into_iter().map(|tensor| match tensor {
            PlannedTensor::Unquantized { name, .. } => self.input.unquantized(&name),
            PlannedTensor::Made(spec) => Ok(spec),
        });
        specs.collect()
    }

    /// How many of the units that were written are blocks.
    pub(super) fn finished_blocks(&self, done: &[DoneBlock]) -> usize {
        let outer = self.input.architecture.outer_tensors();
        done.iter().filter(|done| outer.iter().all(|outer| outer.part != done.block)).count()
    }

    /// How the output is written.
    pub(super) fn options(&self, output: &Output) -> Result<Options> {
        let side_bytes = self.input.source.side_files()?.copied.iter().map(SideFile::bytes).sum();
        Ok(Options { resume: output.resume, side_bytes, ..Options::default() })
    }

    /// What a resumed run must agree on.
    pub(super) fn identity(&self) -> Result<Value> {
        let identity = Identity {
            tool_version: env!("CARGO_PKG_VERSION"),
            source: self.input.source.fingerprint()?,
            recipe: &self.recipe,
            calibration: &self.input.provenance,
            blocks: &self.blocks,
            ignored_tensors: &self.input.ignored,
        };
        Ok(serde_json::to_value(identity).expect("an identity has only JSON types"))
    }

    /// `config.json` of the output.
    pub(super) fn config(&self) -> Value {
        const TIED: &str = "tie_word_embeddings";
        let mut config = self.input.source.config().clone();
        if !self.input.architecture.tied && config.get(TIED) == Some(&Value::Bool(true)) {
            // The stored head is another than the embedding, whatever the source says.
            config[TIED] = Value::Bool(false);
        }
        let Recipe { bits, act_bits, kv_bits, format, group, outliers, .. } = self.recipe;
        let quantization = QuantizationConfig {
            quant_method: "atom",
            format_version: FORMAT_VERSION,
            bits,
            act_bits,
            kv_bits,
            format,
            group,
            outliers,
        };
        config["quantization_config"] =
            serde_json::to_value(quantization).expect("settings have only JSON types");
        config
    }

    /// What `atom.json` of the output says. `blocks` are the complete plans, `errors` those of the quantized linears.
    pub(super) fn manifest(
        &self,
        mut blocks: Vec<BlockPlan>,
        errors: &[(String, f64)],
    ) -> Result<Manifest> {
        let errors: HashMap<&str, f64> =
            errors.iter().map(|(name, error)| (name.as_str(), *error)).collect();
        for linear in blocks.iter_mut().flatten().flat_map(|site| &mut site.linears) {
            linear.error = errors.get(linear.name.as_str()).copied();
        }
        Ok(Manifest {
            format_version: FORMAT_VERSION,
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            source: SourceRecord {
                name: self.input.source.name().to_owned(),
                fingerprint: self.input.source.fingerprint()?,
                bytes: self.input.source.total_bytes(),
                hub: self.input.source.place().cloned(),
                ignored_tensors: self.input.ignored.clone(),
            },
            calibration: self.input.provenance.clone(),
            recipe: self.recipe.clone(),
            kv: self.recipe.kv(),
            bits_per_weight: bits_per_weight(&self.blocks),
            distillation: None,
            blocks,
        })
    }
}
