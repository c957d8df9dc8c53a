//! Decoder blocks of random weights, in full precision and quantized.

use half::f16;

use super::cpu::random;
use crate::Result;
use crate::backend::{Backend, Matrix, Unquantized};
use crate::checkpoint::{Dtype, Tensor};
use crate::model::Architecture;
use crate::model::architecture::Activation;
use crate::model::block::{Block, Leaving, Linear, Site, Treatment};
use crate::model::sites::{LinearSpec, MLP_ACT, MLP_IN, SiteSpec};
use crate::quant::codebook::Codebook;
use crate::quant::grid::Scaling;
use crate::quant::site::SiteFormat;

/// The weights of a block's linears, by site: f16, little-endian.
pub(super) struct BlockValues(Vec<Vec<Vec<u8>>>);

impl BlockValues {
    /// Values of variance `1 / columns`, which keep a token's energy.
    pub(super) fn new(architecture: &Architecture, seed: u64) -> Self {
        let site = |(at, spec): (usize, &SiteSpec)| {
            let linears = spec.linears.iter().enumerate();
            let values = |(nth, linear): (usize, &LinearSpec)| {
                random_matrix(linear.rows, linear.columns, seed << 8 | (at << 4 | nth) as u64)
            };
            linears.map(values).collect()
        };
        Self(architecture.sites(0).iter().enumerate().map(site).collect())
    }
}

/// f16 values of variance `1 / columns`.
pub(super) fn random_matrix(rows: usize, columns: usize, seed: u64) -> Vec<u8> {
    let scale = (3.0 / columns as f32).sqrt();
    let values = random(rows * columns, seed);
    values.into_iter().flat_map(|value| f16::from_f32(value * scale).to_le_bytes()).collect()
}

/// A block in full precision.
pub(super) fn dense_block<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    weights: &BlockValues,
) -> Result<Block<B>> {
    let mut sites = Vec::new();
    for (at, (spec, values)) in architecture.sites(0).iter().zip(&weights.0).enumerate() {
        let dense = spec.linears.iter().zip(values).map(|(linear, bytes)| {
            let shape = [linear.rows, linear.columns];
            let stored = Tensor::in_memory(&linear.name, Dtype::F16, &shape, bytes);
            Ok(Linear::Dense(backend.dense(&backend.load(stored)?, None)?))
        });
        sites.push(site(at, spec, Treatment::Source, dense.collect::<Result<_>>()?));
    }
    block(backend, architecture, sites)
}

/// A block rounded to nearest: sites of the format for their channels, weights of so many bits.
pub(super) fn quantized_block<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    weights: &BlockValues,
    (format, bits): (&dyn Fn(usize) -> SiteFormat, u8),
) -> Result<Block<B>> {
    let specs = architecture.sites(0);
    let mut sites = Vec::new();
    for (at, (spec, values)) in specs.iter().zip(&weights.0).enumerate() {
        let own = format(spec.channels);
        let order = backend.site(&own)?;
        let feeds = (at == MLP_IN).then(|| backend.site(&format(specs[MLP_ACT].channels)));
        let feeds = feeds.transpose()?;
        let packed = spec.linears.iter().zip(values).map(|(linear, bytes)| {
            let shape = [linear.rows, linear.columns];
            let stored = Tensor::in_memory(&linear.name, Dtype::F16, &shape, bytes);
            let unquantized = Unquantized {
                name: &linear.name,
                weight: &backend.load(stored)?,
                format: own.row.weights(bits, Codebook::Int, 1),
                scaling: Scaling::clipped(1.0),
            };
            let rounded = backend.round(&unquantized, &order)?;
            Ok(Linear::Packed(backend.pack(&rounded, feeds.as_ref())?))
        });
        let packed = packed.collect::<Result<_>>()?;
        sites.push(site(at, spec, Treatment::Quantized(order), packed));
    }
    block(backend, architecture, sites)
}

fn site<B: Backend>(
    at: usize,
    spec: &SiteSpec,
    treatment: Treatment<B>,
    linears: Vec<Linear<B>>,
) -> Site<B> {
    let biases = linears.iter().map(|_| None).collect();
    Site { at, name: spec.name.clone(), treatment, linears, biases, leaving: Leaving::unchanged() }
}

fn block<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    sites: Vec<Site<B>>,
) -> Result<Block<B>> {
    let ones = || {
        let columns = architecture.hidden;
        backend.upload(Matrix { rows: 1, columns, data: vec![1.0; columns] })
    };
    Ok(Block {
        index: 0,
        norms: Some([ones()?, ones()?]),
        epsilon: architecture.norm_epsilon,
        key_mean: None,
        qk_norm: None,
        head_order: None,
        activation: Activation::Silu,
        router: None,
        sites,
    })
}
