/*! The content of `atom.json`: what was done to which source, and how the checkpoint is run. This type is the only way to it. */

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::plan::BlockPlan;
use super::{DistillationRecord, FORMAT_VERSION, HubOrigin, Provenance};
use crate::quant::kv::KvFormat;
use crate::recipe::Recipe;
use crate::{Error, Kind, Result};

/// What `atom.json` says, but for the hashes, which the checkpoint room keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub format_version: u64,
    /// Version of the program that wrote it.
    pub tool_version: String,
    /// What was quantized.
    pub source: SourceRecord,
    /// Where the calibration windows came from.
    pub calibration: Provenance,
    /// The settings.
    pub recipe: Recipe,
    /// How keys and values are held.
    pub kv: KvFormat,
    /// Average bits of a weight of the linears.
    pub bits_per_weight: f64,
    /// How its scales, norms and clip ratios were trained afterwards, if they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distillation: Option<DistillationRecord>,
    /// What became of every site and linear.
    pub blocks: Vec<BlockPlan>,
}

/// The source of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Its name.
    pub name: String,
    /// Its fingerprint.
    pub fingerprint: String,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Where on the Hub it came from, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubOrigin>,
    /// Stored tensors that were left out, at the user's wish or as another part's of a larger model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored_tensors: Vec<String>,
}

impl Manifest {
    /// The manifest that a value of `atom.json` is.
    ///
    /// # Errors
    /// Input: a field that is missing, of another type or out of its range, named.
    pub(in crate::checkpoint) fn parse(content: &Value) -> Result<Self> {
        Self::deserialize(content).map_err(|error| Error::of(Kind::Input, error))?.check()
    }

    /// The manifest itself, if every field means something and the fields agree.
    fn check(self) -> Result<Self> {
        let recipe = self.recipe.clone().check().map_err(|error| error.context("`recipe`"))?;
        self.kv.check().map_err(|error| error.context("`kv`"))?;
        if self.kv != recipe.kv() {
            return Err(Error::input("`kv` is not what `recipe` says of keys and values"));
        }
        if self.format_version != FORMAT_VERSION {
            return Err(Error::input(format!("`format_version` is {}", self.format_version)));
        }
        if self.bits_per_weight.is_nan() || self.bits_per_weight <= 0.0 {
            return Err(Error::input(format!("`bits_per_weight` is {}", self.bits_per_weight)));
        }
        self.distillation.as_ref().map_or(Ok(()), DistillationRecord::check)?;
        Ok(self)
    }
}
