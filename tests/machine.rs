/*! What the machine lacks, and how it is said: before the work where it can be known, and in a sentence with an exit
code, never an abort, where it cannot. */

mod common;

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Dtype, Home, RandomModel, Run, SMALL, contents, send};
use fs_err as fs;
use rustix::process::Signal;

/// Sets a limit of the child, in bytes, before it runs.
fn limited(command: &mut Command, resource: libc::__rlimit_resource_t, bytes: u64) -> &mut Command {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: setrlimit is a plain system call, which the child may make before it runs.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(resource, &limit) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    }
}

fn run(line: &str, command: &mut Command) -> Run {
    Run::new(line, command.output().unwrap())
}

/// Everything under a directory that is not a directory, with its bytes.
fn files(home: &Home, name: &str) -> Vec<(String, Vec<u8>)> {
    contents(&home.path(name))
}

#[test]
fn a_run_that_memory_does_not_suffice_for_is_refused_before_it_begins() {
    let home = Home::with_model();
    home.run("calibrate --model model --samples 4 --seq-len 64 --out c").done();
    home.run("plan c --group 32 --outliers 16 --out p").done();
    let before = files(&home, "model");
    let names = home.names();
    for line in [
        format!("quantize --model model {SMALL} --out out"),
        format!("quantize --model model {SMALL} --out out --dry-run"),
        format!("quantize --model model {SMALL} --out out --target-bits 5"),
        "calibrate --model model --samples 4 --seq-len 64 --out other".to_owned(),
        "pack --model model --plan p --no-eval --out out".to_owned(),
        "eval-ppl --model model --seq-len 64 --windows 2".to_owned(),
    ] {
        let line = format!("{line} --threads 1");
        // What the program and its libraries map differs from machine to machine: below the estimate's limits there
        // are others at which a mapping or an allocation before it is refused, in a sentence too.
        let refused = (5..60).find_map(|step| {
            let limit = step * 10_000_000;
            let run = run(&line, limited(&mut home.command(&line), libc::RLIMIT_AS, limit));
            assert!(matches!(run.code, Some(3 | 4)), "{limit}: {:?}: {}", run.code, run.stderr);
            assert!(run.stderr.contains("error: ") && run.stderr.contains("hint: "), "{line}");
            run.stderr.contains("error: this run needs about").then_some(run)
        });
        let refused = refused.expect("some limit admits the estimate and not the run");
        let refused =
            refused.fails(4, &["of memory", "available", "`ulimit -v`", "hint: ", "--samples"]);
        assert!(refused.stdout.is_empty(), "{}", refused.stdout);
        assert_eq!(home.names(), names, "{line}");
        assert!(files(&home, "model") == before);
    }
}

#[test]
fn memory_that_barely_suffices_is_a_warning() {
    let home = Home::with_model();
    let line = format!("quantize --model model {SMALL} --no-eval --out out --threads 1");
    let needed = home.json(&format!("{line} --dry-run"))["memory_bytes"].as_u64().unwrap();
    // What is mapped at the start comes on top of it.
    let warned = (0..40).find_map(|step| {
        let limit = needed + step * 10_000_000;
        let line = format!("{line} --dry-run");
        let run = run(&line, limited(&mut home.command(&line), libc::RLIMIT_AS, limit));
        (run.code == Some(0)).then_some(run)
    });
    let warned = warned.expect("400 MB more than is needed do");
    assert!(warned.stderr.contains("warning: this run may need about"), "{}", warned.stderr);
}

#[test]
fn doctor_shows_what_runs_are_compared_with() {
    let home = Home::new();
    let line = "doctor --device cpu --json --threads 1";
    let run = run(line, limited(&mut home.command(line), libc::RLIMIT_AS, 1_500_000_000));
    let checks = run.json()["checks"].clone();
    let memory = checks.as_array().unwrap().iter().find(|check| check["name"] == "memory").unwrap();
    let detail = memory["detail"].as_str().unwrap();
    assert!(detail.contains("of 1.5 GB available, by `ulimit -v`"), "{detail}");
}

#[test]
fn an_allocation_that_is_refused_is_a_sentence() {
    // A text that is read entirely, beyond the process's memory limit.
    let home = Home::with_model();
    let text = home.path("long.txt");
    fs::File::create(&text).unwrap().set_len(3_000_000_000).unwrap();
    let before = home.names();
    for json in ["", " --json"] {
        let line =
            format!("quantize --model model --calib long.txt {SMALL} --out out --threads 1{json}");
        let run = run(&line, limited(&mut home.command(&line), libc::RLIMIT_AS, 600_000_000));
        assert!(matches!(run.code, Some(3 | 4)), "{:?}: {}", run.code, run.stderr);
        assert!(run.stderr.contains("error: ") && run.stderr.contains("hint: "), "{}", run.stderr);
        if !json.is_empty() {
            assert_eq!(run.json()["error"]["exit_code"], run.code.unwrap());
        }
        assert_eq!(home.names(), before);
    }
}

