/*! How much memory a run takes at its peak, and whether the machine has it.

The estimate follows the arithmetic on the host: what lives at the same time in each step of a block, of which
the largest counts. Page cache of the source's files is part of it only while a tensor is read from start to end,
since its pages are given back afterwards.

On a GPU it is what the host needs whatever the device holds: the libraries, the tensors that are copied, and one
block on its way to the disk. Hidden states that the device has no room for are set aside in the host's memory and
are not counted, since nobody knows here how many they are: a run that needs less than it has is never refused. */

use super::Job;
use super::plan::{BlockPlan, SitePlan};
use super::sensitivity::EFFECT_TOKENS;
use super::stream::windows_per_batch;
use crate::backend::Backend;
use crate::checkpoint::{TensorSpec, Tensors};
use crate::machine::{self, Bound, Memory};
use crate::model::Architecture;
use crate::model::sites::{ATTN_OUT, EMBEDDING, MLP_ACT, MLP_IN};
use crate::progress::Progress;
use crate::recipe::{Group, Recipe};
use crate::units;
use crate::{Error, Result};

/// The program and its tokenizer.
const BASE: u64 = 20 << 20;
/// For each thread: its stack, its heap, and packed operands.
const PER_THREAD: u64 = 3 << 20;
/// Host memory of a run on a GPU: the driver's and the libraries' own.
const DEVICE_BASE: u64 = 512 << 20;
/// Channels of a matrix as wide as a Hessian that are packed at a time for the loss, and for the correction
/// of a drift.
const PACKED_CHANNELS: [u64; 2] = [512, 1024];
/// Channels of such a matrix that its factorization keeps and works with beside it and its factor.
const FACTOR_CHANNELS: u64 = 256;
/// Larger pieces of memory go back to the system when they are freed; smaller ones leave holes, which the
/// next ones may not fit into.
const ON_HEAP: u64 = 32 << 20;
/// Address space that is reserved and never touched, which `ulimit -v` counts: stacks, arenas, buffers of
/// libraries.
const UNTOUCHED: u64 = 128 << 20;
/// Queries that attention takes at once.
const QUERIES: u64 = 48;

/// Where the arithmetic runs, as far as memory is concerned.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Activations of a batch, in bytes.
    pub batch_bytes: usize,
    /// Hidden states of a part of an evaluation, in bytes.
    pub stream_bytes: usize,
    /// Threads.
    pub threads: usize,
    /// Whether weights, Hessians and activations are on a device and not in the host's memory.
    pub on_device: bool,
}

impl Place {
    /// A backend's.
    pub fn of<B: Backend>(backend: &B) -> Self {
        Self {
            batch_bytes: backend.batch_bytes(),
            stream_bytes: backend.stream_bytes(),
            threads: rayon::current_num_threads(),
            on_device: !B::ON_HOST,
        }
    }

    fn base(&self) -> u64 {
        let base = if self.on_device { DEVICE_BASE } else { BASE };
        base + PER_THREAD * self.threads as u64
    }

    /// Tokens that pass a block together, of `tokens` in windows of `seq_len`.
    fn batch_tokens(&self, architecture: &Architecture, tokens: usize, seq_len: usize) -> u64 {
        let windows = windows_per_batch(self.batch_bytes, architecture, seq_len);
        windows.saturating_mul(seq_len).min(tokens) as u64
    }

    /// Tokens whose buffers are kept: those of a batch, and of the last one if it is too small to use the others'.
    fn pooled_tokens(&self, architecture: &Architecture, tokens: usize, seq_len: usize) -> u64 {
        let batch = self.batch_tokens(architecture, tokens, seq_len);
        let last = tokens as u64 % batch.max(1);
        if 2 * last < batch { batch + last } else { batch }
    }
}

/// Windows of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Tokens of all windows.
    pub tokens: usize,
    /// Tokens of one.
    pub seq_len: usize,
}

/// Bytes that a network's parts take in f32 on the host.
struct Network<'a> {
    architecture: &'a Architecture,
    place: Place,
}

/// Bytes of a block.
#[derive(Clone, Copy, Debug, Default)]
struct BlockBytes {
    /// All weights in f32, packed for products.
    dense: u64,
    /// All quantized weights, a code a byte.
    codes: u64,
    /// The same laid out for the integer product.
    laid_out: u64,
    /// The same as they are stored.
    stored: u64,
    /// A hole that the largest linear in f32 may leave in the heap when it is freed.
    hole: u64,
}

