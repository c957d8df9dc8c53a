/*! The file that holds a calibration. */

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use super::energies::{Energies, Statistics};
use super::sensitivity::Sensitivity;
use crate::checkpoint::{FileKind, Provenance, read_named, sha256_hex};
use crate::model::Architecture;
use crate::network::{check_counts, key_mean_spec};
use crate::{Error, Result};

/// What `atom calibrate` writes: a safetensors file with the windows, every block's statistics, and the
/// sensitivity if it was measured.
pub struct CalibrationData {
    /// Name of the model.
    pub model: String,
    /// Its fingerprint.
    pub fingerprint: String,
    /// Its `config.json`, so that a plan can be made without it.
    pub config: serde_json::Value,
    /// Where the windows came from.
    pub provenance: Provenance,
    /// `[samples, seq_len]`.
    pub tokens: Vec<u32>,
    /// Every block's.
    pub statistics: Vec<Statistics>,
    /// What widths and outlier counts would cost, where it was measured.
    pub sensitivity: Option<Sensitivity>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    model: String,
    fingerprint: String,
    config: serde_json::Value,
    provenance: Provenance,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sensitivity: Option<Sensitivity>,
}

/// What [`CalibrationData`] is written as.
pub const CALIBRATION_FILE: FileKind =
    FileKind { name: "a calibration file", recognizes: is_calibration };

/// Whether a file's header says that it holds calibration data.
fn is_calibration(path: &Path) -> bool {
    // The writer puts the metadata first.
    let mut head = Vec::new();
    let read = fs_err::File::open(path).and_then(|file| file.take(64).read_to_end(&mut head));
    let begins = format!("{{\"__metadata__\":{{\"{KEY}\":");
    read.is_ok() && head.get(8..).is_some_and(|header| header.starts_with(begins.as_bytes()))
}

/// Version of the file's format.
const VERSION: u32 = 2;
/// The longest file that is read, in bytes: those of the largest networks have some 300 MB.
const MAX_BYTES: u64 = 1 << 30;
const KEY: &str = "atom_calibration";
const WINDOWS: &str = "windows";

struct Bytes {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl View for &Bytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

impl CalibrationData {
    /// The file's bytes.
    pub fn to_bytes(&self, architecture: &Architecture) -> Result<Vec<u8>> {
        let Provenance { samples, seq_len, .. } = self.provenance;
        let data = self.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let windows = Bytes { dtype: Dtype::U32, shape: vec![samples, seq_len], data };
        let mut tensors = BTreeMap::from([(WINDOWS.to_owned(), windows)]);
        for (index, Statistics { energies, key_mean }) in self.statistics.iter().enumerate() {
            let data = key_mean.iter().flat_map(|value| value.to_le_bytes()).collect();
            let spec = key_mean_spec(architecture, index);
            tensors.insert(spec.name, Bytes { dtype: Dtype::F32, shape: spec.shape, data });
            for (site, energy) in architecture.sites(index).into_iter().zip(energies) {
                let data = energy.iter().flat_map(|value| value.to_le_bytes()).collect();
                let shape = vec![energy.len()];
                tensors.insert(energy_name(&site.name), Bytes { dtype: Dtype::F64, shape, data });
            }
        }
        let header = Header {
            version: VERSION,
            model: self.model.clone(),
            fingerprint: self.fingerprint.clone(),
            config: self.config.clone(),
            provenance: self.provenance.clone(),
            sensitivity: self.sensitivity.clone(),
        };
        let header = serde_json::to_string(&header).expect("a header has only JSON types");
        safetensors::serialize(&tensors, Some([(KEY.to_owned(), header)].into()))
            .map_err(|error| Error::machine(format!("the calibration cannot be written: {error}")))
    }

    /// Reads the file; also returns the SHA-256 of its bytes.
    pub fn read(path: &Path) -> Result<(Self, Architecture, String)> {
        let bytes = read_named(path, MAX_BYTES)
            .map_err(|error| error.hint("make one with `atom calibrate`"))?;
        let wrong = |what: &str| {
            Error::input(format!("{} is not a calibration file: {what}", path.display()))
                .hint("make one with `atom calibrate`")
        };
        let (_, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|error| wrong(&error.to_string()))?;
        let header = metadata
            .metadata()
            .as_ref()
            .and_then(|metadata| metadata.get(KEY))
            .ok_or_else(|| wrong("its header lacks `atom_calibration`"))?;
        let header: Header =
            serde_json::from_str(header).map_err(|error| wrong(&error.to_string()))?;
        if header.version != VERSION {
            return Err(wrong("it was written by another version"));
        }
        let damaged = |what: &str| {
            Error::input(format!("{} is damaged: {what}", path.display()))
                .hint("make it again with `atom calibrate`")
        };
        let file = SafeTensors::deserialize(&bytes).map_err(|error| wrong(&error.to_string()))?;
        let tensor = |name: &str, dtype: Dtype, shape: &[usize]| {
            let view = file.tensor(name).map_err(|error| wrong(&error.to_string()))?;
            if view.dtype() != dtype || view.shape() != shape {
                return Err(wrong(&format!("`{name}` has another type or shape")));
            }
            Ok(view.data())
        };
        let config_file = format!("config.json in {}", path.display());
        let architecture = Architecture::read(&header.config, &config_file)?;
        check_counts(&architecture, file.len(), bytes.len() as u64)
            .map_err(|what| damaged(&what))?;
        let Provenance { samples, seq_len, .. } = header.provenance;
        if samples == 0 || seq_len < 2 {
            return Err(damaged(&format!("it holds {samples} windows of {seq_len} tokens")));
        }
        let windows = tensor(WINDOWS, Dtype::U32, &[samples, seq_len])?;
        let tokens = windows.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        let mut statistics = Vec::new();
        for index in 0..architecture.blocks {
            let mut block = Energies::new();
            for site in architecture.sites(index) {
                let data = tensor(&energy_name(&site.name), Dtype::F64, &[site.channels])?;
                let values = data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
                let values: Vec<f64> = values.collect();
                let energy = |value: &f64| value.is_finite() && *value >= 0.0;
                if let Some(channel) = values.iter().position(|value| !energy(value)) {
                    return Err(damaged(&format!(
                        "channel {channel} of {} has the energy {}",
                        site.name, values[channel]
                    )));
                }
                block.push(values);
            }
            let spec = key_mean_spec(&architecture, index);
            let data = tensor(&spec.name, Dtype::F32, &spec.shape)?;
            let key_mean: Vec<f32> =
                data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            if let Some(channel) = key_mean.iter().position(|mean| !mean.is_finite()) {
                let (name, mean) = (&spec.name, key_mean[channel]);
                return Err(damaged(&format!("`{name}` holds {mean} at {channel}")));
            }
            statistics.push(Statistics { energies: block, key_mean });
        }
        if let Some(sensitivity) = &header.sensitivity {
            sensitivity.check(&architecture).map_err(|what| damaged(&what))?;
        }
        let Header { model, fingerprint, config, provenance, sensitivity, .. } = header;
        let data = Self { model, fingerprint, config, provenance, tokens, statistics, sensitivity };
        Ok((data, architecture, sha256_hex(&bytes)))
    }
}

fn energy_name(site: &str) -> String {
    format!("{site}.energy")
}

#[cfg(test)]
#[path = "calibration_tests.rs"]
mod tests;
