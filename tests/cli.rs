/*! The command line from outside: refusals, exit codes and streams. Nothing here quantizes; what help and
messages say word by word is pinned by `help.rs`. */

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs `atom` in `directory`, with no colours and no terminal.
fn atom_in(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(assert_cmd::cargo::cargo_bin!("atom"))
        .args(arguments)
        .current_dir(directory)
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn atom(arguments: &[&str]) -> Output {
    atom_in(&std::env::temp_dir(), arguments)
}

/// stderr of a command that ended with `code` and did not panic.
#[track_caller]
fn refusal(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("backtrace"), "{stderr}");
    assert!(!stderr.contains('\u{1b}'), "colours where there is no terminal: {stderr}");
    stderr
}

#[test]
fn the_version_names_the_commit_and_its_date() {
    let output = atom(&["--version"]);
    assert_eq!(output.status.code(), Some(0));
    let found = String::from_utf8(output.stdout).unwrap();
    let package = env!("CARGO_PKG_VERSION");
    let git = |words: &[&str]| {
        let output =
            Command::new("git").current_dir(env!("CARGO_MANIFEST_DIR")).args(words).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    };
    let here = git(&["rev-parse", "--show-toplevel"]);
    let is_checkout = here.is_some_and(|top| {
        Path::new(&top).canonicalize().ok()
            == Path::new(env!("CARGO_MANIFEST_DIR")).canonicalize().ok()
    });
    let Some(rest) = found.strip_prefix(&format!("atom {package} (")) else {
        assert!(!is_checkout, "a checkout has a commit: {found}");
        return assert_eq!(found, format!("atom {package}\n"));
    };
    // The program may be older than the last commit, which a test run must not depend on.
    let (commit, date) = rest.strip_suffix(")\n").unwrap().split_once(' ').unwrap();
    let dated = git(&["log", "-1", "--no-show-signature", "--date=short", "--format=%cd", commit]);
    assert_eq!(dated.as_deref(), Some(date));
}

#[test]
fn what_the_parser_refuses_is_wrong_usage() {
    for (line, part) in [
        ("quantise --model m", "unrecognized subcommand"),
        ("quantize", "--model <MODEL>"),
        ("quantize --model m --bitz 4", "unexpected argument '--bitz'"),
        ("quantize --model m --group foo", "`row` for one scale a row"),
        ("quantize --model m --outlier-format int9", "int8, fp8, fp16"),
        ("quantize --model m --samples 0", "at least 1"),
        ("quantize --model m --seq-len 1", "at least 2"),
        ("quantize --model m --device tpu", "auto, cpu, cuda and cuda:N"),
        ("quantize --model m --no-eval --max-ppl 20", "--max-ppl"),
        ("eval-ppl --model m --max-ppl 0.5", "at least 1"),
        ("verify --model m --max-ppl-increase=-1 --reference r", "ratio"),
        ("inspect", "<DIR>"),
        ("plan", "<CALIBRATION>"),
    ] {
        let words: Vec<&str> = line.split_whitespace().collect();
        let stderr = refusal(&atom(&words), 2);
        assert!(stderr.contains(part), "{line}: no `{part}` in\n{stderr}");
    }
}

#[test]
fn a_bad_recipe_flag_is_wrong_usage() {
    for (flags, message) in [
        ("--group 0", "group must be a multiple of 16"),
        ("--group 24", "group must be a multiple of 16"),
        ("--bits 5", "bits is 5; it must be 2, 3, 4, 8 or 16"),
        ("--bits 16", "nothing would be quantized"),
        ("--clip-act 1.5", "clip_act is 1.5"),
        ("--recipe papr", "there is no recipe named `papr`"),
        ("--format fp4 --bits 3", "bits is 3; weights of the format fp4 have 4"),
        ("--format fp4 --act-bits 2", "act_bits is 2; activations of the format fp4 have 4"),
    ] {
        let line = format!("quantize --model m {flags}");
        let words: Vec<&str> = line.split_whitespace().collect();
        let stderr = refusal(&atom(&words), 2);
        assert!(stderr.contains(message), "{flags}: {stderr}");
        assert!(stderr.contains("\n\nhint: "), "{flags}: {stderr}");
    }
}

