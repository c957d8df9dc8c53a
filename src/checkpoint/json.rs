/*! JSON as models' tools write it: Python's `NaN` and `Infinity` and a byte order mark are read as well.

Of a key that occurs twice the last value counts, as in Python. */

use serde_json::Value;

use crate::{Error, Result};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// UTF-8 text without its byte order mark.
///
/// # Errors
/// Bad input if it is UTF-16 or UTF-32, by its byte order mark or its zero bytes.
pub(crate) fn text<'a>(bytes: &'a [u8], path: &str) -> Result<&'a [u8]> {
    let wide = |order: &[u8]| bytes.starts_with(order);
    if wide(b"\xff\xfe") || wide(b"\xfe\xff") || matches!(bytes, [0, _, ..] | [_, 0, ..]) {
        return Err(Error::input(format!("{path} is UTF-16 or UTF-32 text, not UTF-8"))
            .hint("save it as UTF-8, or download it again"));
    }
    Ok(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes))
}

/// The value that a file holds.
///
/// # Errors
/// Bad input that names the file and the place in it.
pub(super) fn parse(bytes: &[u8], path: &str) -> Result<Value> {
    let text = text(bytes, path)?;
    let parsed = serde_json::from_slice(text).or_else(|error| match quote_not_numbers(text) {
        Some(quoted) => serde_json::from_slice(&quoted),
        None => Err(error),
    });
    parsed.map_err(|error| {
        Error::input(format!("{path} is not valid JSON: {error}")).hint("download the file again")
    })
}

/// Puts `NaN`, `Infinity` and `-Infinity` in quotes: where a number is needed, the reader of the
/// field finds a text instead and says so. `None` if there are none.
fn quote_not_numbers(text: &[u8]) -> Option<Vec<u8>> {
    let mut quoted = Vec::with_capacity(text.len() + 16);
    let (mut at, mut in_string, mut found) = (0, false, false);
    while at < text.len() {
        let rest = &text[at..];
        let word = [&b"NaN"[..], b"-Infinity", b"Infinity"];
        let word = word.into_iter().find(|word| !in_string && rest.starts_with(word));
        if let Some(word) = word {
            quoted.push(b'"');
            quoted.extend_from_slice(word);
            quoted.push(b'"');
            at += word.len();
            found = true;
            continue;
        }
        let length = if in_string && rest[0] == b'\\' { 2.min(rest.len()) } else { 1 };
        if rest[0] == b'"' {
            in_string = !in_string;
        }
        quoted.extend_from_slice(&rest[..length]);
        at += length;
    }
    found.then_some(quoted)
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
