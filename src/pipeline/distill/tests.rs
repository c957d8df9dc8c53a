//! Distillation of tiny-llama: the loss is the measured one, gradients are slopes, and a run repeats itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::parameters::{NetworkValues, Parameters, Trained};
use super::*;
use crate::backend::cpu::Cpu;
use crate::backend::{Forward, Measurement};
use crate::checkpoint::{Destination, Dtype, Inputs};
use crate::model::AttentionSpecs;
use crate::network::{OutputHead, Stream, TrainedNetwork, final_norm, trained_values};
use crate::pipeline::{Calibration, Quantization, quantize};
use crate::progress::Silent;
use crate::recipe::{Group, Outliers, Recipe};
use crate::text::Split;

const SEQ_LEN: usize = 32;

fn output(out: &Path) -> Output {
    let destination =
        Destination { out: out.to_owned(), overwrite: false, inputs: Inputs::default() };
    Output { destination, resume: false }
}

fn recipe() -> Recipe {
    Recipe { group: Group::Size(64), outliers: Outliers::Count(0), ..Recipe::default_recipe() }
}

fn quantized(recipe: &Recipe, out: &Path) -> (Source, AtomCheckpoint) {
    let source = crate::hub::tiny_llama().unwrap();
    let text = TextSet::sample(Split::Calibration);
    let calibration = Calibration { text, samples: 4, seq_len: 64, seed: 0 };
    let output = output(out);
    let quantization = Quantization {
        source: &source,
        calibration: &calibration,
        recipe,
        output: &output,
        evaluation: None,
    };
    quantize(&Cpu::new().unwrap(), &quantization, &Silent).unwrap();
    (source, AtomCheckpoint::open(out).unwrap())
}

/// Tokens of the sample, complete windows.
fn tokens(source: &Source, windows: usize) -> Vec<u32> {
    let text = TextSet::sample(Split::Evaluation);
    let tokenizer = source.tokenizer().unwrap();
    let tokenizer = crate::text::Tokenizer::from_bytes(&tokenizer, "tokenizer.json").unwrap();
    text.evaluation_windows(&tokenizer, SEQ_LEN, Some(windows), &Silent).unwrap()
}

/// The source's normed hidden states, by evaluation's own way.
fn source_states(
    cpu: &Cpu,
    source: &Source,
    tokens: &[u32],
) -> <Cpu as crate::backend::Memory>::Activation {
    states(cpu, &Runnable::source(cpu, source, &Silent).unwrap(), tokens)
}

fn states(
    cpu: &Cpu,
    model: &Runnable<'_, Cpu>,
    tokens: &[u32],
) -> <Cpu as crate::backend::Memory>::Activation {
    let architecture = &model.architecture;
    let attention = AttentionSpecs::of(architecture, model.kv, SEQ_LEN);
    let mut stream = Stream::embed(cpu, model.tensors, architecture, tokens, SEQ_LEN, 0).unwrap();
    for index in 0..architecture.blocks {
        let block = model.block(model.load(index).unwrap()).unwrap();
        stream.advance(cpu, &attention, &block, || Ok(())).unwrap();
    }
    assert_eq!(stream.batches.len(), 1);
    let norm = final_norm(cpu, model.tensors, architecture).unwrap();
    cpu.rms_norm(&stream.batches[0], &norm, architecture.norm_epsilon).unwrap()
}

#[test]
fn the_first_loss_is_the_divergence_that_evaluation_measures() {
    let home = tempfile::tempdir().unwrap();
    let recipe = Recipe { outliers: Outliers::Count(16), ..recipe() };
    let (source, checkpoint) = quantized(&recipe, &home.path().join("q"));
    let cpu = Cpu::new().unwrap();
    let tokens = tokens(&source, 3);
    let model = Runnable::atom(&cpu, &checkpoint).unwrap();
    let original = source_states(&cpu, &source, &tokens);
    let own = states(&cpu, &model, &tokens);
    let head = OutputHead::load(&cpu, &source, &model.architecture).unwrap();
    let expected = cpu.kl_divergence(&own, &original, &head.weight).unwrap();
    assert!(expected.iter().all(|nats| *nats > 0.0));
    let network = TrainedNetwork::load(&model, SEQ_LEN).unwrap();
    let go_on = &mut || Ok(());
    assert_eq!(network.divergences(&tokens, &original, go_on).unwrap(), expected);
    assert_eq!(network.gradients(&tokens, &original, go_on).unwrap().0, expected);
}

