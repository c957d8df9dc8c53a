/*! Mangled files of every kind that the program reads: whatever they hold, they are read or refused, within bounded time
and memory, and nothing panics.

Each target changes a sound file at random, bytes and JSON values alike, and hands it to what the commands call. By itself
a target tries a few hundred inputs, the same ones every time; with ATOM_FUZZ_SECONDS=600 it goes on for ten minutes
from a seed of its own (ATOM_FUZZ_SEED). An input that fails is saved and named. */

mod common;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use atom::backend::cpu::Cpu;
use atom::checkpoint::{AtomCheckpoint, Destination, Inputs, OutputFile, Source};
use atom::eval::{KernelCheck, Limits, Verification};
use atom::hub::Hub;
use atom::pipeline::plan::PLAN_FILE;
use atom::pipeline::{self, Calibration, Output, Packing, Planning, Quantization};
use atom::progress::Silent;
use atom::recipe::Recipe;
use atom::text::{Evaluation, Split, TextSet};
use common::{Dtype, Home, RandomModel};
use fs_err as fs;
use serde_json::{Value, json};

/// Inputs of each target without ATOM_FUZZ_SECONDS.
const INPUTS: u64 = 150;
/// The longest that one input may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Resident memory at most.
const MEMORY_BYTES: u64 = 2_000_000_000;

/// Splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// A value in the place of another.
fn strange(random: &mut Random) -> Value {
    match random.below(18) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(0),
        3 => json!(-1),
        4 => json!(1),
        5 => json!(random.below(300)),
        6 => json!(1u64 << random.below(64)),
        7 => json!(u64::MAX),
        8 => json!(i64::MIN),
        9 => json!(1e308),
        10 => json!(0.5),
        11 => json!(-0.0),
        12 => json!(""),
        13 => json!("x".repeat(random.below(5000))),
        14 => json!("\u{1b}[2J\u{202e}\0"),
        15 => json!([]),
        16 => json!({}),
        _ => (0..random.below(200)).fold(json!(7), |inner, _| json!([inner])),
    }
}

/// All JSON pointers into a value.
fn pointers(value: &Value, at: String, all: &mut Vec<String>) {
    // A few entries of a long list or table are as good as all.
    const MOST: usize = 64;
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter().take(MOST) {
                let key = key.replace('~', "~0").replace('/', "~1");
                pointers(value, format!("{at}/{key}"), all);
            }
        }
        Value::Array(list) => {
            for (index, value) in list.iter().enumerate().take(MOST) {
                pointers(value, format!("{at}/{index}"), all);
            }
        }
        _ => {}
    }
    all.push(at);
}

/// Changes a value in one to three places.
fn mangle_json(value: &mut Value, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let mut all = Vec::new();
        pointers(value, String::new(), &mut all);
        let from = random.pick(&all).clone();
        let other = value.pointer(random.pick(&all).as_str()).cloned().unwrap_or_default();
        let new = strange(random);
        let Some(place) = value.pointer_mut(&from) else { continue };
        match (random.below(8), &mut *place) {
            (0, Value::Object(map)) => {
                let key = map.keys().nth(random.below(map.len())).cloned();
                key.map(|key| map.remove(&key));
            }
            (1, Value::Object(map)) => {
                map.insert(format!("k{}", random.below(9)), new);
            }
            (0, Value::Array(list)) if !list.is_empty() => {
                list.remove(random.below(list.len()));
            }
            (1, Value::Array(list)) if list.len() < 10_000 => list.extend(list.clone()),
            (2, _) => *place = other,
            (3, Value::Number(number)) => {
                let near = number.as_f64().unwrap_or(0.0) + random.below(3) as f64 - 1.0;
                *place = if random.below(2) == 0 { json!(near as i64) } else { json!(near) };
            }
            _ => *place = new,
        }
    }
}

/// Changes bytes in one to four places.
fn mangle_bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(7) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes.truncate(at),
            2 => drop(bytes.drain(at..end)),
            3 => {
                let copy = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            4 => bytes[at] = *random.pick(b"\"{}[],:0-9\\\n\0\xff"),
            5 => bytes[at..end].fill(*random.pick(&[0, 0xff, b' ', b'9'])),
            _ => {
                let word = random.next().to_le_bytes();
                bytes.splice(at..at, word);
            }
        }
    }
}

