/*! `atom doctor`, `completions` and `man` from outside. */

mod common;

use common::{Home, Run};
use serde_json::Value;

/// The check of that name.
fn check<'a>(page: &'a Value, name: &str) -> &'a Value {
    let checks = page["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name}: {page}"))
}

#[test]
fn without_a_gpu_there_is_nothing_wrong() {
    let home = Home::new();
    let page = home.json("doctor");
    assert_eq!(page["ok"], true, "{page}");
    let keys: Vec<&String> = page.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["ok", "checks"]);
    for check in page["checks"].as_array().unwrap() {
        let keys: Vec<&String> = check.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["name", "status", "detail", "hint"]);
        assert!(["ok", "note", "fault"].iter().any(|status| check["status"] == *status), "{check}");
    }
    // Tests run with ATOM_DEVICE=cpu.
    assert_eq!(check(&page, "gpu")["detail"], "left out by --device cpu");
    assert_eq!(check(&page, "cpu arithmetic")["status"], "ok");
    assert!(home.names().is_empty(), "it leaves {:?}", home.names());
}

#[test]
fn what_should_be_there_and_is_not_is_a_fault() {
    let home = Home::new();
    // No machine has so many devices.
    let run = home.run("doctor --device cuda:999 --json").fails(4, &["this should work", "hint: "]);
    // One object, the page; the error is on stderr.
    assert_eq!(run.json()["ok"], false);
    let run = home.run_on("avx1024", "doctor --json").fails(4, &["instruction set"]);
    let page = run.json();
    let isa = check(&page, "instruction set");
    assert_eq!(isa["status"], "fault");
    assert!(isa["hint"].as_str().unwrap().contains("plain, portable"), "{isa}");
    let page = home.run_on("plain", "doctor --json").done().json();
    assert_eq!(check(&page, "instruction set")["status"], "note");
}

#[test]
fn a_token_is_never_shown() {
    let home = Home::new();
    for line in ["doctor", "doctor --json"] {
        let mut command = home.command(line);
        command.env("HF_TOKEN", "hf_abcdef").env("HF_HOME", home.path("hf"));
        let run = Run::new(line, command.output().unwrap()).done();
        let words: Vec<&str> = run.stdout.split_whitespace().collect();
        assert!(words.join(" ").contains("HF_TOKEN is set"), "{}", run.stdout);
        assert!(!format!("{}{}", run.stdout, run.stderr).contains("abcdef"));
        assert!(words.join(" ").contains("not made yet"), "{}", run.stdout);
    }
    assert!(home.names().is_empty(), "it makes no cache: {:?}", home.names());
}

#[test]
fn the_page_has_no_colours_off_a_terminal_and_fits_eighty_columns() {
    let run = Home::new().run("doctor --quiet").done();
    assert!(run.stderr.is_empty(), "{}", run.stderr);
    assert!(!run.stdout.contains('\u{1b}'), "{}", run.stdout);
    let verdict = run.stdout.lines().last().unwrap();
    assert!(verdict.starts_with("ok: 0 faults, "), "{verdict}");
    // A word of a path or a processor's name may be longer; two words are not.
    for line in run.stdout.lines().filter(|line| line.chars().count() > 80) {
        assert_eq!(line.split_whitespace().count(), 1, "{line}");
    }
}

#[test]
fn manual_pages_are_printed_or_written() {
    let home = Home::new();
    let all = home.run("man --out pages").done();
    let written = common::names(&home.path("pages"));
    assert_eq!(all.stdout.lines().count(), written.len());
    for (name, line) in [("atom.1", "man"), ("atom-bench-gemm.1", "man bench gemm")] {
        assert!(written.iter().any(|known| known == name), "no {name} in {written:?}");
        let file = fs_err::read_to_string(home.path("pages").join(name)).unwrap();
        assert_eq!(home.run(line).done().stdout, file);
    }
    assert!(home.json("man quantize")["page"].as_str().unwrap().contains(".SH EXAMPLES"));
}

/// The script of the shell that every machine of ours has.
#[test]
fn bash_takes_its_completions() {
    let home = Home::new();
    fs_err::write(home.path("atom.bash"), home.run("completions bash").done().stdout).unwrap();
    let script = "source ./atom.bash; COMP_WORDS=(atom quantize --out); COMP_CWORD=2; \
                  _atom atom --out quantize; echo ${COMPREPLY[@]}";
    let bash = std::process::Command::new("bash")
        .args(["--norc", "-c", script])
        .current_dir(home.path(""))
        .output();
    let Ok(output) = bash else { return common::skipped("bash_takes_its_completions", "no bash") };
    let found = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(found.trim(), "--out --outliers --outlier-format --outlier-counts", "{found}");
}
