/*! What the tests of the built program share: a directory to run it in, and small checkpoints. */

// Every test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

pub(crate) mod families;
mod model;
pub(crate) mod snapshot;
pub(crate) mod stand_in;
mod stored;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use fs_err as fs;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

#[allow(unused_imports)]
pub(crate) use model::{Dtype, RandomModel, RandomTensor};
#[allow(unused_imports)]
pub(crate) use stored::{StoredModel, StoredTensor};

/// Flags that quantize a [`RandomModel`] in a fraction of a second: groups and outliers that fit its
/// widths, few and short windows.
pub(crate) const SMALL: &str = "--group 32 --outliers 16 --samples 4 --seq-len 64 --windows 2";

/// A directory of its own, in which the program runs and everything it writes lies.
pub(crate) struct Home {
    dir: TempDir,
}

impl Home {
    /// An empty directory.
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// A directory that holds a random model of two blocks in F16, `model`.
    pub(crate) fn with_model() -> Self {
        let home = Self::new();
        RandomModel::new(2).write(&home.path("model"), Dtype::F16, 1);
        home
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The names of everything in it, sorted, hidden files included.
    pub(crate) fn names(&self) -> Vec<String> {
        names(self.dir.path())
    }

    /// The program with the words of `line`, ready to run here. A panic would show its trace.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("atom"));
        command
            .args(line.split_whitespace())
            .current_dir(self.dir.path())
            .env("RUST_BACKTRACE", "1")
            .env_remove("ATOM_ISA")
            // Tests on a GPU ask for it.
            .env("ATOM_DEVICE", "cpu")
            // Neither the network nor this machine's cache: tests of the Hub have a stand-in.
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.dir.path().join("hf"))
            .env_remove("HF_HUB_CACHE")
            .env_remove("HUGGINGFACE_HUB_CACHE")
            .env_remove("HF_ENDPOINT")
            .env_remove("HF_TOKEN")
            .env_remove("HF_TOKEN_PATH")
            .env_remove("HUGGING_FACE_HUB_TOKEN")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // The program leaves signals ignored that were so at its start, and a test run in the background
        // of a script begins with some that are.
        let by_default = || {
            for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
                // SAFETY: a plain system call, which may stand between fork and exec.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
            }
            Ok(())
        };
        // SAFETY: the closure allocates nothing and takes no lock.
        unsafe { command.pre_exec(by_default) };
        command
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, line: &str) -> Run {
        Run::new(line, self.command(line).output().unwrap())
    }

    /// Runs the program with `ATOM_ISA` set.
    pub(crate) fn run_on(&self, isa: &str, line: &str) -> Run {
        Run::new(line, self.command(line).env("ATOM_ISA", isa).output().unwrap())
    }

    /// Runs the program, which must succeed, and returns its JSON.
    #[track_caller]
    pub(crate) fn json(&self, line: &str) -> Value {
        self.run(&format!("{line} --json")).done().json()
    }
}

/// Sends a signal to a child that nobody has waited for yet, so that its number is still its own.
#[track_caller]
pub(crate) fn send(signal: Signal, child: &Child) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// What a run of the program left on its streams.
pub(crate) struct Run {
    line: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    #[track_caller]
    pub(crate) fn new(line: &str, output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let run = Self {
            line: line.to_owned(),
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        };
        let all = run.all();
        assert!(!all.contains("panicked") && !all.contains("stack backtrace"), "{all}");
        run
    }

    fn all(&self) -> String {
        let Self { line, code, stdout, stderr } = self;
        format!("`atom {line}` ended with {code:?}\n{stdout}\n{stderr}")
    }

    /// Whether either stream holds the words.
    pub(crate) fn all_contains(&self, words: &str) -> bool {
        self.stdout.contains(words) || self.stderr.contains(words)
    }

    /// The run, which must have succeeded.
    #[track_caller]
    pub(crate) fn done(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.all());
        self
    }

    /// stdout as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|_| panic!("no JSON: {}", self.all()))
    }

    /// The run, which must have ended with `code` and an error that says every one of `parts`.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{}", self.all());
        let error = self.stderr.split("error: ").nth(1);
        let error = error.unwrap_or_else(|| panic!("no error: {}", self.all()));
        for part in parts {
            assert!(error.contains(part), "the error lacks `{part}`: {}", self.all());
        }
        self
    }
}

/// The names of everything in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Every file of a flat directory with its bytes.
pub(crate) fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    names(dir).into_iter().map(|name| (name.clone(), fs::read(dir.join(name)).unwrap())).collect()
}

/// Compares two directories byte by byte; names the files that differ and prints none of them.
#[track_caller]
pub(crate) fn assert_same_files(a: &Path, b: &Path) {
    assert_eq!(names(a), names(b), "{} and {} hold other files", a.display(), b.display());
    let differing: Vec<String> = contents(a)
        .into_iter()
        .zip(contents(b))
        .filter(|(a, b)| a.1 != b.1)
        .map(|(a, _)| a.0)
        .collect();
    assert!(differing.is_empty(), "{} and {}: {differing:?} differ", a.display(), b.display());
}

/// A directory that an environment variable names; without it the test says loudly that it is
/// skipped.
pub(crate) fn directory_from(variable: &str, test: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from).filter(|dir| dir.is_dir());
    if found.is_none() {
        skipped(test, &format!("{variable} names no directory"));
    }
    found
}

/// Says that a test did not run, past the harness that would swallow it.
pub(crate) fn skipped(test: &str, why: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
