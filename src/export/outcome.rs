/*! What an export returns: plain data, serialized as the `--json` objects. */

use std::path::PathBuf;

use serde::Serialize;

/// The result of `atom export`.
#[derive(Clone, Debug, Serialize)]
pub struct ExportOutcome {
    /// Where the export is.
    pub out: PathBuf,
    /// The checkpoint's name.
    pub checkpoint: String,
    /// The format's name.
    pub format: &'static str,
    /// Which programs load it.
    pub loaded_by: &'static str,
    /// Tensors in the export.
    pub tensors: usize,
    /// Bytes of the checkpoint's tensors.
    pub checkpoint_bytes: u64,
    /// Bytes of the export, all files.
    pub out_bytes: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Highest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// Tensors that an unfinished run had written.
    pub resumed_tensors: usize,
    /// What a user should know, a sentence each.
    pub notes: Vec<String>,
    /// The command that publishes the export.
    pub upload: String,
}

/// What `atom export --dry-run` found.
#[derive(Clone, Debug, Serialize)]
pub struct ExportDryRun {
    /// Where the export would be.
    pub out: PathBuf,
    /// The checkpoint's name.
    pub checkpoint: String,
    /// The format's name.
    pub format: &'static str,
    /// Which programs load it.
    pub loaded_by: &'static str,
    /// Tensors in the export.
    pub tensors: usize,
    /// Bytes of the checkpoint's tensors.
    pub checkpoint_bytes: u64,
    /// Bytes of the export's tensors.
    pub out_bytes: u64,
    /// Bytes of disk that the run would still reserve.
    pub needed_disk_bytes: u64,
    /// Free bytes where the export would be written.
    pub free_disk_bytes: u64,
    /// Tensors that an unfinished run of the same export has written.
    pub finished_tensors: usize,
    /// What a user should know, a sentence each.
    pub notes: Vec<String>,
}
