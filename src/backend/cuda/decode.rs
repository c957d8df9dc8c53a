/*! Decoding: a step's tokens into the pages of a cache, and their attention.

Sequences that begin in a step attend to their own tokens as windows do, those of one length together (attention.cu). Every
other token attends to pages (decode.cu): the last one of a sequence that is being decoded, and each of a prompt that goes
on, as if it were the last one of a sequence that ends with it.

```text
    rows of a step       |  a: 1  |  b, new: 5    |  c: 1  |  d, new: 5    |  e, goes on: 2  |
    windows of 5 tokens           |  b            |        |  d            |                  flash_attention
    readers of pages     |  a     |               |  c     |               |  e    |  e      |  decode_attention
```

Work is divided among the device's multiprocessors by the number of readers and by the longest sequence that the cache
could hold, not by the sequences at hand, so that the sums of a token have one order for one number of readers. */

use std::collections::BTreeMap;
use std::sync::OnceLock;

use super::Cuda;
use super::gpu::Buffer;
use super::pages::{Additions, DecodePlan, PAGE_TOKENS, PagePool, Readers};
use super::product::Precision;
use super::quantize::SourceRows;
use super::replay::{DeviceArgmax, StepReplay};
use super::slice::Out;
use super::tensor::{Activation, Dense, Hidden, Weight};
use super::{ActivationPart, kernels};
use crate::Result;
use crate::backend::{
    AttentionSpec, Decode, DecodeStep, GreedyToken, Matrix, Qkv, Quantization, SequenceStep,
};

/// A step on the device.
pub struct DeviceStep {
    tokens: usize,
    /// The tokens themselves.
    ids: Buffer,
    /// The pages of each sequence, `[sequences, table_stride]`.
    table: Buffer,
    table_stride: usize,
    rows: Buffer,
    held: Buffer,
    sequences: usize,
    most_added: usize,
    touched_pages: usize,
    windows: Vec<NewWindows>,
    readers: Option<PageReaders>,
    /// Where the rows are in the order of windows and readers; none where that is their own.
    order: Option<Buffer>,
}

/// Sequences of one length that begin.
struct NewWindows {
    /// Their rows; none where they are all of the step's.
    rows: Option<Buffer>,
    count: usize,
    seq_len: usize,
}

/// Tokens that attend to pages.
struct PageReaders {
    /// Their rows; none where they are all of the step's.
    rows: Option<Buffer>,
    count: usize,
    table: Buffer,
    lengths: Buffer,
    /// Made for the first block, used by all.
    workspace: OnceLock<Workspace>,
}

/// What splits leave for the last of them, and how many have.
struct Workspace {
    plan: DecodePlan,
    parts: Buffer,
    finished: Buffer,
}

impl Decode for Cuda {
    type Cache = PagePool;
    type Step = DeviceStep;
    type Head = Dense;
    type Argmax = DeviceArgmax;
    type Replay = StepReplay;

    fn page_tokens(&self) -> usize {
        PAGE_TOKENS
    }

    fn page_bytes(&self, spec: &AttentionSpec) -> Result<u64> {
        Ok((self.page_program(spec)?.pages.bytes() * spec.kv_heads) as u64)
    }

    fn cache(&self, spec: &AttentionSpec, pages: usize) -> Result<PagePool> {
        self.page_pool(spec, pages)
    }

