/*! A plan compared with the network that it is for. */

use super::Architecture;
use crate::checkpoint::plan::{BlockPlan, SitePlan};
use crate::checkpoint::{AtomCheckpoint, Manifest};
use crate::{Error, Result};

/// The manifest of a checkpoint, which must describe its network.
///
/// # Errors
/// Input: a field that is missing, of another type or out of its range, named; a plan of another network.
pub fn read_manifest(checkpoint: &AtomCheckpoint, architecture: &Architecture) -> Result<Manifest> {
    let manifest = checkpoint.manifest().and_then(|manifest| {
        check_plan(architecture, &manifest.blocks)?;
        manifest.blocks.iter().flatten().try_for_each(SitePlan::check_complete)?;
        Ok(manifest)
    });
    manifest.map_err(|error| {
        error
            .context(format!("{} is damaged", checkpoint.path_of("atom.json")))
            .hint("copy the checkpoint again, or quantize the model again")
    })
}

/// Refuses a plan that does not fit the network, naming the first difference.
pub fn check_plan(architecture: &Architecture, blocks: &[BlockPlan]) -> Result<()> {
    if blocks.len() != architecture.blocks {
        return Err(Error::input(format!(
            "the plan has {} blocks, the model {}",
            blocks.len(),
            architecture.blocks
        )));
    }
    for (index, block) in blocks.iter().enumerate() {
        let sites = architecture.sites(index);
        if block.len() != sites.len() {
            return Err(Error::input(format!(
                "the plan's block {index} has {} sites instead of {}",
                block.len(),
                sites.len()
            )));
        }
        for (plan, site) in block.iter().zip(&sites) {
            let planned = plan.linears.iter().map(|linear| (&linear.name, linear.rows));
            let expected = site.linears.iter().map(|linear| (&linear.name, linear.rows));
            if plan.name != site.name || plan.channels != site.channels || !planned.eq(expected) {
                return Err(Error::input(format!(
                    "the plan's site {} does not match the model's {}",
                    plan.name, site.name
                ))
                .hint("names, channels, rows and linears of a plan must stay as `atom plan` wrote them"));
            }
            plan.check()?;
        }
    }
    if blocks.iter().flatten().flat_map(|site| &site.linears).all(|linear| linear.bits == 16) {
        return Err(Error::input(
            "the plan leaves every linear at 16 bits: nothing would be quantized",
        ));
    }
    Ok(())
}
