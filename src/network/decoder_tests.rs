/*! Decoding compared with prefill: the logits of every token have the same bits, whatever steps the tokens come in, for every
kind of network, every width of the cache, and a quantized network. */

use std::path::Path;

use super::{Decoder, Model, OutputHead, Runnable, Stream, split_fused};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::device_of_tests;
use crate::backend::{Backend, Decode, DecodeStep, Forward, Memory, SequenceStep};
use crate::checkpoint::{AtomCheckpoint, Destination, Inputs, Source};
use crate::hub;
use crate::model::AttentionSpecs;
use crate::model::rope::RopeScaling;
use crate::pipeline::{Calibration, Output, Quantization, quantize};
use crate::progress::Silent;
use crate::quant::kv::KvFormat;
use crate::recipe::{Group, Outliers, Recipe};
use crate::text::{Split, TextSet};

/// The logits of every token of a text that passes the blocks at once.
fn prefill(model: &Runnable<'_, Cpu>, tokens: &[u32]) -> Vec<u32> {
    let (cpu, architecture) = (model.backend, &model.architecture);
    let attention = AttentionSpecs::of(architecture, model.kv, tokens.len());
    let mut stream =
        Stream::embed(cpu, model.tensors, architecture, tokens, tokens.len(), 0).unwrap();
    for index in 0..architecture.blocks {
        let block = model.block(model.load(index).unwrap()).unwrap();
        stream.advance(cpu, &attention, &block, || Ok(())).unwrap();
    }
    let head = OutputHead::load(cpu, model.tensors, architecture).unwrap();
    let normed = head.normed(cpu, &stream.batches[0]).unwrap();
    let logits = cpu.product(&normed, &head.weight).unwrap();
    cpu.download_activation(&logits).unwrap().data.iter().map(|x| x.to_bits()).collect()
}

/// The logits of every token of two texts that are decoded together, `steps[i]` tokens of each in step i; the second one
/// comes a step later. Pages alternate between them.
fn decode<B: Backend + Decode>(
    decoder: &Decoder<'_, B>,
    texts: [&[u32]; 2],
    steps: &[usize],
) -> [Vec<f32>; 2] {
    let backend = decoder.backend();
    let longest = texts.iter().map(|text| text.len()).max().unwrap();
    let each = longest.div_ceil(backend.page_tokens()) as u32;
    let mut caches = decoder.caches(longest, 2 * each as usize).unwrap();
    let mut logits = [Vec::new(), Vec::new()];
    let mut held = [0, 0];
    for step in 0..=steps.len() {
        let (mut sequences, mut tokens, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        for (own, text) in texts.iter().enumerate() {
            let wanted = step.checked_sub(own).and_then(|step| steps.get(step)).copied();
            let added = wanted.unwrap_or(0).min(text.len() - held[own]);
            if added > 0 {
                tokens.extend_from_slice(&text[held[own]..held[own] + added]);
                owners.extend(vec![own; added]);
                let pages = (0..each).map(|page| 2 * page + own as u32).collect();
                sequences.push(SequenceStep { pages, held: held[own], added });
                held[own] += added;
            }
        }
        if tokens.is_empty() {
            continue;
        }
        let wanted: Vec<u32> = (0..tokens.len() as u32).collect();
        let found =
            decoder.forward(&mut caches, &DecodeStep { sequences }, &tokens, &wanted).unwrap();
        for (row, own) in found.data.chunks(found.columns).zip(owners) {
            logits[own].extend_from_slice(row);
        }
    }
    logits
}

/// Decodes two texts and compares every logit with prefill.
fn check(model: Runnable<'_, Cpu>, texts: [&[u32]; 2], what: &str) {
    let expected = texts.map(|text| prefill(&model, text));
    let vocabulary = model.architecture.vocabulary;
    let decoder = Decoder::load(model, &Silent).unwrap();
    let one_by_one = vec![1; texts[0].len().max(texts[1].len())];
    let mut prompt_first = vec![texts[0].len() / 2];
    prompt_first.extend(&one_by_one);
    for steps in [one_by_one, prompt_first, vec![5, 1, 1, 1000]] {
        let found = decode(&decoder, texts, &steps);
        for ((found, expected), text) in found.iter().zip(&expected).zip(texts) {
            assert_eq!(found.len(), text.len() * vocabulary, "{what}");
            let same = found.iter().map(|x| x.to_bits()).eq(expected.iter().copied());
            assert!(same, "{what}: logits differ with steps {steps:?}");
        }
    }
}

#[test]
fn every_family_decodes_as_it_prefills() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families");
    let mut count = 0;
    for entry in fs_err::read_dir(directory).unwrap() {
        let directory = entry.unwrap().path();
        let (cpu, source) = (Cpu::new().unwrap(), Source::open(&directory).unwrap());
        let source = split_fused(source).unwrap();
        let vocabulary = source.config()["vocab_size"].as_u64().unwrap() as u32;
        let text = |len: u32, salt: u32| -> Vec<u32> {
            (0..len).map(|i| (i * i + 7 * i + salt) % vocabulary).collect()
        };
        let model = Runnable::source(&cpu, &source, &Silent).unwrap();
        // LongRoPE has other frequencies where the longest text of a run is longer than the original context.
        let most = match model.architecture.common_rope().map(|rope| &rope.scaling) {
            Some(RopeScaling::LongRope { original, .. }) if *original > 33.0 => 60,
            _ => 70,
        };
        let (first, second) = (text(most, 1), text(33, 5));
        check(model, [&first, &second], &directory.display().to_string());
        count += 1;
    }
    assert!(count >= 10, "{count} networks");
}

