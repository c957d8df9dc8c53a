/*! `atom bench attention`: one new token of each sequence over the paged cache in codes, compared with the same kernel
over pages of f16 and with a plain read of the same bytes.

Everything is on random data and by medians of graph replays, over caches that are used one after another, so that none is in
L2 when its turn comes. */

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::BenchOutcome;
use super::device::Timer;
use super::svg::{Chart, Series};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::cache::PagedCache;
use crate::backend::cuda::timing::rotation;
use crate::backend::{AttentionSpec, Memory};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::{Error, Result};

/// Bytes of the read and the copy that the device's rates are measured by. A cache of so many drives itself out of L2.
const STREAMED_BYTES: usize = 1 << 30;
/// Bytes of the keys that are added at a time.
const ADDED_BYTES: usize = 256 << 20;

/// Heads of a model.
#[derive(Clone, Copy, Debug)]
pub struct AttentionModel {
    /// The model.
    pub name: &'static str,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

/// The models of `atom bench attention`.
pub const ATTENTION_MODELS: [AttentionModel; 4] = [
    AttentionModel { name: "llama-2-7b", heads: 32, kv_heads: 32, head_dim: 128 },
    AttentionModel { name: "llama-2-13b", heads: 40, kv_heads: 40, head_dim: 128 },
    AttentionModel { name: "llama-2-70b", heads: 64, kv_heads: 8, head_dim: 128 },
    AttentionModel { name: "mixtral-8x7b", heads: 32, kv_heads: 8, head_dim: 128 },
];

/// The model of a name, or `all`.
///
/// # Errors
/// A usage error that lists the names.
pub fn attention_models(name: &str) -> Result<Vec<AttentionModel>> {
    let known = ATTENTION_MODELS.into_iter();
    let found: Vec<AttentionModel> =
        known.filter(|model| name == "all" || model.name == name).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let names = ATTENTION_MODELS.map(|model| model.name).join(", ");
    Err(Error::usage(format!("no heads of a model `{name}` are known"))
        .hint(format!("one of {names}, or all")))
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct AttentionSettings {
    /// Models whose heads attention has.
    pub models: Vec<AttentionModel>,
    /// Tokens of each sequence.
    pub contexts: Vec<usize>,
    /// Sequences.
    pub batches: Vec<usize>,
    /// Bits of a code, 2 to 4.
    pub bits: u8,
}

/// One shape, times in microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionRow {
    /// The model.
    pub name: String,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub context: usize,
    /// Over codes; none where the cache does not fit the device, as with f16.
    pub us: Option<f64>,
    /// Over f16.
    pub fp16_us: Option<f64>,
    /// How many times as fast as f16 it is over codes.
    pub vs_fp16: Option<f64>,
    /// What is reached of the rate of a plain read of as many bytes as the codes' pages take.
    pub read_share: Option<f64>,
    /// The same of f16.
    pub fp16_read_share: Option<f64>,
}

/// The result of `atom bench attention`.
pub struct AttentionOutcome {
    rows: Vec<AttentionRow>,
    facts: Map<String, Value>,
}

impl AttentionOutcome {
    /// Rows and facts as every measurement has them.
    pub fn outcome(&self) -> BenchOutcome {
        BenchOutcome { facts: self.facts.clone(), ..BenchOutcome::of(&self.rows) }
    }

