/*! Reads a quantized block from a checkpoint, finished or not. */

use crate::Result;
use crate::backend::Backend;
use crate::checkpoint::linear::{from_tensors, order_spec, read_floats, read_order, specs};
use crate::checkpoint::plan::{BlockPlan, SitePlan};
use crate::checkpoint::{Dtype, Stored, TensorSpec};
use crate::model::Architecture;
use crate::quant::kv::KvFormat;
use crate::quant::linear::QuantizedLinear;
use crate::quant::site::SiteFormat;

/// A site of a quantized block. `Q` is the host's or a backend's form of a quantized linear.
#[derive(Clone, Debug)]
pub struct QuantizedSite<Q> {
    /// Its order and format.
    pub format: SiteFormat,
    /// Its linears; none for an unquantized one.
    pub linears: Vec<Option<Q>>,
}

impl QuantizedSite<QuantizedLinear> {
    /// The same site on a backend.
    pub fn restore<B: Backend>(self, backend: &B) -> Result<QuantizedSite<B::Quantized>> {
        let Self { format, linears } = self;
        let restore =
            |linear: Option<QuantizedLinear>| linear.map(|linear| backend.restore(linear));
        let linears = linears.into_iter().map(|linear| restore(linear).transpose());
        Ok(QuantizedSite { format, linears: linears.collect::<Result<_>>()? })
    }
}

/// Checks that the backend computes with every codebook of a plan.
///
/// # Errors
/// The backend's, with an alternative.
pub fn check_codebook<B: Backend>(backend: &B, blocks: &[BlockPlan]) -> Result<()> {
    for site in blocks.iter().flatten() {
        let linears = site.linears.iter().map(|linear| (linear.bits, linear.codebook));
        let quantized = linears.chain([(site.bits, site.codebook)]).filter(|(bits, _)| *bits < 16);
        quantized.into_iter().try_for_each(|(_, codebook)| backend.check_codebook(codebook))?;
    }
    Ok(())
}

/// A tensor that a plan puts into a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum PlannedTensor {
    /// Stays as the source has it.
    Unquantized {
        /// Its name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Made by calibration or quantization.
    Made(TensorSpec),
}

/// The tensors of a checkpoint, in the order they are stored.
pub fn planned_tensors(
    architecture: &Architecture,
    blocks: &[BlockPlan],
    kv: &KvFormat,
) -> Vec<PlannedTensor> {
    let outer = architecture.outer_tensors().into_iter();
    let mut outer = outer.map(|outer| unquantized((outer.name.to_owned(), outer.shape)));
    // The embedding is stored before the blocks, the others after them.
    let mut planned: Vec<_> = outer.next().into_iter().collect();
    for (index, plan) in blocks.iter().enumerate() {
        planned.extend(planned_block(architecture, index, plan, kv));
    }
    planned.extend(outer);
    planned
}

/// The tensors of block `index` by its plan, in the order they are stored.
pub fn planned_block(
    architecture: &Architecture,
    index: usize,
    plan: &[SitePlan],
    kv: &KvFormat,
) -> Vec<PlannedTensor> {
    let others = architecture.unquantized_tensors(index).into_iter();
    let mut planned: Vec<_> = others.map(unquantized).collect();
    if kv.is_centered() {
        planned.push(PlannedTensor::Made(key_mean_spec(architecture, index)));
    }
    for site in plan {
        planned.push(PlannedTensor::Made(order_spec(&site.name, site.width())));
        for linear in &site.linears {
            if linear.bits == 16 {
                let shape = vec![linear.rows, site.channels];
                planned.push(unquantized((format!("{}.weight", linear.name), shape)));
            } else {
                let made = specs(&linear.name, linear.rows, &site.weights(linear));
                planned.extend(made.into_iter().map(PlannedTensor::Made));
            }
        }
    }
    planned
}

fn unquantized((name, shape): (String, Vec<usize>)) -> PlannedTensor {
    PlannedTensor::Unquantized { name, shape }
}

/// The tensor of a block's mean keys.
pub fn key_mean_spec(architecture: &Architecture, block: usize) -> TensorSpec {
    let shape = [architecture.kv_heads * architecture.head_dim];
    TensorSpec::new(architecture.key_mean_name(block), Dtype::F32, shape)
}

/// The stored mean keys of block `block`, if its cache is centred.
pub fn read_key_mean(
    stored: &impl Stored,
    architecture: &Architecture,
    block: usize,
    kv: &KvFormat,
) -> Result<Option<Vec<f32>>> {
    let read = || read_floats(stored, &key_mean_spec(architecture, block));
    kv.is_centered().then(read).transpose()
}

/// The stored sites of a planned block.
pub fn read_sites(
    stored: &impl Stored,
    plan: &[SitePlan],
) -> Result<Vec<QuantizedSite<QuantizedLinear>>> {
    plan.iter()
        .map(|site| {
            let order = read_order(
                stored,
                &site.name,
                site.channels,
                site.groups() * site.group_size,
                site.outlier_channels,
            )?;
            let linears = site.linears.iter().map(|linear| match linear.bits {
                16 => Ok(None),
                _ => {
                    from_tensors(stored, &linear.name, linear.rows, &site.weights(linear)).map(Some)
                }
            });
            Ok(QuantizedSite {
                linears: linears.collect::<Result<_>>()?,
                format: site.format(order),
            })
        })
        .collect()
}