    fn begin_step(&self, step: &DecodeStep, ids: &[u32]) -> Result<DeviceStep> {
        let all = &step.sequences;
        let table_stride = table_stride(step);
        let mut first_rows = vec![0];
        first_rows.extend(all.iter().scan(0, |next, sequence| {
            *next += sequence.added;
            Some(*next)
        }));
        let begins = |sequence: &SequenceStep| sequence.held == 0 && sequence.added > 1;
        let (mut by_length, mut readers) = (BTreeMap::<usize, Vec<u32>>::new(), Vec::new());
        for (sequence, first) in all.iter().zip(&first_rows) {
            let rows = *first as u32..(first + sequence.added) as u32;
            if begins(sequence) {
                by_length.entry(sequence.added).or_default().extend(rows);
            } else {
                let lengths = sequence.held + 1..;
                readers.extend(rows.zip(lengths).map(|(row, length)| (row, sequence, length)));
            }
        }
        let tokens = step.tokens();
        assert_eq!(ids.len(), tokens, "a token for each row of a step");
        let named = |rows: &[u32]| (rows.len() < tokens).then(|| self.gpu.upload(rows)).transpose();
        let mut order = Vec::with_capacity(tokens);
        let mut windows = Vec::new();
        for (seq_len, rows) in by_length {
            windows.push(NewWindows { rows: named(&rows)?, count: rows.len(), seq_len });
            order.extend(rows);
        }
        let rows: Vec<u32> = readers.iter().map(|(row, ..)| *row).collect();
        order.extend(&rows);
        let readers = match readers.is_empty() {
            true => None,
            false => Some(PageReaders {
                rows: named(&rows)?,
                count: rows.len(),
                table: self.table(readers.iter().map(|(_, own, _)| *own), table_stride)?,
                lengths: self.counts(readers.iter().map(|(.., length)| *length))?,
                workspace: OnceLock::new(),
            }),
        };
        let touched = all.iter().map(|SequenceStep { held, added, .. }| {
            (held + added).div_ceil(PAGE_TOKENS) - held / PAGE_TOKENS
        });
        Ok(DeviceStep {
            tokens,
            ids: self.gpu.upload(ids)?,
            table: self.table(all.iter(), table_stride)?,
            table_stride,
            rows: self.counts(first_rows)?,
            held: self.counts(all.iter().map(|sequence| sequence.held))?,
            sequences: all.len(),
            most_added: all.iter().map(|sequence| sequence.added).max().unwrap_or(0),
            touched_pages: touched.max().unwrap_or(0),
            windows,
            readers,
            order: inverse(&order).map(|order| self.gpu.upload(&order)).transpose()?,
        })
    }

    fn cached_attention(
        &self,
        spec: &AttentionSpec,
        cache: &mut PagePool,
        step: &DeviceStep,
        qkv: Qkv<Activation>,
        key_mean: Option<&Hidden>,
    ) -> Result<Activation> {
        let Qkv { q, k, v } = &qkv;
        assert!(q.rows == step.tokens && spec.seq_len <= cache.spec.seq_len);
        let new = Additions {
            table: &step.table,
            table_stride: step.table_stride,
            rows: &step.rows,
            held: &step.held,
            sequences: step.sequences,
            tokens: step.tokens,
            most_added: step.most_added,
            touched_pages: step.touched_pages,
        };
        self.append_to_pages(cache, [k, v], key_mean, &new)?;
        let out = self.half(q.rows, q.columns)?;
        let mut written = 0;
        for windows in &step.windows {
            let to = Out::from(out.half()).skip(written * q.columns);
            let spec = AttentionSpec { seq_len: windows.seq_len, ..spec.clone() };
            let part = |x| self.named_rows(x, windows.rows.as_ref(), windows.count);
            let parts = Qkv { q: part(q)?, k: part(k)?, v: part(v)? };
            let own = Qkv {
                q: parts.q.as_ref().unwrap_or(q),
                k: parts.k.as_ref().unwrap_or(k),
                v: parts.v.as_ref().unwrap_or(v),
            };
            self.attention_into(&spec, &own, key_mean, to)?;
            written += windows.count;
        }
        if let Some(readers) = &step.readers {
            let to = Out::from(out.half()).skip(written * q.columns);
            let part = self.named_rows(q, readers.rows.as_ref(), readers.count)?;
            let workspace = self.workspace(cache, readers)?;
            let Workspace { plan, parts, finished } = workspace;
            let reading = Readers {
                table: &readers.table,
                table_stride: step.table_stride,
                lengths: &readers.lengths,
                count: readers.count,
                plan: *plan,
                parts,
                finished,
            };
            let own = part.as_ref().unwrap_or(q);
            self.read_pages(cache, own.half().into(), to, &reading)?;
        }
        Ok(self.named_rows(&out, step.order.as_ref(), step.tokens)?.unwrap_or(out))
    }

    fn head(&self, weight: &Weight) -> Result<Dense> {
        self.dense(weight, None)
    }

    fn logits(&self, x: &Activation, head: &Dense) -> Result<Matrix> {
        let bytes = 4 * x.rows * head.rows;
        let to = self.gpu.alloc(bytes)?;
        self.multiply(ActivationPart::all(x), head, &to, Precision::HalfToFloat, false)?;
        Ok(Matrix { rows: x.rows, columns: head.rows, data: to.download(0..bytes)? })
    }

    fn embed_step(&self, table: &Weight, step: &DeviceStep) -> Result<Hidden> {
        self.embed_ids(table, &step.ids, step.tokens)
    }

