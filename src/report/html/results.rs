/*! What a page shows of the results of commands: the fields of their `--json` objects that it needs. A result on its way out and one that
was saved to a file are read alike. */

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::recipe::Recipe;
use crate::{Error, Kind, Result};

/// The result of a command.
#[derive(Debug)]
pub(super) enum Outcome {
    Quantized(Box<Quantized>),
    Verified(Verified),
    Perplexity(Perplexity),
    Tasks(Tasks),
    Bench(Bench),
}

/// Of `quantize` and `pack`.
#[derive(Debug, Deserialize)]
pub(super) struct Quantized {
    pub(super) model: String,
    pub(super) recipe: Recipe,
    pub(super) samples: usize,
    pub(super) seq_len: usize,
    pub(super) seconds: f64,
    pub(super) stage_seconds: Map<String, Value>,
    pub(super) peak_rss_bytes: u64,
    pub(super) peak_gpu_bytes: Option<u64>,
    pub(super) bits_per_weight: f64,
    pub(super) source_bytes: u64,
    pub(super) out_bytes: u64,
    pub(super) device: String,
    pub(super) linears: Vec<Linear>,
    pub(super) perplexity: Option<Change>,
    #[serde(default)]
    pub(super) worst_sites: Vec<Site>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Linear {
    pub(super) name: String,
    pub(super) bits: u8,
    pub(super) error: Option<f64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Change {
    pub(super) dataset: String,
    pub(super) windows: usize,
    pub(super) seq_len: usize,
    pub(super) before: f64,
    pub(super) after: f64,
}

/// The channels of the site of a linear.
#[derive(Debug, Deserialize)]
pub(super) struct Site {
    pub(super) linear: String,
    pub(super) site: String,
    pub(super) channels: usize,
    pub(super) outliers: usize,
    /// Shares of the channels, ascending, and the root mean square at each.
    pub(super) shares: Vec<f64>,
    pub(super) rms: Vec<f64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Verified {
    pub(super) model: String,
    pub(super) ok: bool,
    pub(super) checks: Vec<Check>,
    pub(super) perplexity: Option<f64>,
    pub(super) reference_perplexity: Option<f64>,
    pub(super) device: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Check {
    pub(super) name: String,
    pub(super) ok: bool,
    pub(super) detail: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Perplexity {
    pub(super) model: String,
    pub(super) dataset: String,
    pub(super) perplexity: f64,
    pub(super) standard_error: Option<f64>,
    pub(super) windows: usize,
    pub(super) seq_len: usize,
    pub(super) seconds: f64,
    pub(super) tokens_per_second: f64,
    pub(super) device: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Tasks {
    pub(super) model: String,
    pub(super) tasks: Vec<Task>,
    pub(super) seconds: f64,
    pub(super) device: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Task {
    pub(super) task: String,
    pub(super) rows: usize,
    pub(super) acc: f64,
    pub(super) acc_stderr: Option<f64>,
    pub(super) acc_norm: Option<f64>,
    pub(super) acc_norm_stderr: Option<f64>,
    pub(super) perplexity: Option<f64>,
    pub(super) perplexity_stderr: Option<f64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Bench {
    pub(super) rows: Vec<Map<String, Value>>,
    #[serde(default)]
    pub(super) facts: BTreeMap<String, Value>,
}

impl Outcome {
    /// The outcome that a JSON object is.
    ///
    /// # Errors
    /// Bad input: it is the result of no command that a page is made of, or a field has another type.
    pub(super) fn read(object: Value) -> Result<Self> {
        let has = |keys: &[&str]| keys.iter().all(|key| object.get(key).is_some());
        let damaged = |error| Error::of(Kind::Input, error);
        Ok(match () {
            () if has(&["source_bytes", "stage_seconds"]) => {
                Self::Quantized(Box::new(Quantized::deserialize(object).map_err(damaged)?))
            }
            () if has(&["checks", "model"]) => {
                Self::Verified(Verified::deserialize(object).map_err(damaged)?)
            }
            () if has(&["tasks", "model"]) => {
                Self::Tasks(Tasks::deserialize(object).map_err(damaged)?)
            }
            () if has(&["perplexity", "dataset"]) => {
                Self::Perplexity(Perplexity::deserialize(object).map_err(damaged)?)
            }
            () if has(&["rows"]) => Self::Bench(Bench::deserialize(object).map_err(damaged)?),
            () => {
                return Err(Error::input("it is not the result of a command that a report shows").hint(
                    "give what quantize, pack, verify, eval-ppl, eval-tasks or bench print with --json",
                ));
            }
        })
    }
}
