/*! What a person reads: the help of every subcommand and the main error messages, pinned in
`tests/snapshots`, and examples that work. `tests/common/snapshot.rs` says how to rewrite the files.

The subcommands come from clap; none is listed here. */

mod common;

use atom::cli::Cli;
use clap::{Command, CommandFactory, Parser};
use common::{Dtype, Home, RandomModel, Run, skipped, snapshot};

/// Every command, the program itself included, by the words that call it.
fn commands() -> Vec<(Vec<String>, Command)> {
    fn walk(words: &[String], command: &Command, all: &mut Vec<(Vec<String>, Command)>) {
        all.push((words.to_vec(), command.clone()));
        for subcommand in command.get_subcommands() {
            let words = [words, &[subcommand.get_name().to_owned()]].concat();
            walk(&words, subcommand, all);
        }
    }
    let mut all = Vec::new();
    walk(&["atom".to_owned()], &Cli::command(), &mut all);
    all
}

/// Commands of a help's examples, without the pipe or file that their output goes to.
fn examples(command: &Command) -> Vec<String> {
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let lines = help.lines().skip_while(|line| *line != "Examples:").skip(1);
    let lines = lines.take_while(|line| !line.is_empty()).map(str::trim);
    lines.map(|line| line.split(['>', '|']).next().unwrap().trim().to_owned()).collect()
}

/// The help as a terminal of that many columns shows it.
fn help(home: &Home, words: &[String], columns: usize) -> String {
    let line = format!("{} --help", words[1..].join(" "));
    let output = home.command(&line).env("COLUMNS", columns.to_string()).output().unwrap();
    let run = Run::new(&line, output).done();
    assert!(run.stderr.is_empty() && !run.stdout.contains('\u{1b}'), "{}", run.stderr);
    run.stdout
}