    /// How many times as fast as f16, against the context, a line for each model and batch.
    pub fn chart(&self) -> Chart {
        let point = |row: &AttentionRow| {
            let name = format!("{} x {}", row.name, row.batch);
            Some((name, (row.context as f64, row.vs_fp16?)))
        };
        let series = Series::by_name(self.rows.iter().filter_map(point));
        let fact = |key: &str| self.facts.get(key).and_then(|value| value.as_str()).unwrap_or("");
        Chart {
            title: format!("Decoding over {} against f16, {}", fact("format"), fact("device")),
            x_title: "tokens of each sequence".to_owned(),
            y_title: "times as fast".to_owned(),
            doubling_x: true,
            mark: Some((1.0, "pages of f16".to_owned())),
            series,
        }
    }
}

/// Measures every model with every context and batch.
pub fn attention(
    cuda: &Cuda,
    settings: &AttentionSettings,
    progress: &dyn Progress,
) -> Result<AttentionOutcome> {
    let timer = Timer { cuda };
    let rate = STREAMED_BYTES as f64 / timer.read(STREAMED_BYTES)?;
    let mut rows = Vec::new();
    let all = settings.models.len() * settings.contexts.len() * settings.batches.len();
    progress.begin("bench attention", all);
    for model in &settings.models {
        for &batch in &settings.batches {
            for &context in &settings.contexts {
                progress.check_stop()?;
                let int4 = KvFormat { bits: settings.bits, rotate: true, ..KvFormat::FULL };
                let codes = measure(&timer, rate, model, batch, context, int4)?;
                let full = measure(&timer, rate, model, batch, context, KvFormat::FULL)?;
                let share = |(seconds, read): (f64, f64)| read / seconds;
                let ratio = |((codes, _), (full, _))| full / codes;
                rows.push(AttentionRow {
                    name: model.name.to_owned(),
                    heads: model.heads,
                    kv_heads: model.kv_heads,
                    batch,
                    context,
                    us: codes.map(|(seconds, _)| seconds * 1e6),
                    fp16_us: full.map(|(seconds, _)| seconds * 1e6),
                    vs_fp16: codes.zip(full).map(ratio),
                    read_share: codes.map(share),
                    fp16_read_share: full.map(share),
                });
                progress.advance(&format!("{} x {batch} x {context}", model.name));
            }
        }
    }
    progress.end();
    let copy = 2.0 * STREAMED_BYTES as f64 / timer.copy(STREAMED_BYTES)?;
    let facts = [
        ("device", json!(cuda.device())),
        ("format", json!(format!("kv{}", settings.bits))),
        ("plain read TB/s", json!(rate / 1e12)),
        ("plain copy TB/s", json!(copy / 1e12)),
    ];
    let facts = facts.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Ok(AttentionOutcome { rows, facts })
}

/// Seconds of a token over such a cache, and of a plain read of it; none where the caches do not fit the device.
fn measure(
    timer: &Timer,
    rate: f64,
    model: &AttentionModel,
    batch: usize,
    context: usize,
    kv: KvFormat,
) -> Result<Option<(f64, f64)>> {
    let cuda = timer.cuda;
    let AttentionModel { heads, kv_heads, head_dim, .. } = *model;
    let half = head_dim / 2;
    let angle = |i: usize| (i / half) as f32 * 10_000f32.powf(-((i % half) as f32) / half as f32);
    let spec = AttentionSpec {
        sliding_window: None,
        heads,
        kv_heads,
        head_dim,
        seq_len: context,
        scale: AttentionSpec::usual_scale(head_dim),
        query_tables: None,
        cos: (0..context * half).map(|i| angle(i).cos()).collect(),
        sin: (0..context * half).map(|i| angle(i).sin()).collect(),
        kv,
    };
    let token_bytes = cuda.paged_cache(&spec, 1, 0, None)?.token_bytes();
    let bytes = batch * context * token_bytes;
    let sets = if bytes < STREAMED_BYTES { rotation(bytes) } else { 1 };
    if (sets * bytes + 3 * ADDED_BYTES) as u64 > cuda.gpu().limit_bytes() {
        return Ok(None);
    }
    let caches =
        (0..sets).map(|set| filled(cuda, &spec, batch, set)).collect::<Result<Vec<_>>>()?;
    let q = cuda.random_activations(batch, heads * head_dim, sets)?;
    let out = cuda.random_activations(batch, heads * head_dim, sets)?;
    let seconds = timer.seconds(sets, |set| cuda.decode_into(&caches[set], &q, &out))?;
    drop(caches);
    let read = if bytes < STREAMED_BYTES { timer.read(bytes)? } else { bytes as f64 / rate };
    Ok(Some((seconds, read)))
}

/// A cache of random tokens.
fn filled(cuda: &Cuda, spec: &AttentionSpec, batch: usize, seed: usize) -> Result<PagedCache> {
    let pages = batch * spec.seq_len.div_ceil(crate::backend::cuda::cache::PAGE_TOKENS);
    let mut cache = cuda.paged_cache(spec, batch, pages, None)?;
    let columns = spec.kv_heads * spec.head_dim;
    let most = (ADDED_BYTES / (2 * columns * batch)).clamp(1, spec.seq_len);
    let tokens = |side| cuda.random_activations(batch * most, columns, 2 * seed + side);
    let (k, v) = (tokens(0)?, tokens(1)?);
    let mut held = 0;
    while held < spec.seq_len {
        let added = most.min(spec.seq_len - held);
        cuda.append(&mut cache, &k, &v, &vec![added; batch])?;
        held += added;
    }
    Ok(cache)
}
