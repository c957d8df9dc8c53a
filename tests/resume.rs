/*! Runs that do not reach their end, and what becomes of them. */

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use common::{Dtype, Home, RandomModel, Run, assert_same_files, contents, send};
use fs_err as fs;
use rustix::process::Signal;

/// Work enough that a run can be caught between two blocks.
const QUANTIZE: &str = "quantize --model model --group 32 --outliers 16 --samples 32 --seq-len 128 --no-eval --threads 1";
const BLOCKS: usize = 8;
const WORK: &str = ".out.atom-work";

/// A model of many blocks, and what an undisturbed run makes of it, `expected`.
fn home() -> Home {
    home_of("")
}

/// The same with more flags.
fn home_of(flags: &str) -> Home {
    let home = Home::new();
    RandomModel::new(BLOCKS).write(&home.path("model"), Dtype::F16, 2);
    home.run(&format!("{QUANTIZE} {flags} --out expected")).done();
    home
}

/// Blocks that are complete in the work directory.
fn blocks_done(home: &Home) -> usize {
    let log = std::fs::read_to_string(home.path(WORK).join("done.jsonl")).unwrap_or_default();
    log.split_inclusive('\n')
        .filter(|line| line.contains(r#""block":"model.layers."#) && line.ends_with('\n'))
        .count()
}

/// Starts the run and waits until `ready`.
fn start(home: &Home, line: &str, mut ready: impl FnMut() -> bool) -> Child {
    let mut child = home.command(line).spawn().unwrap();
    while !ready() {
        if let Some(status) = child.try_wait().unwrap() {
            let mut stderr = String::new();
            child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
            panic!("{line} ended with {status} before it could be disturbed: {stderr}");
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    child
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn interrupt(line: &str, child: Child) -> Run {
    send(Signal::INT, &child);
    Run::new(line, child.wait_with_output().unwrap())
}

#[test]
fn a_killed_run_goes_on_and_gives_the_same_bytes() {
    let home = home();
    let line = format!("{QUANTIZE} --out out");
    for blocks in [0, 1, 3, 6] {
        kill(start(&home, &line, || {
            home.path(WORK).join("job.json").exists() && blocks_done(&home) >= blocks
        }));
        assert!(!home.path("out").exists(), "killed after {blocks} blocks");
        let found = blocks_done(&home);
        assert!(found >= blocks);
        let run = home.run(&format!("{line} --resume --json")).done();
        assert_eq!(run.json()["resumed_blocks"], found);
        assert_same_files(&home.path("expected"), &home.path("out"));
        assert_eq!(home.names(), ["expected", "model", "out"]);
        fs::remove_dir_all(home.path("out")).unwrap();
    }
}

#[test]
fn a_run_killed_twice_goes_on_twice_and_says_what_it_found() {
    // What the second run reads back are packed FP4 codes and FP8 outliers.
    let flags = "--format fp4 --outlier-format fp8";
    let home = home_of(flags);
    let line = format!("{QUANTIZE} {flags} --out out --resume");
    kill(start(&home, &line, || blocks_done(&home) >= 2));
    let first = blocks_done(&home);
    kill(start(&home, &line, || blocks_done(&home) > first));
    let second = blocks_done(&home);
    assert!(first < second && second < BLOCKS);
    let run = home.run(&line).done();
    assert!(run.stdout.contains(&format!("{second} blocks found done")), "{}", run.stdout);
    assert_same_files(&home.path("expected"), &home.path("out"));
}

#[test]
fn a_torn_record_costs_its_block_and_nothing_else() {
    let home = home();
    let line = format!("{QUANTIZE} --out out");
    kill(start(&home, &line, || blocks_done(&home) >= 3));
    let log = home.path(WORK).join("done.jsonl");
    let text = fs::read_to_string(&log).unwrap();
    let found = blocks_done(&home);
    fs::write(&log, &text[..text.trim_end().len() - 20]).unwrap();
    let run = home.run(&format!("{line} --resume --json")).done();
    assert_eq!(run.json()["resumed_blocks"], found - 1);
    assert_same_files(&home.path("expected"), &home.path("out"));
}

#[test]
fn work_that_was_changed_is_not_gone_on_with() {
    let home = home();
    let line = format!("{QUANTIZE} --out out");
    kill(start(&home, &line, || blocks_done(&home) >= 2));
    let shard = home.path(WORK).join("checkpoint/model.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let codes = &header["model.layers.1.mlp.up_proj.weight_codes"]["data_offsets"][0];
    let start_of_data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[start_of_data + codes.as_u64().unwrap() as usize + 5] ^= 1;
    fs::write(&shard, bytes).unwrap();
    home.run(&format!("{line} --resume")).fails(
        3,
        &["model.layers.1.mlp.up_proj.weight_codes", "is not what was written", "--overwrite"],
    );
    // Without the flag too: nothing is thrown away unasked.
    home.run(&line).fails(3, &["is not what was written"]);
    assert!(!home.path("out").exists());
    // As the hint says.
    home.run(&format!("{line} --overwrite")).done();
    assert_same_files(&home.path("expected"), &home.path("out"));
}

#[test]
fn ctrl_c_stops_between_blocks_and_names_the_command_that_goes_on() {
    let home = home();
    let line = format!("{QUANTIZE} --out out");
    let child = start(&home, &line, || blocks_done(&home) >= 2);
    let run =
        interrupt(&line, child).fails(130, &["interrupted", "hint: go on with `", " --resume`"]);
    assert!(run.stderr.contains(&format!("{line} --resume`")), "{}", run.stderr);
    assert!(run.stdout.is_empty());
    assert!(!home.path("out").exists());
    let found = blocks_done(&home);
    let outcome = home.run(&format!("{line} --resume --json")).done().json();
    assert_eq!(outcome["resumed_blocks"], found);
    assert_same_files(&home.path("expected"), &home.path("out"));
}

/// The hint is right there too: a run with nothing to resume is a full run.
#[test]
fn ctrl_c_before_the_first_block_leaves_nothing() {
    let home = home();
    let line = format!("{QUANTIZE} --out out");
    let child = start(&home, &line, || home.path(WORK).join("job.json").exists());
    interrupt(&line, child).fails(130, &["interrupted", " --resume`"]);
    // The first block may have been faster than the signal.
    assert_eq!(home.path(WORK).exists(), blocks_done(&home) > 0);
    assert!(!home.path("out").exists());
    home.run(&format!("{line} --resume")).done();
    assert_same_files(&home.path("expected"), &home.path("out"));
}

#[test]
fn with_json_an_interruption_is_an_object() {
    let home = home();
    let line = format!("{QUANTIZE} --out out --json");
    let child = start(&home, &line, || blocks_done(&home) >= 1);
    let error = interrupt(&line, child).fails(130, &["interrupted"]).json();
    assert_eq!(error["error"]["kind"], "interrupted");
    assert_eq!(error["error"]["exit_code"], 130);
    assert!(error["error"]["hint"].as_str().unwrap().contains("--resume"));
}

#[test]
fn another_recipe_text_or_model_is_refused_with_what_differs() {
    let home = home();
    let line = format!("{QUANTIZE} --out out");
    kill(start(&home, &line, || blocks_done(&home) >= 1));
    let found = blocks_done(&home);
    RandomModel::new(BLOCKS + 1).write(&home.path("longer"), Dtype::F16, 1);
    for (change, parts) in [
        ("--clip-act 0.8", &["clip_act was 0.9", "now 0.8"][..]),
        ("--seed 3", &["seed was 0, now 3"]),
        ("--samples 31", &["samples was 32, now 31"]),
        ("--no-gptq", &["gptq was true, now false"]),
        ("--model longer", &["source was", "now"]),
    ] {
        let run = home.run(&format!("{line} {change} --resume"));
        run.fails(3, &[&["the unfinished run in", WORK, "differs", "--overwrite"], parts].concat());
        assert_eq!(blocks_done(&home), found, "{change}: refused, and nothing lost");
    }
    home.run(&format!("{line} --resume")).done();
    assert_same_files(&home.path("expected"), &home.path("out"));
}

/// A job of a pipeline that was killed can simply run again.
#[test]
fn the_same_command_continues_and_says_so() {
    let home = home();
    let line = format!("{QUANTIZE} --out out");
    kill(start(&home, &line, || blocks_done(&home) >= 2));
    let found = blocks_done(&home);
    let planned = home.json(&format!("{line} --dry-run"));
    assert_eq!(planned["finished_blocks"], found);
    assert_eq!(planned["needed_disk_bytes"], 0);
    let run = home.run(&format!("{line} --json")).done();
    assert!(
        run.stderr.contains(&format!("{found} of {BLOCKS} blocks are finished")),
        "{}",
        run.stderr
    );
    assert_eq!(run.json()["resumed_blocks"], found);
    assert_same_files(&home.path("expected"), &home.path("out"));
    assert_eq!(home.names(), ["expected", "model", "out"]);
}

/// With `--overwrite` on the line too, which stands there for the checkpoint that is to be replaced.
#[test]
fn another_command_throws_nothing_away_unless_it_is_told_to() {
    let home = home();
    let line = format!("{QUANTIZE} --out out");
    home.run(&format!("{line} --no-gptq")).done();
    let old = contents(&home.path("out"));
    let line = format!("{line} --overwrite");
    kill(start(&home, &line, || blocks_done(&home) >= 2));
    let found = blocks_done(&home);
    home.run(&format!("{QUANTIZE} --out out --seed 3 --overwrite --resume"))
        .fails(3, &["seed was 0, now 3"]);
    for other in ["--seed 3", "--seed 3 --dry-run"] {
        // The old checkpoint stands in the way first.
        home.run(&format!("{QUANTIZE} --out out {other}")).fails(2, &["out exists", "--overwrite"]);
    }
    fs::rename(home.path("out"), home.path("aside")).unwrap();
    for other in ["--seed 3", "--seed 3 --dry-run"] {
        let run = home.run(&format!("{QUANTIZE} --out out {other}"));
        run.fails(
            3,
            &["the unfinished run in", "seed was 0, now 3", "it has finished", "--overwrite"],
        );
    }
    fs::rename(home.path("aside"), home.path("out")).unwrap();
    assert_eq!(blocks_done(&home), found);
    assert!(contents(&home.path("out")) == old);
    assert_eq!(home.json(&line)["resumed_blocks"], found);
    assert_same_files(&home.path("expected"), &home.path("out"));
    // Asked to, it does.
    kill(start(&home, &format!("{line} --seed 3"), || blocks_done(&home) >= 1));
    assert_eq!(home.json(&line)["resumed_blocks"], 0);
    assert_same_files(&home.path("expected"), &home.path("out"));
}

/// Every tensor that is there is compared, those next to the blocks too.
#[test]
fn a_finished_tensor_of_any_kind_that_was_changed_is_found() {
    let home = home();
    let line = format!("{QUANTIZE} --out out");
    kill(start(&home, &line, || blocks_done(&home) >= 2));
    let shard = home.path(WORK).join("checkpoint/model.safetensors");
    let sound = fs::read(&shard).unwrap();
    let length = u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&sound[8..8 + length]).unwrap();
    let log = fs::read_to_string(home.path(WORK).join("done.jsonl")).unwrap();
    for name in [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.key_mean",
        "model.layers.1.mlp.mlp_act.order",
        "model.layers.1.mlp.down_proj.weight_scales",
    ] {
        assert!(log.contains(&format!("\"{name}\"")), "{name} is not finished yet");
        let range = |end: usize| header[name]["data_offsets"][end].as_u64().unwrap() as usize;
        let mut zeroed = sound.clone();
        zeroed[8 + length + range(0)..8 + length + range(1)].fill(0);
        fs::write(&shard, zeroed).unwrap();
        let parts = [name, "is not what was written", "--overwrite"];
        home.run(&line).fails(3, &parts);
        home.run(&format!("{line} --resume")).fails(3, &parts);
    }
    fs::write(&shard, sound).unwrap();
    home.run(&line).done();
    assert_same_files(&home.path("expected"), &home.path("out"));
}

#[test]
fn resume_with_nothing_to_resume_is_a_whole_run() {
    let home = home();
    let outcome = home.json(&format!("{QUANTIZE} --out out --resume"));
    assert_eq!(outcome["resumed_blocks"], 0);
    assert_same_files(&home.path("expected"), &home.path("out"));
}

#[test]
fn two_runs_do_not_write_one_output() {
    let home = home();
    let line = format!("{QUANTIZE} --out out");
    let child = start(&home, &line, || home.path(WORK).join("job.json").exists());
    home.run(&line).fails(2, &["another atom run is writing", "--out"]);
    home.run(&format!("{line} --resume")).fails(2, &["another atom run is writing"]);
    Run::new(&line, child.wait_with_output().unwrap()).done();
    assert_same_files(&home.path("expected"), &home.path("out"));
}

#[test]
fn what_is_there_is_replaced_only_when_asked() {
    let home = Home::with_model();
    let line = format!("quantize --model model {} --no-eval --out out", common::SMALL);
    home.run(&line).done();
    let before = contents(&home.path("out"));
    let other = format!("{line} --clip-act 0.8");
    for refused in [&other, &format!("{other} --resume"), &format!("{other} --dry-run")] {
        home.run(refused).fails(2, &["out exists", "--overwrite"]);
        assert!(contents(&home.path("out")) == before, "{refused}");
        assert_eq!(home.names(), ["model", "out"]);
    }
    home.run(&format!("{other} --overwrite")).done();
    assert!(contents(&home.path("out")) != before);
    assert_eq!(home.names(), ["model", "out"]);

    // Only a checkpoint of ours is ever replaced, an empty directory taken.
    home.run(&format!("{line} --out model --overwrite")).fails(2, &["is model, which is read"]);
    assert_eq!(
        common::names(&home.path("model")),
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    fs::create_dir(home.path("empty")).unwrap();
    home.run(&format!("{line} --out empty")).done();
    assert!(contents(&home.path("empty")) == before);
}

/// Killed anywhere around the exchange, the output is the complete old checkpoint or the complete new one.
#[test]
fn a_killed_replacement_leaves_the_old_checkpoint_or_the_new_one() {
    let home = home();
    let line = format!("{QUANTIZE} --out out --overwrite");
    home.run(&format!("{line} --no-gptq")).done();
    let old = contents(&home.path("out"));
    let new = contents(&home.path("expected"));
    let done_log = home.path(WORK).join("done.jsonl");
    kill(start(&home, &line, || blocks_done(&home) >= BLOCKS || is_gone(&home, &done_log)));
    let now = contents(&home.path("out"));
    assert!(now == old || now == new);
    home.run(&format!("{line} --resume")).done();
    assert!(contents(&home.path("out")) == new);
    assert_eq!(home.names(), ["expected", "model", "out"]);
}

/// Whether the run has put its output in place and is sweeping up.
fn is_gone(home: &Home, done_log: &Path) -> bool {
    home.path(WORK).exists() && !done_log.exists() && home.path(WORK).join("replaced").exists()
}

/// The checkpoint is there by then: to go on would be wrong advice.
#[test]
fn ctrl_c_while_perplexity_is_measured_leaves_the_checkpoint() {
    let home = home();
    let text = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/calibration-data/sample.txt"));
    fs::write(home.path("long.txt"), text.unwrap().repeat(20)).unwrap();
    let quantize = QUANTIZE.replace("--no-eval", "--dataset long.txt --windows 1000000");
    let line = format!("{quantize} --out out");
    let mut child = home.command(&line).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("evaluate") {
        assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "no evaluation: {said}");
    }
    send(Signal::INT, &child);
    stderr.read_to_string(&mut said).unwrap();
    let mut output = child.wait_with_output().unwrap();
    output.stderr = said.into_bytes();
    let run =
        Run::new(&line, output).fails(130, &["interrupted", "out", "is complete", "atom eval-ppl"]);
    assert!(!run.stderr.contains("go on with"), "{}", run.stderr);
    assert_same_files(&home.path("expected"), &home.path("out"));
}
