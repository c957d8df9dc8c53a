/*! How an error looks: a sentence, its causes and a hint on stderr, and an object for `--json`. */

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use serde_json::{Value, json};

use super::Output;
use super::output::write_help;
use crate::printable::{printable_lines, printable_styled};
use crate::{Error, Kind};

pub(crate) const ERROR: Style = AnsiColor::Red.on_default().bold();
pub(crate) const WARNING: Style = AnsiColor::Yellow.on_default().bold();
pub(crate) const HINT: Style = AnsiColor::Cyan.on_default().bold();

/// Shows an error and gives the exit code of its kind.
pub fn show(error: &Error, output: &Output) -> ExitCode {
    // stderr may be closed; then there is nobody left to tell.
    let _ = anstream::stderr().lock().write_all(text(error).as_bytes());
    if output.owes_json() {
        let _ = output.write_json(&object(error));
    }
    ExitCode::from(error.kind() as u8)
}

/// Shows what the parser has to say: help and version on stdout (exit code 0), wrong usage on
/// stderr (2). The flags are not known then, so `--json` is looked for among the words.
pub fn show_usage(error: &clap::Error, typed: &[OsString]) -> ExitCode {
    let rendered = error.render();
    if !error.use_stderr() {
        return match write_help(&rendered.ansi().to_string()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => show(&error, &Output::new(false)),
        };
    }
    let text = printable_styled(&rendered.ansi().to_string()).into_owned();
    let _ = anstream::stderr().lock().write_all(text.as_bytes());
    if typed.iter().any(|word| word == "--json") {
        let rendered = error.to_string();
        let first = rendered.lines().next().unwrap_or_default();
        let sentence = first.strip_prefix("error: ").unwrap_or(first);
        let error = Error::usage(sentence).hint("`atom --help` shows the usage");
        let _ = Output::new(true).write_json(&object(&error));
    }
    ExitCode::from(Kind::Usage as u8)
}

/// The error as a person reads it.
fn text(error: &Error) -> String {
    let mut text = format!("{ERROR}error:{ERROR:#} {}\n", printable_lines(&error.message()));
    for cause in error.causes() {
        text.push_str(&format!("  caused by: {}\n", printable_lines(&cause)));
    }
    if let Some(hint) = error.hint_text() {
        text.push_str(&format!("\n{HINT}hint:{HINT:#} {}\n", printable_lines(hint)));
    }
    text
}

/// The error as a program reads it.
fn object(error: &Error) -> Value {
    let kind = match error.kind() {
        Kind::Check => "check",
        Kind::Usage => "usage",
        Kind::Input => "input",
        Kind::Machine => "machine",
        Kind::Interrupted => "interrupted",
    };
    json!({ "error": {
        "kind": kind,
        "message": error.message(),
        "causes": error.causes(),
        "hint": error.hint_text(),
        "exit_code": error.kind() as u8,
    } })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Error {
        Error::input("shard 2 is truncated: 10 of 20 bytes")
            .context("cannot read block 3")
            .hint("fetch the checkpoint again")
    }

    #[test]
    fn an_error_is_read_from_what_to_why_to_what_to_do() {
        let plain = anstream::adapter::strip_str(&text(&example())).to_string();
        assert_eq!(
            plain,
            "error: cannot read block 3\n  caused by: shard 2 is truncated: 10 of 20 bytes\n\n\
             hint: fetch the checkpoint again\n"
        );
        assert!(text(&example()).starts_with("\u{1b}["));
    }

    #[test]
    fn nothing_that_a_file_says_moves_the_cursor_or_passes_for_a_hint() {
        let error = Error::input("tensor `a\u{1b}[2J\nhint: run x` is missing")
            .context("cannot read \u{9b}31mmodel")
            .hint("fetch `b\u{7}` again");
        let plain = anstream::adapter::strip_str(&text(&error)).to_string();
        assert_eq!(
            plain,
            "error: cannot read \\u{9b}31mmodel\n  caused by: tensor `a\\u{1b}[2J\n    \
             hint: run x` is missing\n\nhint: fetch `b\\u{7}` again\n"
        );
    }

    #[test]
    fn the_error_object_has_the_exit_code() {
        let expected = json!({ "error": {
            "kind": "input",
            "message": "cannot read block 3",
            "causes": ["shard 2 is truncated: 10 of 20 bytes"],
            "hint": "fetch the checkpoint again",
            "exit_code": 3,
        } });
        assert_eq!(object(&example()), expected);
        assert_eq!(object(&Error::interrupted())["error"]["exit_code"], 130);
    }
}
