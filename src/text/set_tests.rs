use std::fs;
use std::path::PathBuf;

use super::*;
use crate::Kind;
use crate::hub::Hub;
use crate::pipeline::progress::Silent;
use crate::text::{Tokenizer, calibration_windows, evaluation_windows};

/// A file in a directory of its own, and the path as a flag would hold it.
fn file(name: &str, content: &[u8]) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    (directory, path.to_str().unwrap().to_owned())
}

fn hub() -> Hub<'static> {
    Hub::from_env(true, &Silent).unwrap()
}

fn load(name: &str, content: &[u8]) -> Result<TextSet> {
    let (_directory, path) = file(name, content);
    TextSet::load(&path, Split::Calibration, &hub())
}

#[test]
fn plain_text_is_taken_as_it_is() {
    let set = load("wiki.raw", " \n = Größe = \r\n\n".as_bytes()).unwrap();
    assert_eq!(set.text, " \n = Größe = \r\n\n");
    assert!(set.name.ends_with("wiki.raw"));
    assert_eq!(
        load("abc.txt", b"abc").unwrap().sha256,
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}

#[test]
fn rows_are_joined_by_a_blank_line_empty_ones_included() {
    let rows = br#"{"text": ""}
{"text": " = Title = \n"}
{"id": 3, "text": "", "more": [1]}
{"text": "caf\u00e9 \ud83d\ude00"}
"#;
    let joined = "\n\n = Title = \n\n\n\n\ncafé 😀";
    for name in ["rows.jsonl", "ROWS.JSONL", "c4.json"] {
        assert_eq!(load(name, rows).unwrap().text, joined, "{name}");
    }
    let crlf = String::from_utf8(rows.to_vec()).unwrap().replace('\n', "\r\n");
    assert_eq!(load("rows.jsonl", crlf.as_bytes()).unwrap().text, joined);
}

#[test]
fn a_bad_line_is_named() {
    for (line, cause) in [
        ("{\"txt\": \"a\"}", "missing field `text`"),
        ("{\"text\": 3}", "invalid type: integer `3`"),
        ("{\"text\": \"a\"", "EOF while parsing an object"),
        ("", "EOF while parsing a value"),
        ("text", "expected"),
    ] {
        let content = format!("{{\"text\": \"good\"}}\n{line}\n{{\"text\": \"good\"}}\n");
        let error = load("rows.jsonl", content.as_bytes()).unwrap_err();
        assert!(error.message().contains("rows.jsonl, line 2: "), "{error}");
        assert!(error.message().contains(cause), "{error}");
        assert!(!error.message().contains("line 1"), "{error}");
        assert!(error.hint_text().unwrap().contains("{\"text\": \"...\"}"));
        assert_eq!(error.kind(), Kind::Input);
    }
}

#[test]
fn text_that_is_not_utf8_is_refused() {
    for name in ["latin1.txt", "latin1.jsonl"] {
        let error = load(name, b"caf\xe9").unwrap_err();
        assert!(error.message().contains("is not UTF-8 text: the byte at offset 3"), "{error}");
    }
}

#[test]
fn a_text_must_hold_something() {
    for (name, content) in [
        ("a.txt", &b""[..]),
        ("a.txt", b" \n\n"),
        ("a.jsonl", b""),
        ("a.jsonl", b"{\"text\":\"\"}"),
    ] {
        let error = load(name, content).unwrap_err();
        assert!(error.message().ends_with(&format!("{name} holds no text")), "{error}");
    }
}

#[test]
fn published_sets_say_which_file_to_pass() {
    for (name, split, wanted) in [
        ("wikitext2", Split::Calibration, "`--calib wiki.train.raw`"),
        ("wikitext2", Split::Evaluation, "`--dataset wiki.test.raw`"),
        ("ptb", Split::Evaluation, "`--dataset ptb.valid.txt`"),
        ("c4", Split::Calibration, "`--calib c4-train.00000-of-01024.json`"),
    ] {
        let error = TextSet::load(name, split).unwrap_err();
        assert_eq!(
            error.message(),
            format!("the text set `{name}` cannot be downloaded by this version")
        );
        assert!(error.hint_text().unwrap().contains(wanted), "{:?}", error.hint_text());
        assert_eq!(error.kind(), Kind::Input);
    }
}

#[test]
fn an_unknown_name_gets_the_known_ones() {
    let error = TextSet::load("wikitext3", Split::Evaluation, &hub()).unwrap_err();
    assert_eq!(error.message(), "`wikitext3` is neither a known text set nor a file that exists");
    assert_eq!(error.hint_text(), Some("known text sets are `sample`, `wikitext2`, `ptb`, `c4`"));
    let directory = tempfile::tempdir().unwrap();
    let error =
        TextSet::load(directory.path().to_str().unwrap(), Split::Evaluation, &hub()).unwrap_err();
    assert_eq!(error.kind(), Kind::Input);
}

fn tiny_llama() -> Tokenizer {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama/tokenizer.json");
    Tokenizer::from_bytes(&fs::read(path).unwrap(), path).unwrap()
}

#[test]
fn the_sample_is_long_enough_and_its_parts_differ() {
    let calibration = TextSet::load("sample", Split::Calibration, &hub()).unwrap();
    let evaluation = TextSet::load("sample", Split::Evaluation, &hub()).unwrap();
    assert!(calibration.text.len() >= 36 << 10, "{} bytes", calibration.text.len());
    assert_ne!(calibration.sha256, evaluation.sha256);

    let tokenizer = tiny_llama();
    let ids = tokenizer.encode(&calibration.text).unwrap();
    assert_eq!(calibration_windows(&ids, 128, 2048, 0).unwrap().len(), 128 * 2048);
    // Broad vocabulary: most of the ids that the tokenizer has should occur.
    let distinct: std::collections::HashSet<_> = ids.iter().collect();
    assert!(distinct.len() > 2000, "{} distinct ids of {}", distinct.len(), ids.len());

    let ids = tokenizer.encode(&evaluation.text).unwrap();
    assert!(evaluation_windows(&ids, 1024, None).unwrap().len() >= 2, "{} ids", ids.len());
    assert_eq!(evaluation_windows(&ids, 2048, Some(1)).unwrap().len(), 1);
}

#[test]
fn no_paragraph_of_the_sample_is_in_both_parts_or_twice() {
    let mut seen = std::collections::HashSet::new();
    for split in [Split::Calibration, Split::Evaluation] {
        for line in TextSet::load("sample", split).unwrap().text.lines() {
            let line = line.trim();
            assert!(line.len() < 60 || seen.insert(line.to_owned()), "twice: {line}");
        }
    }
}

/// WikiText-2 where the tests' data lies, or `None`, saying so.
fn wikitext2() -> Option<PathBuf> {
    let data = std::env::var_os("ATOM_DATA").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data")),
        PathBuf::from,
    );
    let directory = data.join("wikitext2");
    if directory.is_dir() {
        return Some(directory);
    }
    eprintln!("skipped: no wikitext2 in {} (set ATOM_DATA)", data.display());
    None
}