#[test]
fn the_help_of_every_subcommand_is_as_pinned() {
    let home = Home::new();
    let mut names = Vec::new();
    let mut differences = Vec::new();
    for (words, _) in commands() {
        let name = format!("{}.txt", words.join("-"));
        differences.extend(snapshot::difference(&format!("help/{name}"), &help(&home, &words, 80)));
        names.push(name);
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    let strays = snapshot::strays("help", &names);
    assert!(strays.is_empty(), "pinned help of no subcommand: {strays:?}");
}

#[test]
fn the_help_fits_a_terminal() {
    let home = Home::new();
    for (words, _) in commands() {
        for (columns, most) in [(80, 80), (120, 100)] {
            for line in help(&home, &words, columns).lines() {
                let width = line.chars().count();
                assert!(width <= most, "{words:?} at {columns} columns has {width}: {line}");
            }
        }
    }
}

#[test]
fn every_subcommand_has_examples_that_parse_and_fit_a_line() {
    for (words, command) in commands() {
        let examples = examples(&command);
        assert!(examples.len() >= 2, "{words:?} has the examples {examples:?}");
        for example in examples {
            assert!(example.chars().count() <= 78, "{words:?}: {example} is broken by 80 columns");
            let parsed = Cli::try_parse_from(example.split_whitespace());
            // Help is an error to the parser.
            let is_help = |error: &clap::Error| error.kind() == clap::error::ErrorKind::DisplayHelp;
            let failed = parsed.err().filter(|error| !is_help(error));
            assert!(failed.is_none(), "{example}: {}", failed.unwrap());
        }
        // Paragraphs of a single line, so that clap and not the source decides where lines end.
        let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for paragraph in text.split("\n\n").filter(|text| !text.starts_with("Examples:\n")) {
            assert!(!paragraph.trim_end().contains('\n'), "{words:?}: broken lines in {paragraph}");
        }
    }
}

/// An example with a model or text of the user's, a GPU's, or a measurement of the machine.
fn needs_more_than_we_ship(example: &str) -> bool {
    let names = ["SmolLM2", "Llama", "wiki", "--device cuda", "atom bench"];
    names.iter().any(|name| example.contains(name))
}

#[test]
fn examples_that_need_nothing_else_work_one_after_the_other() {
    let home = Home::new();
    let mut done = Vec::new();
    for (words, command) in commands() {
        for example in examples(&command).into_iter().filter(|line| !needs_more_than_we_ship(line))
        {
            // The program's own examples are its subcommands'.
            if words.len() > 1 {
                home.run(example.strip_prefix("atom ").unwrap()).done();
                done.push(words[1].clone());
            }
        }
    }
    for name in ["quantize", "calibrate", "plan", "pack", "eval-ppl", "verify", "inspect", "doctor"]
    {
        assert!(done.iter().any(|known| known == name), "no example of {name} was run: {done:?}");
    }
    for path in ["tiny-llama-atom-w4a4-g128", "tiny-llama-atom-w4a4-g64", "tiny-llama-plan.json"] {
        assert!(home.path(path).exists(), "the examples left no {path}: {:?}", home.names());
    }
}

/// A command, and what it says on stderr.
fn transcript(home: &Home, line: &str) -> String {
    let mut command = home.command(line);
    command.env("COLUMNS", "80").env("LC_ALL", "C");
    // Where it stands for --device, the parser's usage would name the flag. What the parser passes runs on the
    // CPU, or says what device it was to run on.
    let words = line.split_whitespace().map(str::to_owned);
    let words = std::iter::once("atom".to_owned()).chain(words);
    if Cli::try_parse_from(words).is_err() {
        command.env_remove("ATOM_DEVICE");
    }
    let output = command.output().unwrap();
    let run = Run::new(line, output);
    assert_ne!(run.code, Some(0), "`atom {line}` was to fail: {}", run.stdout);
    let here = home.path("");
    let here = here.to_str().unwrap().trim_end_matches('/');
    let real = std::fs::canonicalize(here).unwrap();
    let stderr = run.stderr.replace(real.to_str().unwrap(), "[dir]").replace(here, "[dir]");
    format!("$ {}\n{stderr}[exit code {}]\n\n", format!("atom {line}").trim(), run.code.unwrap())
}

/// Lines that are refused, by what is wrong with them.
const REFUSED: &[(&str, &[&str])] = &[
    (
        "wrong usage",
        &[
            "",
            "quantise --model tiny-llama",
            "quantize",
            "quantize --model tiny-llama --bitz 4",
            "quantize --model tiny-llama --outlier-format int9",
            "quantize --model tiny-llama --samples 0",
            "quantize --model tiny-llama --group foo",
            "quantize --model tiny-llama --device tpu",
            "quantize --model tiny-llama --gpu-memory 24XB",
            "quantize --model tiny-llama --target-bits 4 --target-size 1GB",
            "quantize --model tiny-llama --bits 5",
            "quantize --model tiny-llama --group 24",
            "quantize --model tiny-llama --clip-act 1.5",
            "quantize --model tiny-llama --format fp4 --bits 3",
            "quantize --model tiny-llama --set corection=0.5",
            "quantize --model tiny-llama --recipe papr",
            "calibrate --model tiny-llama --bits 3",
            "verify --model model --max-ppl-increase 0.1",
            "eval-ppl --model tiny-llama --max-ppl 0.5",
            "plan",
            "bench gemm --shape gpt",
            "bench prefill --kv-bits 9",
            "completions tcsh",
            "man quantise",
            "man --out pages quantize",
        ],
    ),
    (
        "models",
        &[
            "quantize --model lama-7b",
            "quantize --model ./absent",
            "quantize --model a-file",
            "quantize --model empty",
            "quantize --model cut-off --dry-run",
            "verify --model absent",
            "verify --model model",
            "inspect absent",
            "inspect empty",
        ],
    ),
    (
        "texts, recipes and plans",
        &[
            "quantize --model model --calib absent.txt",
            "quantize --model model --calib empty-file",
            "eval-ppl --model model --dataset a-file",
            "quantize --model model --recipe absent.toml",
            "quantize --model model --recipe slip.toml",
            "plan absent.safetensors",
            "plan a-file",
            "pack --model model --plan absent.json",
            "pack --model model --plan a-file",
        ],
    ),
    (
        "output",
        &[
            "quantize --model model --out model --dry-run --group 32 --outliers 16",
            "quantize --model model --out model --overwrite --dry-run --group 32 --outliers 16",
            "quantize --model model --out a-file --dry-run --group 32 --outliers 16",
            "quantize --model model --outliers 128",
            "calibrate --model model --out a-file --samples 2 --seq-len 32",
        ],
    ),
    (
        "limits and machines",
        &[
            "eval-ppl --model model --seq-len 32 --windows 2 --max-ppl 1 --quiet",
            "bench gemm --device cpu",
        ],
    ),
];

#[test]
fn error_messages_are_as_pinned() {
    let home = Home::with_model();
    fs_err::create_dir(home.path("empty")).unwrap();
    fs_err::write(home.path("a-file"), "neither a plan nor a text of any length\n").unwrap();
    fs_err::write(home.path("empty-file"), "").unwrap();
    fs_err::write(home.path("slip.toml"), "grup = 64\n").unwrap();
    RandomModel::new(2).write(&home.path("cut-off"), Dtype::F16, 1);
    let shard = fs_err::OpenOptions::new().write(true).open(home.path("cut-off/model.safetensors"));
    shard.unwrap().set_len(100_000).unwrap();
    let before = home.names();
    let mut text = String::new();
    for (about, lines) in REFUSED {
        text.push_str(&format!("# {about}\n\n"));
        lines.iter().for_each(|line| text.push_str(&transcript(&home, line)));
    }
    assert_eq!(home.names(), before, "a refused command leaves nothing behind");
    snapshot::assert_pinned("messages.txt", &text);
}

#[test]
fn a_machine_without_a_driver_says_so() {
    let home = Home::new();
    let doctor = home.run("doctor --device cuda --json").json();
    let names = doctor["checks"].as_array().unwrap().iter().map(|check| &check["name"]);
    if names.into_iter().any(|name| name == "cuda driver") {
        return skipped("a_machine_without_a_driver_says_so", "there is a driver");
    }
    let lines = ["quantize --model tiny-llama --device cuda", "eval-ppl --model x --device cuda:1"];
    let text: String = lines.iter().map(|line| transcript(&home, line)).collect();
    snapshot::assert_pinned("no-gpu.txt", &text);
}
