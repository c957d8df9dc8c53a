/*! Texts, rows and tokenizers as they come: what is odd is read in bounded memory, what cannot be read is refused
with a sentence that names the file, and nothing is left on the disk. */

mod common;

use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Home, Run, SMALL, assert_same_files, send};
use fs_err as fs;
use rustix::process::Signal;
use serde_json::{Value, json};

const SENTENCE: &str = "One word and another word stand in this line of text .\n";

/// Evaluates two windows of 64 tokens of `text` with a small model.
fn evaluated(home: &Home, text: &str) -> Run {
    home.run(&format!("eval-ppl --model model --seq-len 64 --windows 2 --json --dataset {text}"))
}

/// Plans a quantization that is calibrated on `text`.
fn planned(home: &Home, text: &str, flags: &str) -> Run {
    home.run(&format!("quantize --model model {SMALL} --out out --dry-run --calib {text} {flags}"))
}

#[track_caller]
fn perplexity(run: Run) -> f64 {
    run.done().json()["perplexity"].as_f64().unwrap()
}

/// Changes the model's tokenizer.
fn with_tokenizer(change: impl FnOnce(&mut Value)) -> Home {
    let home = Home::with_model();
    let path = home.path("model/tokenizer.json");
    let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(&path, json.to_string()).unwrap();
    home
}

#[test]
fn an_evaluation_reads_the_beginning_of_its_text() {
    let home = Home::with_model();
    fs::write(home.path("short.txt"), SENTENCE.repeat(100)).unwrap();
    let expected = perplexity(evaluated(&home, "short.txt"));

    let sparse = fs::File::create(home.path("sparse.txt")).unwrap();
    (&sparse).write_all(SENTENCE.repeat(10_000).as_bytes()).unwrap();
    sparse.set_len(50_000_000_000).unwrap();
    let begin = Instant::now();
    assert_eq!(perplexity(evaluated(&home, "sparse.txt")), expected);
    assert!(begin.elapsed() < Duration::from_secs(30));
    let parts = ["sparse.txt holds more than 4 GB of text", "hint: "];
    planned(&home, "sparse.txt", "").fails(3, &parts);
    home.run("eval-ppl --model model --dataset sparse.txt").fails(3, &parts);

    // Bytes after the windows need not even be text.
    fs::write(home.path("later.txt"), [SENTENCE.repeat(20_000).as_bytes(), b"\xff"].concat())
        .unwrap();
    assert_eq!(perplexity(evaluated(&home, "later.txt")), expected);
    let parts = ["later.txt is not UTF-8 text: the byte at offset 1100000"];
    planned(&home, "later.txt", "").fails(3, &parts);
}

#[test]
fn a_few_kilobytes_that_hold_gigabytes() {
    let home = Home::with_model();
    let gzip = |name: &str, first: &str, rest: u8, megabytes: usize| {
        let file = fs::File::create(home.path(name)).unwrap();
        let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::best());
        gzip.write_all(first.as_bytes()).unwrap();
        (0..megabytes).for_each(|_| gzip.write_all(&vec![rest; 1 << 20]).unwrap());
        gzip.finish().unwrap();
    };
    gzip("line.jsonl.gz", "{\"text\": \"", b'a', 300);
    let line = ["line.jsonl.gz, line 1 is longer than 256 MB", "hint: "];
    planned(&home, "line.jsonl.gz", "").fails(3, &line);
    evaluated(&home, "line.jsonl.gz").fails(3, &line);
    gzip("quote.csv.gz", "text\n\"", b'a', 300);
    planned(&home, "quote.csv.gz", "").fails(3, &["quote.csv.gz", "is a quote not closed"]);
    fs::write(home.path("short.txt"), SENTENCE.repeat(100)).unwrap();
    gzip("long.txt.gz", &SENTENCE.repeat(20_000), 0, 300);
    let expected = perplexity(evaluated(&home, "short.txt"));
    assert_eq!(perplexity(evaluated(&home, "long.txt.gz")), expected);
}