/// Activations and cache are in floating point: nothing but the scales' own rounding stands between parameters and loss.
#[test]
fn gradients_of_the_whole_network_are_slopes_of_its_loss() {
    let home = tempfile::tempdir().unwrap();
    let recipe = Recipe { act_bits: 16, kv_bits: 16, bits: 3, ..recipe() };
    let (source, checkpoint) = quantized(&recipe, &home.path().join("q"));
    let cpu = Cpu::new().unwrap();
    let tokens = tokens(&source, 2);
    let model = Runnable::atom(&cpu, &checkpoint).unwrap();
    let original = source_states(&cpu, &source, &tokens);
    let mut network = TrainedNetwork::load(&model, SEQ_LEN).unwrap();
    let (blocks, final_norm) = trained_values(&model).unwrap();
    let base = NetworkValues { blocks, final_norm };
    let before = flat(&base);
    let parameters = Parameters::new(base, Dtype::F32);
    assert_eq!(before.len(), parameters.count());
    let go_on = &mut || Ok(());
    let (_, gradient) = network.gradients(&tokens, &original, go_on).unwrap();
    let gradient = parameters.gradient(&gradient, tokens.len());
    for (kind, far) in [(Trained::Scale, 0.1), (Trained::Norm, 0.03)] {
        let mut along = vec![0.0; parameters.count()];
        for (_, range) in parameters.kinds().filter(|(of, _)| *of == kind) {
            along[range.clone()].copy_from_slice(&gradient[range]);
        }
        let length = along.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        assert!(length > 0.0);
        let far = far / length;
        // The loss, and by the gradient its change, on one side. Scales arrive where their f16 allows.
        let mut side = |sign: f64| {
            let mut moved: Vec<f32> =
                along.iter().map(|x| (f64::from(*x) * far * sign) as f32).collect();
            let values = parameters.values(&moved);
            for (index, block) in values.blocks.iter().enumerate() {
                network.set_block(index, block).unwrap();
            }
            network.set_final_norm(&values.final_norm).unwrap();
            if kind == Trained::Scale {
                let scales = flat(&values).into_iter().zip(&before);
                let shares =
                    scales.map(|(scale, base)| if *base == 0.0 { 0.0 } else { scale / base - 1.0 });
                moved = shares.collect();
            }
            let nats = network.divergences(&tokens, &original, &mut || Ok(())).unwrap();
            let terms = along.iter().zip(moved).map(|(x, moved)| f64::from(*x) * f64::from(moved));
            (nats.iter().sum::<f64>() / tokens.len() as f64, terms.sum::<f64>())
        };
        let (plus, minus) = (side(1.0), side(-1.0));
        let (found, expected) = (plus.0 - minus.0, plus.1 - minus.1);
        assert!((found / expected - 1.0).abs() < 0.02, "{kind:?}: {found} for {expected}");
    }
}

/// Values in the order of the parameters, where there are no clip ratios, outliers or QK-norms.
fn flat(values: &NetworkValues) -> Vec<f32> {
    let mut all = Vec::new();
    for block in &values.blocks {
        all.extend(block.norms.iter().flatten());
        for linear in block.sites.iter().flat_map(|site| &site.linears).flatten() {
            all.extend(linear.scales.iter().map(|scale| scale.to_f32()));
        }
    }
    all.extend(&values.final_norm);
    all
}

/// Stops a run after so many steps of its progress.
struct Stopping {
    after: usize,
    seen: AtomicUsize,
}

