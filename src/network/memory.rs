/*! The peak memory of a network that runs, and whether the machine has it.

The estimate follows the arithmetic on the host: the sum of what is alive in each step of a block, and the maximum over
the steps. Page cache of the source's files counts only while a tensor is read from start to end,
since its pages are released afterwards.

On a GPU only the host's memory is estimated: the libraries, the tensors that are copied, and one block that is being
written. Hidden states that are offloaded to the host are not counted, since their number is unknown here. So a run
that fits is never refused. */

use super::stream::windows_per_batch;
use crate::backend::Backend;
use crate::checkpoint::linear::specs;
use crate::checkpoint::plan::{BlockPlan, SitePlan};
use crate::checkpoint::{TensorSpec, Tensors};
use crate::machine::{self, Bound, Memory};
use crate::model::Architecture;
use crate::model::sites::MLP_ACT;
use crate::progress::Progress;
use crate::units;
use crate::{Error, Result};

/// The program and its tokenizer.
const BASE: u64 = 20 << 20;
/// For each thread: its stack, its heap, and packed operands.
const PER_THREAD: u64 = 3 << 20;
/// Host memory of a run on a GPU: the driver's and the libraries' own.
const DEVICE_BASE: u64 = 512 << 20;
/// Larger pieces of memory go back to the system when they are freed; smaller ones leave holes, which the
/// next ones may not fit into.
pub(crate) const ON_HEAP: u64 = 32 << 20;
/// Address space that is reserved and never touched, which `ulimit -v` counts: stacks, arenas, buffers of
/// libraries.
const UNTOUCHED: u64 = 128 << 20;
/// Queries in a tile of attention.
const QUERIES: u64 = 48;

/// The parameters of the arithmetic that decide its memory.
#[derive(Clone, Copy, Debug)]
pub struct Workspace {
    /// Activations of a batch, in bytes.
    pub batch_bytes: usize,
    /// Hidden states of a part of an evaluation, in bytes.
    pub stream_bytes: usize,
    /// Threads.
    pub threads: usize,
    /// Whether weights, Hessians and activations are on a device and not in the host's memory.
    pub on_device: bool,
}

impl Workspace {
    /// The workspace of a backend.
    pub fn of<B: Backend>(backend: &B) -> Self {
        Self {
            batch_bytes: backend.batch_bytes(),
            stream_bytes: backend.stream_bytes(),
            threads: rayon::current_num_threads(),
            on_device: !B::ON_HOST,
        }
    }

    /// Bytes of a run besides its network.
    pub(crate) fn base(&self) -> u64 {
        let base = if self.on_device { DEVICE_BASE } else { BASE };
        base + PER_THREAD * self.threads as u64
    }

    /// Tokens of a batch, of `tokens` in windows of `seq_len`.
    pub(crate) fn batch_tokens(
        &self,
        architecture: &Architecture,
        tokens: usize,
        seq_len: usize,
    ) -> u64 {
        let windows = windows_per_batch(self.batch_bytes, architecture, seq_len);
        windows.saturating_mul(seq_len).min(tokens) as u64
    }

    /// Tokens whose buffers are pooled: those of a batch, and of the last one if it is too small to reuse the others'.
    pub(crate) fn pooled_tokens(
        &self,
        architecture: &Architecture,
        tokens: usize,
        seq_len: usize,
    ) -> u64 {
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

/// Bytes that a network's parts take on the host.
#[derive(Clone, Copy)]
pub struct NetworkBytes<'a> {
    /// The network.
    pub architecture: &'a Architecture,
    /// The parameters of its arithmetic.
    pub workspace: Workspace,
}

impl NetworkBytes<'_> {
    /// Channels of queries, and of keys and values.
    pub(crate) fn heads(&self) -> [u64; 2] {
        let Architecture { heads, kv_heads, head_dim, .. } = *self.architecture;
        [heads, kv_heads].map(|heads| (heads * head_dim) as u64)
    }

    pub(crate) fn mlp_channels(&self) -> u64 {
        let sites = self.architecture.largest_block();
        sites.iter().skip(MLP_ACT).map(|site| site.channels).max().unwrap_or(0) as u64
    }

    /// Rows of the largest activation after gate and up for `tokens`: all, or those of one expert, which may get
    /// three times the mean.
    pub(crate) fn mlp_tokens(&self, tokens: u64) -> u64 {
        match &self.architecture.experts {
            None => tokens,
            Some(experts) if experts.shared.is_some() => tokens,
            Some(experts) => (3 * tokens * experts.per_token as u64)
                .div_ceil(experts.count.max(1) as u64)
                .min(tokens),
        }
    }

