//! The distilled checkpoint: the tensors of the one before, with trained values in the place of theirs.

use std::collections::HashMap;

use half::f16;
use serde_json::Value;

use super::parameters::NetworkValues;
use crate::Result;
use crate::checkpoint::linear::{from_tensors, to_tensors};
use crate::checkpoint::plan::SitePlan;
use crate::checkpoint::{AtomCheckpoint, Dtype, Tensor, TensorBytes, TensorSpec, Writer};
use crate::model::Architecture;
use crate::model::sites::FINAL_NORM;
use crate::network::{PlannedTensor, planned_block};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::quant::linear::OutlierBlock;

/// What is written, and of what.
pub(super) struct Writing<'a> {
    pub(super) checkpoint: &'a AtomCheckpoint,
    pub(super) architecture: &'a Architecture,
    pub(super) blocks: &'a [Vec<SitePlan>],
    pub(super) kv: &'a KvFormat,
    /// Trained values; none where the checkpoint stays as it is.
    pub(super) values: Option<&'a NetworkValues>,
    pub(super) progress: &'a dyn Progress,
}

/// Names and bytes.
type Named<'a> = Vec<(String, TensorBytes<'a>)>;

impl<'a> Writing<'a> {
    /// The tensors of the output: those of the checkpoint.
    pub(super) fn specs(&self) -> Result<Vec<TensorSpec>> {
        let names = self.names();
        let spec = |name: &String| {
            let tensor = self.checkpoint.tensor(name)?;
            Ok(TensorSpec::new(name, tensor.dtype, tensor.shape))
        };
        names.iter().map(spec).collect()
    }

    /// Their names, in the order that they are stored.
    fn names(&self) -> Vec<String> {
        let planned =
            crate::network::planned_tensors(self.architecture, self.blocks, self.kv).into_iter();
        planned.map(name_of).collect()
    }

    /// Writes what is not written yet.
    pub(super) fn write(&self, writer: &mut Writer) -> Result<()> {
        let is_done =
            |writer: &Writer, unit: &str| writer.done().iter().any(|done| done.block == unit);
        for outer in self.architecture.outer_tensors() {
            self.progress.check_stop()?;
            if !is_done(writer, outer.part) {
                let mut tensors = vec![self.stored(outer.name)?];
                if let (FINAL_NORM, Some(values)) = (outer.name, self.values) {
                    tensors = vec![self.norm(outer.name, &values.final_norm)?];
                }
                writer.write_block(outer.part, tensors, Value::Null)?;
            }
        }
        for index in 0..self.blocks.len() {
            self.progress.check_stop()?;
            let unit = self.architecture.block_name(index);
            if !is_done(writer, &unit) {
                writer.write_block(&unit, self.block(index)?, Value::Null)?;
            }
        }
        Ok(())
    }

    /// The tensors of a block.
    fn block(&self, index: usize) -> Result<Named<'a>> {
        let mut made = HashMap::new();
        if let Some(values) = self.values {
            made.extend(self.trained(index, values)?);
        }
        let planned = planned_block(self.architecture, index, &self.blocks[index], self.kv);
        let tensors = planned.into_iter().map(name_of).map(|name| match made.remove(&name) {
            Some(bytes) => Ok((name, bytes)),
            None => self.stored(&name),
        });
        tensors.collect()
    }

    /// The tensors of a block that training has changed.
    fn trained(&self, index: usize, values: &NetworkValues) -> Result<Named<'a>> {
        let values = &values.blocks[index];
        let mut tensors = Vec::new();
        for (name, norm) in self.architecture.norm_names(index).iter().zip(&values.norms) {
            tensors.push(self.norm(name, norm)?);
        }
        let names = self.architecture.qk_norm_names(index);
        for (name, norm) in names.iter().flatten().zip(values.qk_norms.iter().flatten()) {
            tensors.push(self.norm(name, norm)?);
        }
        for (site, values) in self.blocks[index].iter().zip(&values.sites) {
            for (linear, values) in site.linears.iter().zip(&values.linears) {
                let Some(values) = values else { continue };
                let format = site.weights(linear);
                let mut weights =
                    from_tensors(self.checkpoint, &linear.name, linear.rows, &format)?;
                weights.scales.clone_from(&values.scales);
                match &mut weights.outliers {
                    OutlierBlock::Int8 { scales, .. } | OutlierBlock::Fp8 { scales, .. } => {
                        scales.clone_from(&values.outlier_scales);
                    }
                    OutlierBlock::None | OutlierBlock::F16(_) => {}
                }
                let made = to_tensors(&linear.name, &weights).into_iter();
                tensors.extend(made.map(|(name, bytes)| (name, TensorBytes::from(bytes))));
            }
        }
        Ok(tensors)
    }

    /// A tensor as it is.
    fn stored(&self, name: &str) -> Result<(String, TensorBytes<'a>)> {
        let tensor: Tensor<'a> = self.checkpoint.tensor(name)?;
        Ok((name.to_owned(), tensor.into()))
    }

    /// A norm in the type that it has.
    fn norm(&self, name: &str, values: &[f32]) -> Result<(String, TensorBytes<'a>)> {
        let bytes: Vec<u8> = match self.checkpoint.tensor(name)?.dtype {
            Dtype::BF16 => {
                let values = values.iter().map(|value| half::bf16::from_f32(*value));
                values.flat_map(|value| value.to_le_bytes()).collect()
            }
            Dtype::F16 => {
                let values = values.iter().map(|value| f16::from_f32(*value));
                values.flat_map(|value| value.to_le_bytes()).collect()
            }
            _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        };
        Ok((name.to_owned(), bytes.into()))
    }
}

fn name_of(planned: PlannedTensor) -> String {
    match planned {
        PlannedTensor::Unquantized { name, .. } => name,
        PlannedTensor::Made(spec) => spec.name,
    }
}