/// How a file of this kind is made of JSON.
#[derive(Clone, Copy)]
enum Form {
    Json,
    /// Eight bytes of length, JSON, tensors.
    Safetensors,
    /// A metadata entry of such a header that holds JSON itself.
    Metadata(&'static str),
    Lines,
}

fn mangle(sound: &[u8], form: Form, random: &mut Random) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    if random.below(4) == 0 {
        mangle_bytes(&mut bytes, random);
        return bytes;
    }
    let with_header = |header: Value, data: &[u8], random: &mut Random| {
        let header = header.to_string();
        let length = match random.below(10) {
            0 => random.next(),
            _ => header.len() as u64,
        };
        [&length.to_le_bytes()[..], header.as_bytes(), data].concat()
    };
    let header_of = |bytes: &[u8]| {
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        (serde_json::from_slice::<Value>(&bytes[8..end]).unwrap(), bytes[end..].to_vec())
    };
    match form {
        Form::Json => {
            let mut value: Value = serde_json::from_slice(&bytes).unwrap();
            mangle_json(&mut value, random);
            value.to_string().into_bytes()
        }
        Form::Safetensors => {
            let (mut header, data) = header_of(&bytes);
            mangle_json(&mut header, random);
            with_header(header, &data, random)
        }
        Form::Metadata(key) => {
            let (mut header, data) = header_of(&bytes);
            let inner = header["__metadata__"][key].as_str().unwrap();
            let mut inner: Value = serde_json::from_str(inner).unwrap();
            mangle_json(&mut inner, random);
            header["__metadata__"][key] = inner.to_string().into();
            with_header(header, &data, random)
        }
        Form::Lines => {
            let mut lines: Vec<String> =
                String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect();
            let at = random.below(lines.len());
            let mut value: Value = serde_json::from_str(&lines[at]).unwrap();
            mangle_json(&mut value, random);
            lines[at] = value.to_string();
            lines.join(*random.pick(&["\n", "\r\n", "\n\n", "\u{feff}\n"])).into_bytes()
        }
    }
}

/// Tries mangled forms of the sound file at `path`, each written there and handed to `run`.
fn fuzz(name: &str, path: &Path, forms: &[Form], mut run: impl FnMut()) {
    let seconds = std::env::var("ATOM_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let deadline = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let seed = std::env::var("ATOM_FUZZ_SEED").ok().and_then(|text| text.parse().ok());
    let mut random = Random(seed.unwrap_or(name.len() as u64));
    let sound = fs::read(path).unwrap();
    run();

    let case = Arc::new(AtomicU64::new(0));
    let watched = Arc::clone(&case);
    let (saved, title) = (failures(name), name.to_owned());
    std::thread::spawn(move || {
        let (mut last, mut since) = (0, Instant::now());
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let now = watched.load(Ordering::Relaxed);
            if now == u64::MAX {
                return;
            }
            if now != last {
                (last, since) = (now, Instant::now());
            } else if since.elapsed() > PATIENCE {
                eprintln!("{title}: an input takes longer than {PATIENCE:?}: {}", saved.display());
                std::process::abort();
            }
        }
    });
    let saved = failures(name);
    let mut count = 0u64;
    loop {
        let more = match deadline {
            Some(deadline) => Instant::now() < deadline,
            None => count < INPUTS,
        };
        if !more {
            break;
        }
        let bytes = mangle(&sound, *random.pick(forms), &mut random);
        // Saved before it is tried, so that it survives an abort.
        fs::write(&saved, &bytes).unwrap();
        let new = path.with_extension("new");
        fs::write(&new, &bytes).unwrap();
        fs::rename(&new, path).unwrap();
        case.store(count + 1, Ordering::Relaxed);
        if catch_unwind(AssertUnwindSafe(&mut run)).is_err() {
            panic!("{name}: input {count} panics: {}", saved.display());
        }
        count += 1;
    }
    case.store(u64::MAX, Ordering::Relaxed);
    fs::write(path, &sound).unwrap();
    run();
    fs::remove_file(&saved).unwrap();
    let peak = atom::machine::peak_rss_bytes();
    assert!(peak < MEMORY_BYTES, "{name}: {peak} bytes at the peak");
    if seconds.is_some() {
        eprintln!(
            "FUZZED {name}: {count} inputs, none panics; {} MB at the peak",
            peak / 1_000_000
        );
    }
}

/// The file of the input that is being tried.
fn failures(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    fs::create_dir_all(&dir).unwrap();
    dir.join(name)
}

fn recipe() -> Recipe {
    let flags = "group = 32\noutliers = 16".parse().unwrap();
    Recipe::resolve("default", &flags).unwrap()
}

fn calibration() -> Calibration {
    Calibration { text: TextSet::sample(Split::Calibration), samples: 2, seq_len: 32, seed: 0 }
}

fn output(out: PathBuf) -> Output {
    let inputs = Inputs::default();
    Output { destination: Destination { out, overwrite: false, inputs }, resume: false }
}

/// A home with a random model of one block.
fn small(shards: usize) -> Home {
    let home = Home::new();
    RandomModel::new(1).write(&home.path("model"), Dtype::F16, shards);
    home
}

/// Everything that `quantize` finds out of a source before its first product, and `inspect` shows.
fn examine(home: &Home) {
    let Ok(source) = Source::open(&home.path("model")) else { return };
    let out = output(home.path("out"));
    let evaluation =
        Evaluation { text: TextSet::sample(Split::Evaluation), seq_len: 32, windows: Some(1) };
    let cpu = Cpu::new().unwrap();
    let (calibration, recipe, text) = (calibration(), recipe(), Some(&evaluation));
    let quantization = Quantization {
        source: &source,
        calibration: &calibration,
        recipe: &recipe,
        output: &out,
        evaluation: text,
    };
    let _ = pipeline::dry_run(&cpu, &quantization, &Silent);
}

