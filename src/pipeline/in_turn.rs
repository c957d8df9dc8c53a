/*! Quantizing one block site by site: each site's Hessian is measured behind the quantized linears of the sites
before it, and its linears aim at what the source computes there.

Both streams go through the block together, a site at a time, and no product is computed twice but the quantized
block's gate and up, whose result is too wide to be kept. Experts are sites one after the other: each looks at the tokens
that the quantized block's router gives it, on both streams, and what it computed there is not kept. So do its gate and up,
which share a site with all others' but not their tokens. */

use super::block::{BlockQuantizer, QuantizedBlock, SiteWork, formats};
use super::calibrate::Statistics;
use super::load::{BlockWeights, open_block, quantized_linears, source_block};
use super::plan::SitePlan;
use super::stream::Stream;
use super::timing::Timing;
use crate::Result;
use crate::backend::{Backend, Drift};
use crate::model::Architecture;
use crate::model::block::{Block, Observer, Site};
use crate::model::experts::Share;
use crate::model::sites::{ATTN_OUT, MLP_ACT, MLP_IN, SiteKind, SiteSpec};

/// The hidden states of the calibration windows behind the source's blocks and behind the quantized ones,
/// batch by batch alike.
type Streams<'s, B> = [&'s mut Stream<B>; 2];

/// Tokens for each channel of mlp_in that an expert needs for a Hessian and a drift of its own: with 2 and with 4 the
/// model was worse than by those of all tokens (docs/results.md).
const TOKENS_PER_CHANNEL: usize = 8;

/// Device memory that the drift of the widest site and attention's outputs of all `tokens` take.
pub fn beside_bytes(architecture: &Architecture, tokens: usize) -> u64 {
    let widest = architecture.sites(0).iter().map(|site| site.channels).max().unwrap_or(0);
    let drift = widest * (widest + architecture.hidden);
    let heads = 2 * tokens * architecture.heads * architecture.head_dim;
    (4 * drift + 2 * heads) as u64
}

/// What attn_out sees of a batch: of the source, and of the quantized block.
type Heads<B> = [<B as Backend>::Tensor; 2];

/// What is kept of every batch between its sites.
struct Kept<B: Backend> {
    /// While o is quantized.
    heads: Vec<Heads<B>>,
    /// The tokens that the quantized block's router sends to each of its experts, from behind attention on.
    shares: Vec<Vec<Share>>,
}

/// Linears of a site that the same tokens quantize.
struct Part {
    /// Whose tokens; without one, all of them.
    expert: Option<usize>,
    /// The linears' numbers.
    linears: Vec<usize>,
}

/// What a part's linears are quantized by.
struct Sums<B: Backend> {
    hessian: Option<B::Hessian>,
    drift: Option<Drift<B::Cross>>,
}