    /// Bytes of a batch of `tokens` in a block: the buffers of attention, of which one is reused after it, and
    /// those of the MLP. Experts' buffers of many sizes stay in the pool: as many bytes as if one expert computed
    /// every token.
    pub(crate) fn activations(&self, tokens: u64, seq_len: usize) -> u64 {
        let [q, kv] = self.heads();
        let hidden = self.architecture.hidden as u64;
        let heads = if (q..=2 * q).contains(&hidden) { 0 } else { q };
        let chosen = if self.architecture.experts.is_some() { 2 * hidden } else { 0 };
        let mlp = 2 * self.mlp_channels() + chosen;
        4 * tokens * (hidden + q + 2 * kv + heads + mlp) + self.attention(seq_len)
    }

    /// Bytes of quantized rows of mlp_act besides the activations: codes, scales and sums.
    pub(crate) fn rows(&self, tokens: u64) -> u64 {
        tokens * self.mlp_channels() * 5 / 4
    }

    /// Keys and values of the heads that threads work on, and scores of a tile of queries.
    pub(crate) fn attention(&self, seq_len: usize) -> u64 {
        let head = 4 * self.architecture.head_dim as u64 + QUERIES;
        4 * self.workspace.threads as u64 * seq_len as u64 * head
    }

    pub(crate) fn states(&self, tokens: usize) -> u64 {
        4 * (tokens as u64).saturating_mul(self.architecture.hidden as u64)
    }

    fn head(&self, tensors: &dyn Tensors) -> u64 {
        let Ok(head) = tensors.tensor(self.architecture.head_name()) else { return 0 };
        let values = (self.architecture.vocabulary as u64).next_multiple_of(64)
            * self.architecture.hidden as u64;
        4 * values + head.bytes.len() as u64
    }

    /// Bytes that an evaluation of the source takes at the peak.
    pub fn source_evaluation(&self, tensors: &dyn Tensors, windows: Windows) -> u64 {
        let Self { architecture, workspace } = self;
        let blocks = (0..architecture.blocks).map(|block| SourceBytes::of(architecture, block));
        let weights = blocks.map(|SourceBytes { dense, hole }| dense + hole).max().unwrap_or(0);
        let mut forward = self.forward(weights, windows);
        if !workspace.on_device {
            forward += widest_stored(tensors, architecture);
        }
        workspace.base() + forward.max(self.last(tensors, windows))
    }

    /// Bytes that an evaluation of planned `blocks` on the integer path takes at the peak.
    pub fn quantized_evaluation(
        &self,
        tensors: &dyn Tensors,
        blocks: &[BlockPlan],
        windows: Windows,
    ) -> u64 {
        let part = self.part(windows);
        let batch = self.workspace.pooled_tokens(self.architecture, part, windows.seq_len);
        // The next block is read and unpacked at the same time.
        let weights = blocks.iter().map(|plan| {
            let BlockBytes { codes, laid_out, .. } = BlockBytes::of(plan);
            2 * codes + laid_out + self.rows(batch)
        });
        let forward = self.forward(weights.max().unwrap_or(0), windows);
        self.workspace.base() + forward.max(self.last(tensors, windows))
    }

    /// Bytes of decoding a source with all blocks resident, `tokens` of sequences of up to `longest` in a step, without the
    /// cache.
    pub fn source_decoding(&self, tensors: &dyn Tensors, tokens: usize, longest: usize) -> u64 {
        let blocks = 0..self.architecture.blocks;
        let blocks = blocks.map(|block| SourceBytes::of(self.architecture, block));
        let [dense, hole] =
            blocks.fold([0, 0], |[dense, hole], block| [dense + block.dense, block.hole.max(hole)]);
        self.decoding(
            tensors,
            dense + hole + widest_stored(tensors, self.architecture),
            tokens,
            longest,
        )
    }

    /// The same of planned `blocks` on the integer path.
    pub fn quantized_decoding(
        &self,
        tensors: &dyn Tensors,
        blocks: &[BlockPlan],
        tokens: usize,
        longest: usize,
    ) -> u64 {
        let blocks = blocks.iter().map(|plan| BlockBytes::of(plan));
        // Of two blocks at most there are codes of a byte each: one is laid out while the next is read.
        let [laid_out, codes] = blocks.fold([0, 0], |[laid_out, codes], block| {
            [laid_out + block.laid_out, block.codes.max(codes)]
        });
        self.decoding(tensors, laid_out + 2 * codes + self.rows(tokens as u64), tokens, longest)
    }

    fn decoding(&self, tensors: &dyn Tensors, weights: u64, tokens: usize, longest: usize) -> u64 {
        if self.workspace.on_device {
            return self.workspace.base();
        }
        let step = self.activations(tokens as u64, longest) + self.states(tokens);
        // The head in its own type, and its pages while it is laid out.
        let head = tensors.tensor(self.architecture.head_name());
        let head = head.map_or(0, |head| 2 * head.bytes.len() as u64);
        self.workspace.base() + weights + head + step
    }