#[test]
fn every_width_of_the_cache_decodes_as_it_prefills() {
    let (cpu, source) = (Cpu::new().unwrap(), hub::tiny_llama().unwrap());
    let text = |len: u32, salt: u32| -> Vec<u32> {
        (0..len).map(|i| (i * i * 31 + 7 * i + salt) % 4096).collect()
    };
    let (first, second) = (text(75, 1), text(20, 5));
    for bits in [2, 3, 4, 8, 16] {
        let kv = KvFormat { bits, rotate: bits != 3, after_rope: bits != 8, ..KvFormat::FULL };
        let mut model = Runnable::source(&cpu, &source, &Silent).unwrap();
        model.kv = kv;
        check(model, [&first, &second], &format!("{bits} bits"));
    }
}

/// A quantized checkpoint in `out`.
fn quantized(source: &Source, out: &Path, recipe: &Recipe) -> AtomCheckpoint {
    let text = TextSet::sample(Split::Calibration);
    let calibration = Calibration { text, samples: 1, seq_len: 16, seed: 0 };
    let destination =
        Destination { out: out.to_owned(), overwrite: false, inputs: Inputs::default() };
    let quantization = Quantization {
        source,
        calibration: &calibration,
        recipe,
        output: &Output { destination, resume: false },
        evaluation: None,
    };
    quantize(&Cpu::new().unwrap(), &quantization, &Silent).unwrap();
    AtomCheckpoint::open(out).unwrap()
}

fn recipe(group: usize, outliers: usize, kv_bits: u8) -> Recipe {
    Recipe {
        group: Group::Size(group),
        outliers: Outliers::Count(outliers),
        gptq: false,
        kv_bits,
        ..Recipe::default_recipe()
    }
}

#[test]
fn a_quantized_network_decodes_as_it_prefills() {
    let home = tempfile::tempdir().unwrap();
    let source = hub::tiny_llama().unwrap();
    let text = |len: u32, salt: u32| -> Vec<u32> {
        (0..len).map(|i| (i * i * 31 + 7 * i + salt) % 4096).collect()
    };
    let (first, second) = (text(70, 1), text(21, 5));
    for kv_bits in [4, 2, 3, 8, 16] {
        let out = home.path().join(kv_bits.to_string());
        let checkpoint = quantized(&source, &out, &recipe(32, 16, kv_bits));
        let cpu = Cpu::new().unwrap();
        let model = Runnable::atom(&cpu, &checkpoint).unwrap();
        assert_eq!(model.kv.is_centered(), kv_bits < 16);
        check(model, [&first, &second], &format!("{kv_bits} bits"));
    }
}