#[test]
fn what_is_no_file() {
    let home = Home::with_model();
    fs::create_dir(home.path("folder")).unwrap();
    fs::create_dir(home.path("rows.jsonl")).unwrap();
    for (text, parts) in [
        ("folder", ["folder is a directory", "hint: give one of the files in it"]),
        ("rows.jsonl", ["rows.jsonl is a directory", "hint: "]),
        ("/dev/zero", ["/dev/zero is a device", "hint: "]),
        ("/dev/null", ["/dev/null is a device", "hint: "]),
    ] {
        planned(&home, text, "").fails(3, &parts);
        evaluated(&home, text).fails(3, &parts);
        let tasks = format!("eval-tasks --model model --tasks lambada={text}");
        home.run(&tasks).fails(3, &parts);
    }
    let made = std::process::Command::new("mkfifo").arg(home.path("pipe")).status().unwrap();
    assert!(made.success());
    evaluated(&home, "pipe").fails(3, &["pipe is a pipe that nobody writes to", "hint: "]);
    assert_eq!(home.names(), ["folder", "model", "pipe", "rows.jsonl"]);
}

#[test]
fn a_pipe_is_read_once() {
    let home = Home::with_model();
    fs::write(home.path("text.txt"), SENTENCE.repeat(100)).unwrap();
    let line = format!("quantize --model model {SMALL} --json --out");
    let expected = home.run(&format!("{line} a --calib text.txt --dataset text.txt")).done().json();
    let mut command = home.command(&format!("{line} b --calib text.txt --dataset /dev/stdin"));
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    stdin.write_all(SENTENCE.repeat(100).as_bytes()).unwrap();
    drop(stdin);
    let found = Run::new(&line, child.wait_with_output().unwrap()).done().json();
    assert_eq!(found["perplexity"]["after"], expected["perplexity"]["after"]);
    assert!(found["perplexity"]["after"].is_f64(), "{found}");
}

#[test]
fn numbers_beyond_any_memory() {
    let home = Home::with_model();
    for flags in ["quantize --samples", "quantize --seq-len", "eval-ppl --windows"] {
        let huge = "1000000000000000000";
        home.run(&format!("{flags} {huge} --model model")).fails(2, &[huge, "it must be at most"]);
    }
    let huge = "4294967295";
    let parts = [huge, "windows of 64", "tokens, more than", "hint: "];
    let calibrate = format!("calibrate --model model --seq-len 64 --samples {huge} --out c");
    home.run(&calibrate).fails(2, &parts);
    let small = "--group 32 --outliers 16 --dry-run";
    home.run(&format!("quantize --model model --seq-len 64 --samples {huge} {small}"))
        .fails(2, &parts);
    let parts = ["the text has", "need at least 42949672", "hint: "];
    home.run(&format!("quantize --model model --seq-len {huge} {small}")).fails(3, &parts);
    home.run(&format!("eval-ppl --model model --seq-len {huge} --windows {huge}")).fails(3, &parts);
    home.run(&format!("eval-ppl --model model --seq-len 512 --windows {huge}")).done();
    // Beyond 32 bits they are no numbers of windows at all.
    for flag in ["--samples", "--seq-len", "--windows"] {
        let line = format!("quantize --model model {flag} 1000000000000000000 {small}");
        home.run(&line).fails(2, &[flag, "at most 4294967295"]);
    }
    assert_eq!(home.names(), ["model"]);
}

#[test]
fn tokens_that_the_model_lacks() {
    let home = with_tokenizer(|json| {
        json["added_tokens"].as_array_mut().unwrap().push(
            json!({"id": 90_000, "content": "another",
            "lstrip": false, "rstrip": false, "single_word": false, "normalized": false,
            "special": false}),
        );
    });
    fs::write(home.path("text.txt"), SENTENCE.repeat(100)).unwrap();
    let parts =
        ["model/tokenizer.json: the tokenizer gives token", "but the model has 4096 embeddings"];
    planned(&home, "text.txt", "").fails(3, &parts);
    planned(&home, "sample", "--dataset text.txt").fails(3, &parts);
    assert_eq!(home.names(), ["model", "text.txt"]);
}