impl<B: Backend> BlockQuantizer<'_, B> {
    /// Quantizes a block by `plan` and carries both streams through it; not all the way if it is the
    /// `last`, whose states nobody needs.
    pub fn quantize_in_turn(
        &self,
        weights: &BlockWeights<B>,
        plan: &[SitePlan],
        statistics: &Statistics,
        mut streams: [&mut Stream<B>; 2],
        last: bool,
        timing: &mut Timing,
    ) -> Result<QuantizedBlock<B>> {
        let Self { backend, architecture, .. } = *self;
        let formats = formats(plan, &statistics.energies);
        let source = source_block(backend, architecture, weights)?;
        let key_mean = self.key_mean(statistics);
        let mut block = open_block(backend, architecture, weights, &formats, key_mean)?;
        let mut made = QuantizedBlock { sites: Vec::new(), errors: Vec::new() };
        let mut kept = Kept { heads: Vec::new(), shares: Vec::new() };
        let specs = architecture.sites(weights.index);
        for (at, (spec, format)) in specs.iter().zip(formats).enumerate() {
            let mut linears: Vec<_> = spec.linears.iter().map(|_| None).collect();
            for part in self.parts(spec, format.width(), &kept.shares) {
                let pair = [&source, &block];
                let sums = timing.measure("hessians", || {
                    let site = (at, spec, format.width());
                    let sums = self.sums(pair, site, part.expert, &mut streams, &mut kept, last)?;
                    backend.wait()?;
                    Ok::<_, crate::Error>(sums)
                })?;
                backend.trim();
                let planned = part.linears.iter();
                let work = SiteWork {
                    spec,
                    plan: &plan[at],
                    linears: planned
                        .map(|&linear| (&plan[at].linears[linear], &weights.sites[at][linear]))
                        .collect(),
                    energy: &statistics.energies[at],
                };
                let quantized = timing.measure("gptq", || {
                    let Sums { hessian, drift } = sums;
                    let quantized = self.quantize_site(&work, &format, hessian, drift.as_ref())?;
                    backend.wait()?;
                    Ok::<_, crate::Error>(quantized)
                })?;
                for (linear, quantized) in part.linears.into_iter().zip(quantized) {
                    linears[linear] = quantized;
                }
            }
            block.sites[at].linears = timing.measure("gptq", || {
                let order = backend.site(&format)?;
                made.push(&plan[at], format, linears);
                let feeds = if at == MLP_IN { &block.sites[MLP_ACT..] } else { &[] };
                let feeds: Vec<_> = feeds.iter().map(Site::order).collect();
                let site = &made.sites[at];
                let laid_out = quantized_linears(backend, weights, at, site, &order, &feeds)?;
                backend.wait()?;
                Ok::<_, crate::Error>(laid_out)
            })?;
            timing.measure("propagate", || {
                if spec.kind == SiteKind::AttnOut {
                    self.add_heads([&source, &block], &mut streams, &mut kept)?;
                } else if at + 1 == specs.len() && !last {
                    self.add_mlp([&source, &block], &mut streams)?;
                }
                backend.wait()
            })?;
        }
        Ok(made)
    }

    /// The parts of a site. An expert's gate and up are quantized by the tokens that go there, if these are enough; those
    /// of all others by all tokens.
    fn parts(&self, spec: &SiteSpec, width: usize, shares: &[Vec<Share>]) -> Vec<Part> {
        let experts = shares.first().map_or(0, Vec::len);
        if spec.kind != SiteKind::MlpIn || experts == 0 {
            return vec![Part { expert: spec.expert, linears: (0..spec.linears.len()).collect() }];
        }
        let enough = self.expert_tokens.max(TOKENS_PER_CHANNEL * width);
        let tokens =
            |expert: usize| shares.iter().map(|batch| batch[expert].tokens.len()).sum::<usize>();
        let (own, few): (Vec<_>, Vec<_>) =
            (0..experts).partition(|expert| tokens(*expert) >= enough);
        let gate_and_up = |expert: usize| [2 * expert, 2 * expert + 1];
        let mut parts: Vec<Part> = own
            .into_iter()
            .map(|expert| Part { expert: Some(expert), linears: gate_and_up(expert).into() })
            .collect();
        if !few.is_empty() {
            self.progress.warn(&format!(
                "{}: fewer than {enough} calibration tokens came to {} of {experts} experts ({}): their gate and up are \
                 quantized by the tokens of all experts; give more with --samples",
                spec.name,
                few.len(),
                few.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
            ));
            let linears = few.into_iter().flat_map(gate_and_up).collect();
            parts.push(Part { expert: None, linears });
        }
        parts
    }

    /// The Hessian and drift of site `at` on the streams as they reach it, over all tokens or an expert's. What attn_out
    /// sees is kept; without experts, the source's stream is through with the block at its last site.
    fn sums(
        &self,
        [source, block]: [&Block<B>; 2],
        (at, spec, width): (usize, &SiteSpec, usize),
        expert: Option<usize>,
        streams: &mut Streams<'_, B>,
        Kept { heads, shares }: &mut Kept<B>,
        last: bool,
    ) -> Result<Sums<B>> {
        let Self { backend, architecture, attention, full_attention, .. } = *self;
        let mut hessian = backend.hessian(width)?;
        let all: usize = streams[0].batches.iter().map(|batch| backend.rows(batch)).sum();
        let mut drift = if self.correction > 0.0 && all >= width {
            let adds = matches!(spec.kind, SiteKind::AttnOut | SiteKind::MlpAct);
            let outputs = adds.then(|| backend.cross(architecture.hidden, width)).transpose()?;
            let inputs = backend.cross(width, width)?;
            Some(Drift { inputs, outputs, share: self.correction })
        } else {
            None
        };
        let mut tokens = 0;
        self.for_batches(streams, |batch, before, after| {
            let share = expert.map(|expert| &shares[batch][expert]);
            if share.is_some_and(Share::is_empty) {
                return Ok(());
            }
            let nobody: Observer<B::Tensor> = &mut |_, _| Ok(());
            let norm = |x: &B::Tensor, weight| backend.rms_norm(x, weight, source.epsilon);
            let [x0, x] = match spec.kind {
                SiteKind::AttnIn => {
                    [norm(before, &source.attn_norm)?, norm(after, &block.attn_norm)?]
                }
                SiteKind::AttnOut => [
                    source.heads(backend, full_attention, before, nobody)?,
                    block.heads(backend, attention, after, nobody)?,
                ],
                SiteKind::MlpIn => {
                    let pair = [norm(before, &source.mlp_norm)?, norm(after, &block.mlp_norm)?];
                    match share {
                        None => pair,
                        Some(Share { tokens, .. }) => [
                            backend.select_rows(&pair[0], tokens)?,
                            backend.select_rows(&pair[1], tokens)?,
                        ],
                    }
                }
                SiteKind::MlpAct => match expert.zip(share) {
                    None => [
                        source.gated(backend, before, nobody)?,
                        block.gated(backend, after, nobody)?,
                    ],
                    Some((expert, share)) => {
                        let normed0 = norm(before, &source.mlp_norm)?;
                        let normed = norm(after, &block.mlp_norm)?;
                        [
                            source.gated_of(backend, expert, &normed0, share, nobody)?,
                            block.gated_of(backend, expert, &normed, share, nobody)?,
                        ]
                    }
                },
            };
            tokens += backend.rows(&x);
            let site = &block.sites[at];
            // What an expert gives counts by the token's share of it, so that its errors do.
            let mut seen = site.seen(backend, &x)?;
            if let Some(Share { weights, .. }) = share {
                backend.scale_rows(&mut seen, weights)?;
            }
            backend.add_to_hessian(&mut hessian, &seen)?;
            if let Some(Drift { inputs, outputs, .. }) = &mut drift {
                let mut wanted = backend.arrange(&x0, site.order())?;
                if let Some(Share { weights, .. }) = share {
                    backend.scale_rows(&mut wanted, weights)?;
                }
                backend.add_to_cross(inputs, &backend.difference(&wanted, &seen)?, &seen)?;
                if let Some(outputs) = outputs {
                    let mut lost = backend.difference(before, after)?;
                    if let (Some(share), Some(router)) = (share, &block.router) {
                        // Each of a token's experts makes up for its part.
                        let part = vec![1.0 / router.per_token as f32; share.tokens.len()];
                        lost = backend.select_rows(&lost, &share.tokens)?;
                        backend.scale_rows(&mut lost, &part)?;
                    }
                    backend.add_to_cross(outputs, &lost, &seen)?;
                }
            }
            match spec.kind {
                SiteKind::AttnOut => heads.push([x0, x]),
                SiteKind::MlpAct if expert.is_none() && !last => {
                    source.sites[at].apply_onto(backend, x0, before, nobody)?
                }
                _ => {}
            }
            Ok(())
        })?;
        let hessian = self.trusted(spec, tokens, hessian);
        // Least squares with more unknowns than tokens would learn the tokens by heart.
        if self.correction > 0.0 && tokens < width && hessian.is_some() {
            self.progress.warn(&format!(
                "{}: {tokens} calibration tokens are fewer than its {width} channels; the drift of its \
                 inputs is not corrected: give more with --samples or --seq-len",
                spec.name
            ));
        }
        Ok(Sums { hessian, drift: drift.filter(|_| tokens >= width) })
    }

    /// Adds attention's output to both streams, and where there are experts, finds out the tokens of each.
    fn add_heads(
        &self,
        [source, block]: [&Block<B>; 2],
        streams: &mut Streams<'_, B>,
        Kept { heads, shares }: &mut Kept<B>,
    ) -> Result<()> {
        let backend = self.backend;
        let mut heads = std::mem::take(heads).into_iter();
        self.for_batches(streams, |_, before, after| {
            let [x0, x] = heads.next().expect("as many as batches");
            source.sites[ATTN_OUT].apply_onto(backend, x0, before, &mut |_, _| Ok(()))?;
            block.sites[ATTN_OUT].apply_onto(backend, x, after, &mut |_, _| Ok(()))?;
            if let Some(router) = &block.router {
                let normed = backend.rms_norm(after, &block.mlp_norm, block.epsilon)?;
                shares.push(router.shares(backend, &normed)?);
            }
            Ok(())
        })
    }

    /// Adds the MLP's output to the quantized stream; where there are experts, to both.
    fn add_mlp(&self, [source, block]: [&Block<B>; 2], streams: &mut Streams<'_, B>) -> Result<()> {
        let backend = self.backend;
        self.for_batches(streams, |_, before, after| {
            let nobody: Observer<B::Tensor> = &mut |_, _| Ok(());
            if source.router.is_some() {
                source.mlp(backend, before, nobody)?;
            }
            // As the forward pass does it, which a resumed run repeats.
            block.mlp(backend, after, nobody)
        })
    }

    fn for_batches(
        &self,
        streams: &mut Streams<'_, B>,
        mut work: impl FnMut(usize, &mut B::Tensor, &mut B::Tensor) -> Result<()>,
    ) -> Result<()> {
        let backend = self.backend;
        let [source, quantized] = streams;
        let batches = source.batches.iter_mut().zip(&mut quantized.batches);
        for (batch, (before, after)) in batches.enumerate() {
            self.progress.check_stop()?;
            backend.recall(before)?;
            backend.recall(after)?;
            work(batch, before, after)?;
            backend.set_aside(before)?;
            backend.set_aside(after)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::checkpoint::Source;
    use crate::model::sites::MLP_IN;
    use crate::pipeline::calibrate::measure_block;
    use crate::pipeline::load::{attention_spec, quantized_block};
    use crate::pipeline::plan::plan_network;
    use crate::pipeline::progress::Silent;
    use crate::quant::kv::KvFormat;
    use crate::recipe::{Group, Recipe};

    const SEQ_LEN: usize = 32;

    /// Quantizes the first block of a tiny Mixtral. Of each expert, the squared output errors of gate and up on the
    /// tokens that go there.
    fn errors_on_own_tokens(expert_tokens: usize) -> Vec<f64> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families/mixtral");
        let (cpu, source) = (Cpu::new().unwrap(), Source::open(&directory).unwrap());
        let architecture = Architecture::from_config(source.config()).unwrap();
        // Without a correction, the error is to the source's own weights.
        let recipe = Recipe {
            group: Group::Size(16),
            outliers: 8,
            correction: 0.0,
            ..Recipe::default_recipe()
        };
        let plan = &plan_network(&recipe, &architecture).unwrap()[0];
        let mut seed = 1u32;
        let tokens: Vec<u32> = (0..64 * SEQ_LEN)
            .map(|_| {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 16) % architecture.vocabulary as u32
            })
            .collect();
        let stream = || Stream::embed(&cpu, &source, &architecture, &tokens, SEQ_LEN, 0).unwrap();
        let full_attention = &attention_spec(&architecture, KvFormat::FULL, SEQ_LEN);
        let weights = BlockWeights::load(&cpu, &source, &architecture, 0, |_, _| true).unwrap();
        let statistics = measure_block(
            &cpu,
            &architecture,
            full_attention,
            &weights,
            &mut stream(),
            false,
            &Silent,
        )
        .unwrap();
        let quantizer = BlockQuantizer {
            backend: &cpu,
            architecture: &architecture,
            attention: &attention_spec(&architecture, recipe.kv(), SEQ_LEN),
            full_attention,
            damping: recipe.damping,
            correction: recipe.correction,
            expert_tokens,
            progress: &Silent,
        };
        let (mut before, mut after) = (stream(), stream());
        let streams = [&mut before, &mut after];
        let made = quantizer
            .quantize_in_turn(&weights, plan, &statistics, streams, true, &mut Timing::default())
            .unwrap();

        let source = source_block(&cpu, &architecture, &weights).unwrap();
        let key_mean = quantizer.key_mean(&statistics);
        let block = quantized_block(&cpu, &architecture, &weights, &made.sites, key_mean).unwrap();
        let (pair, specs) = ([&source, &block], architecture.sites(0));
        let mut kept = Kept { heads: Vec::new(), shares: Vec::new() };
        let (mut before, mut after) = (stream(), stream());
        let mut streams = [&mut before, &mut after];
        let mut sums = |at: usize, expert, kept: &mut Kept<Cpu>| {
            let site = (at, &specs[at], made.sites[at].format.width());
            let sums = quantizer.sums(pair, site, expert, &mut streams, kept, true).unwrap();
            if at == ATTN_OUT {
                quantizer.add_heads(pair, &mut streams, kept).unwrap();
            }
            sums.hessian.unwrap()
        };
        sums(ATTN_OUT, None, &mut kept);
        let order = cpu.site(&made.sites[MLP_IN].format).unwrap();
        let errors = (0..kept.shares[0].len()).map(|expert| {
            let mut hessian = sums(MLP_IN, Some(expert), &mut kept);
            cpu.factor(&mut hessian, recipe.damping).unwrap().unwrap();
            let error = |linear: usize| {
                let weight = weights.sites[MLP_IN][linear].as_ref().unwrap();
                let quantized = made.sites[MLP_IN].linears[linear].as_ref().unwrap();
                cpu.output_error(&hessian, &order, weight, quantized).unwrap()
            };
            error(2 * expert).powi(2) + error(2 * expert + 1).powi(2)
        });
        errors.collect()
    }

    #[test]
    fn an_experts_gate_and_up_are_best_on_its_own_tokens() {
        let (own, common) = (errors_on_own_tokens(1), errors_on_own_tokens(usize::MAX));
        eprintln!("{own:?} with Hessians of their own, {common:?} with one for all");
        assert_eq!(own.len(), 4);
        for (own, common) in own.iter().zip(&common) {
            assert!(own < common, "{own:?}, {common:?}");
        }
    }
}