impl Progress for Stopping {
    fn begin(&self, _stage: &str, _steps: usize) {}
    fn advance(&self, _detail: &str) {
        self.seen.fetch_add(1, Ordering::Relaxed);
    }
    fn end(&self) {}
    fn info(&self, _message: &str) {}
    fn warn(&self, _message: &str) {}
    fn stop_requested(&self) -> bool {
        self.seen.load(Ordering::Relaxed) >= self.after
    }
}

struct Case<'a> {
    source: &'a Source,
    checkpoint: &'a AtomCheckpoint,
    steps: usize,
    out: PathBuf,
    always_writes: bool,
}

impl Case<'_> {
    fn run(&self, threads: usize, progress: &dyn Progress) -> Result<DistillOutcome> {
        let text = TextSet::sample(Split::Calibration);
        let (output, seq_len) = (output(&self.out), 128);
        let distillation = Distillation {
            checkpoint: self.checkpoint,
            source: self.source,
            windows: DistillationWindows::Drawn { text: &text, seq_len, seed: 3 },
            tokens: self.steps * 8 * seq_len,
            rates: RATES,
            output: &output,
            always_writes: self.always_writes,
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| distill(&Cpu::new().unwrap(), &distillation, progress))
    }
}

fn bytes_of(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs_err::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let named = |path: PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, fs_err::read(path).unwrap())
    };
    files.map(named).collect()
}

#[test]
fn a_run_gains_and_repeats_itself_stopped_or_not() {
    let home = tempfile::tempdir().unwrap();
    let (source, checkpoint) = quantized(&recipe(), &home.path().join("q"));
    let case = |out: &str| Case {
        source: &source,
        checkpoint: &checkpoint,
        steps: 3,
        out: home.path().join(out),
        always_writes: false,
    };
    let outcome = case("a").run(1, &Silent).unwrap();
    assert!(outcome.kept_step > 0 && outcome.after < outcome.before, "{:?}", outcome.curve);
    assert_eq!(outcome.curve.len(), 4, "before, and after each of three steps");

    // Five steps of progress are the source's predictions; two of training follow.
    let stopping = Stopping { after: 7, seen: AtomicUsize::new(0) };
    let error = case("b").run(2, &stopping).unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted);
    assert!(!home.path().join("b").exists() && home.path().join(".b.atom-work/state.bin").exists());
    let resumed = case("b").run(2, &Silent).unwrap();
    assert_eq!(resumed.resumed_steps, 2);
    assert_eq!(resumed.curve, outcome.curve);
    assert_eq!(bytes_of(&home.path().join("a")), bytes_of(&home.path().join("b")));
    assert!(!home.path().join(".b.atom-work").exists());

    let distilled = AtomCheckpoint::open(&home.path().join("a")).unwrap();
    let (manifest, before) = (distilled.manifest().unwrap(), checkpoint.manifest().unwrap());
    let record = manifest.distillation.as_ref().unwrap();
    assert_eq!((record.steps, record.kept_step), (3, outcome.kept_step));
    assert_eq!(distilled.total_bytes(), checkpoint.total_bytes());
    let mut changed = [0; 4];
    for name in checkpoint.names() {
        let [old, new] = [&checkpoint, &distilled].map(|of| of.tensor(name).unwrap());
        assert_eq!((old.dtype, old.shape), (new.dtype, new.shape), "{name}");
        let kind = ["_codes", ".order", "_scales", "norm.weight"];
        if let Some(kind) = kind.iter().position(|end| name.ends_with(end)) {
            changed[kind] += usize::from(old.bytes != new.bytes);
        }
    }
    assert_eq!(changed[..2], [0, 0], "codes and orders stay");
    assert_eq!(changed[2], 4 * 7, "the scales of every linear");
    assert!(changed[3] > 0 && changed[3] <= 9);
    let clips = |manifest: &crate::checkpoint::Manifest| -> Vec<f32> {
        manifest.blocks.iter().flatten().map(|site| site.clip).collect()
    };
    assert!(clips(&manifest).iter().zip(clips(&before)).all(|(new, old)| *new != old));

    let again = Case { checkpoint: &distilled, ..case("c") }.run(1, &Silent).unwrap_err();
    assert!(again.message().contains("distilled already"), "{again}");
}