#[test]
fn tokenizers_that_panic_grow_or_hold_the_text_twice() {
    let replace = |content: &str| json!({"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": content});
    let template =
        json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    for (field, value, part) in [
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0}), ""),
        ("normalizer", replace(&"b".repeat(10_000)), "10000 times as long"),
        (
            "normalizer",
            json!({"type": "Sequence", "normalizers": vec![replace("bb"); 90]}),
            "times as long",
        ),
        ("added_tokens", json!([{"id": 1}]), ""),
        ("model", json!({"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}), ""),
        ("model", json!({"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}), ""),
        (
            "model",
            json!({"type": "WordPiece", "unk_token": "?", "vocab": {"a": 0},
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 10}),
            "",
        ),
        (
            "pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
            "invert": false}),
            "",
        ),
    ] {
        let home = with_tokenizer(|json| json[field] = value.clone());
        let parts = ["model/tokenizer.json", part];
        planned(&home, "sample", "").fails(3, &parts);
        evaluated(&home, "sample").fails(3, &parts);
        assert_eq!(home.names(), ["model"]);
    }
    let home = with_tokenizer(|json| json["post_processor"]["single"] = template);
    evaluated(&home, "sample").fails(3, &["model/tokenizer.json", "has the text 2 times"]);
    fs::write(home.path("model/tokenizer.json"), "[".repeat(1_000_000)).unwrap();
    evaluated(&home, "sample").fails(3, &["model/tokenizer.json is not a readable tokenizer"]);
}

#[test]
fn a_tokenizer_that_takes_endless_memory() {
    let home = with_tokenizer(|json| {
        json["pre_tokenizer"] = Value::Null;
        json["normalizer"] =
            json!({"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": "b".repeat(99)});
    });
    fs::write(home.path("text.txt"), "a".repeat(400_000)).unwrap();
    let parts = ["model/tokenizer.json cannot tokenize the text", "MB of memory", "hint: "];
    evaluated(&home, "text.txt").fails(3, &parts);
}

#[test]
fn rows_with_marks_and_blank_lines_in_every_form() {
    let home = Home::with_model();
    let json = format!("{{\"text\": {}}}", json!(SENTENCE.repeat(100)));
    fs::write(home.path("plain.jsonl"), format!("{json}\n")).unwrap();
    fs::write(home.path("marked.jsonl"), format!("\u{feff}\n{json}\r\n\n  \n")).unwrap();
    fs::write(home.path("rows.csv"), format!("id,text\n1,\"{}\"\n", SENTENCE.repeat(100))).unwrap();
    let expected = perplexity(evaluated(&home, "plain.jsonl"));
    assert_eq!(perplexity(evaluated(&home, "marked.jsonl")), expected);
    assert_eq!(perplexity(evaluated(&home, "rows.csv")), expected);

    fs::write(home.path("deep.jsonl"), "[".repeat(1_000_000)).unwrap();
    evaluated(&home, "deep.jsonl").fails(3, &["deep.jsonl, line 1: recursion limit", "hint: "]);
    fs::write(home.path("body.csv"), "id,body\n1,a\n").unwrap();
    evaluated(&home, "body.csv").fails(3, &["no field `text`; its fields are id, body"]);

    let tasks = "eval-tasks --model model --json --tasks";
    fs::write(home.path("t.jsonl"), "{\"text\": \"the end of the story\"}\n").unwrap();
    fs::write(home.path("m.jsonl"), "\u{feff}{\"text\": \"the end of the story\"}\n\n").unwrap();
    fs::write(home.path("t.csv"), "text\nthe end of the story\n").unwrap();
    let figures = |file: &str| {
        let outcome = home.run(&format!("{tasks} lambada={file}")).done().json();
        outcome["tasks"][0]["perplexity"].clone()
    };
    let expected = figures("t.jsonl");
    assert!(expected.is_object() || expected.is_f64(), "{expected}");
    assert_eq!(figures("m.jsonl"), expected);
    assert_eq!(figures("t.csv"), expected);
}

#[test]
fn what_is_recorded_of_a_text_is_the_hash_of_all_of_it() {
    use sha2::{Digest, Sha256};
    let home = Home::with_model();
    let text = SENTENCE.repeat(20_000);
    fs::write(home.path("text.txt"), &text).unwrap();
    home.run(&format!("quantize --model model {SMALL} --no-eval --calib text.txt --out out"))
        .done();
    let atom: Value =
        serde_json::from_slice(&fs::read(home.path("out/atom.json")).unwrap()).unwrap();
    let hash = hex::encode(Sha256::digest(text.as_bytes()));
    assert_eq!(atom["calibration"]["sha256"], hash.as_str());
}

/// The peak of the resident memory of a run that ends with this exit code, in bytes.
#[allow(clippy::zombie_processes, reason = "wait4 waits for the child")]
fn peak(home: &Home, line: &str, code: i32) -> u64 {
    let mut command = home.command(line);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut status = 0;
    // SAFETY: rusage is plain numbers, and no other code waits for the child process.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(
            libc::wait4(child.id().cast_signed(), &mut status, 0, &mut usage),
            child.id().cast_signed()
        );
        usage
    };
    assert_eq!(libc::WEXITSTATUS(status), code, "{line}");
    usage.ru_maxrss.unsigned_abs() * 1024
}

