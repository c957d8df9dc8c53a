/*! Writing a checkpoint next to the arithmetic: the tensors outside the blocks, and blocks as they are finished. */

use std::sync::mpsc::Receiver;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use super::block_loop::FinishedBlock;
use super::energies::Statistics;
use super::job::Job;
use super::quantizer::QuantizedBlock;
use super::underflow::check_weights;
use crate::backend::Backend;
use crate::checkpoint::linear::{order_tensor, to_tensors};
use crate::checkpoint::plan::SitePlan;
use crate::checkpoint::{DoneBlock, Writer};
use crate::model::sites::OuterTensor;
use crate::network::{PlannedTensor, planned_block, read_sites};
use crate::progress::Progress;
use crate::{Error, Result};

/// A checkpoint that several threads write and read.
pub(super) struct Writing<'a, 'w> {
    job: &'a Job<'a>,
    /// What an earlier run had finished.
    done: Vec<DoneBlock>,
    writer: Mutex<&'w mut Writer>,
    progress: &'a dyn Progress,
}

impl<'a, 'w> Writing<'a, 'w> {
    pub(super) fn new(
        job: &'a Job<'a>,
        writer: &'w mut Writer,
        progress: &'a dyn Progress,
    ) -> Self {
        Self { job, done: writer.done().to_vec(), writer: Mutex::new(writer), progress }
    }

    /// The writer; a panic of one thread is passed on by the other.
    fn writer(&self) -> MutexGuard<'_, &'w mut Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an earlier run wrote as this unit.
    fn done(&self, unit: &str) -> Option<&DoneBlock> {
        self.done.iter().find(|done| done.block == unit)
    }

    /// Writes the tensors that are not of a block.
    pub(super) fn outer_tensors(&self) -> Result<()> {
        for OuterTensor { part, name, .. } in self.job.input.architecture.outer_tensors() {
            if self.done(part).is_none() {
                let tensor = self.job.input.copy(name, self.progress)?;
                self.writer().write_block(part, vec![tensor], Value::Null)?;
            }
        }
        Ok(())
    }

    /// Packs and writes finished blocks as they come.
    pub(super) fn blocks<B: Backend>(
        &self,
        backend: &B,
        blocks: Receiver<FinishedBlock<B>>,
    ) -> Result<()> {
        let Job { input, recipe, blocks: plans } = self.job;
        for FinishedBlock { index, block, statistics } in blocks {
            let QuantizedBlock { sites, errors } = block;
            let Statistics { key_mean, energies } = statistics;
            let mut tensors = Vec::new();
            for planned in planned_block(&input.architecture, index, &plans[index], &recipe.kv()) {
                if let PlannedTensor::Unquantized { name, .. } = planned {
                    tensors.push(input.copy(&name, self.progress)?);
                }
            }
            if recipe.kv().is_centered() {
                let bytes = key_mean.iter().flat_map(|value| value.to_le_bytes()).collect();
                tensors.push((input.architecture.key_mean_name(index), bytes));
            }
            let planned = plans[index].iter().zip(&energies);
            for ((site, energy), quantized) in planned.zip(sites) {
                let order = &quantized.format.order;
                tensors.push(order_tensor(&site.name, order));
                for (linear, weights) in site.linears.iter().zip(quantized.linears) {
                    let Some(weights) = weights else { continue };
                    let weights = backend.fetch(weights)?;
                    let source = input.source.tensor(&format!("{}.weight", linear.name))?;
                    check_weights(&linear.name, &weights, &source, order, energy)?;
                    tensors.extend(to_tensors(&linear.name, &weights));
                }
            }
            let name = input.architecture.block_name(index);
            self.writer().write_block(&name, tensors, json!(errors))?;
        }
        Ok(())
    }

    /// Whether an earlier run finished block `index`.
    pub(super) fn is_finished(&self, index: usize) -> bool {
        self.done(&self.job.input.architecture.block_name(index)).is_some()
    }

    /// Block `index`, of that plan, as an earlier run left it, if one did.
    pub(super) fn resumed<B: Backend>(
        &self,
        backend: &B,
        index: usize,
        plan: &[SitePlan],
    ) -> Result<Option<QuantizedBlock<B>>> {
        let name = self.job.input.architecture.block_name(index);
        let Some(done) = self.done(&name) else { return Ok(None) };
        let errors = serde_json::from_value(done.extra.clone())
            .map_err(|error| Error::input(format!("work of block {index}: {error}")))?;
        let sites = read_sites(&**self.writer(), plan)?;
        let sites = sites.into_iter().map(|site| site.restore(backend));
        Ok(Some(QuantizedBlock { sites: sites.collect::<Result<_>>()?, errors }))
    }
}
