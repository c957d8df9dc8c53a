/*! How much memory quantization and calibration take at their peak. */

use super::job::{CalibrationInput, Job};
use super::sensitivity::EFFECT_TOKENS;
use crate::checkpoint::Tensors;
use crate::checkpoint::plan::{BlockPlan, SitePlan};
use crate::machine;
use crate::model::Architecture;
use crate::model::sites::{ATTN_OUT, MLP_ACT};
use crate::network::memory::{BlockBytes, NetworkBytes, ON_HEAP, SourceBytes, Windows, Workspace};
use crate::ranks::Chunks;
use crate::recipe::Recipe;

/// Channels of a matrix as wide as a Hessian that are packed at a time for the loss, and for the correction
/// of an accumulated error.
const PACKED_CHANNELS: [u64; 2] = [512, 1024];
/// Channels of such a matrix that its factorization keeps and works with, besides it and its factor.
const FACTOR_CHANNELS: u64 = 320;

/// Bytes that `quantize` and `pack` take at the peak.
pub(super) fn quantize_bytes(
    job: &Job<'_>,
    workspace: Workspace,
    evaluation: Option<Windows>,
    text_bytes: u64,
) -> u64 {
    let CalibrationInput { source, architecture, .. } = &job.input;
    let network = NetworkBytes { architecture, workspace };
    let outer = outer_bytes(*source, architecture);
    // The embedding and the head are copied to the output, one after the other, before the first block.
    let start = outer.max(text_bytes);
    let work = BlockWork {
        network,
        recipe: &job.recipe,
        windows: job.input.windows(),
        writes_meanwhile: job.blocks.len() > 1,
    };
    let quantizing = job.blocks.iter().map(|plan| match workspace.on_device {
        false => work.quantizing(plan),
        true => {
            // Blocks wait on the device; one is fetched and written.
            let BlockBytes { codes, stored, .. } = BlockBytes::of(plan);
            outer + codes + stored
        }
    });
    let quantizing = workspace.base() + start.max(quantizing.max().unwrap_or(0));
    let evaluating = evaluation.map_or(0, |windows| {
        let before = network.source_evaluation(*source, windows);
        before.max(network.quantized_evaluation(*source, &job.blocks, windows))
    });
    quantizing.max(evaluating)
}

/// How sensitivity is measured, as far as memory is concerned.
pub(super) struct SensitivityPlan<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) blocks: &'a [BlockPlan],
}

/// Bytes that `calibrate` takes at the peak, with `sensitivity` where it is measured.
pub(super) fn calibration_bytes(
    input: &CalibrationInput<'_>,
    workspace: Workspace,
    sensitivity: Option<SensitivityPlan<'_>>,
    text_bytes: u64,
) -> u64 {
    let windows = input.windows();
    let architecture = &input.architecture;
    let network = NetworkBytes { architecture, workspace };
    let measuring = match sensitivity {
        _ if workspace.on_device => 0,
        None => {
            let blocks = (0..architecture.blocks).map(|block| {
                let SourceBytes { dense, .. } = SourceBytes::of(architecture, block);
                measuring_bytes(&network, dense, windows)
            });
            network.states(windows.tokens) + blocks.max().unwrap_or(0)
        }
        Some(SensitivityPlan { recipe, blocks }) => {
            // Linears are quantized on some of the windows, at every choice.
            let recipe = &Recipe { gptq: true, ..recipe.clone() };
            let work = BlockWork { network, recipe, windows, writes_meanwhile: false };
            let measuring = blocks.iter().map(|plan| work.quantizing(plan)).max().unwrap_or(0);
            // For each block, the states of the windows that it alone changed.
            let tokens = EFFECT_TOKENS.next_multiple_of(windows.seq_len).min(windows.tokens);
            measuring + network.states(tokens) * (blocks.len() as u64 + 2)
        }
    };
    workspace.base() + text_bytes.max(measuring)
}

/// A block of `dense` bytes and the activations of a batch, while energies are measured.
fn measuring_bytes(network: &NetworkBytes<'_>, dense: u64, windows: Windows) -> u64 {
    let Windows { seq_len, .. } = windows;
    let chunk = chunk_tokens(windows);
    let pooled = network.workspace.pooled_tokens(network.architecture, chunk, seq_len);
    dense + network.activations(pooled, seq_len)
}

