//! Runs that several processes share: the bytes, and the end, of a run of one.

mod common;

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::{Dtype, Home, RandomModel, Run, assert_same_files, send};
use fs_err as fs;
use rustix::process::Signal;

const QUANTIZE: &str = "quantize --model model --group 32 --outliers 16 --samples 9 --seq-len 64 --windows 2 --threads 1";
const BLOCKS: usize = 6;
/// What is promised for the end of all ranks after that of one.
const PROMISED: Duration = Duration::from_secs(10);

fn home() -> Home {
    let home = Home::new();
    RandomModel::new(BLOCKS).write(&home.path("model"), Dtype::F16, 2);
    home
}

/// The processes that a process has started.
fn children(parent: &Child) -> Vec<u32> {
    let of = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).ok();
    let tasks = fs::read_dir(format!("/proc/{}/task", parent.id())).unwrap();
    let all: String = tasks.filter_map(|task| of(task.unwrap())).collect();
    all.split_whitespace().map(|id| id.parse().unwrap()).collect()
}

fn is_alive(id: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // A zombie has ended.
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

fn send_to(id: u32, signal: Signal) {
    let id = rustix::process::Pid::from_raw(id as i32).unwrap();
    rustix::process::kill_process(id, signal).unwrap();
}

/// A run of several ranks that has finished a block.
fn started(home: &Home, line: &str) -> (Child, Vec<u32>) {
    let child = home.command(line).spawn().unwrap();
    let done = home.path(".out.atom-work/done.jsonl");
    let start = Instant::now();
    while !fs::read_to_string(&done).is_ok_and(|log| log.contains("model.layers.")) {
        assert!(start.elapsed() < Duration::from_secs(120), "no block was finished");
        std::thread::sleep(Duration::from_millis(1));
    }
    let ranks = children(&child);
    (child, ranks)
}

/// What a run ended with, and after how long; all of its processes have ended.
fn ended(line: &str, child: Child, ranks: &[u32]) -> (Run, Duration) {
    let start = Instant::now();
    let run = Run::new(line, child.wait_with_output().unwrap());
    while ranks.iter().any(|rank| is_alive(*rank)) {
        assert!(start.elapsed() < 2 * PROMISED, "a rank goes on after {}", run.stderr);
        std::thread::sleep(Duration::from_millis(1));
    }
    (run, start.elapsed())
}

#[test]
fn processes_write_the_bytes_of_one_and_measure_the_same() {
    let home = home();
    let alone = home.run(&format!("{QUANTIZE} --out alone --json")).done().json();
    let ranks = home.run(&format!("{QUANTIZE} --out out --ranks 3 --json")).done();
    assert_eq!(ranks.stderr.matches("quantizing").count(), 1, "{}", ranks.stderr);
    let ranks = ranks.json();
    for field in ["linears", "perplexity"] {
        assert_eq!(alone[field], ranks[field]);
    }
    for file in ["model-00001-of-00002.safetensors", "atom.json"] {
        let read = |dir: &str| fs::read(home.path(dir).join(file));
        match (read("alone"), read("out")) {
            (Ok(alone), Ok(out)) => assert!(alone == out, "{file}"),
            (Err(_), Err(_)) => assert_ne!(file, "atom.json"),
            _ => panic!("only one has {file}"),
        }
    }
    let measure = "eval-ppl --model alone --seq-len 64 --windows 12 --threads 1 --json";
    let (alone, ranks) =
        (home.run(measure).done().json(), home.run(&format!("{measure} --ranks 2")).done().json());
    for field in ["perplexity", "standard_error", "windows", "tokens"] {
        assert_eq!(alone[field], ranks[field]);
    }
}

#[test]
fn a_rank_that_is_killed_ends_all_and_loses_no_block() {
    let home = home();
    home.run(&format!("{QUANTIZE} --no-eval --out expected")).done();
    let line = &format!("{QUANTIZE} --no-eval --out out --ranks 3");
    let (child, ranks) = started(&home, line);
    assert_eq!(ranks.len(), 2);
    send_to(ranks[1], Signal::KILL);
    let (run, took) = ended(line, child, &ranks);
    assert!(took < PROMISED, "{took:?}");
    assert_eq!(run.code, Some(4), "{}", run.stderr);
    assert!(run.stderr.contains("rank 2: it has ended without a word"), "{}", run.stderr);
    assert!(run.stderr.contains("finished blocks are kept"), "{}", run.stderr);
    assert!(!home.path("out").exists());
    // Any number of ranks goes on.
    let run = home.run(&format!("{QUANTIZE} --no-eval --out out --ranks 2 --resume --json")).done();
    assert!(run.json()["resumed_blocks"].as_u64().unwrap() > 0);
    assert_same_files(&home.path("expected"), &home.path("out"));
}

#[test]
fn the_end_of_the_launcher_ends_all() {
    let home = home();
    let line = &format!("{QUANTIZE} --no-eval --out out --ranks 3");
    let (child, ranks) = started(&home, line);
    send(Signal::INT, &child);
    let (run, took) = ended(line, child, &ranks);
    assert!(took < PROMISED, "{took:?}");
    assert_eq!(run.code, Some(130), "{}", run.stderr);
    assert!(run.stderr.contains("--resume"), "{}", run.stderr);
    // Where it has no time to say so, too.
    let (mut child, ranks) = started(&home, line);
    child.kill().unwrap();
    let (_, took) = ended(line, child, &ranks);
    assert!(took < PROMISED, "{took:?}");
}

#[test]
fn the_error_of_a_rank_is_that_of_the_run() {
    let home = home();
    let shard = fs::read_dir(home.path("model"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "safetensors"))
        .max()
        .unwrap();
    let mut bytes = fs::read(&shard).unwrap();
    let end = bytes.len();
    bytes[end - 4096..].fill(0xff);
    fs::write(&shard, bytes).unwrap();
    let alone = home.run(&format!("{QUANTIZE} --out out"));
    let ranks = home.run(&format!("{QUANTIZE} --out out --ranks 2"));
    assert_eq!((alone.code, ranks.code), (Some(3), Some(3)), "{}", ranks.stderr);
    assert!(!home.path("out").exists());
}

/// Processes that a launcher such as torchrun has started, each with its variables.
fn launched(
    home: &Home,
    variables: &dyn Fn(usize) -> Vec<(&'static str, String)>,
    lines: [&str; 2],
) -> [Run; 2] {
    let start = |rank: usize| {
        let mut command: Command = home.command(lines[rank]);
        command.envs(variables(rank)).spawn().unwrap()
    };
    let [first, second] = [0, 1].map(start);
    let wait = |rank: usize, child: Child| Run::new(lines[rank], child.wait_with_output().unwrap());
    [wait(0, first), wait(1, second)]
}

fn torchrun(port: u16) -> impl Fn(usize) -> Vec<(&'static str, String)> {
    move |rank| {
        vec![
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("WORLD_SIZE", "2".to_owned()),
            ("LOCAL_WORLD_SIZE", "2".to_owned()),
            ("MASTER_ADDR", "127.0.0.1".to_owned()),
            ("MASTER_PORT", port.to_string()),
        ]
    }
}

/// A port of which the next is free too.
fn free_port() -> u16 {
    (20000..)
        .step_by(2)
        .find(|port| {
            let bind = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port));
            bind(*port).and_then(|_| bind(port + 1)).is_ok()
        })
        .unwrap()
}

