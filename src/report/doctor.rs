/*! The page of `atom doctor`. */

use anstyle::{AnsiColor, Style};

use super::Report;
use crate::doctor::{DoctorOutcome, Status};
use crate::printable::printable;

const OK: Style = AnsiColor::Green.on_default();
const NOTE: Style = AnsiColor::Yellow.on_default();
const FAULT: Style = AnsiColor::Red.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default();

/// Columns of the page, so that it reads well on the narrowest of terminals; a path may be longer.
const WIDTH: usize = 80;
/// Columns of a status and the gap after it.
const MARK: usize = 7;

impl Report for DoctorOutcome {
    fn text(&self) -> String {
        let names = self.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
        let margin = MARK + names + 2;
        let indent = " ".repeat(margin);
        let mut text = String::new();
        for check in &self.checks {
            let (style, mark) = mark(check.status);
            let name = &check.name;
            let detail =
                wrapped(&printable(&check.detail), WIDTH - margin).join(&format!("\n{indent}"));
            text.push_str(&format!("{style}{mark:5}{style:#}  {name:names$}  {detail}\n"));
            if let Some(hint) = &check.hint {
                let lines = wrapped(&printable(&format!("hint: {hint}")), WIDTH - margin);
                for line in lines {
                    let line = match line.strip_prefix("hint:") {
                        Some(rest) => format!("{HINT}hint:{HINT:#}{rest}"),
                        None => line,
                    };
                    text.push_str(&format!("{indent}{line}\n"));
                }
            }
        }
        let count = |status| self.checks.iter().filter(|check| check.status == status).count();
        let (notes, faults) = (count(Status::Note), count(Status::Fault));
        let (style, verdict) = mark(if self.ok { Status::Ok } else { Status::Fault });
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        let faults = format!("{faults} fault{}", plural(faults));
        format!("{text}\n{style}{verdict}{style:#}: {faults}, {notes} note{}\n", plural(notes))
    }
}

fn mark(status: Status) -> (Style, &'static str) {
    match status {
        Status::Ok => (OK, "ok"),
        Status::Note => (NOTE, "note"),
        Status::Fault => (FAULT, "FAULT"),
    }
}

/// Lines of whole words; a word that is longer has a line of its own.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always one");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Check;

    #[test]
    fn the_page_is_eighty_columns_wide_and_says_what_to_do() {
        let check = |name: &str, status, detail: &str, hint: Option<&str>| Check {
            name: name.into(),
            status,
            detail: detail.into(),
            hint: hint.map(str::to_owned),
        };
        let outcome = DoctorOutcome {
            ok: false,
            checks: vec![
                check("memory", Status::Ok, "3.0 GB of 8.0 GB available", None),
                check(
                    "gpu",
                    Status::Note,
                    "the CUDA driver's library libcuda.so.1 was not found; --device auto runs on the CPU",
                    Some("install NVIDIA's driver 570 or newer, or run with --device cpu"),
                ),
                check("cpu arithmetic", Status::Fault, "it computes wrongly", Some("report it")),
            ],
        };
        let plain = anstream::adapter::strip_str(&outcome.text()).to_string();
        assert_eq!(
            plain,
            "\
ok     memory          3.0 GB of 8.0 GB available
note   gpu             the CUDA driver's library libcuda.so.1 was not found;
                       --device auto runs on the CPU
                       hint: install NVIDIA's driver 570 or newer, or run with
                       --device cpu
FAULT  cpu arithmetic  it computes wrongly
                       hint: report it

FAULT: 1 fault, 1 note
"
        );
        assert!(outcome.text().contains('\u{1b}'), "coloured where the stream takes colours");
    }

    #[test]
    fn long_words_are_left_whole() {
        assert_eq!(wrapped("a /very/long/path b", 6), ["a", "/very/long/path", "b"]);
        assert_eq!(wrapped("", 6), [""]);
    }
}
