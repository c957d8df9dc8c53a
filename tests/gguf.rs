//! GGUF exports, read by docs/exports.md's reader and the package gguf, and run by llama.cpp.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use atom::backend::cpu::Cpu;
use atom::backend::{Measurement, Tensor};
use atom::checkpoint::AtomCheckpoint;
use atom::model::Architecture;
use atom::model::AttentionSpecs;
use atom::network::{OutputHead, Runnable, Stream};
use atom::progress::Silent;
use atom::text::Tokenizer;
use common::{Dtype, Home, RandomModel, RandomTensor};
use fs_err as fs;
use serde_json::{Value, json};

/// Texts on which tokenizers differ.
const TEXTS: [&str; 14] = [
    "",
    "The quick brown fox jumps over the lazy dog.",
    "I've 'told he's there, 'RE you sure? 'M not sure I'LL make it, we'Ve a'lL",
    "3 33 333 3333 33333 333333 3.14 1,234,567 2026-11-30 \u{b2}\u{bd}\u{2167} \u{664}\u{662}",
    "def f(x):\n    if x > 0:\n\t\treturn {'a': [1, 2]}  # comment\r\n\r\n    else:\n        pass\n",
    "  two before,  two inside, trailing  ",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n",
    "Привет, мир! Добро пожаловать. Γειά σου Κόσμε.",
    "我想在apple工作1314151天～ こんにちは世界。안녕하세요 세계",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก កាន់តែពិសេស",
    "🚀 (normal) 😶\u{200d}🌫️ ✅ 🦙🦙 e\u{301}\u{308} \u{feff}\u{a0}\u{3000}x",
    "https://example.org/a_b?c=d&e=%20#f <html lang=\"en\"> $100 €5 50% a+b=c ~/.config",
    "ÀÉÎõü ſ ß İı Ǆǅǆ CamelCaseWords SCREAMING_SNAKE kebab-case",
    "'''''''```````\"\"\"\"......!!!!!!?????? ------======= ((()))[[[]]]{{{}}}",
];