#[test]
fn a_bad_recipe_file_is_bad_input() {
    let directory = tempfile::tempdir().unwrap();
    for (text, message) in [
        ("grup = 64", "unknown recipe key `grup` in recipe.toml"),
        ("bits = 5", "bits is 5"),
        ("bits", "recipe recipe.toml is not TOML"),
    ] {
        fs_err::write(directory.path().join("recipe.toml"), text).unwrap();
        let words = ["quantize", "--model", "m", "--recipe", "recipe.toml"];
        let stderr = refusal(&atom_in(directory.path(), &words), 3);
        assert!(stderr.contains(message), "{text}: {stderr}");
    }
    let absent = ["quantize", "--model", "m", "--recipe", "absent.toml"];
    assert!(refusal(&atom_in(directory.path(), &absent), 3).contains("absent.toml"));
}

#[test]
fn a_missing_device_is_the_machines_fault() {
    // No machine has so many devices; many have no driver either.
    let stderr = refusal(&atom(&["eval-ppl", "--model", "m", "--device", "cuda:999"]), 4);
    assert!(stderr.contains("libcuda") || stderr.contains("cuda:999 was asked for"), "{stderr}");
    assert!(stderr.contains("hint: "), "{stderr}");
}

#[test]
fn a_gpus_measurements_need_a_gpu() {
    for device in ["cpu", "cuda:999"] {
        let stderr = refusal(&atom(&["bench", "gemm", "--device", device]), 4);
        assert!(stderr.contains("hint: "), "{stderr}");
    }
    for what in [["--shape", "gpt"], ["--bits", "5"]] {
        let arguments = [&["bench", "attention", "--device", "cpu"], &what[..]].concat();
        refusal(&atom(&arguments), 2);
    }
    refusal(&atom(&["bench", "attention", "--device", "cpu"]), 4);
    let stderr = refusal(&atom(&["bench", "gemm", "--device", "cpu"]), 4);
    assert!(stderr.contains("this measures a GPU's kernels"), "{stderr}");
    // What was typed is looked at first.
    let stderr = refusal(&atom(&["bench", "gemm", "--device", "cpu", "--shape", "gpt"]), 2);
    assert!(stderr.contains("there are no shapes named `gpt`"), "{stderr}");
    let stderr = refusal(&atom(&["bench", "gemm", "--device", "cpu", "--bits", "5"]), 2);
    assert!(stderr.contains("there are no int codes of 5 bits"), "{stderr}");
}

#[test]
fn an_increase_needs_a_reference() {
    let stderr = refusal(&atom(&["verify", "--model", "m", "--max-ppl-increase", "0.1"]), 2);
    assert!(stderr.contains("--reference"), "{stderr}");
}

#[test]
fn a_model_that_is_not_there_is_bad_input() {
    let directory = tempfile::tempdir().unwrap();
    let stderr = refusal(&atom_in(directory.path(), &["quantize", "--model", "./absent"]), 3);
    assert!(stderr.contains("absent"), "{stderr}");
    refusal(&atom_in(directory.path(), &["inspect", "absent"]), 3);
    let left: Vec<_> = fs_err::read_dir(directory.path()).unwrap().collect();
    assert!(left.is_empty(), "a refused run leaves nothing behind: {left:?}");
}

#[test]
fn with_json_an_error_is_one_object_on_stdout() {
    for (words, code, kind) in [
        (vec!["quantize", "--model", "m", "--bits", "5", "--json"], 2, "usage"),
        (vec!["--json", "inspect", "./absent"], 3, "input"),
        (vec!["eval-ppl", "--model", "m", "--device", "cuda:999", "--json"], 4, "machine"),
        // The parser's own refusals as well.
        (vec!["quantize", "--json", "--bitz"], 2, "usage"),
    ] {
        let output = atom(&words);
        refusal(&output, code);
        let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(object["error"]["kind"], kind, "{words:?}");
        assert_eq!(object["error"]["exit_code"], code);
        let message = object["error"]["message"].as_str().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.starts_with(&format!("error: {message}\n")), "{message} / {stderr}");
    }
}

#[test]
fn without_json_an_error_leaves_stdout_empty() {
    assert!(atom(&["inspect", "./absent"]).stdout.is_empty());
}

/// A reader that goes away before it has read a word.
#[test]
fn a_closed_pipe_is_no_panic() {
    for words in [&["quantize", "--help"][..], &["--json", "inspect", "./absent"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(assert_cmd::cargo::cargo_bin!("atom"))
            .args(words)
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(matches!(output.status.code(), Some(0 | 3)), "{:?}: {stderr}", output.status);
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

#[test]
fn of_a_repeated_flag_the_last_wins() {
    let words = ["eval-ppl", "--model", "./absent", "--device", "cuda:999", "--device", "cpu"];
    assert!(refusal(&atom(&words), 3).contains("absent"));
}