impl Network<'_> {
    fn width(&self, channels: usize) -> u64 {
        channels as u64
    }

    /// Channels of queries, and of keys and values.
    fn heads(&self) -> [u64; 2] {
        let Architecture { heads, kv_heads, head_dim, .. } = *self.architecture;
        [heads, kv_heads].map(|heads| (heads * head_dim) as u64)
    }

    fn mlp_channels(&self) -> u64 {
        let sites = self.architecture.sites(0);
        self.width(sites.get(MLP_ACT).map_or(0, |site| site.channels))
    }

    /// Rows of the largest activation behind gate and up for `tokens`: all, or one expert's, of which some
    /// are used three times as much as others.
    fn mlp_tokens(&self, tokens: u64) -> u64 {
        match &self.architecture.experts {
            None => tokens,
            Some(experts) => (3 * tokens * experts.per_token as u64)
                .div_ceil(experts.count.max(1) as u64)
                .min(tokens),
        }
    }

    /// What a batch of `tokens` takes on its way through a block: the buffers of attention, of which one is
    /// used again behind it, and those of the MLP. Of experts' buffers of many sizes all are kept: as much as
    /// if every token went to one of them.
    fn activations(&self, tokens: u64, seq_len: usize) -> u64 {
        let [q, kv] = self.heads();
        let hidden = self.architecture.hidden as u64;
        let heads = if (q..=2 * q).contains(&hidden) { 0 } else { q };
        let chosen = if self.architecture.experts.is_some() { 2 * hidden } else { 0 };
        let mlp = 2 * self.mlp_channels() + chosen;
        4 * tokens * (hidden + q + 2 * kv + heads + mlp) + self.attention(seq_len)
    }

    /// What quantized rows of mlp_act take beside the activations: codes, scales and sums.
    fn rows(&self, tokens: u64) -> u64 {
        tokens * self.mlp_channels() * 5 / 4
    }

    /// Keys and values of the heads that threads work on, and scores of a tile of queries.
    fn attention(&self, seq_len: usize) -> u64 {
        let head = 4 * self.architecture.head_dim as u64 + QUERIES;
        4 * self.place.threads as u64 * seq_len as u64 * head
    }

    fn states(&self, tokens: usize) -> u64 {
        4 * (tokens as u64).saturating_mul(self.architecture.hidden as u64)
    }

    fn head(&self, tensors: &dyn Tensors) -> u64 {
        let Ok(head) = tensors.tensor(self.architecture.head_name()) else { return 0 };
        let values = (self.architecture.vocabulary as u64).next_multiple_of(64)
            * self.architecture.hidden as u64;
        4 * values + head.bytes.len() as u64
    }
}

impl BlockBytes {
    fn of(plan: &BlockPlan) -> Self {
        let mut bytes = Self::default();
        for site in plan {
            let width = site.width() as u64;
            for linear in &site.linears {
                let rows = linear.rows as u64;
                bytes.dense += 4 * rows.next_multiple_of(64) * width;
                let specs = crate::checkpoint::linear::specs(
                    &linear.name,
                    linear.rows,
                    &site.weights(linear),
                );
                let stored = match linear.bits {
                    16 => 2 * rows * width,
                    _ => specs.iter().map(TensorSpec::bytes).sum(),
                };
                bytes.stored += stored;
                bytes.codes += rows * width + stored / 8;
                bytes.laid_out += if linear.bits == 16 { 4 * rows * width } else { stored };
                if 4 * rows * width < ON_HEAP {
                    bytes.hole = bytes.hole.max(4 * rows * width);
                }
            }
        }
        bytes
    }
}

