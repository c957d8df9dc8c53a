/*! Where the calibration windows of a checkpoint came from. */

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What stands for a hash in a job that is only looked at, where what is hashed is made in the run itself.
pub const NOT_YET_KNOWN: &str = "not known yet";

/// Where calibration windows came from; part of a checkpoint's provenance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Name of the text set.
    pub dataset: String,
    /// SHA-256 of its text; where the model wrote the windows, of their tokens as 32-bit integers, little-endian.
    pub sha256: String,
    /// Windows.
    pub samples: usize,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Seed of the draw.
    pub seed: u64,
    /// The sets of a mix, or the one set of the Hub that it was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sets: Vec<SetUsed>,
}

/// A set that calibration windows were drawn from; part of a checkpoint's provenance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetUsed {
    /// Its name or path.
    pub name: String,
    /// SHA-256 of its text.
    pub sha256: String,
    /// Windows drawn from it.
    pub samples: usize,
    /// The file on the Hub, if it came from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<DataFile>,
}

/// A file of a data set on this machine, and where it came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    /// Where it lies: in the Hub's cache, under its own name.
    #[serde(skip)]
    pub path: PathBuf,
    /// The repository.
    pub repo: String,
    /// Its name in the repository.
    pub file: String,
    /// The revision that was asked for.
    pub revision: String,
    /// The commit that it meant.
    pub commit: String,
    /// SHA-256 of the file, lower-case hexadecimal.
    pub sha256: String,
}