#[test]
fn a_long_text_takes_no_more_memory_than_a_short_one() {
    let home = Home::with_model();
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("calibration-data/sample.txt");
    let sample = fs::read_to_string(sample).unwrap();
    fs::write(home.path("long.txt"), sample.repeat(600)).unwrap();
    let evaluate = "eval-ppl --model model --seq-len 64 --windows 2 --dataset";
    let plan = "quantize --model model --samples 2 --seq-len 64 --no-eval --group 32 --outliers 16 --dry-run --calib";
    for line in [evaluate, plan] {
        let long = peak(&home, &format!("{line} long.txt"), 0);
        // Tokenized in one piece, these 24 MB took 3.5 GB.
        assert!(long < 400_000_000, "{line}: {long} bytes");
    }
}

/// Writes the file `tests/data/NAME.gz` into the home, out of its gzip.
fn unpacked(home: &Home, name: &str) {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/{name}.gz"));
    let mut content = flate2::read::GzDecoder::new(fs::File::open(packed).unwrap());
    std::io::copy(&mut content, &mut fs::File::create(home.path(name)).unwrap()).unwrap();
}

/// 58 KB and 31 KB of Parquet: a text of 1.9 GB in one page, and one of 1 GB in a dictionary.
#[test]
fn a_few_kilobytes_of_parquet_that_hold_gigabytes() {
    let home = Home::with_model();
    for name in ["page-bomb.parquet", "dictionary-bomb.parquet"] {
        unpacked(&home, name);
        let before = home.names();
        let cause = [name, "cannot be read as Parquet", "of memory", "hint: "];
        planned(&home, name, "").fails(3, &cause);
        let peak = peak(&home, &format!("eval-ppl --model model --dataset {name}"), 3);
        assert!(peak < 2_000_000_000, "{name}: {peak} bytes");
        assert_eq!(home.names(), before);
    }
}

/// Interrupts a command that has run for a while, and measures how long it takes to end.
#[track_caller]
fn interrupted(home: &Home, line: &str, after: Duration) {
    let mut command = home.command(line);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(after);
    let begin = Instant::now();
    send(Signal::INT, &child);
    let run = Run::new(line, child.wait_with_output().unwrap());
    let took = begin.elapsed();
    run.fails(130, &["interrupted"]);
    assert!(took < Duration::from_secs(2), "{line}: {took:?}");
}