/// Bytes that `quantize` and `pack` take at the peak.
pub(super) fn quantize_bytes(
    job: &Job<'_>,
    place: Place,
    evaluation: Option<Windows>,
    text_bytes: u64,
) -> u64 {
    let windows = Windows { tokens: job.tokens.len(), seq_len: job.provenance.seq_len };
    let network = Network { architecture: &job.architecture, place };
    let kept = kept_bytes(job.source, &job.architecture);
    // The embedding and the head are copied to the output, one after the other, before the first block.
    let start = kept.max(text_bytes);
    let many = job.blocks.len() > 1;
    let quantizing = job.blocks.iter().map(|plan| match place.on_device {
        false => block_bytes(&network, &job.recipe, plan, windows, many),
        true => {
            // Blocks wait on the device; one is fetched and written.
            let BlockBytes { codes, stored, .. } = BlockBytes::of(plan);
            kept + codes + stored
        }
    });
    let quantizing = quantizing.max().unwrap_or(0);
    let evaluating = evaluation.map_or(0, |windows| {
        let source = forward_bytes(&network, &job.blocks, windows, false)
            + widest_stored(job.source, &job.blocks);
        let atom = forward_bytes(&network, &job.blocks, windows, true);
        source.max(atom).max(last_bytes(&network, job.source, windows))
    });
    place.base() + start.max(quantizing).max(evaluating)
}

/// A recipe that fits every network, where only its shapes are looked at.
pub fn any_recipe() -> Recipe {
    Recipe { group: Group::Row, outliers: 0, ..Recipe::paper() }
}

/// Bytes that `calibrate` takes at the peak.
pub(super) fn calibration_bytes(
    job: &Job<'_>,
    place: Place,
    sensitivity: bool,
    text_bytes: u64,
) -> u64 {
    let windows = Windows { tokens: job.tokens.len(), seq_len: job.provenance.seq_len };
    let network = Network { architecture: &job.architecture, place };
    // Nothing is quantized, unless sensitivity is measured: on some of the windows, at every choice.
    let recipe = Recipe { gptq: sensitivity, ..job.recipe.clone() };
    let blocks = job.blocks.iter().map(|plan| block_bytes(&network, &recipe, plan, windows, false));
    let measuring = if place.on_device { 0 } else { blocks.max().unwrap_or(0) };
    // For each block, the states of the windows that it alone changed.
    let changed = if sensitivity && !place.on_device {
        let tokens = EFFECT_TOKENS.next_multiple_of(windows.seq_len).min(windows.tokens);
        network.states(tokens) * (job.blocks.len() as u64 + 2)
    } else {
        0
    };
    place.base() + text_bytes.max(measuring + changed)
}

/// The largest tensor that is kept as it is.
fn kept_bytes(tensors: &dyn Tensors, architecture: &Architecture) -> u64 {
    let names = [EMBEDDING, architecture.head_name()];
    let bytes =
        names.map(|name| tensors.tensor(name).map_or(0, |tensor| tensor.bytes.len() as u64));
    bytes.into_iter().max().unwrap_or(0)
}

/// The largest linear as the source stores it: its pages while it is read.
fn widest_stored(tensors: &dyn Tensors, blocks: &[BlockPlan]) -> u64 {
    let linears = blocks.iter().take(1).flatten().flat_map(|site| &site.linears);
    let stored = linears.map(|linear| {
        let tensor = tensors.tensor(&format!("{}.weight", linear.name));
        tensor.map_or(0, |tensor| tensor.bytes.len() as u64)
    });
    stored.max().unwrap_or(0)
}

/// The peak while a block is calibrated and quantized; `behind` others, one is on its way to the disk.
fn block_bytes(
    network: &Network<'_>,
    recipe: &Recipe,
    plan: &BlockPlan,
    windows: Windows,
    behind: bool,
) -> u64 {
    let Windows { tokens, seq_len } = windows;
    let hidden = network.architecture.hidden as u64;
    let batch = network.place.batch_tokens(network.architecture, tokens, seq_len);
    let pooled = network.place.pooled_tokens(network.architecture, tokens, seq_len);
    let activations = network.activations(pooled, seq_len);
    let BlockBytes { dense, codes, laid_out, stored, hole } = BlockBytes::of(plan);
    let in_turn = recipe.gptq && recipe.sequential;
    let streams = network.states(tokens) * if recipe.gptq { 2 } else { 1 };
    let copy = if in_turn { 4 * batch * hidden } else { 0 };
    // Codes are packed linear by linear, and what they leave is not all used again.
    let writing = if behind { codes + stored / 2 } else { 0 };
    let calibrating = dense + activations + copy + writing;
    let quantizing = match (recipe.gptq, in_turn) {
        (false, _) => rounding(plan) + writing,
        (true, false) => {
            let squares: u64 = plan.iter().map(gram).sum();
            let seen = seen_bytes(network, plan, batch);
            let copy = 4 * batch * hidden;
            let hessians = dense - last_dense(plan) + squares + activations + copy + seen + writing;
            let propagating = codes + laid_out + activations + network.rows(batch);
            let sites = sites_bytes(plan, false, |at, site| {
                let later: u64 = plan[at + 1..].iter().map(gram).sum();
                gram(site) + square(site) + later + linear_bytes(site, 2, PACKED_CHANNELS[0])
            });
            hessians.max(propagating).max(sites + hole)
        }
        (true, true) => {
            let drift = recipe.correction > 0.0;
            // What calibration worked with is still there.
            let first = activations + copy + 9 * batch * hidden + 4 * hidden * hidden * 2 + writing;
            dense + first.max(in_turn_bytes(network, plan, windows, drift) + hole)
        }
    };
    streams + calibrating.max(quantizing)
}