/// Tokens of the largest chunk of windows, which batches do not exceed.
fn chunk_tokens(Windows { tokens, seq_len }: Windows) -> usize {
    Chunks::most_windows(tokens / seq_len.max(1)) * seq_len
}

/// How many of each sum there are while one is made: that of all chunks so far and that of the next.
fn sums(Windows { tokens, seq_len }: Windows) -> u64 {
    if tokens > seq_len { 2 } else { 1 }
}

/// Bytes of the largest tensor outside the blocks.
fn outer_bytes(tensors: &dyn Tensors, architecture: &Architecture) -> u64 {
    let outer = architecture.outer_tensors().into_iter();
    let bytes = outer.map(|outer| tensors.tensor(outer.name).map_or(0, |t| t.bytes.len() as u64));
    bytes.max().unwrap_or(0)
}

/// The work on a block.
struct BlockWork<'a> {
    network: NetworkBytes<'a>,
    recipe: &'a Recipe,
    windows: Windows,
    /// Whether the block before is on its way to the disk.
    writes_meanwhile: bool,
}

impl BlockWork<'_> {
    /// The peak while a block is calibrated and quantized.
    fn quantizing(&self, plan: &[SitePlan]) -> u64 {
        let Self { network, recipe, windows, writes_meanwhile } = self;
        let Windows { tokens, seq_len } = *windows;
        let chunk = chunk_tokens(*windows);
        let hidden = network.architecture.hidden as u64;
        let batch = network.workspace.batch_tokens(network.architecture, chunk, seq_len);
        let pooled = network.workspace.pooled_tokens(network.architecture, chunk, seq_len);
        let activations = network.activations(pooled, seq_len);
        let BlockBytes { dense, codes, laid_out, stored, hole } = BlockBytes::of(plan);
        let sequential = recipe.gptq && recipe.sequential;
        let streams = network.states(tokens) * if recipe.gptq { 2 } else { 1 };
        // Codes are packed linear by linear, and what they leave is not all used again.
        let writing = if *writes_meanwhile { codes + stored / 2 } else { 0 };
        // The source's stream before and after a part of the block.
        let ahead = if sequential { network.states(tokens) } else { 0 };
        let calibrating = dense + activations + ahead + writing;
        let quantizing = match (recipe.gptq, sequential) {
            (false, _) => rounding(plan) + writing,
            (true, false) => {
                let squares: u64 = plan.iter().map(gram).sum();
                let seen = self.seen_bytes(plan, batch);
                let copy = 4 * batch * hidden;
                let squares = sums(*windows) * squares;
                let hessians =
                    dense - last_dense(plan) + squares + activations + copy + seen + writing;
                let propagating = codes + laid_out + activations + network.rows(batch);
                let sites = sites_bytes(
                    plan,
                    |_| 0,
                    |at, site| {
                        let later: u64 = plan[at + 1..].iter().map(gram).sum();
                        gram(site)
                            + square(site)
                            + later
                            + linear_bytes(site, 2, PACKED_CHANNELS[0])
                    },
                );
                hessians.max(propagating).max(sites + hole)
            }
            (true, true) => dense + self.sequential_bytes(plan, activations + writing) + hole,
        };
        streams + calibrating.max(quantizing)
    }

    /// While Hessians are measured on what sites see: the widest in codes and packed, and again where groups are
    /// filled up, since it fits no buffer then.
    fn seen_bytes(&self, plan: &[SitePlan], batch: u64) -> u64 {
        let widest = plan.get(MLP_ACT..).into_iter().flatten();
        let width = widest.map(|site| site.width() as u64).max().unwrap_or(0);
        let own = if width > self.network.mlp_channels() { 4 } else { 0 };
        batch * width * (5 + own)
    }

    /// Besides the block in f32 and the streams, where sites are quantized one after the other. `calibrated` bytes are still
    /// there of the measurement of energies.
    fn sequential_bytes(&self, plan: &[SitePlan], calibrated: u64) -> u64 {
        let Self { network, recipe, windows, writes_meanwhile } = self;
        let Windows { tokens, seq_len } = *windows;
        let [q, kv] = network.heads();
        let hidden = network.architecture.hidden as u64;
        let has_experts = network.architecture.experts.is_some();
        let chunk = chunk_tokens(*windows);
        let batch = network.workspace.batch_tokens(network.architecture, chunk, seq_len);
        // Of the sums, the part of a chunk that is not added yet.
        let parts = sums(*windows) - 1;
        sites_bytes(
            plan,
            |bytes| bytes.laid_out,
            |at, site| {
                let (width, channels) = (site.width() as u64, site.channels as u64);
                let corrected = recipe.correction > 0.0 && tokens as u64 >= width;
                let adds = at == ATTN_OUT || at >= MLP_ACT;
                let cross = match (corrected, adds) {
                    (false, _) => 0,
                    (true, false) => square(site),
                    (true, true) => 4 * hidden * width,
                };
                // The source's stream before and after a part of the block; what the linear of a site reads.
                let code = if site.bits < 16 { 5 } else { 16 };
                let codes = tokens as u64 * width * code / 4;
                let stored = match at {
                    ATTN_OUT => codes,
                    at if at >= MLP_ACT && has_experts => network.states(tokens),
                    at if at >= MLP_ACT && *writes_meanwhile && code == 5 => codes,
                    at if at >= MLP_ACT => 0,
                    _ => network.states(tokens),
                };
                let filled_up = if width > channels { width } else { 0 };
                // The quantized stream's activations and what the site sees, the error, and the packed operand.
                let before = match at {
                    ATTN_OUT => hidden + 2 * q + 2 * kv + filled_up,
                    at if at < MLP_ACT => 2 * width + hidden,
                    _ if has_experts => 5 * hidden + 2 * channels + 3 * width + filled_up,
                    _ => 3 * hidden + 2 * channels + filled_up,
                };
                let rows = if at >= MLP_ACT { network.mlp_tokens(batch) } else { batch };
                let mut measuring = 4 * rows * (before + width) + network.attention(seq_len);
                if at == 0 {
                    measuring = measuring.max(calibrated + 4 * rows * (2 * hidden + width));
                }
                let quantizing = square(site)
                    + match corrected {
                        true => linear_bytes(site, 3, PACKED_CHANNELS[1]),
                        false => linear_bytes(site, 2, PACKED_CHANNELS[0]),
                    };
                let sums = gram(site) + cross;
                sums + stored + (measuring + parts * sums).max(quantizing)
            },
        )
    }
}

