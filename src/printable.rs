/*! Text that came from files, names or the Hub, made safe for a terminal: characters that move the cursor,
clear the screen, change the title or the order of reading are shown as escapes such as `\u{1b}`. */

use std::borrow::Cow;

/// Whether a terminal or an editor would do something else with the character than show it.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Marks, embeddings, overrides and isolates of the order of reading; separators of lines.
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            // Characters without a width or a shape, which make two names look alike.
            | '\u{200b}' | '\u{2060}' | '\u{feff}')
}

/// Text of one line: every character that acts is an escape, line breaks too.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false)
}

/// Text of several lines: line breaks stay, and lines after the first are indented, so that none of them
/// can pass for a message of its own.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    match escaped(text, |c| c == '\n') {
        text if text.contains('\n') => Cow::Owned(text.replace('\n', "\n    ")),
        text => text,
    }
}

/// Text that is printed as it is, such as a model's: line breaks and tabs stay.
pub fn printable_text(text: &str) -> Cow<'_, str> {
    escaped(text, |c| matches!(c, '\n' | '\t'))
}

/// Text that was put together of safe parts, with line breaks, tabs and colours of our own: every other
/// character that acts is an escape.
pub fn printable_styled(text: &str) -> Cow<'_, str> {
    let acts = |c: char| acts(c) && !matches!(c, '\n' | '\t');
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let taken = match colour_at(rest) {
            Some(length) => {
                safe.push_str(&rest[..length]);
                length
            }
            None => {
                push(&mut safe, c, acts(c));
                c.len_utf8()
            }
        };
        rest = &rest[taken..];
    }
    Cow::Owned(safe)
}

/// JSON with every character that acts as an escape of JSON. They stand in strings only.
pub fn printable_json(json: String) -> String {
    let acts = |c: char| acts(c) && c != '\n';
    if !json.contains(acts) {
        return json;
    }
    let mut safe = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        match acts(c) {
            true => safe.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => safe.push(c),
        }
    }
    safe
}

fn escaped(text: &str, keeps: impl Fn(char) -> bool) -> Cow<'_, str> {
    let escapes = |c: char| acts(c) && !keeps(c);
    if !text.contains(escapes) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    text.chars().for_each(|c| push(&mut safe, c, escapes(c)));
    Cow::Owned(safe)
}

fn push(safe: &mut String, c: char, escape: bool) {
    if escape { safe.extend(c.escape_unicode()) } else { safe.push(c) }
}

/// Length of the colour (`ESC [ digits and semicolons m`) that `text` begins with.
fn colour_at(text: &str) -> Option<usize> {
    let rest = text.strip_prefix("\u{1b}[")?;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    rest[end..].starts_with('m').then_some(2 + end + 1)
}

/// A word as a POSIX shell reads it back.
pub fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./=:,+@%".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_is_an_escape_and_the_rest_is_untouched() {
        assert_eq!(
            printable("a\u{1b}[2Jb\r\n\u{9b}31m\u{7f}"),
            "a\\u{1b}[2Jb\\u{d}\\u{a}\\u{9b}31m\\u{7f}"
        );
        assert_eq!(printable("x\u{202e}y\u{2066}\u{200b}"), "x\\u{202e}y\\u{2066}\\u{200b}");
        for plain in ["Müller/模型-7B", "±0.1 → 2", "", "a \\ \"b\""] {
            assert!(matches!(printable(plain), Cow::Borrowed(same) if same == plain));
        }
    }

    #[test]
    fn a_second_line_cannot_pass_for_a_message() {
        assert_eq!(printable_lines("bad\nhint: run x\u{1b}c"), "bad\n    hint: run x\\u{1b}c");
        assert_eq!(printable_lines("one line"), "one line");
    }

    #[test]
    fn our_colours_survive_and_nothing_else_that_begins_like_them() {
        let ours = "\u{1b}[1m\u{1b}[32mok\u{1b}[0m\n\u{1b}[38;5;1mx\u{1b}[m";
        assert_eq!(printable_styled(ours), ours);
        let theirs = "\u{1b}[2J\u{1b}]0;t\u{7}\u{1b}[1\u{1b}[31mred";
        assert_eq!(printable_styled(theirs), "\\u{1b}[2J\\u{1b}]0;t\\u{7}\\u{1b}[1\u{1b}[31mred");
    }

    #[test]
    fn json_stays_the_same_value() {
        let value = serde_json::json!({ "name": "a\u{9b}\u{7f}\u{202e}\u{1b}\n\u{2028}é" });
        let safe = printable_json(serde_json::to_string_pretty(&value).unwrap());
        assert!(safe.chars().all(|c| c == '\n' || !acts(c)), "{safe}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
    }

    #[test]
    fn words_are_quoted_only_where_a_shell_needs_it() {
        assert_eq!(quoted("a/b-1.toml"), "a/b-1.toml");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