/// While Hessians are measured on what sites see: the widest in codes and packed, and again where groups are
/// filled up, since it fits no buffer then.
fn seen_bytes(network: &Network<'_>, plan: &BlockPlan, batch: u64) -> u64 {
    let widest = plan.get(MLP_ACT..).into_iter().flatten();
    let width = widest.map(|site| site.width() as u64).max().unwrap_or(0);
    let own = if width > network.mlp_channels() { 4 } else { 0 };
    batch * width * (5 + own)
}

/// Beside the block in f32 and the streams, where sites are quantized one after the other.
fn in_turn_bytes(network: &Network<'_>, plan: &BlockPlan, windows: Windows, drift: bool) -> u64 {
    let Windows { tokens, seq_len } = windows;
    let [q, kv] = network.heads();
    let hidden = network.architecture.hidden as u64;
    let batch = network.place.batch_tokens(network.architecture, tokens, seq_len);
    sites_bytes(plan, true, |at, site| {
        let (width, channels) = (site.width() as u64, site.channels as u64);
        let drifts = drift && tokens as u64 >= width;
        let adds = drifts && (at == ATTN_OUT || at >= MLP_ACT);
        let cross = if drifts { square(site) } else { 0 };
        let outputs = if adds { 4 * hidden * width } else { 0 };
        // What attn_out sees is kept of both streams until o is done.
        let heads = if at == ATTN_OUT { 2 * 4 * tokens as u64 * q } else { 0 };
        let chosen = if network.architecture.experts.is_some() { 2 * hidden } else { 0 };
        // Both streams' activations, and of the site's what is seen, wanted, their difference, and the packed
        // operand. Where groups are filled up, what is seen fits no buffer of the activations.
        let before = match at {
            0 | MLP_IN => 2 * hidden,
            ATTN_OUT => hidden + q + 2 * kv,
            _ => 3 * hidden + chosen + 2 * channels + if width > channels { channels } else { 0 },
        };
        let seen = match (at, drifts) {
            (ATTN_OUT, true) => 4 * width - 2 * kv.min(width),
            (_, true) => 4 * width,
            (ATTN_OUT, false) => width,
            (_, false) => 2 * width,
        };
        let rows = if at >= MLP_ACT { network.mlp_tokens(batch) } else { batch };
        let measuring = 4 * rows * (before + seen) + network.attention(seq_len);
        let quantizing = square(site)
            + match drifts {
                true => linear_bytes(site, 3, PACKED_CHANNELS[1]),
                false => linear_bytes(site, 2, PACKED_CHANNELS[0]),
            };
        gram(site) + cross + outputs + heads + measuring.max(quantizing)
    })
}