#[test]
fn a_limit_on_file_sizes_is_a_sentence_and_nothing_is_left() {
    let home = Home::with_model();
    let before = home.names();
    for line in [
        format!("quantize --model model {SMALL} --out out"),
        "calibrate --model model --samples 4 --seq-len 64 --out c".to_owned(),
    ] {
        let run = run(&line, limited(&mut home.command(&line), libc::RLIMIT_FSIZE, 1000));
        run.fails(4, &["File too large", "hint: raise the limit on file sizes (`ulimit -f`)"]);
        assert_eq!(home.names(), before, "{line}");
    }
}

#[test]
fn threads_that_cannot_be_started_are_a_sentence() {
    let home = Home::new();
    // The address space of their stacks is what a test can take away from any user.
    let line = "inspect tiny-llama --threads 200";
    let run = run(line, limited(&mut home.command(line), libc::RLIMIT_AS, 200_000_000));
    run.fails(4, &["cannot start the worker threads", "`ulimit -v` leaves", "hint: "]);
}

#[test]
fn a_source_that_shrinks_while_it_is_mapped_is_named() {
    for json in [false, true] {
        let home = Home::new();
        RandomModel::new(30).write(&home.path("model"), Dtype::F32, 1);
        let shard = home.path("model/model.safetensors");
        let line = "quantize --model model --group 32 --outliers 16 --samples 16 --seq-len 128 --no-eval \
                    --threads 1 --out out --overwrite";
        let line = if json { format!("{line} --json") } else { line.to_owned() };
        let mut child = home.command(&line).spawn().unwrap();
        // Once the first block is done, the rest is still to be read.
        let work = |home: &Home| home.names().iter().any(|name| name.contains("out"));
        wait_until(|| work(&home));
        let file = fs::File::options().write(true).open(&shard).unwrap();
        file.set_len(100_000).unwrap();
        let run = finished(&line, child.wait_with_output_in(Duration::from_secs(120)));
        assert_eq!(run.code, Some(3), "{}", run.stderr);
        let error = run.stderr.split("error: ").nth(1).unwrap_or_default();
        for part in ["model/model.safetensors became shorter while it was read", "hint: "] {
            assert!(error.contains(part), "{}", run.stderr);
        }
        if json {
            assert_eq!(run.json()["error"]["exit_code"], 3);
        }
    }
}

/// The same length with other content: the result would mix two versions, and nothing of it remains.
#[test]
fn a_source_that_is_written_to_during_a_run_leaves_nothing() {
    let home = Home::new();
    RandomModel::new(30).write(&home.path("model"), Dtype::F32, 2);
    let before = home.names();
    let line = "quantize --model model --group 32 --outliers 16 --samples 16 --seq-len 128 --no-eval \
                --threads 1 --out out";
    let mut child = home.command(line).spawn().unwrap();
    wait_until(|| home.names() != before);
    let shard = home.path("model/model-00002-of-00002.safetensors");
    let file = fs::File::options().write(true).open(&shard).unwrap();
    file.file().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let run = finished(line, child.wait_with_output_in(Duration::from_secs(120)));
    assert_eq!(run.code, Some(3), "{}", run.stderr);
    for part in ["model/model-00002-of-00002.safetensors changed during the run", "hint: "] {
        assert!(run.stderr.contains(part), "{}", run.stderr);
    }
    assert_eq!(home.names(), before, "no checkpoint, and no finished block of one");
}

/// Waits for a condition, at most a minute.
#[track_caller]
fn wait_until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "it does not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for a child, and kills it where it does not end.
trait Patient {
    fn wait_with_output_in(&mut self, most: Duration) -> std::process::Output;
}

