/*! What a run is asked to write, and how. */

use serde::Serialize;
use serde_json::{Map, Value};

use super::{DirectoryKind, FORMAT_VERSION, TensorFiles};

/// The largest shard unless told otherwise: 5 GB of tensors, as the Hub's tools write them.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// How to write.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Insist on the unfinished run that is there: it is never thrown away.
    pub resume: bool,
    /// Bytes of tensors in a shard, at most; a larger tensor has a shard of its own.
    pub max_shard_bytes: u64,
    /// Bytes of the files that are copied next to the shards.
    pub side_bytes: u64,
    /// What is written.
    pub kind: DirectoryKind,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            resume: false,
            max_shard_bytes: DEFAULT_SHARD_BYTES,
            side_bytes: 0,
            kind: DirectoryKind::Checkpoint,
        }
    }
}

/// What decides an output's bytes.
#[derive(Serialize)]
struct OutputJob<'a> {
    format_version: u64,
    job: &'a Value,
    max_shard_bytes: u64,
    /// Type and shape of each tensor by name, in the order they are stored.
    tensors: Map<String, Value>,
}

/// What decides an output's bytes, as a run that continues it must have it.
pub(super) fn output_job(files: &TensorFiles, job: &Value, options: Options) -> Value {
    let tensors = files.specs().map(|spec| (spec.name.clone(), spec.form().into())).collect();
    let job = OutputJob {
        format_version: FORMAT_VERSION,
        job,
        max_shard_bytes: options.max_shard_bytes,
        tensors,
    };
    serde_json::to_value(job).expect("a job has only JSON types")
}