#[test]
fn an_interruption_is_answered_while_a_text_is_tokenized() {
    let home = Home::with_model();
    home.run(&format!("quantize --model model {SMALL} --no-eval --out atom")).done();
    fs::write(home.path("long.txt"), SENTENCE.repeat(30_000_000 / SENTENCE.len())).unwrap();
    let before = home.names();
    for line in [
        "eval-ppl --model model --dataset long.txt".to_owned(),
        "calibrate --model model --calib long.txt --out c.safetensors".to_owned(),
        format!("quantize --model model {SMALL} --calib long.txt --out out"),
        "verify --model atom --dataset long.txt --windows 400000 --seq-len 8".to_owned(),
    ] {
        interrupted(&home, &line, Duration::from_millis(700));
        assert_eq!(home.names(), before, "{line}");
    }
    // A tokenizer of unknown reach gets the entire text.
    let unknown = with_tokenizer(|json| json["model"]["dropout"] = json!(0.1));
    fs::write(unknown.path("long.txt"), SENTENCE.repeat(30_000_000 / SENTENCE.len())).unwrap();
    interrupted(&unknown, "eval-ppl --model model --dataset long.txt", Duration::from_millis(700));
}

#[test]
fn an_interruption_is_answered_while_a_pipe_gives_nothing() {
    let home = Home::with_model();
    let mut command = home.command("eval-ppl --model model --dataset /dev/stdin");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    pipe.write_all(SENTENCE.as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(700));
    send(Signal::INT, &child);
    let begin = Instant::now();
    let run = Run::new("eval-ppl", child.wait_with_output().unwrap());
    run.fails(130, &["interrupted"]);
    assert!(begin.elapsed() < Duration::from_secs(2));
    drop(pipe);
}

#[test]
fn names_that_are_no_names_of_files() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let home = Home::with_model();
    let before = home.names();
    let run = |line: &str, last: &[u8]| {
        let output = home.command(line).arg(OsStr::from_bytes(last)).output().unwrap();
        Run::new(line, output)
    };
    for flag in ["--model", "--dataset", "--calib"] {
        let rest = if flag == "--model" { "" } else { "--model model" };
        run(&format!("quantize {rest} {flag}"), b"a\xff").fails(2, &["invalid UTF-8"]);
    }
    run("eval-ppl --model model --dataset", b"").fails(3, &["`` names no file", "hint: "]);
    let parts = ["`wikitext2=` names no file", "hint: "];
    run("eval-ppl --model model --dataset", b"wikitext2=").fails(3, &parts);
    run("quantize --model model --out out --calib", b"wikitext2=").fails(3, &parts);
    run("quantize --model model --out out --calib", b"").fails(3, &["`` names no file"]);
    run("eval-ppl --model", b"").fails(3, &["there is no model or directory named ``"]);
    run("eval-tasks --model model --tasks", b"piqa=").fails(2, &["`piqa=` names no file"]);
    run("quantize --model model --out", b"").fails(2, &["--out"]);
    assert_eq!(home.names(), before);
}

/// A calibration on what the model writes, `flags` besides.
fn on_own_text(home: &Home, flags: &str) -> Run {
    home.run(&format!("quantize --model tiny-llama --device cpu --group 64 --outliers 64 {flags}"))
}

