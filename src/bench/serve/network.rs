//! Networks of random weights that decode.

use serde::Serialize;

use super::super::cpu::identity_site;
use super::super::random_block::{BlockValues, dense_block, quantized_block, random_matrix};
use crate::backend::{Backend, Decode, Matrix};
use crate::checkpoint::{Dtype, Tensor};
use crate::model::Architecture;
use crate::network::{Decoder, DecoderParts};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::quant::number::ScaleFormat;
use crate::quant::site::{SiteFormat, Transform};
use crate::{Error, Result};

/// How a network's linears and its cache are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RowKind {
    /// Weights, activations and cache in f16.
    F16,
    /// Weights, activations and cache in 8 bits, without outliers or transform.
    W8a8kv8,
    /// Weights, activations and cache in 4 bits, outliers in INT8: the default recipe.
    W4a4kv4,
}

impl RowKind {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::W8a8kv8 => "w8a8kv8",
            Self::W4a4kv4 => "w4a4kv4",
        }
    }

    fn kv(self) -> KvFormat {
        match self {
            Self::F16 => KvFormat::FULL,
            Self::W8a8kv8 => KvFormat { bits: 8, ..KvFormat::FULL },
            Self::W4a4kv4 => KvFormat { bits: 4, rotate: true, ..KvFormat::FULL },
        }
    }
}

/// The shapes of a network, and how it is quantized.
#[derive(Clone, Debug)]
pub struct NetworkShape {
    /// The model's name.
    pub name: String,
    /// Its shapes and blocks.
    pub architecture: Architecture,
    /// Channels that share a scale.
    pub group_size: usize,
    /// Outlier channels of a site.
    pub outliers: usize,
}

impl NetworkShape {
    /// Checks that the formats fit.
    ///
    /// # Errors
    /// Usage.
    pub fn check(&self) -> Result<()> {
        let usage =
            |what: String| Error::usage(what).hint("`atom bench serve --help` shows the flags");
        if let Some(what) = self.architecture.not_plain() {
            return Err(usage(format!("{} has {what}: choose another --shape", self.name)));
        }
        for site in self.architecture.sites(0) {
            let channels = site.channels;
            if self.outliers >= channels {
                let outliers = self.outliers;
                return Err(usage(format!(
                    "{outliers} outliers leave nothing of {channels} channels"
                )));
            }
            self.format(channels).check().map_err(|error| usage(error.to_string()))?;
        }
        Ok(())
    }

    /// A site of the default recipe's kind.
    fn format(&self, channels: usize) -> SiteFormat {
        let mut site = identity_site(channels, self.group_size, self.outliers);
        site.transform = Transform::Hadamard;
        site.row.numbers.scale = ScaleFormat::SIGNED_F16;
        site
    }

    /// The same in INT8.
    fn int8_format(&self, channels: usize) -> SiteFormat {
        let mut site = identity_site(channels, self.group_size, 0);
        site.row.numbers.bits = 8;
        site
    }
}

/// Random weights, each of which stands for those of all blocks. Every block has a copy of its own on the backend, so that
/// none is in a cache when it comes.
pub(super) struct NetworkValues {
    block: BlockValues,
    table: Vec<u8>,
    table_shape: [usize; 2],
}

impl NetworkValues {
    pub(super) fn new(architecture: &Architecture) -> Self {
        let table_shape = [architecture.vocabulary, architecture.hidden];
        Self {
            block: BlockValues::new(architecture, 1),
            table: random_matrix(table_shape[0], table_shape[1], 2),
            table_shape,
        }
    }

    fn table(&self) -> Tensor<'_> {
        Tensor::in_memory("embedding", Dtype::F16, &self.table_shape, &self.table)
    }

    /// A network on a backend.
    pub(super) fn decoder<'a, B: Backend + Decode>(
        &'a self,
        backend: &'a B,
        shape: &NetworkShape,
        kind: RowKind,
        progress: &dyn Progress,
    ) -> Result<Decoder<'a, B>> {
        let architecture = &shape.architecture;
        let mut blocks = Vec::with_capacity(architecture.blocks);
        progress.begin(&format!("make {}", kind.name()), architecture.blocks);
        for _ in 0..architecture.blocks {
            progress.check_stop()?;
            blocks.push(match kind {
                RowKind::F16 => dense_block(backend, architecture, &self.block)?,
                RowKind::W8a8kv8 => {
                    let format = |channels| shape.int8_format(channels);
                    quantized_block(backend, architecture, &self.block, (&format, 8))?
                }
                RowKind::W4a4kv4 => {
                    let format = |channels| shape.format(channels);
                    quantized_block(backend, architecture, &self.block, (&format, 4))?
                }
            });
            backend.wait()?;
            progress.advance("");
        }
        progress.end();
        let columns = architecture.hidden;
        let final_norm = backend.upload(Matrix { rows: 1, columns, data: vec![1.0; columns] })?;
        let head = backend.head(&backend.load(self.table())?)?;
        backend.trim();
        let table = backend.load(self.table())?;
        let parts = DecoderParts { table, blocks, final_norm, head };
        Ok(Decoder::of_parts(backend, architecture.clone(), kind.kv(), parts))
    }
}