#[test]
fn where_nothing_is_gained_the_checkpoint_stays_as_it_was() {
    let home = tempfile::tempdir().unwrap();
    // Weights of eight bits alone lose so little that a step of training costs more.
    let recipe = Recipe { bits: 8, act_bits: 16, kv_bits: 16, ..recipe() };
    let (source, checkpoint) = quantized(&recipe, &home.path().join("q"));
    let mut case = Case {
        source: &source,
        checkpoint: &checkpoint,
        steps: 1,
        out: home.path().join("a"),
        always_writes: false,
    };
    let outcome = case.run(2, &Silent).unwrap();
    assert_eq!((outcome.kept_step, outcome.out), (0, None), "{:?}", outcome.curve);
    assert!(!case.out.exists() && !home.path().join(".a.atom-work").exists());
    case.always_writes = true;
    case.run(2, &Silent).unwrap();
    assert_eq!(bytes_of(&case.out), bytes_of(&home.path().join("q")));
}

#[test]
fn quantizing_and_distilling_goes_on_where_it_stopped() {
    let home = tempfile::tempdir().unwrap();
    let source = crate::hub::tiny_llama().unwrap();
    let run = |name: &str, progress: &dyn Progress| {
        let text = TextSet::sample(Split::Calibration);
        let calibration = Calibration { text, samples: 20, seq_len: 128, seed: 0 };
        let (output, recipe) = (output(&home.path().join(name)), recipe());
        let quantization = Quantization {
            source: &source,
            calibration: &calibration,
            recipe: &recipe,
            output: &output,
            evaluation: None,
        };
        let cpu = Cpu::new().unwrap();
        quantize_and_distill(&cpu, &quantization, 2 * 8 * 128, progress)
    };
    let (quantized, distilled) = run("a", &Silent).unwrap();
    assert_eq!(Some(&quantized.out), distilled.out.as_ref());
    assert_eq!(distilled.windows + distilled.held_out_windows, 20);
    // Four blocks, then five steps of predictions, then one of training.
    let error = run("b", &Stopping { after: 10, seen: AtomicUsize::new(0) }).unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted);
    assert!(home.path().join(".b.undistilled/atom.json").exists());
    let (_, resumed) = run("b", &Silent).unwrap();
    assert_eq!(resumed.resumed_steps, 1);
    assert_eq!(bytes_of(&home.path().join("a")), bytes_of(&home.path().join("b")));
    let left = fs_err::read_dir(home.path()).unwrap().count();
    assert_eq!(left, 2, "nothing hidden is left");
}

#[test]
fn what_cannot_be_distilled_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let (source, checkpoint) = quantized(&recipe(), &home.path().join("q"));
    let config: serde_json::Value = serde_json::json!({"model_type": "mixtral",
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100});
    let experts = crate::model::Architecture::from_config(&config).unwrap();
    let error = check_trainable(&experts).unwrap_err();
    assert!(error.message().contains("8 in a block"), "{error}");
    assert!(course_of(100, 64).unwrap_err().message().contains("less than a step"));
    assert_eq!(course_of(DEFAULT_TOKENS, 2048).unwrap(), (100, 4));

    let other = home.path().join("other");
    fs_err::create_dir(&other).unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-llama");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs_err::copy(model.join(file), other.join(file)).unwrap();
    }
    let mut bytes = fs_err::read(other.join("model.safetensors")).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs_err::write(other.join("model.safetensors"), bytes).unwrap();
    let other = Source::open(&other).unwrap();
    let case = Case {
        source: &other,
        checkpoint: &checkpoint,
        steps: 1,
        out: home.path().join("a"),
        always_writes: false,
    };
    let error = case.run(1, &Silent).unwrap_err();
    assert!(error.message().contains("was not made from"), "{error}");
    let inside = Case { source: &source, out: home.path().join("q"), ..case };
    assert_eq!(inside.run(1, &Silent).unwrap_err().kind(), Kind::Usage);
}