#[test]
fn a_model_writes_the_text_that_it_is_calibrated_on() {
    let home = Home::new();
    let small = "--samples 6 --seq-len 64 --no-eval";
    let planned = on_own_text(&home, &format!("--calib self {small} --out one --dry-run"));
    assert_eq!(planned.done().code, Some(0));
    assert!(home.names().is_empty(), "a dry run writes nothing");
    for (out, threads) in [("one", 1), ("two", 2)] {
        on_own_text(&home, &format!("--calib self {small} --threads {threads} --out {out}")).done();
    }
    assert_same_files(&home.path("one"), &home.path("two"));
    let read = |name: &str| fs::read_to_string(home.path(name)).unwrap();
    let calibration =
        |out: &str| serde_json::from_str::<Value>(&read(&format!("{out}/atom.json"))).unwrap();
    let one = calibration("one")["calibration"].clone();
    assert_eq!((&one["dataset"], &one["samples"]), (&json!("self"), &json!(6)));
    assert_eq!(one["sha256"].as_str().unwrap().len(), 64);
    assert!(
        read("one/README.md").contains("which the model itself wrote at temperature 1 (`self`)")
    );
    assert!(read("one/README.md").contains("--calib self"));

    on_own_text(&home, &format!("--calib self --seed 1 {small} --out other")).done();
    assert_ne!(calibration("other")["calibration"]["sha256"], one["sha256"]);

    // Two stages give what one pass gives, and a mix takes its share.
    home.run(
        "calibrate --model tiny-llama --device cpu --calib self --samples 6 --seq-len 64 --out own.safetensors",
    )
    .done();
    home.run("plan own.safetensors --group 64 --outliers 64 --out plan.json").done();
    home.run("pack --model tiny-llama --device cpu --plan plan.json --no-eval --out packed").done();
    assert_same_files(&home.path("one"), &home.path("packed"));
    fs::write(home.path("lines.txt"), "A first line\n\nand a second\n").unwrap();
    on_own_text(&home, &format!("--calib sample,self=lines.txt {small} --out mixed")).done();
    let mixed = calibration("mixed")["calibration"].clone();
    assert_eq!(mixed["dataset"], "sample,self=lines.txt");
    assert_eq!(mixed["sets"][1]["samples"], 3);
    assert_ne!(mixed["sets"][1]["sha256"], one["sha256"]);
}

#[test]
fn what_a_model_cannot_write_is_refused_before_it_writes() {
    let home = Home::new();
    let begin = Instant::now();
    on_own_text(&home, "--calib self --samples 200000 --seq-len 100000 --out out")
        .fails(2, &["are 20000000000 tokens"]);
    on_own_text(&home, "--calib self --samples 2 --seq-len 100000 --no-eval --out out")
        .fails(2, &["positions", "--seq-len", "hint: "]);
    on_own_text(&home, "--calib self,self=x --samples 4 --seq-len 64 --out out")
        .fails(2, &["the model itself twice"]);
    on_own_text(&home, "--calib self --dataset self --out out")
        .fails(2, &["`self` is a text to calibrate on"]);
    on_own_text(&home, "--calib self=absent.txt --samples 4 --seq-len 64 --out out")
        .fails(3, &["absent.txt"]);
    fs::write(home.path("blank.txt"), " \n\n").unwrap();
    on_own_text(&home, "--calib self=blank.txt --samples 4 --seq-len 64 --out out")
        .fails(3, &["no line to begin with"]);
    fs::write(home.path("long.txt"), SENTENCE.repeat(40).replace('\n', " ")).unwrap();
    on_own_text(&home, "--calib self=long.txt --samples 4 --seq-len 64 --no-eval --out out")
        .fails(3, &["leaves nothing to sample"]);
    // What is refused without it is refused before the model writes for minutes.
    fs::create_dir(home.path("taken")).unwrap();
    fs::write(home.path("taken/notes.txt"), "mine").unwrap();
    let refused =
        on_own_text(&home, "--calib self --samples 4096 --seq-len 512 --no-eval --out taken");
    assert_ne!(refused.code, Some(0));
    assert!(refused.stderr.contains("taken"), "{}", refused.stderr);
    assert!(begin.elapsed() < Duration::from_secs(60));
    assert_eq!(home.names(), ["blank.txt", "long.txt", "taken"]);
}
