/*! What a run is decided by, and what follows from it: the tensors of the output, its configuration and its
manifest. */

use std::collections::HashMap;

use serde_json::{Value, json};

use super::output::Output;
use crate::Result;
use crate::checkpoint::linear::{order_spec, specs};
use crate::checkpoint::plan::{BlockPlan, bits_per_weight};
use crate::checkpoint::{
    FORMAT_VERSION, Manifest, Options, Provenance, SideFile, Source, SourceRecord, TensorSpec,
};
use crate::model::Architecture;
use crate::model::sites::{EMBEDDING, FINAL_NORM};
use crate::network::memory::Windows;
use crate::network::{expect, key_mean_spec};
use crate::progress::Progress;
use crate::recipe::Recipe;

/// A model, and the windows it is calibrated on.
pub struct CalibrationInput<'a> {
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
    pub fn windows(&self) -> Windows {
        Windows { tokens: self.tokens.len(), seq_len: self.provenance.seq_len }
    }

    /// Refuses a source whose tensors are not what its config says, before any work.
    pub fn check_tensors(&self) -> Result<()> {
        for (name, shape) in self.architecture.tensors() {
            expect(self.source, &name, &shape)?;
        }
        Ok(())
    }

    /// Refuses a NaN or infinity in a tensor that is kept: such tensors are few, and the output head
    /// would otherwise be looked at after all the work.
    pub fn check_kept(&self, progress: &dyn Progress) -> Result<()> {
        for name in self.kept_names() {
            let tensor = self.source.tensor(&name)?;
            tensor.check_finite(&|| progress.check_stop())?;
            tensor.release();
        }
        Ok(())
    }

    /// Bytes of what is in the output whatever the plan: the tensors that are not linears, and the files
    /// next to the shards.
    pub fn kept_bytes(&self) -> Result<u64> {
        let mut bytes = self.source.side_files()?.copied.iter().map(SideFile::bytes).sum();
        for name in self.kept_names() {
            bytes += self.kept(&name)?.bytes();
        }
        Ok(bytes)
    }

    /// The tensors that are not linears; a tied head once.
    fn kept_names(&self) -> Vec<String> {
        let blocks = 0..self.architecture.blocks;
        let others = blocks.flat_map(|block| self.architecture.unquantized_tensors(block));
        let mut names = vec![EMBEDDING.to_owned(), FINAL_NORM.to_owned()];
        if !self.architecture.tied {
            names.push(self.architecture.head_name().to_owned());
        }
        names.extend(others.map(|(name, _)| name));
        names
    }

    /// A tensor that stays as the source has it.
    fn kept(&self, name: &str) -> Result<TensorSpec> {
        let tensor = self.source.tensor(name)?;
        Ok(TensorSpec::new(name, tensor.dtype, tensor.shape))
    }

    /// Tensors that stay as they are, with their bytes.
    pub fn copies(
        &self,
        names: impl IntoIterator<Item = String>,
        progress: &dyn Progress,
    ) -> Result<Vec<(String, Vec<u8>)>> {
        names
            .into_iter()
            .map(|name| {
                let tensor = self.source.tensor(&name)?;
                // A NaN here would spoil the model as surely as one in a linear.
                tensor.check_finite(&|| progress.check_stop())?;
                Ok((name, tensor.copied()))
            })
            .collect()
    }
}

/// Everything a run is decided by.
pub struct Job<'a> {
    /// The model and its calibration windows.
    pub input: CalibrationInput<'a>,
    /// The resolved recipe.
    pub recipe: Recipe,
    /// What becomes of every block.
    pub blocks: Vec<BlockPlan>,
}

impl Job<'_> {
    /// The output's tensors, in the order they are stored.
    pub fn tensor_specs(&self) -> Result<Vec<TensorSpec>> {
        let mut all = vec![self.input.kept(EMBEDDING)?];
        for (index, block) in self.blocks.iter().enumerate() {
            for (name, _) in self.input.architecture.unquantized_tensors(index) {
                all.push(self.input.kept(&name)?);
            }
            if self.recipe.kv().is_centered() {
                all.push(key_mean_spec(&self.input.architecture, index));
            }
            for site in block {
                all.push(order_spec(&site.name, site.width()));
                for linear in &site.linears {
                    if linear.bits == 16 {
                        all.push(self.input.kept(&format!("{}.weight", linear.name))?);
                    } else {
                        all.extend(specs(&linear.name, linear.rows, &site.weights(linear)));
                    }
                }
            }
        }
        all.push(self.input.kept(FINAL_NORM)?);
        if !self.input.architecture.tied {
            all.push(self.input.kept(self.input.architecture.head_name())?);
        }
        Ok(all)
    }

    /// How the output is written.
    pub fn options(&self, output: &Output) -> Result<Options> {
        let side_bytes = self.input.source.side_files()?.copied.iter().map(SideFile::bytes).sum();
        Ok(Options { resume: output.resume, side_bytes, ..Options::default() })
    }

    /// What a resumed run must agree on.
    pub fn identity(&self) -> Result<Value> {
        let mut identity = json!({
            "tool_version": env!("CARGO_PKG_VERSION"),
            "source": self.input.source.fingerprint()?,
            "recipe": self.recipe,
            "calibration": self.input.provenance,
            "blocks": self.blocks,
        });
        if !self.input.ignored.is_empty() {
            identity["ignored_tensors"] = json!(self.input.ignored);
        }
        Ok(identity)
    }

    /// `config.json` of the output.
    pub fn config(&self) -> Value {
        let mut config = self.input.source.config().clone();
        if !self.input.architecture.tied && config.get("tie_word_embeddings") == Some(&json!(true))
        {
            // The stored head is another than the embedding, whatever the source says.
            config["tie_word_embeddings"] = json!(false);
        }
        config["quantization_config"] = json!({
            "quant_method": "atom",
            "format_version": FORMAT_VERSION,
            "bits": self.recipe.bits,
            "act_bits": self.recipe.act_bits,
            "kv_bits": self.recipe.kv_bits,
            "format": self.recipe.format,
            "group": self.recipe.group,
            "outliers": self.recipe.outliers,
        });
        config
    }

    /// What `atom.json` of the output says. `errors` are those of the quantized linears.
    pub fn manifest(&self, errors: &[(String, f64)]) -> Result<Manifest> {
        let errors: HashMap<&str, f64> =
            errors.iter().map(|(name, error)| (name.as_str(), *error)).collect();
        let mut blocks = self.blocks.clone();
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
            blocks,
        })
    }
}