    /// Tokens whose hidden states are held together.
    fn part(&self, Windows { tokens, seq_len }: Windows) -> usize {
        let fit = self.workspace.stream_bytes / (4 * self.architecture.hidden).max(1);
        tokens.min(fit).max(seq_len)
    }

    /// The peak of a forward pass over a block whose weights take `weights`.
    fn forward(&self, weights: u64, windows: Windows) -> u64 {
        if self.workspace.on_device {
            return 0;
        }
        let (part, seq_len) = (self.part(windows), windows.seq_len);
        let batch = self.workspace.pooled_tokens(self.architecture, part, seq_len);
        weights + self.activations(batch, seq_len) + self.states(part)
    }

    /// The peak at the end of a forward pass: the output head.
    fn last(&self, tensors: &dyn Tensors, windows: Windows) -> u64 {
        if self.workspace.on_device {
            return 0;
        }
        let Windows { tokens, seq_len } = windows;
        let fit = self.workspace.stream_bytes / (4 * self.architecture.hidden).max(1);
        let batch = self.workspace.batch_tokens(self.architecture, self.part(windows), seq_len);
        self.head(tensors) + self.states(tokens.min(fit)) + self.states(batch as usize)
    }
}

/// Bytes of a planned block.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BlockBytes {
    /// All weights in f32, packed for products.
    pub(crate) dense: u64,
    /// All quantized weights, a code a byte.
    pub(crate) codes: u64,
    /// All quantized weights, laid out for the integer product.
    pub(crate) laid_out: u64,
    /// All quantized weights, as they are stored.
    pub(crate) stored: u64,
    /// Heap fragmentation: the largest linear in f32 that is freed without going back to the system.
    pub(crate) hole: u64,
}

impl BlockBytes {
    /// The bytes of a planned block.
    pub(crate) fn of(plan: &[SitePlan]) -> Self {
        let mut bytes = Self::default();
        for site in plan {
            let width = site.width() as u64;
            for linear in &site.linears {
                let rows = linear.rows as u64;
                bytes.dense += 4 * rows.next_multiple_of(64) * width;
                let specs = specs(&linear.name, linear.rows, &site.weights(linear));
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

/// Bytes of a block in full precision.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SourceBytes {
    /// All weights in f32, packed for products.
    pub(crate) dense: u64,
    /// Heap fragmentation: the largest linear in f32 that is freed without going back to the system.
    pub(crate) hole: u64,
}

impl SourceBytes {
    /// The bytes of block `block`.
    pub(crate) fn of(architecture: &Architecture, block: usize) -> Self {
        let mut bytes = Self::default();
        for site in architecture.sites(block) {
            let width = site.channels.next_multiple_of(16) as u64;
            for linear in &site.linears {
                let rows = linear.rows as u64;
                bytes.dense += 4 * rows.next_multiple_of(64) * width;
                if 4 * rows * width < ON_HEAP {
                    bytes.hole = bytes.hole.max(4 * rows * width);
                }
            }
        }
        bytes
    }
}

/// The largest linear as the source stores it: its pages while it is read.
fn widest_stored(tensors: &dyn Tensors, architecture: &Architecture) -> u64 {
    let sites = if architecture.blocks > 0 { architecture.largest_block() } else { Vec::new() };
    let linears = sites.iter().flat_map(|site| &site.linears);
    let stored = linears.map(|linear| {
        tensors.tensor(&linear.weight()).map_or(0, |tensor| tensor.bytes.len() as u64)
    });
    stored.max().unwrap_or(0)
}

/// Compares an estimate with the available memory, and warns near the limit.
///
/// # Errors
/// A machine error with both numbers if the memory does not suffice.
pub fn check(needed: u64, progress: &dyn Progress) -> Result<()> {
    const HINT: &str = "give fewer --samples, a shorter --seq-len or fewer --threads, or take a machine \
                        with more memory";
    check_or(needed, HINT, progress)
}

/// The same with a hint of its own.
pub(super) fn check_or(needed: u64, hint: &str, progress: &dyn Progress) -> Result<()> {
    match machine::available() {
        Some(memory) => compare(needed, memory, hint, progress),
        None => Ok(()),
    }
}

fn compare(needed: u64, memory: Memory, hint: &str, progress: &dyn Progress) -> Result<()> {
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
        return Err(Error::machine(format!("this run needs {numbers}")).hint(hint));
    }
    // Four fifths: the estimate holds within a tenth, and other programs use the machine too.
    if needed / 4 > room / 5 {
        progress.warn(&format!("this run may need {numbers}: {hint}"));
    }
    Ok(())
}
