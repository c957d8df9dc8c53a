/*! What the program may write: no input, nothing that is not its own, nothing that is there unless it is asked to. Each
refusal leaves every file as it was. */

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use common::{Home, SMALL};
use fs_err as fs;
use serde_json::{Value, json};

/// Every file below a directory with its bytes, links as what they lead to.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            let target = fs::read_link(&path).unwrap();
            files.insert(path, target.into_os_string().into_encoded_bytes());
        } else if path.is_dir() {
            files.insert(path.clone(), Vec::new());
            files.extend(tree(&path));
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

/// Runs a line that must be refused, with every file as it was.
#[track_caller]
fn refused(home: &Home, line: &str, code: i32, parts: &[&str]) {
    let before = tree(&home.path(""));
    home.run(line).fails(code, &[parts, &["hint: "]].concat());
    assert!(tree(&home.path("")) == before, "`atom {line}` changed something");
}

/// A home with a model in `p/src`, next to files that cannot be recreated.
fn precious() -> Home {
    let home = Home::with_model();
    fs::create_dir_all(home.path("p/.git")).unwrap();
    fs::rename(home.path("model"), home.path("p/src")).unwrap();
    fs::write(home.path("p/.git/HEAD"), "ref: refs/heads/main").unwrap();
    fs::write(home.path("p/README.md"), "mine").unwrap();
    home
}

#[test]
fn a_directory_that_holds_is_or_lies_in_an_input_is_no_output() {
    let home = precious();
    let line = format!("quantize --model p/src {SMALL} --no-eval");
    for overwrite in ["", "--overwrite", "--overwrite --dry-run", "--dry-run"] {
        for (out, how) in [
            ("p", "holds p/src"),
            (".", "holds p/src"),
            ("p/src", "is p/src"),
            ("p/src/out", "lies inside p/src"),
            ("p/../p/src", "is p/src"),
        ] {
            refused(&home, &format!("{line} --out {out} {overwrite}"), 2, &[how]);
        }
    }
    symlink(home.path("p"), home.path("link")).unwrap();
    refused(&home, &format!("{line} --out link --overwrite"), 2, &["holds p/src"]);
    refused(&home, &format!("{line} --out link/src/x"), 2, &["lies inside p/src"]);
    // A text and a recipe are inputs too.
    fs::create_dir(home.path("texts")).unwrap();
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/calibration-data/sample.txt");
    fs::copy(sample, home.path("texts/a.txt")).unwrap();
    fs::write(home.path("texts/r.toml"), "group = 32\noutliers = 16").unwrap();
    for flags in
        ["--calib texts/a.txt", "--calib sample,wikitext2=texts/a.txt", "--recipe texts/r.toml"]
    {
        refused(&home, &format!("{line} {flags} --out texts --overwrite"), 2, &["holds texts/"]);
    }
}

#[test]
fn only_what_a_manifest_lists_is_replaced() {
    let home = Home::with_model();
    let line = format!("quantize --model model {SMALL} --no-eval --out out");
    home.run(&line).done();
    let other = format!("{line} --clip-act 0.8 --overwrite");
    for name in ["plan.json", "notes", "model.safetensors.bak", "tokenizer_config.json"] {
        fs::write(home.path("out").join(name), "mine").unwrap();
        let part = format!("out holds {name}, which the checkpoint in it does not list");
        refused(&home, &other, 2, &[&part]);
        refused(&home, &format!("{other} --dry-run"), 2, &[&part]);
        fs::remove_file(home.path("out").join(name)).unwrap();
    }
    let atom = fs::read(home.path("out/atom.json")).unwrap();
    for content in ["[]", "{}", "", "{\"format_version\": 1, \"tensors\": []}"] {
        fs::write(home.path("out/atom.json"), content).unwrap();
        refused(&home, &other, 2, &["out is not an Atom checkpoint and is not overwritten"]);
    }
    fs::write(home.path("out/atom.json"), &atom).unwrap();
    home.run(&other).done();

    // One that was written before there were hashes of files has no list: names tell.
    let path = home.path("out/atom.json");
    let mut old: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for key in ["files", "sha256"] {
        old.as_object_mut().unwrap().remove(key).unwrap();
    }
    fs::write(&path, old.to_string()).unwrap();
    fs::write(home.path("out/notes"), "mine").unwrap();
    refused(&home, &format!("{line} --overwrite"), 2, &["holds notes"]);
    fs::remove_file(home.path("out/notes")).unwrap();
    home.run(&format!("{line} --overwrite")).done();
}

#[test]
fn a_model_card_is_its_owners() {
    let home = Home::with_model();
    let line = format!("quantize --model model {SMALL} --no-gptq --out out");
    home.run(&line).done();
    let card = || fs::read_to_string(home.path("out/README.md")).unwrap();
    let first = card();
    assert!(first.contains("# model-atom-w4a4-g32") && first.contains("| `sample` |"), "{first}");
    assert!(!first.contains(home.path("").to_str().unwrap()), "no path of this machine: {first}");
    home.run(&format!("{line} --overwrite")).done();
    assert!(card() == first, "the same run writes the same card");
    home.run(&format!("{line} --overwrite --no-eval")).done();
    assert!(card().contains("Not measured"));

    fs::write(home.path("out/README.md"), format!("{first}\nMine.\n")).unwrap();
    home.run("verify --model out --no-eval").done();
    let edited = "out holds README.md, which is not as atom wrote it";
    refused(&home, &format!("{line} --overwrite"), 2, &[edited]);
    refused(&home, &format!("{line} --overwrite --dry-run"), 2, &[edited]);
    fs::remove_file(home.path("out/README.md")).unwrap();
    home.run("verify --model out --no-eval").done();
    home.run(&format!("{line} --overwrite")).done();
    assert!(card() == first);
}

#[test]
fn a_sources_card_is_read_and_never_needed() {
    let home = Home::with_model();
    let line = format!("quantize --model model {SMALL} --no-eval --no-gptq --overwrite --out out");
    for (readme, expected, warned) in [
        (
            "---\nlicense: mit\nlanguage: no\n---\n# Theirs",
            "license: mit\nlanguage:\n- \"no\"\n",
            "",
        ),
        ("# Theirs", "---\nlibrary_name: atom\n", ""),
        ("---\nlicense: [mit\n---\n", "---\nlibrary_name: atom\n", "has no valid front matter"),
    ] {
        fs::write(home.path("model/README.md"), readme).unwrap();
        let run = home.run(&line).done();
        let card = fs::read_to_string(home.path("out/README.md")).unwrap();
        assert!(card.contains(expected) && !card.contains("Theirs"), "{card}");
        assert_eq!(run.stderr.contains("README.md"), !warned.is_empty(), "{}", run.stderr);
        assert!(run.stderr.contains(warned), "{}", run.stderr);
    }
    // A link that leads out of the model is not followed, as with other side files.
    fs::write(home.path("secret"), "---\nlicense: secret\n---\n").unwrap();
    fs::remove_file(home.path("model/README.md")).unwrap();
    symlink(home.path("secret"), home.path("model/README.md")).unwrap();
    let run = home.run(&line).done();
    assert!(run.stderr.contains("outside the model"), "{}", run.stderr);
    assert!(!fs::read_to_string(home.path("out/README.md")).unwrap().contains("secret"));
}

#[test]
fn a_page_is_a_result_like_others() {
    let home = Home::with_model();
    let line = format!("quantize --model model {SMALL} --no-gptq --out out");
    let done = home.run(&format!("{line} --report q.html --json")).done();
    fs::write(home.path("q.json"), &done.stdout).unwrap();
    let page = |name: &str| fs::read_to_string(home.path(name)).unwrap();
    for part in ["<title>out</title>", "Perplexity", "Worst linears", "What they read", "Stages"] {
        assert!(page("q.html").contains(part), "{part}: {}", page("q.html"));
    }
    // Of every other command that measures.
    let short = "--seq-len 64 --windows 2";
    home.run(&format!("verify --model out --reference model {short} --report v.html")).done();
    assert!(page("v.html").contains("All checks hold") && page("v.html").contains("reference"));
    home.run(&format!("eval-ppl --model out {short} --report p.html")).done();
    assert!(page("p.html").contains("sample, 2 windows of 64 tokens"));
    let prefill = "bench prefill --shape llama-3.2-1b --blocks 1 --tokens 2 --repeats 1";
    home.run(&format!("{prefill} --report b.html")).done();
    assert!(page("b.html").contains("<h2>Speed</h2>") && page("b.html").contains("full precision"));
    // A checkpoint by itself, and with what was printed.
    home.run("report out").done();
    let alone = page("out-report.html");
    assert!(alone.contains("output error, %") && !alone.contains("Stages"), "{alone}");
    home.run("report out --with q.json -o all.html").done();
    assert!(page("all.html").contains("What they read"));
    assert!(page("all.html") == page("q.html"), "what was saved shows as what was measured");

    refused(&home, "report out --with q.json -o all.html", 2, &["all.html exists already"]);
    home.run("report out -o all.html --overwrite").done();
    fs::write(home.path("thesis"), "mine").unwrap();
    let kept = "thesis is not a report of atom and is not overwritten";
    refused(&home, "report out -o thesis --overwrite", 2, &[kept]);
    refused(&home, &format!("{line} --overwrite --report thesis"), 2, &[kept]);
    refused(&home, "bench cpu --report thesis --overwrite", 2, &[kept]);
    refused(&home, "report out -o out/report.html", 2, &["lies inside out"]);
    refused(&home, &format!("{line} --overwrite --report out/r.html"), 2, &["lies inside out"]);
    refused(
        &home,
        &format!("eval-ppl --model out {short} --report p.html"),
        2,
        &["exists already"],
    );
    refused(&home, "report out --with q.json -o q.json --overwrite", 2, &["which is read"]);
    refused(&home, "report model -o m.html", 3, &["model is not an Atom checkpoint"]);
    refused(&home, "report out --with thesis -o m.html", 3, &["thesis is not one JSON object"]);
    fs::write(home.path("other.json"), "{}").unwrap();
    let none = "not the result of a command that a report shows";
    refused(&home, "report out --with other.json -o m.html", 3, &["cannot show other.json", none]);
}

#[test]
fn a_plan_and_a_calibration_survive_pack() {
    let home = Home::with_model();
    fs::create_dir(home.path("out")).unwrap();
    let flags = "--samples 4 --seq-len 64";
    home.run(&format!("calibrate --model model {flags} --out out/c.safetensors")).done();
    home.run("plan out/c.safetensors --group 32 --outliers 16 --out out/plan.json").done();
    let pack = "pack --model model --plan out/plan.json --no-eval";
    for overwrite in ["", "--overwrite"] {
        refused(&home, &format!("{pack} --out out {overwrite}"), 2, &["holds", "which is read"]);
    }
    home.run(&format!("{pack} --out packed")).done();
}

#[test]
fn a_file_is_replaced_by_its_own_kind_only() {
    let home = Home::with_model();
    let calibrate = "calibrate --model model --samples 2 --seq-len 64 --out";
    home.run(&format!("{calibrate} c")).done();
    let plan = "plan c --group 32 --outliers 16 --out";
    home.run(&format!("{plan} p")).done();
    fs::write(home.path("thesis"), "mine").unwrap();
    fs::create_dir(home.path("dir")).unwrap();
    for (line, own, other) in [(calibrate, "c", "p"), (plan, "p", "c")] {
        refused(&home, &format!("{line} {own}"), 2, &["exists already"]);
        refused(&home, &format!("{line} thesis"), 2, &["exists already"]);
        for kind in [other, "thesis", "model/model.safetensors", "model/config.json"] {
            refused(&home, &format!("{line} {kind} --overwrite"), 2, &[]);
        }
        refused(&home, &format!("{line} dir --overwrite"), 2, &["is a directory"]);
        refused(&home, &format!("{line} nowhere/x"), 3, &["nowhere"]);
        refused(&home, &format!("{line} thesis/x"), 3, &[]);
    }
    // An input, whatever its kind: the calibration that a plan is made from.
    refused(
        &home,
        "plan c --group 32 --outliers 16 --out c --overwrite",
        2,
        &["is c, which is read"],
    );
    refused(&home, &format!("{calibrate} model/c.safetensors"), 2, &["lies inside model"]);
    home.run(&format!("{calibrate} c --overwrite")).done();
    home.run(&format!("{plan} p --overwrite")).done();
    symlink(home.path("gone"), home.path("link")).unwrap();
    refused(&home, &format!("{plan} link --overwrite"), 2, &["is a link to"]);
}

#[test]
fn a_log_of_samples_replaces_nothing_else() {
    let home = Home::with_model();
    let row =
        json!({"query": "How is water kept?", "choices": ["in a jar", "in a net"], "gold": 0});
    fs::write(home.path("piqa.jsonl"), format!("{row}\n")).unwrap();
    let line = "eval-tasks --model model --tasks piqa=piqa.jsonl --log-samples";
    home.run(&format!("{line} log")).done();
    assert!(fs::read_to_string(home.path("log")).unwrap().contains("log_likelihoods"));
    refused(&home, &format!("{line} log"), 2, &["exists already", "--overwrite"]);
    home.run(&format!("{line} log --overwrite")).done();
    for (file, part) in [
        ("piqa.jsonl", "which is read"),
        ("model/model.safetensors", "which is read"),
        ("model/log", "lies inside model"),
        ("thesis", "is not a log of samples"),
    ] {
        fs::write(home.path("thesis"), "mine").unwrap();
        refused(&home, &format!("{line} {file} --overwrite"), 2, &[part]);
    }
    refused(&home, &format!("{line} nowhere/log"), 3, &["nowhere"]);
    home.run(&format!("{line} /dev/null")).done();
    // Its rows in a directory of tasks are inputs as well.
    fs::create_dir(home.path("tasks")).unwrap();
    fs::rename(home.path("piqa.jsonl"), home.path("tasks/piqa.jsonl")).unwrap();
    let line = "eval-tasks --model model --tasks piqa --tasks-dir tasks --log-samples";
    refused(&home, &format!("{line} tasks/piqa.jsonl --overwrite"), 2, &["which is read"]);
}

#[test]
fn manual_pages_replace_manual_pages_only() {
    let home = Home::new();
    home.run("man --out man1").done();
    refused(&home, "man --out man1", 2, &["exists already", "--overwrite"]);
    home.run("man --out man1 --overwrite").done();
    fs::write(home.path("man1/atom-plan.1"), "mine").unwrap();
    refused(&home, "man --out man1 --overwrite", 2, &["is not a manual page of atom"]);
}

#[test]
fn a_link_as_output_is_followed_or_refused_before_the_work() {
    let home = Home::with_model();
    let line = format!("quantize --model model {SMALL} --no-eval");
    symlink(home.path("gone"), home.path("dangling")).unwrap();
    for flags in ["", "--overwrite", "--dry-run"] {
        refused(
            &home,
            &format!("{line} --out dangling {flags}"),
            2,
            &["is a link to", "does not exist"],
        );
        refused(&home, &format!("{line} --out dangling/x {flags}"), 3, &["dangling"]);
    }
    fs::create_dir(home.path("real")).unwrap();
    symlink(home.path("real"), home.path("link")).unwrap();
    home.run(&format!("{line} --out link")).done();
    assert!(home.path("link").is_symlink() && home.path("real/atom.json").exists());
    home.run(&format!("{line} --out link --overwrite --clip-act 0.8")).done();
    assert!(home.path("link").is_symlink());
    assert_eq!(home.names(), ["dangling", "link", "model", "real"]);
}

/// Dry-run asks for the same room as the run reserves.
#[test]
fn dry_run_and_run_ask_for_the_same_disk() {
    let home = Home::with_model();
    let line = format!("quantize --model model {SMALL} --no-eval --out out");
    let planned = home.json(&format!("{line} --dry-run"));
    assert_eq!(planned["finished_blocks"], 0);
    home.run(&line).done();
    let written: u64 = tree(&home.path("out")).values().map(|bytes| bytes.len() as u64).sum();
    let needed = planned["needed_disk_bytes"].as_u64().unwrap();
    assert!(needed >= written && needed < written + (9 << 20), "{needed} for {written}");
}
