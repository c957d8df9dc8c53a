//! `atom eval-tasks` compared with lm-evaluation-harness: tests/harness/*.json has the harness's own results, made by
//! tests/harness.py, so that nothing of it is needed here.

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use common::{Home, SMALL, directory_from};
use fs_err as fs;
use serde_json::{Value, json};

/// How far log likelihoods of a text may be apart, in nats.
const TOLERANCE: f64 = 1e-3;

const ALL: &str = "piqa,arc_easy,arc_challenge,boolq,hellaswag,winogrande,lambada";

fn harness() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/harness")
}

fn found_by_harness(file: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(harness().join(file)).unwrap()).unwrap()
}

fn floats(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

/// Compares every row's log likelihoods and every metric; `samples` is the file of `--log-samples`.
fn compare(outcome: &Value, samples: &Path, expected: &Value) {
    let mut rows: HashMap<String, usize> = HashMap::new();
    for line in fs::read_to_string(samples).unwrap().lines() {
        let sample: Value = serde_json::from_str(line).unwrap();
        let task = sample["task"].as_str().unwrap();
        let row = sample["row"].as_u64().unwrap() as usize;
        let theirs = &expected["tasks"][task];
        let (found, wanted) =
            (floats(&sample["log_likelihoods"]), floats(&theirs["log_likelihoods"][row]));
        assert_eq!(found.len(), wanted.len(), "{task} row {row}");
        for (found, wanted) in found.iter().zip(&wanted) {
            assert!((found - wanted).abs() < TOLERANCE, "{task} row {row}: {found} {wanted}");
        }
        assert_eq!(sample["greedy"], theirs["greedy"][row], "{task} row {row}");
        *rows.entry(task.to_owned()).or_default() += 1;
    }
    for task in outcome["tasks"].as_array().unwrap() {
        let name = task["task"].as_str().unwrap();
        let theirs = &expected["tasks"][name];
        assert_eq!(task["rows"], theirs["rows"], "{name}");
        assert_eq!(task["rows"].as_u64().unwrap() as usize, rows[name], "{name}");
        let metrics = theirs["metrics"].as_object().unwrap();
        assert!(metrics.contains_key("acc"), "{name}");
        for (metric, wanted) in metrics {
            let (found, wanted) = (task[metric].as_f64().unwrap(), wanted.as_f64().unwrap());
            // Accuracies are equal; a perplexity follows from likelihoods.
            let far = (found - wanted).abs() / wanted.abs().max(1.0);
            assert!(
                far < if metric == "perplexity" { TOLERANCE } else { 1e-12 },
                "{name} {metric}"
            );
        }
        assert_eq!(metrics.contains_key("acc_norm"), !task["acc_norm"].is_null(), "{name}");
    }
}

#[test]
fn every_task_gives_what_the_harness_gives_on_the_bundled_model() {
    let home = Home::new();
    let line = format!(
        "eval-tasks --model tiny-llama --tasks {ALL} --tasks-dir {} --log-samples rows.jsonl",
        harness().display()
    );
    let outcome = home.json(&line);
    assert_eq!(outcome["tasks"].as_array().unwrap().len(), 7);
    // Texts that begin alike share tokens.
    assert!(outcome["tokens"].as_u64().unwrap() < outcome["text_tokens"].as_u64().unwrap() * 2 / 3);
    compare(&outcome, &home.path("rows.jsonl"), &found_by_harness("tiny-llama.json"));
}

#[test]
fn smollm2_gives_what_the_harness_gives_on_arc_easy_and_piqa() {
    let test = "smollm2_gives_what_the_harness_gives_on_arc_easy_and_piqa";
    let Some(model) = directory_from("ATOM_SMOLLM2", test) else { return };
    let Some(data) = directory_from("ATOM_DATA", test) else { return };
    let home = Home::new();
    let line = format!(
        "eval-tasks --model {} --tasks arc_easy,piqa --tasks-dir {} --limit 40 --log-samples rows.jsonl",
        model.display(),
        data.join("zero-shot").display()
    );
    let outcome = home.json(&line);
    compare(&outcome, &home.path("rows.jsonl"), &found_by_harness("smollm2.json"));
}

#[test]
fn a_quantized_model_answers_alike_for_any_batch_and_thread_count() {
    let home = Home::with_model();
    home.run(&format!("quantize --model model --out atom {SMALL} --no-eval")).done();
    let tasks = harness();
    let ask = |flags: &str, file: &str| {
        let line = format!(
            "eval-tasks --model atom --tasks-dir {} --log-samples {file} {flags}",
            tasks.display()
        );
        home.json(&line);
        fs::read_to_string(home.path(file)).unwrap()
    };
    let together = ask("--tasks arc_easy,piqa,winogrande", "together.jsonl");
    assert_eq!(ask("--tasks arc_easy,piqa,winogrande --threads 1", "one.jsonl"), together);
    // Quantized activations and keys and values are a token's own: other texts in a batch change no bit.
    let alone = ["arc_easy", "piqa", "winogrande"]
        .map(|task| ask(&format!("--tasks {task}"), &format!("{task}.jsonl")));
    assert_eq!(alone.concat(), together);
}

#[test]
fn a_limit_that_is_missed_is_exit_code_1_behind_the_outcome() {
    let home = Home::new();
    let line = format!(
        "eval-tasks --model tiny-llama --tasks piqa,arc_easy --tasks-dir {}",
        harness().display()
    );
    home.run(&format!("{line} --min-acc piqa=0.4")).done();
    let run = home.run(&format!("{line} --min-acc piqa=0.9,0.0 --json"));
    let outcome = run.json();
    assert_eq!(outcome["tasks"][0]["acc"], json!(0.4));
    assert!(outcome.get("error").is_none());
    run.fails(1, &["acc 0.4000 of piqa is below --min-acc 0.9"]);
}

#[test]
fn a_task_without_rows_says_where_rows_come_from() {
    let home = Home::new();
    let fails = |flags: &str, code: i32, parts: &[&str]| {
        home.run(&format!("eval-tasks --model tiny-llama {flags}")).fails(code, parts);
    };
    fails("--tasks nonsense", 2, &["there is no task `nonsense`"]);
    fails("--tasks piqa,piqa", 2, &["--tasks names piqa twice"]);
    fails("--tasks piqa --min-acc boolq=0.5", 2, &["--min-acc limits boolq"]);
    fails("--tasks piqa --tasks-dir .", 3, &["has no piqa.jsonl", "--tasks piqa=FILE"]);
    fails("--tasks piqa=absent.jsonl", 3, &["absent.jsonl"]);
    fails("--tasks piqa --log-samples absent/rows.jsonl", 3, &["directory absent does not exist"]);
    fs::write(home.path("empty.jsonl"), "").unwrap();
    fails("--tasks piqa=empty.jsonl", 3, &["empty.jsonl holds no row"]);
    fs::write(home.path("bad.jsonl"), "{\"goal\": \"a\", \"sol1\": \"b\"}\n").unwrap();
    fails(
        "--tasks piqa=bad.jsonl",
        3,
        &["row 1 of bad.jsonl", "there is no `sol2`", "docs/tasks.md"],
    );
    fs::write(home.path("broken.jsonl"), "{\"goal\": \n").unwrap();
    fails("--tasks piqa=broken.jsonl", 3, &["broken.jsonl"]);
    let cache = home.path("cache");
    let mut command = home.command("eval-tasks --model tiny-llama --tasks piqa --offline");
    let output = command.env("HF_HUB_CACHE", cache).output().unwrap();
    common::Run::new("offline", output).fails(4, &["--tasks-dir", "piqa.jsonl"]);
}