fn python() -> String {
    std::env::var("ATOM_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// Whether Python has what these tests need; says loudly where it has not.
fn ready(test: &str) -> bool {
    let program = "import gguf, numpy, importlib.util as u; assert u.find_spec('xllamacpp')";
    let output = Command::new(python()).args(["-c", program]).output();
    let ready = output.is_ok_and(|output| output.status.success());
    if !ready {
        common::skipped(test, &format!("{} lacks gguf, numpy or xllamacpp", python()));
    }
    ready
}

/// Runs a program of tests/ with a text on its standard input; what it printed.
fn run(script: &str, arguments: &[&Path], input: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(script);
    let mut child = Command::new(python())
        .arg("-B")
        .arg(&script)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", script.display());
    String::from_utf8(output.stdout).unwrap()
}

/// The one GGUF file of an export.
fn file_of(export: &Path) -> PathBuf {
    let names = common::names(export);
    let name = names.iter().find(|name| name.ends_with(".gguf"));
    export.join(name.unwrap_or_else(|| panic!("no file in {names:?}")))
}

/// Exports a checkpoint, and compares every tensor with it to the bit; the file.
fn export(home: &Home, checkpoint: &str, flags: &str) -> PathBuf {
    let out = format!("{checkpoint}-export");
    home.run(&format!("export {checkpoint} --format gguf --out {out} {flags}")).done();
    let file = file_of(&home.path(&out));
    let rounded = if flags.contains("q8_0") { "--rounded" } else { "--" };
    let arguments = [&home.path(checkpoint), &file, Path::new(rounded)];
    let compared = run("gguf_weights.py", &arguments, "");
    assert!(compared.contains("linears"), "{compared}");
    file
}

/// What llama.cpp makes of texts and windows.
struct LlamaCpp {
    /// The tokens of each text.
    ids: Vec<Vec<u32>>,
    /// What each token of each window but the first costs, in nats.
    nats: Vec<f64>,
    /// The length of context that the file says.
    context: u64,
}

fn llama_cpp(file: &Path, texts: &[&str], windows: &[Vec<u32>]) -> LlamaCpp {
    let request = json!({ "texts": texts, "windows": windows });
    let answer: Value =
        serde_json::from_str(&run("llama_cpp.py", &[file], &request.to_string())).unwrap();
    let nats = answer["nats"].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap());
    LlamaCpp {
        ids: serde_json::from_value(answer["ids"].clone()).unwrap(),
        nats: nats.map(|nats| nats.as_f64().unwrap()).collect(),
        context: answer["context"].as_u64().unwrap(),
    }
}

/// The same of the checkpoint on our integer path.
fn own_nats(checkpoint: &Path, windows: &[Vec<u32>]) -> Vec<f64> {
    let (cpu, checkpoint) = (Cpu::new().unwrap(), AtomCheckpoint::open(checkpoint).unwrap());
    let model = Runnable::atom(&cpu, &checkpoint).unwrap();
    let (tokens, seq_len) = (windows.concat(), windows[0].len());
    let attention = AttentionSpecs::of(&model.architecture, model.kv, seq_len);
    let mut stream =
        Stream::embed(&cpu, &checkpoint, &model.architecture, &tokens, seq_len, 0).unwrap();
    for index in 0..model.architecture.blocks {
        let block = model.block(model.load(index).unwrap()).unwrap();
        stream.advance(&cpu, &attention, &block, || Ok(())).unwrap();
    }
    let head = OutputHead::load(&cpu, &checkpoint, &model.architecture).unwrap();
    let mut first = 0;
    let batches = stream.batches.iter().flat_map(|batch| {
        let normed = head.normed(&cpu, batch).unwrap();
        let tokens = &tokens[first..first + batch.rows()];
        first += batch.rows();
        cpu.cross_entropy(&normed, &head.weight, tokens, seq_len).unwrap()
    });
    batches.collect()
}

fn own_ids(tokenizer: &Path, text: &str) -> Vec<u32> {
    let bytes = fs::read(tokenizer).unwrap();
    let tokenizer = Tokenizer::from_bytes(&bytes, "tokenizer.json").unwrap();
    tokenizer.encode(text, &Silent).unwrap()
}

/// Compares llama.cpp's tokens of [`TEXTS`] with ours.
fn assert_same_tokens(llama_cpp: &LlamaCpp, tokenizer: &Path, texts: &[&str]) {
    for (text, found) in texts.iter().zip(&llama_cpp.ids) {
        assert_eq!(*found, own_ids(tokenizer, text), "{text:?}");
    }
}

/// Mean and greatest difference.
fn differences(a: &[f64], b: &[f64]) -> (f64, f64) {
    assert_eq!(a.len(), b.len());
    let all = || a.iter().zip(b).map(|(a, b)| (a - b).abs());
    (all().sum::<f64>() / a.len() as f64, all().fold(0.0, f64::max))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn held_out() -> String {
    let path = "calibration-data/sample-heldout.txt";
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn windows(ids: &[u32], count: usize, length: usize) -> Vec<Vec<u32>> {
    ids.chunks_exact(length).take(count).map(<[u32]>::to_vec).collect()
}

#[test]
fn the_reader_in_the_document_is_the_one_that_is_tested() {
    let repository =
        |file: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let (document, reader) = (repository("docs/exports.md"), repository("tests/read_gguf.py"));
    assert!(document.contains(&format!("```python\n{reader}```\n")));
    let lines = reader.lines().filter(|line| !line.trim().is_empty()).count();
    assert!(lines <= 30, "the reader has grown to {lines} lines");
}

#[test]
fn llama_cpp_runs_tiny_llama() {
    if !ready("llama_cpp_runs_tiny_llama") {
        return;
    }
    let home = Home::new();
    let settings = "--recipe q4_0 --samples 4 --seq-len 128 --no-eval";
    home.run(&format!("quantize --model tiny-llama {settings} --out tiny")).done();
    let tokenizer = home.path("tiny/tokenizer.json");
    let windows = windows(&own_ids(&tokenizer, &held_out()), 4, 256);
    let ours = own_nats(&home.path("tiny"), &windows);
    let texts = [&TEXTS[..], &["<s>x</s> y"]].concat();
    let found = llama_cpp(&export(&home, "tiny", ""), &texts, &windows);
    assert_same_tokens(&found, &tokenizer, &texts);
    assert_eq!(found.context, 2048);
    // Its activations have 8 bits; ours are floating point.
    let (difference, greatest) = differences(&ours, &found.nats);
    assert!(difference < 0.1 && greatest < 1.0, "{difference}, {greatest}");
    let perplexity = (mean(&found.nats) - mean(&ours)).exp();
    assert!((perplexity - 1.0).abs() < 0.01, "{perplexity}");

    // Embedding and head of 8 bits, on the user's word.
    let out = "export tiny --format gguf --out tiny-export --overwrite --embedding q8_0";
    home.run(out).done();
    let smaller = export(&home, "tiny", "--overwrite --embedding q8_0");
    let rounded = llama_cpp(&smaller, &[], &windows);
    let perplexity = (mean(&rounded.nats) - mean(&ours)).exp();
    assert!((perplexity - 1.0).abs() < 0.01, "{perplexity}");
}

/// A random network of which attention and routers decide something.
fn random(changes: Value) -> RandomModel {
    let mut config = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 1,
        "max_position_embeddings": 512, "tie_word_embeddings": false, "torch_dtype": "float16",
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let tensors = Architecture::from_config(&config).unwrap().tensors();
    let tensors = tensors.into_iter().enumerate().map(|(seed, (name, shape))| {
        let mut state = seed as u64 + 1;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let size = match &shape[..] {
            [_] if name.ends_with("norm.weight") => None,
            [_] => Some(1.0),
            [.., columns] => Some(6.0 / (*columns as f32).sqrt()),
            [] => unreachable!(),
        };
        let count = shape.iter().product();
        let value = |()| match size {
            Some(size) => size * uniform(),
            None => 1.0 + 0.6 * uniform(),
        };
        let values = std::iter::repeat_n((), count).map(value).collect();
        RandomTensor { name, shape, values }
    });
    RandomModel { tensors: tensors.collect(), config }
}

#[test]
fn llama_cpp_computes_every_family_as_we_do() {
    if !ready("llama_cpp_computes_every_family_as_we_do") {
        return;
    }
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32
    });
    let linear = json!({ "rope_type": "linear", "factor": 4.0 });
    let families = [
        (
            "llama-3",
            512,
            json!({
                "model_type": "llama", "rope_scaling": llama3, "attention_bias": true, "mlp_bias": true
            }),
        ),
        (
            "llama-linear",
            2048,
            json!({
                "model_type": "llama", "rope_scaling": linear, "tie_word_embeddings": true
            }),
        ),
        ("mistral", 64, json!({ "model_type": "mistral", "head_dim": 24, "sliding_window": 64 })),
        (
            "mixtral",
            512,
            json!({
                "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2
            }),
        ),
        ("qwen2", 512, json!({ "model_type": "qwen2", "rope_theta": 50000.0 })),
        (
            "qwen3",
            512,
            json!({ "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": true }),
        ),
        (
            "qwen3-moe",
            512,
            json!({
                "model_type": "qwen3_moe", "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3,
                "moe_intermediate_size": 32, "norm_topk_prob": true
            }),
        ),
    ];
    let home = Home::new();
    for (name, context, changes) in families {
        random(changes).write(&home.path(name), Dtype::F16, 1);
        let settings = "--recipe q4_0 --no-gptq --samples 2 --seq-len 64 --no-eval";
        home.run(&format!("quantize --model ./{name} {settings} --out {name}-q")).done();
        // The same codes and scales with activations as llama.cpp has them: 8 bits in groups of 32.
        let own = "--act-bits 8 --set clip_act=1.0";
        home.run(&format!("quantize --model ./{name} {settings} {own} --out {name}-8")).done();
        let ids = own_ids(&home.path(&format!("{name}-q/tokenizer.json")), &held_out());
        let windows = windows(&ids, 2, 64);
        let found = llama_cpp(&export(&home, &format!("{name}-q"), ""), &[], &windows);
        let [float, eight] =
            ["q", "8"].map(|kind| own_nats(&home.path(&format!("{name}-{kind}")), &windows));
        let (difference, explained) =
            (differences(&float, &found.nats), differences(&float, &eight));
        eprintln!("{name}: {difference:.4?}, by 8-bit activations {explained:.4?}");
        assert!(difference.0 < 1.5 * explained.0, "{name}: {difference:?}, {explained:?}");
        assert_eq!(found.context, context, "{name}");
    }
}

/// Exports a network of one block with this tokenizer, and compares llama.cpp's tokens of texts with ours.
fn compare_tokens(home: &Home, name: &str, tokenizer: &Value, texts: &[&str]) {
    let rows = tokenizer["model"]["vocab"].as_object().unwrap().len() + 3;
    let config = json!({ "model_type": "llama", "vocab_size": rows, "num_hidden_layers": 1 });
    random(config).write(&home.path(name), Dtype::F16, 1);
    let path = home.path(name).join("tokenizer.json");
    fs::write(&path, tokenizer.to_string()).unwrap();
    let settings = "--recipe q4_0 --no-gptq --samples 2 --seq-len 64 --no-eval";
    home.run(&format!("quantize --model ./{name} {settings} --out {name}-q")).done();
    let file = export(home, &format!("{name}-q"), "");
    assert_same_tokens(&llama_cpp(&file, texts, &[]), &path, texts);
}

fn tokenizer(path: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// llama.cpp's splitting of text under each name is that of the settings which the name stands for.
#[test]
fn llama_cpp_splits_text_as_the_pre_tokenizer_does() {
    if !ready("llama_cpp_splits_text_as_the_pre_tokenizer_does") {
        return;
    }
    let home = Home::new();
    let held_out = held_out();
    let texts = [&TEXTS[..], &["<s>x</s> y", &held_out]].concat();
    let bytes = |splits: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": splits });
    let digits = json!({ "type": "Digits", "individual_digits": true });
    let words = |numbers: &str| {
        let regex = [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
            numbers,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ];
        json!({
            "type": "Split", "pattern": { "Regex": regex.concat() }, "behavior": "Isolated",
            "invert": false
        })
    };
    let (llama_3, qwen_2) = (words(r"\p{N}{1,3}"), words(r"\p{N}"));
    for (name, parts, ignore_merges) in [
        ("smollm", [digits, bytes(true)], false),
        ("smaug-bpe", [llama_3.clone(), bytes(false)], false),
        ("llama-bpe", [llama_3, bytes(false)], true),
        ("qwen2", [qwen_2, bytes(false)], false),
    ] {
        let mut tokenizer = tokenizer("models/tiny-llama/tokenizer.json");
        tokenizer["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": parts });
        tokenizer["model"]["ignore_merges"] = ignore_merges.into();
        compare_tokens(&home, name, &tokenizer, &texts);
    }
}

#[test]
fn llama_cpp_has_the_tokens_of_a_sentencepiece_tokenizer() {
    if !ready("llama_cpp_has_the_tokens_of_a_sentencepiece_tokenizer") {
        return;
    }
    let held_out = held_out();
    let texts = [&TEXTS[..], &["<s>x</s> y", &held_out]].concat();
    compare_tokens(&Home::new(), "model", &tokenizer("tests/data/sentencepiece.json"), &texts);
}

#[test]
fn llama_cpp_runs_smollm2() {
    if !ready("llama_cpp_runs_smollm2") {
        return;
    }
    let Some(model) = common::directory_from("ATOM_SMOLLM2", "llama_cpp_runs_smollm2") else {
        return;
    };
    let home = Home::new();
    let settings = "--recipe q4_0 --no-gptq --samples 1 --seq-len 64 --no-eval --out smol";
    home.run(&format!("quantize --model {} {settings}", model.display())).done();
    let tokenizer = home.path("smol/tokenizer.json");
    let held_out = held_out();
    let windows = windows(&own_ids(&tokenizer, &held_out), 2, 512);
    let texts = [&TEXTS[..], &["<|im_start|>user\nHi<|im_end|>\n", &held_out]].concat();
    let found = llama_cpp(&export(&home, "smol", ""), &texts, &windows);
    assert_same_tokens(&found, &tokenizer, &texts);
    let ours = own_nats(&home.path("smol"), &windows);
    let perplexity = (mean(&found.nats) - mean(&ours)).exp();
    assert!((perplexity - 1.0).abs() < 0.01, "{perplexity}");
}

#[test]
fn widths_of_8_and_16_bits_are_kept() {
    if !ready("widths_of_8_and_16_bits_are_kept") {
        return;
    }
    let home = Home::new();
    let changes = json!({ "model_type": "llama" });
    random(changes).write(&home.path("model"), Dtype::BF16, 1);
    let calibrate = "calibrate --model ./model --samples 2 --seq-len 64 --out c";
    home.run(calibrate).done();
    home.run("plan c --recipe q4_0 --group 64 --no-gptq --out p.json").done();
    let mut plan: Value = serde_json::from_slice(&fs::read(home.path("p.json")).unwrap()).unwrap();
    // q, k and v, the first permuted by rows.
    for (linear, bits) in [(0, 16), (1, 8), (2, 8)] {
        plan["blocks"][0][0]["linears"][linear]["bits"] = bits.into();
    }
    fs::write(home.path("p.json"), plan.to_string()).unwrap();
    home.run("pack --model ./model --plan p.json --no-eval --out q").done();
    let file = export(&home, "q", "");
    let windows = windows(&own_ids(&home.path("q/tokenizer.json"), &held_out()), 2, 64);
    let (difference, greatest) =
        differences(&own_nats(&home.path("q"), &windows), &llama_cpp(&file, &[], &windows).nats);
    assert!(difference < 0.1 && greatest < 1.0, "{difference}, {greatest}");
}

#[test]
fn what_q4_0_cannot_hold_is_refused_with_the_recipe_that_would_do() {
    let home = Home::new();
    random(json!({ "model_type": "llama" })).write(&home.path("model"), Dtype::F16, 1);
    let flags = "--samples 2 --seq-len 64 --no-eval --no-gptq";
    let refused = |settings: &str, parts: &[&str]| {
        let out = home.path("q");
        if out.exists() {
            fs::remove_dir_all(&out).unwrap();
        }
        home.run(&format!("quantize --model ./model {flags} {settings} --out q")).done();
        let parts = [&["q cannot be exported as gguf", "--recipe q4_0", "--format dense"], parts];
        home.run("export q --format gguf --out e").fails(3, &parts.concat());
        assert!(!home.path("e").exists());
    };
    refused(
        "--group 32 --outliers 16",
        &[
            "order is energy and must be none",
            "outliers is 16 and must be 0",
            "transform is hadamard",
        ],
    );
    refused("--recipe q4_0 --group 16", &["group is 16 and must be 32 or a multiple of it"]);
    refused("--recipe q4_0 --bits 3", &["bits is 3 and must be 4"]);
    refused("--recipe mxfp4 --act-bits 16", &["format is fp4 and must be int"]);

    home.run(&format!("quantize --model ./model {flags} --recipe q4_0 --out q --overwrite")).done();
    home.run("export q --format gguf --out x.gguf").fails(2, &["--out names a directory"]);
    home.run("export q --format dense --embedding f16").fails(2, &["--embedding is for"]);
    // A tokenizer that llama.cpp does not have.
    let path = home.path("model/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["pre_tokenizer"]["add_prefix_space"] = true.into();
    fs::write(&path, tokenizer.to_string()).unwrap();
    home.run(&format!("quantize --model ./model {flags} --recipe q4_0 --out r")).done();
    home.run("export r --format gguf").fails(3, &["its pre-tokenizer is", "smaug-bpe"]);
}

#[test]
fn an_export_is_replaced_by_its_own_kind_alone_and_its_bytes_depend_on_nothing_else() {
    let home = Home::new();
    let model = random(json!({ "model_type": "mixtral", "num_local_experts": 2 }));
    model.write(&home.path("model"), Dtype::BF16, 1);
    fs::write(home.path("model/LICENSE"), "as it is").unwrap();
    let flags = "--samples 2 --seq-len 64 --no-eval --no-gptq --recipe q4_0 --out q";
    home.run(&format!("quantize --model ./model {flags}")).done();
    let planned = home.json("export q --format gguf --out e --dry-run");
    assert!(!home.path("e").exists());
    let made = home.json("export q --format gguf --out e --threads 1");
    assert_eq!((&made["tensors"], &planned["tensors"]), (&json!(23), &json!(23)));
    assert_eq!(
        common::names(&home.path("e")),
        ["LICENSE", "README.md", "atom-export.json", "model-Q4_0.gguf"]
    );
    home.run("export q --format gguf --out e").fails(2, &["output directory e exists"]);
    let first = fs::read(file_of(&home.path("e"))).unwrap();
    home.run("export q --format gguf --out e --overwrite --threads 2").done();
    assert!(first == fs::read(file_of(&home.path("e"))).unwrap());
    fs::write(home.path("e/thesis.tex"), "mine").unwrap();
    home.run("export q --format gguf --out e --overwrite").fails(2, &["thesis.tex"]);
    // A damaged tensor is not copied.
    let shard = home.path("q/model.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    home.run("export q --format gguf --out f").fails(3, &["SHA-256"]);
    assert!(!home.path("f").exists());
}