impl Patient for std::process::Child {
    fn wait_with_output_in(&mut self, most: Duration) -> std::process::Output {
        use std::io::Read;
        let start = Instant::now();
        let status = loop {
            match self.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > most => {
                    let _ = self.kill();
                    break self.wait().unwrap();
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        self.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        self.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
        std::process::Output { status, stdout, stderr }
    }
}

fn finished(line: &str, output: std::process::Output) -> Run {
    Run::new(line, output)
}

#[test]
fn signals_that_were_ignored_at_the_start_stay_ignored() {
    for (signal, ignored) in [
        (Signal::HUP, true),
        (Signal::INT, true),
        (Signal::TERM, true),
        (Signal::HUP, false),
        (Signal::INT, false),
    ] {
        let home = Home::with_model();
        let line =
            format!("quantize --model model {SMALL} --samples 64 --no-eval --out out --threads 1");
        let mut command = home.command(&line);
        // SAFETY: signal is a plain system call, which the child may make before it runs.
        unsafe {
            command.pre_exec(move || {
                libc::signal(signal.as_raw(), if ignored { libc::SIG_IGN } else { libc::SIG_DFL });
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap();
        // The first lines of the log come after the handlers are set.
        wait_until(|| home.names().iter().any(|name| name.contains("out")));
        send(signal, &child);
        let run = finished(&line, child.wait_with_output_in(Duration::from_secs(120)));
        let expected = if ignored { 0 } else { 130 };
        assert_eq!(run.code, Some(expected), "{signal:?} {ignored}: {}", run.stderr);
        assert_eq!(home.path("out").is_dir(), ignored);
    }
}

#[test]
fn absurd_numbers_are_refused_in_a_moment() {
    let home = Home::with_model();
    let huge = [
        "1000000000000000000",
        "9223372036854775808",
        "18446744073709551615",
        "99999999999999999999999",
    ];
    let flags = [
        "inspect model --threads",
        "quantize --model model --out out --samples",
        "quantize --model model --out out --seq-len",
        "quantize --model model --out out --windows",
        "eval-ppl --model model --windows",
        "eval-ppl --model model --seq-len",
        "bench quantize --blocks",
        "bench quantize --samples",
        "bench quantize --seq-len",
        "bench prefill --device cpu --blocks",
        "bench prefill --device cpu --tokens",
        "bench prefill --device cpu --repeats",
        "bench prefill --device cpu --outliers",
        "bench prefill --device cpu --group",
        "bench gemm --tokens",
        "bench gemm --group",
        "bench gemm --outliers",
        "bench attention --context",
        "bench attention --batch",
    ];
    let before = home.names();
    for flag in flags {
        for number in huge {
            let start = Instant::now();
            let refused = home.run(&format!("{flag} {number}")).fails(2, &[]);
            assert!(refused.stderr.contains("at most"), "{flag} {number}: {}", refused.stderr);
            assert!(start.elapsed() < Duration::from_secs(10), "{flag} {number}");
        }
    }
    for threads in ["2000", "10000", "4000000000"] {
        home.run(&format!("inspect model --threads {threads}")).fails(2, &["at most", "threads"]);
    }
    assert_eq!(home.names(), before);
}

#[test]
fn many_threads_start_in_a_moment() {
    let start = Instant::now();
    Home::new().run("inspect tiny-llama --threads 256").done();
    assert!(start.elapsed() < Duration::from_secs(20));
}

/// The estimate over the peak of a run.
fn estimate_to_peak(home: &Home, line: &str) -> f64 {
    let line = format!("quantize --model model --device cpu --out out --overwrite {line}");
    let estimate = home.json(&format!("{line} --dry-run"))["memory_bytes"].as_f64().unwrap();
    estimate / home.json(&line)["peak_rss_bytes"].as_f64().unwrap()
}

/// Of a network whose MLP is wide, where GPTQ's squares are most of it, and of one with many tokens, whose
/// last batch is small and whose groups are filled up.
#[test]
fn the_estimate_holds_within_a_tenth() {
    let wide = (1, 128, 5504, "--samples 4 --seq-len 256 --no-eval");
    let long = (2, 256, 1376, "--samples 32 --seq-len 256 --windows 4");
    for (blocks, hidden, mlp, windows) in [wide, long] {
        let home = Home::new();
        let mut model = RandomModel::with_widths(blocks, hidden, mlp);
        model.config["max_position_embeddings"] = 2048.into();
        model.write(&home.path("model"), Dtype::F16, 1);
        for recipe in ["--recipe paper", "", "--no-gptq"] {
            for threads in [1, 2] {
                let line =
                    format!("{windows} {recipe} --group 64 --outliers 64 --threads {threads}");
                let ratio = estimate_to_peak(&home, &line);
                // What a run without GPTQ takes is small, and the program's own share a part of it.
                let most = if recipe == "--no-gptq" { 1.25 } else { 1.12 };
                assert!((0.9..=most).contains(&ratio), "{mlp} {line}: {ratio:.3}");
            }
        }
    }
}

#[test]
fn a_text_counts_by_its_length() {
    let home = Home::with_model();
    let rows = "Ten or so short words make a row of this text .\n";
    let of_text = |bytes: usize| {
        fs::write(home.path("text.txt"), rows.repeat(bytes / rows.len())).unwrap();
        let line = format!("{SMALL} --no-eval --calib text.txt --threads 1");
        let ratio = estimate_to_peak(&home, &line);
        let line = format!("quantize --model model --out other --dry-run {line}");
        (ratio, home.json(&line)["memory_bytes"].as_u64().unwrap())
    };
    let (short_ratio, short) = of_text(30_000);
    let (long_ratio, long) = of_text(3_000_000);
    let (_, longer) = of_text(12_000_000);
    // A text of common words takes half of what the densest does, in which every byte is a token.
    // Of so small a run the program's own share is most, and half of it is its code.
    assert!((0.9..1.7).contains(&short_ratio), "{short_ratio:.3}");
    assert!((0.9..2.8).contains(&long_ratio), "{long_ratio:.3}");
    assert!(short < 60_000_000 && long > 150_000_000 && longer == long, "{short} {long} {longer}");
}