#[test]
fn torchrun_starts_ranks_and_other_jobs_are_refused() {
    let home = home();
    home.run(&format!("{QUANTIZE} --no-eval --out expected")).done();
    let line = &format!("{QUANTIZE} --no-eval --out out --json");
    let [first, second] = launched(&home, &torchrun(free_port()), [line, line]);
    assert_eq!(first.done().json()["resumed_blocks"], 0);
    assert_eq!((second.code, second.stdout.as_str()), (Some(0), ""), "{}", second.stderr);
    assert_same_files(&home.path("expected"), &home.path("out"));
    let other = &format!("{QUANTIZE} --no-eval --out other --json");
    let different = &format!("{other} --bits 3");
    let runs = launched(&home, &torchrun(free_port()), [other, different]);
    assert_eq!(runs.each_ref().map(|run| run.code), [Some(3); 2], "{}", runs[0].stderr);
    assert!(
        runs[0].stderr.contains("recipe.bits is 4 on rank 0 and 3 on rank 1"),
        "{}",
        runs[0].stderr
    );
    assert!(!Path::new(&home.path("other")).exists());
}

#[test]
fn flags_of_ranks_that_make_no_sense_are_refused() {
    let home = Home::new();
    let refused = |line: &str, code: i32, sentence: &str| {
        let run = home.run(line);
        assert_eq!(run.code, Some(code), "{}", run.stderr);
        assert!(run.stderr.contains(sentence), "{}", run.stderr);
    };
    let line = "eval-ppl --model tiny-llama";
    refused(&format!("{line} --gpus 2"), 2, "--gpus names GPUs, and --device cpu uses none");
    refused(&format!("{line} --gpus 0"), 2, "from 1 on, or all");
    refused(&format!("{line} --ranks a:1"), 2, "but not which rank this is");
    refused(&format!("{line} --ranks a"), 2, "HOST:PORT");
    refused(&format!("{line} --ranks 2 --gpus 2"), 2, "cannot be used with");
}
