//! How much memory a distillation takes at its peak.

use super::reference::reference_bytes;
use super::training::Course;
use crate::backend::Train;
use crate::checkpoint::plan::{BlockPlan, SitePlan};
use crate::model::Architecture;
use crate::model::sites::{MLP_ACT, MLP_IN};
use crate::network::memory::{NetworkBytes, Windows, Workspace};

/// Vectors as long as the parameters: themselves, two moments, the best, the gradient, and a copy to be saved.
const PARAMETER_VECTORS: u64 = 6;

/// Bytes in the host's memory.
pub(super) fn distill_bytes<B: Train>(
    backend: &B,
    architecture: &Architecture,
    blocks: &[BlockPlan],
    tokens: usize,
    course: Course,
) -> u64 {
    let workspace = Workspace::of(backend);
    let network = NetworkBytes { architecture, workspace };
    let kept = reference_bytes::<B>(tokens, architecture.hidden);
    let scales: u64 = blocks.iter().flatten().map(scales).sum();
    let optimizer = 4 * PARAMETER_VECTORS * scales;
    let base = workspace.base() + kept + optimizer;
    if workspace.on_device {
        return base;
    }
    let streams = network.states(tokens.min(backend.stream_bytes() / (4 * architecture.hidden)));
    let step = Windows { tokens: course.per_step * course.seq_len, seq_len: course.seq_len };
    let codes: u64 = blocks.iter().flatten().map(codes).sum();
    let table = 4 * (architecture.vocabulary * architecture.hidden) as u64;
    // Logits and their gradient read the head in layouts of their own.
    let training = codes
        + 2 * table
        + network.states(step.tokens) * (blocks.len() as u64 + 3)
        + blocks.iter().map(|block| inside(block, step.tokens as u64)).max().unwrap_or(0)
        + workspace.threads as u64 * 8 * 48 * architecture.vocabulary as u64;
    base + streams.max(training)
}

/// Scales of a site's linears.
fn scales(site: &SitePlan) -> u64 {
    let linears = site.linears.iter().filter(|linear| linear.bits < 16);
    let of_linear = |rows: usize| (rows * (site.groups() + 1)) as u64;
    linears.map(|linear| of_linear(linear.rows)).sum()
}

/// A byte a code.
fn codes(site: &SitePlan) -> u64 {
    site.linears.iter().map(|linear| (linear.rows * site.width()) as u64).sum()
}

/// The inside of a block on the way back: what the MLP reads and makes, with gradients, and a linear's weights and products.
fn inside(block: &BlockPlan, tokens: u64) -> u64 {
    let width = |at: usize| block.get(at).map_or(0, |site| site.width() as u64);
    let widest = block.iter().flat_map(|site| {
        let width = site.width() as u64;
        site.linears.iter().map(move |linear| linear.rows as u64 * width)
    });
    4 * tokens * (6 * width(MLP_ACT) + 4 * width(MLP_IN)) + 12 * widest.max().unwrap_or(0)
}