/// A tokenizer of the printable characters of ASCII.
fn characters() -> String {
    let mut vocabulary = serde_json::Map::new();
    (32..127u8).for_each(|c| drop(vocabulary.insert(char::from(c).to_string(), (c - 32).into())));
    vocabulary.insert("<unk>".to_owned(), 95.into());
    let split = serde_json::json!({ "type": "Split", "pattern": { "Regex": "[\\s\\S]" }, "behavior": "Isolated", "invert": false });
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": split, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" }
    })
    .to_string()
}

#[test]
fn a_quantized_network_of_experts_decodes_as_it_prefills() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("mixtral");
    fs_err::create_dir(&model).unwrap();
    let family = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families/mixtral");
    for entry in fs_err::read_dir(family).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    fs_err::write(model.join("tokenizer.json"), characters()).unwrap();
    let source = Source::open(&model).unwrap();
    let checkpoint = quantized(&source, &home.path().join("out"), &recipe(16, 0, 4));
    let text = |len: u32, salt: u32| -> Vec<u32> {
        (0..len).map(|i| (i * i + 7 * i + salt) % 96).collect()
    };
    let cpu = Cpu::new().unwrap();
    let model = Runnable::atom(&cpu, &checkpoint).unwrap();
    check(model, [&text(70, 1), &text(33, 5)], "mixtral");
}

/// The mean over tokens of the Kullback-Leibler divergence of predictions from those that are expected, in nats.
fn divergence(found: &[f32], expected: &[f32], vocabulary: usize) -> f64 {
    let log_probabilities = |logits: &[f32]| -> Vec<f64> {
        let greatest = logits.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from(x - greatest).exp()).sum();
        logits.iter().map(|x| f64::from(x - greatest) - sum.ln()).collect()
    };
    let rows = found.chunks(vocabulary).zip(expected.chunks(vocabulary));
    let of_row = |(found, expected): (&[f32], &[f32])| -> f64 {
        let (found, expected) = (log_probabilities(found), log_probabilities(expected));
        found.iter().zip(&expected).map(|(q, p)| p.exp() * (p - q)).sum()
    };
    let count = expected.len() / vocabulary;
    assert_eq!(found.len(), expected.len());
    rows.map(of_row).sum::<f64>() / count as f64
}

#[test]
fn a_gpu_decodes_as_the_cpu() {
    let Some(cuda) = device_of_tests("a_gpu_decodes_as_the_cpu") else { return };
    let (cpu, source) = (Cpu::new().unwrap(), hub::tiny_llama().unwrap());
    let home = tempfile::tempdir().unwrap();
    let checkpoint = quantized(&source, &home.path().join("out"), &recipe(32, 16, 4));
    let text = include_str!("../../docs/guide.md");
    let tokenizer = Model::Source(hub::tiny_llama().unwrap()).tokenizer().unwrap();
    let tokens = tokenizer.encode(&text[..4000], &Silent).unwrap();
    let texts = [&tokens[..200], &tokens[200..290]];
    let steps = [&[40usize, 3][..], &[1; 157]].concat();
    let int4 = KvFormat { bits: 4, rotate: true, ..KvFormat::FULL };
    for (kv, most) in [(Some(KvFormat::FULL), 1e-4), (Some(int4), 3e-3), (None, 3e-2)] {
        let on_host = match kv {
            Some(_) => Runnable::source(&cpu, &source, &Silent).unwrap(),
            None => Runnable::atom(&cpu, &checkpoint).unwrap(),
        };
        let on_device = match kv {
            Some(_) => Runnable::source(&cuda, &source, &Silent).unwrap(),
            None => Runnable::atom(&cuda, &checkpoint).unwrap(),
        };
        let (mut on_host, mut on_device) = (on_host, on_device);
        let kv = kv.unwrap_or(on_host.kv);
        (on_host.kv, on_device.kv) = (kv, kv);
        let expected = decode(&Decoder::load(on_host, &Silent).unwrap(), texts, &steps);
        let decoder = Decoder::load(on_device, &Silent).unwrap();
        let found = decode(&decoder, texts, &steps);
        for (found, expected) in found.iter().zip(&expected) {
            let nats = divergence(found, expected, 4096);
            eprintln!("{kv:?}: {nats:.2e} nats a token");
            assert!(nats < most, "{kv:?}: {nats} nats a token");
        }
        assert!(decode(&decoder, texts, &steps) == found, "another run has other bits");
    }
}