    fn argmax(&self, x: &Activation, head: &Dense) -> Result<DeviceArgmax> {
        self.row_argmax(x, head)
    }

    fn greedy_step(
        &self,
        replay: &mut StepReplay,
        step: &DecodeStep,
        tokens: &[u32],
        work: &mut dyn FnMut(&DeviceStep) -> Result<DeviceArgmax>,
    ) -> Result<Vec<GreedyToken>> {
        self.replayed(replay, step, tokens, work)
    }
}

/// Pages of a row of the table: a power of two, so that few steps differ in it.
pub(super) fn table_stride(step: &DecodeStep) -> usize {
    let longest = step.sequences.iter().map(|sequence| sequence.pages.len()).max();
    longest.unwrap_or(0).next_power_of_two()
}

impl DeviceStep {
    /// Makes it a later step of as many sequences with one token each, in the same memory.
    pub(super) fn rewrite(&self, step: &DecodeStep, ids: &[u32]) -> Result<()> {
        let all = &step.sequences;
        let table = table_rows(all.iter(), self.table_stride);
        self.ids.write(ids)?;
        self.table.write(&table)?;
        self.held.write(&counts(all.iter().map(|sequence| sequence.held)))?;
        if let Some(readers) = &self.readers {
            readers.table.write(&table)?;
            readers.lengths.write(&counts(all.iter().map(|sequence| sequence.held + 1)))?;
        }
        Ok(())
    }
}

impl Cuda {
    /// The rows of `x` that were uploaded; none where they are all of its rows.
    fn named_rows(
        &self,
        x: &Activation,
        rows: Option<&Buffer>,
        count: usize,
    ) -> Result<Option<Activation>> {
        let Some(rows) = rows else { return Ok(None) };
        let to = self.half(count, x.columns)?;
        let element = kernels::Float::Half;
        let from = SourceRows { values: x.half().into(), element, rows: x.rows };
        self.select_named(from, x.columns, (rows, count), to.half())?;
        Ok(Some(to))
    }

    /// The pages of sequences on the device, `[sequences, stride]`.
    fn table<'a>(
        &self,
        sequences: impl Iterator<Item = &'a SequenceStep>,
        stride: usize,
    ) -> Result<Buffer> {
        self.gpu.upload(&table_rows(sequences, stride))
    }

    fn counts(&self, numbers: impl IntoIterator<Item = usize>) -> Result<Buffer> {
        self.gpu.upload(&counts(numbers))
    }

    fn workspace<'s>(&self, cache: &PagePool, readers: &'s PageReaders) -> Result<&'s Workspace> {
        if let Some(made) = readers.workspace.get() {
            return Ok(made);
        }
        let pages = cache.spec.seq_len.div_ceil(PAGE_TOKENS);
        let plan = self.decode_plan(cache, readers.count, pages);
        let units = readers.count * cache.head_tiles();
        let splits = if plan.splits > 1 { plan.splits } else { 0 };
        let parts = self.gpu.alloc(units * splits * cache.program.part_bytes())?;
        let finished = self.gpu.zeros(4 * units)?;
        Ok(readers.workspace.get_or_init(|| Workspace { plan, parts, finished }))
    }
}

/// The pages of sequences, `[sequences, stride]`.
fn table_rows<'a>(sequences: impl Iterator<Item = &'a SequenceStep>, stride: usize) -> Vec<i32> {
    let mut table = Vec::new();
    for (number, SequenceStep { pages, .. }) in sequences.enumerate() {
        let page = |page: &u32| i32::try_from(*page).expect("pages are counted in 31 bits");
        table.extend(pages.iter().map(page));
        table.resize((number + 1) * stride, 0);
    }
    table
}

fn counts(counts: impl IntoIterator<Item = usize>) -> Vec<i32> {
    let count = |count| i32::try_from(count).expect("tokens are counted in 31 bits");
    counts.into_iter().map(count).collect()
}

/// Where each of 0, 1, 2, ... stands in `order`; none where each stands at itself.
fn inverse(order: &[u32]) -> Option<Vec<u32>> {
    if order.iter().enumerate().all(|(at, row)| at == *row as usize) {
        return None;
    }
    let mut places = vec![0; order.len()];
    for (at, row) in order.iter().enumerate() {
        places[*row as usize] = at as u32;
    }
    Some(places)
}
