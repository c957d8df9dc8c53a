/*! What reaches the terminal: no control character of a file, a name or the Hub, one warning for each kind, and an
exit code that says so where the result could not be written. */

mod common;

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;

use common::{Dtype, Home, RandomModel, Run, SMALL};
use fs_err as fs;
use serde_json::{Value, json};

/// Clears the screen, sets the title, moves up, colours by a C1 control, turns the reading order around.
const EVIL: &str = "x\u{1b}[2J\u{1b}]0;t\u{7}\u{1b}[1A\u{9b}31m\u{202e}\u{7f}\rok";

/// Characters that no output may hold: every control but line breaks, and marks of the reading order.
fn acts(c: char) -> bool {
    (c.is_control() && c != '\n') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The run, on whose streams nothing acts.
#[track_caller]
fn plain(run: Run) -> Run {
    for (stream, text) in [("stdout", &run.stdout), ("stderr", &run.stderr)] {
        let found = text.chars().find(|c| acts(*c));
        assert_eq!(found, None, "{stream}: {:?}", text);
    }
    run
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn names_of_directories_and_files_are_escaped() {
    let home = Home::new();
    RandomModel::new(1).write(&home.path(EVIL), Dtype::F16, 1);
    // Words of a command line hold spaces here, so that the program is given them as they are.
    let run = |words: &[&str]| {
        let output = home.command("").args(words).output().unwrap();
        plain(Run::new(&words.join(" "), output))
    };
    let evil = format!("./{EVIL}");
    let small: Vec<&str> = SMALL.split(' ').collect();
    let quantize = |more: &[&str]| {
        run(&[&["quantize", "--model", &evil, "--out", "out"], &small[..], more].concat())
    };
    let shown = quantize(&["--dry-run"]).done();
    assert!(shown.stdout.contains("\\u{1b}[2J"), "{}", shown.stdout);
    assert!(quantize(&[]).done().stderr.contains("\\u{1b}[2J"));
    run(&["inspect", &evil]).done();
    run(&["inspect", "out"]).done();
    run(&["verify", "--model", "out", "--no-eval", "--device", "cpu"]).done();
    run(&["eval-ppl", "--model", &evil, "--seq-len", "64", "--windows", "1"]).done();
    run(&[
        "calibrate",
        "--model",
        &evil,
        "--samples",
        "2",
        "--seq-len",
        "64",
        "--out",
        "c\u{1b}[2J",
    ])
    .done();
    run(&["plan", "c\u{1b}[2J", "--group", "32", "--outliers", "16", "--out", "p\u{1b}c"]).done();
    run(&["pack", "--model", &evil, "--plan", "p\u{1b}c", "--no-eval", "--out", "o\u{9b}2J"])
        .done();
    // What is refused.
    let absent = format!("./{EVIL}absent");
    for words in [
        &["inspect", &absent][..],
        &["quantize", "--model", &absent],
        &["quantize", "--model", &evil, "--recipe", &absent],
        &["quantize", "--model", &evil, "--calib", &absent],
        &["plan", &absent],
        &["pack", "--model", &evil, "--plan", &absent],
        &["quantize", "--model", &evil, "--device", EVIL],
        &["quantize", "--model", &evil, "--set", EVIL],
        &["eval-tasks", "--model", &evil, "--tasks", EVIL],
        &[EVIL],
    ] {
        let refused = run(words);
        assert!(matches!(refused.code, Some(2 | 3)), "{words:?}: {:?}", refused.code);
    }
}

#[test]
fn what_files_say_is_escaped() {
    let home = Home::with_model();
    let inspect = || plain(home.run("inspect model"));
    let config = home.path("model/config.json");
    let intact = fs::read(&config).unwrap();
    edit(&config, |config| config["architectures"] = json!([EVIL]));
    assert_eq!(inspect().code, Some(3), "no network of this family has such a class");
    edit(&config, |config| config["model_type"] = json!(EVIL));
    inspect();
    let refused = plain(home.run(&format!("quantize --model model {SMALL} --out o")));
    assert_eq!(refused.code, Some(3));
    fs::write(&config, &intact).unwrap();
    // A recipe's own words.
    fs::write(home.path("r.toml"), format!("{:?} = 1\n", EVIL)).unwrap();
    plain(home.run(&format!("quantize --model model {SMALL} --recipe r.toml --out o")))
        .fails(3, &[]);
    // Rows of a task and of a text.
    fs::write(home.path("t.jsonl"), format!("{{\"text\": \"{EVIL}\", \"label\": \"\u{9b}2J\"}}\n"))
        .unwrap();
    plain(home.run("eval-ppl --model model --dataset t.jsonl"));
    plain(home.run("eval-tasks --model model --tasks piqa=t.jsonl"));
}

#[test]
fn a_tensor_cannot_speak_for_the_program() {
    let home = Home::new();
    let mut model = RandomModel::new(1);
    model.tensors[1].name = "model.layers.0\nerror: all is well\u{1b}[2J".to_owned();
    model.write(&home.path("model"), Dtype::F16, 1);
    for line in ["inspect model", "eval-ppl --model model --seq-len 64"] {
        let run = plain(home.run(line));
        for text in [&run.stdout, &run.stderr] {
            assert!(!text.lines().any(|line| line.starts_with("error: all is well")), "{text}");
        }
    }
}

#[test]
fn what_a_checkpoint_says_of_itself_is_escaped() {
    let home = Home::with_model();
    home.run(&format!("quantize --model model {SMALL} --no-eval --out out")).done();
    let atom = home.path("out/atom.json");
    let intact = fs::read(&atom).unwrap();
    for (pointer, value) in [
        ("/tool_version", json!(EVIL)),
        ("/source/name", json!(EVIL)),
        ("/calibration/dataset", json!(EVIL)),
        ("/calibration/dataset", json!("sample\nkind  source checkpoint")),
        ("/blocks/0/0/name", json!(EVIL)),
        ("/blocks/0/0/linears/0/name", json!(EVIL)),
        ("/recipe/format", json!(EVIL)),
    ] {
        edit(&atom, |atom| *atom.pointer_mut(pointer).unwrap() = value.clone());
        for line in ["inspect out", "verify --model out --no-eval --device cpu"] {
            let run = plain(home.run(line));
            assert!(!run.stdout.lines().any(|line| line == "kind  source checkpoint"), "{pointer}");
            let json = home.run(&format!("{line} --json"));
            assert!(!json.stdout.chars().any(acts), "{pointer}: {:?}", json.stdout);
            assert!(json.json().is_object());
        }
        fs::write(&atom, &intact).unwrap();
    }
}

#[test]
fn escapes_of_json_are_the_same_text() {
    let home = Home::new();
    let output =
        home.command("").args(["inspect", &format!("./{EVIL}"), "--json"]).output().unwrap();
    let run = Run::new("inspect --json", output);
    assert_eq!(run.code, Some(3));
    assert!(!run.stdout.chars().any(acts), "{:?}", run.stdout);
    let message = run.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains(EVIL), "{message:?}");
}

#[test]
fn a_kind_of_warning_comes_once() {
    let home = Home::with_model();
    // 64 tokens for 172 channels: no site of the MLP has enough, in either block.
    let line = "quantize --model model --group 32 --outliers 16 --samples 1 --seq-len 64 --no-eval";
    let run = home.run(&format!("{line} --out o")).done();
    let warnings: Vec<&str> = run.stderr.lines().filter(|l| l.starts_with("warning:")).collect();
    assert_eq!(warnings.len(), 1, "{}", run.stderr);
    assert!(warnings[0].contains("sites without a correction"), "{warnings:?}");
    assert!(warnings[0].contains("model.layers.0."), "{warnings:?}");
}

/// A command whose result is `bytes` long or longer, run with its stdout replaced.
#[track_caller]
fn unwritten(stdout: impl Fn(&mut std::process::Command), part: &str) {
    for words in ["inspect tiny-llama", "inspect tiny-llama --json", "man", "completions bash"] {
        let home = Home::new();
        let mut command = home.command(words);
        stdout(&mut command);
        let run = Run::new(words, command.output().unwrap());
        run.fails(4, &["cannot write the result to stdout", part, "hint: "]);
    }
}

#[test]
fn a_result_that_could_not_be_written_is_no_success() {
    unwritten(
        |command| {
            command.stdout(std::fs::File::options().write(true).open("/dev/full").unwrap());
        },
        "No space left on device",
    );
    unwritten(
        |command| {
            // SAFETY: close is a plain system call, which the child may make before it runs.
            unsafe {
                command.pre_exec(|| {
                    libc::close(1);
                    Ok(())
                });
            }
        },
        "it is closed",
    );
}

#[test]
fn a_null_stdout_and_streams_that_go_away_are_no_errors() {
    let home = Home::new();
    for stdout in [true, false] {
        let null = std::fs::File::options().read(true).write(stdout).open("/dev/null").unwrap();
        let null = if stdout { Stdio::from(null) } else { Stdio::null() };
        let output = home.command("inspect tiny-llama").stdout(null).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
    }
    // Nobody reads stderr, or it is closed or full: the result counts.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    for stderr in [Stdio::from(writer), Stdio::from(full)] {
        let line = format!("quantize --model tiny-llama {SMALL} --no-eval --out o --overwrite");
        let output = home.command(&line).stderr(stderr).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(!output.stdout.is_empty());
    }
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = home.command("--help").stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
}