/// The largest of the sites, each beside the linears of those before it and its own: their codes, and
/// `laid_out` for the integer product where that is done at once.
fn sites_bytes(plan: &BlockPlan, laid_out: bool, of_site: impl Fn(usize, &SitePlan) -> u64) -> u64 {
    let mut done = 0;
    let mut most = 0;
    for (at, site) in plan.iter().enumerate() {
        let bytes = BlockBytes::of(&vec![site.clone()]);
        done += bytes.codes;
        most = most.max(done + of_site(at, site));
        done += if laid_out { bytes.laid_out } else { 0 };
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

/// The site's largest linear in f32, so many copies, beside so many channels of a square that are packed.
fn linear_bytes(site: &SitePlan, copies: u64, packed: u64) -> u64 {
    let rows = site.linears.iter().map(|linear| linear.rows).max().unwrap_or(0) as u64;
    let width = site.width() as u64;
    let factoring = if packed > 0 { FACTOR_CHANNELS.min(width) } else { 0 };
    4 * width * (copies * rows + packed.min(width) + factoring)
}

/// Rounding to nearest: a linear in f32 and its error beside the codes.
fn rounding(plan: &BlockPlan) -> u64 {
    sites_bytes(plan, false, |_, site| linear_bytes(site, 2, 0))
}

/// The dense weight of the last site's linear, which the Hessians do not need.
fn last_dense(plan: &BlockPlan) -> u64 {
    plan.get(MLP_ACT..).map_or(0, |sites| BlockBytes::of(&sites.to_vec()).dense)
}

/// The peak of a forward pass over a block, of the source or on the integer path.
fn forward_bytes(
    network: &Network<'_>,
    blocks: &[BlockPlan],
    Windows { tokens, seq_len }: Windows,
    quantized: bool,
) -> u64 {
    let part = tokens.min(network.place.stream_bytes / (4 * network.architecture.hidden).max(1));
    let part = part.max(seq_len);
    let batch = network.place.pooled_tokens(network.architecture, part, seq_len);
    let weights = blocks.iter().map(BlockBytes::of).map(|bytes| match quantized {
        false => bytes.dense + bytes.hole,
        // The next block is read and unpacked meanwhile.
        true => 2 * bytes.codes + bytes.laid_out + network.rows(batch),
    });
    let weights = if network.place.on_device { 0 } else { weights.max().unwrap_or(0) };
    let activations = network.activations(batch, seq_len);
    let on_host = if network.place.on_device { 0 } else { activations + network.states(part) };
    weights + on_host
}

/// The end of a forward pass: the output head.
fn last_bytes(network: &Network<'_>, tensors: &dyn Tensors, windows: Windows) -> u64 {
    if network.place.on_device {
        return 0;
    }
    let Windows { tokens, seq_len } = windows;
    let part = tokens.min(network.place.stream_bytes / (4 * network.architecture.hidden).max(1));
    let batch = network.place.batch_tokens(network.architecture, part.max(seq_len), seq_len);
    network.head(tensors) + network.states(part) + network.states(batch as usize)
}

/// Bytes that an evaluation of `blocks` takes at the peak; `quantized` on the integer path.
pub fn evaluation_bytes(
    architecture: &Architecture,
    tensors: &dyn Tensors,
    blocks: &[BlockPlan],
    place: Place,
    windows: Windows,
    quantized: bool,
) -> u64 {
    let network = Network { architecture, place };
    let mut forward = forward_bytes(&network, blocks, windows, quantized);
    if !quantized && !place.on_device {
        forward += widest_stored(tensors, blocks);
    }
    place.base() + forward.max(last_bytes(&network, tensors, windows))
}

/// Compares an estimate with what the machine has: a warning near it.
///
/// # Errors
/// A machine error with both numbers if there is less.
pub fn check(needed: u64, progress: &dyn Progress) -> Result<()> {
    match machine::available() {
        Some(memory) => judge(needed, memory, progress),
        None => Ok(()),
    }
}

fn judge(needed: u64, memory: Memory, progress: &dyn Progress) -> Result<()> {
    const HINT: &str = "give fewer --samples, a shorter --seq-len or fewer --threads, or take a machine \
                        with more memory";
    let Memory { available, bound, .. } = memory;
    let numbers = format!(
        "about {} of memory, and {} are available ({})",
        units::bytes(needed),
        units::bytes(available),
        bound.words()
    );
    let room = match bound {
        Bound::AddressSpace => available.saturating_sub(UNTOUCHED),
        _ => available,
    };
    if needed > room {
        return Err(Error::machine(format!("this run needs {numbers}")).hint(HINT));
    }
    // Four fifths: the estimate holds within a tenth, and others use the machine too.
    if needed / 4 > room / 5 {
        progress.warn(&format!("this run may need {numbers}: {HINT}"));
    }
    Ok(())
}