#[test]
fn wikitext2_as_rows_and_as_a_plain_file() {
    let Some(directory) = wikitext2() else { return };
    let load = |name| {
        TextSet::load(directory.join(name).to_str().unwrap(), Split::Evaluation, &hub())
            .unwrap()
            .text
    };
    let rows = load("test.jsonl");
    let raw = load("wiki.test.raw");
    // The published file is the rows put one behind the other, an empty row being " \n". The
    // reference's join keeps the rows' own "\n" and puts a blank line between: two texts.
    let mut from_raw = String::new();
    for (index, line) in raw.split_inclusive('\n').enumerate() {
        from_raw.push_str(if index > 0 { "\n\n" } else { "" });
        from_raw.push_str(if line == " \n" { "" } else { line });
    }
    assert_eq!(from_raw, rows);

    let Some(model) = std::env::var_os("ATOM_SMOLLM2") else {
        eprintln!("skipped: set ATOM_SMOLLM2 to a directory made by tests/smollm2.py");
        return;
    };
    let path = PathBuf::from(model).join("tokenizer.json");
    let tokenizer = Tokenizer::from_bytes(&fs::read(&path).unwrap(), "tokenizer.json").unwrap();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    for (text, tokens) in [(raw, 303_415), (rows, 304_978)] {
        let ids = tokenizer.encode(&text).unwrap();
        assert_eq!(ids.len(), tokens);
        assert_eq!(evaluation_windows(&ids, 2048, None).unwrap().len(), 148);
    }
}