#[test]
fn safetensors_headers() {
    let home = small(1);
    let path = home.path("model/model.safetensors");
    fuzz("header", &path, &[Form::Safetensors], || examine(&home));
}

#[test]
fn configurations() {
    let home = small(1);
    fuzz("config", &home.path("model/config.json"), &[Form::Json], || examine(&home));
}

#[test]
fn indexes_of_shards() {
    let home = small(2);
    let path = home.path("model/model.safetensors.index.json");
    fuzz("index", &path, &[Form::Json], || examine(&home));
}

#[test]
fn tokenizers() {
    let home = small(1);
    fuzz("tokenizer", &home.path("model/tokenizer.json"), &[Form::Json], || examine(&home));
}

#[test]
fn manifests() {
    let home = small(1);
    home.run(&format!("quantize --model model {} --no-eval --out atom", common::SMALL)).done();
    let path = home.path("atom/atom.json");
    // Without hashes of files a change reaches what computes.
    let mut atom: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for field in ["files", "sha256"] {
        atom.as_object_mut().unwrap().remove(field);
    }
    fs::write(&path, atom.to_string()).unwrap();
    fuzz("manifest", &path, &[Form::Json], || {
        let cpu = Cpu::new().unwrap();
        let Ok(checkpoint) = AtomCheckpoint::open(&home.path("atom")) else { return };
        let evaluation =
            Evaluation { text: TextSet::sample(Split::Evaluation), seq_len: 16, windows: Some(1) };
        let kernels = KernelCheck::Off("not asked".to_owned());
        let verification = Verification {
            checkpoint: &checkpoint,
            kernels: &kernels,
            evaluation: Some(&evaluation),
            reference: None,
            limits: Limits::default(),
        };
        let _ = atom::eval::verify(&cpu, &verification, &Silent);
        let _ = atom::eval::atom_perplexity(&cpu, &checkpoint, &evaluation, &Silent);
    });
}

#[test]
fn plans() {
    let home = small(1);
    home.run("calibrate --model model --samples 2 --seq-len 32 --out c").done();
    home.run("plan c --group 32 --outliers 16 --out p").done();
    let source = Source::open(&home.path("model")).unwrap();
    fuzz("plan", &home.path("p"), &[Form::Json], || {
        let cpu = Cpu::new().unwrap();
        let out = output(home.path("out"));
        let packing =
            Packing { source: &source, plan_file: &home.path("p"), output: &out, evaluation: None };
        if pipeline::pack(&cpu, &packing, &Silent).is_ok() {
            fs::remove_dir_all(home.path("out")).unwrap();
        }
    });
}

#[test]
fn calibration_files() {
    let home = small(1);
    let flags = "--samples 2 --seq-len 32 --sensitivity --group 32 --outliers 16";
    home.run(&format!("calibrate --model model {flags} --outlier-counts 0,16 --out c")).done();
    let forms = [Form::Safetensors, Form::Metadata("atom_calibration")];
    let allocating = atom::pipeline::allocate::Allocating {
        target: atom::pipeline::allocate::Target::Bits(4.5),
        widths: vec![3, 4, 8],
        outlier_counts: None,
    };
    fuzz("calibration", &home.path("c"), &forms, || {
        let out = home.path("plan");
        for planning in [Planning::Uniform(&recipe()), Planning::Allocated(None, &allocating)] {
            let _ = fs::remove_file(&out);
            let file = OutputFile::check(&out, &PLAN_FILE, true, Inputs::default()).unwrap();
            let _ = pipeline::plan(&home.path("c"), planning, &file);
        }
    });
}

#[test]
fn rows_of_json() {
    let home = small(1);
    let rows: BTreeMap<&str, Value> = BTreeMap::from([
        ("text", json!({"text": "A few words that stand in a row.", "n": [1, {"x": null}]})),
        ("task", json!({"query": "Why?", "choices": ["so", "not so"], "gold": 1})),
    ]);
    let text = format!("{}\n{}\n", rows["text"], rows["text"]).repeat(20);
    fs::write(home.path("rows.jsonl"), text).unwrap();
    let source = Source::open(&home.path("model")).unwrap();
    let hub = Hub::cached("the test", &Silent).unwrap();
    fuzz("rows", &home.path("rows.jsonl"), &[Form::Lines], || {
        let path = home.path("rows.jsonl");
        let spec = path.to_str().unwrap();
        for split in [Split::Calibration, Split::Evaluation] {
            let Ok(text) = TextSet::load(spec, split, &hub) else { continue };
            let evaluation = Evaluation { text, seq_len: 16, windows: Some(2) };
            let _ =
                atom::eval::source_perplexity(&Cpu::new().unwrap(), &source, &evaluation, &Silent);
        }
        let task: atom::text::tasks::TaskFile = format!("piqa={spec}").parse().unwrap();
        let _ = task.load(None, Some(5), &hub);
    });
}