/// The largest of the sites, each with the linears of those before it and its own: their codes, and what
/// else is `remaining` of each site that is done.
fn sites_bytes(
    plan: &[SitePlan],
    remaining: impl Fn(&BlockBytes) -> u64,
    of_site: impl Fn(usize, &SitePlan) -> u64,
) -> u64 {
    let mut done = 0;
    let mut most = 0;
    for (at, site) in plan.iter().enumerate() {
        let bytes = BlockBytes::of(std::slice::from_ref(site));
        done += bytes.codes;
        most = most.max(done + of_site(at, site));
        done += remaining(&bytes);
    }
    most
}

/// A matrix of a site's width, in f32.
fn square(site: &SitePlan) -> u64 {
    4 * (site.width() as u64).saturating_mul(site.width() as u64)
}

/// A site's Hessian. Nothing is written above its diagonal, so of a large one, which comes from the system as zeros,
/// only the pages below count; unless the system hands out pages that are larger than its rows.
fn gram(site: &SitePlan) -> u64 {
    const PAGE: u64 = 4096;
    let (square, width) = (square(site), site.width() as u64);
    if square < ON_HEAP || machine::hands_out_huge_pages() {
        return square;
    }
    square / 2 + (width * PAGE / 2).min(square / 2)
}

/// The site's largest linear in f32, so many copies, and so many channels of a square that are packed.
fn linear_bytes(site: &SitePlan, copies: u64, packed: u64) -> u64 {
    let rows = site.linears.iter().map(|linear| linear.rows).max().unwrap_or(0) as u64;
    let width = site.width() as u64;
    let factoring = if packed > 0 { FACTOR_CHANNELS.min(width) } else { 0 };
    4 * width * (copies * rows + packed.min(width) + factoring)
}

/// Rounding to nearest: a linear in f32 and its error besides the codes.
fn rounding(plan: &[SitePlan]) -> u64 {
    sites_bytes(plan, |_| 0, |_, site| linear_bytes(site, 2, 0))
}

/// The dense weight of the last site's linear, which the Hessians do not need.
fn last_dense(plan: &[SitePlan]) -> u64 {
    plan.get(MLP_ACT..).map_or(0, |sites| BlockBytes::of(sites).dense)
}
