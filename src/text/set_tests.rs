use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Mutex;

use super::*;
use crate::Kind;
use crate::hub::Hub;
use crate::progress::{Progress, Silent};
use crate::text::part::or_own_file;
use crate::text::{Tokenizer, named};

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

impl TextSet {
    /// The text of a joined set.
    fn text(&self) -> String {
        let mut text = String::new();
        let mut take = |part: &str| {
            text.push_str(part);
            Ok(ControlFlow::Continue(()))
        };
        self.parts[0].each_part(&mut take).unwrap();
        text
    }

    /// The hash that calibration finds.
    fn sha256(&self) -> String {
        self.calibration_windows(&tiny_llama(), &WindowDraw::once(1, 1, 0), &Silent).unwrap().sha256
    }
}

/// The name, text and hash of a file's content.
#[derive(Debug)]
struct Loaded {
    name: String,
    text: String,
    sha256: String,
}

fn load_as(prefix: &str, name: &str, content: &[u8]) -> Result<Loaded> {
    let (_directory, path) = file(name, content);
    let set = TextSet::load(&format!("{prefix}{path}"), Split::Calibration, &hub())?;
    let sha256 =
        set.calibration_windows(&tiny_llama(), &WindowDraw::once(1, 1, 0), &Silent)?.sha256;
    Ok(Loaded { name: set.name.clone(), text: set.text(), sha256 })
}

fn load(name: &str, content: &[u8]) -> Result<Loaded> {
    load_as("", name, content)
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
        ("{\"txt\": \"a\"}", "it has no field `text`"),
        ("{\"text\": 3}", "its field `text` is no string"),
        ("{\"text\": \"a\"", "EOF while parsing an object"),
        ("text", "expected"),
    ] {
        let content = format!("{{\"text\": \"good\"}}\n{line}\n{{\"text\": \"good\"}}\n");
        let error = load("rows.jsonl", content.as_bytes()).err().unwrap();
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
        let error = load(name, b"caf\xe9").err().unwrap();
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
        let error = load(name, content).err().unwrap();
        assert!(error.message().ends_with(&format!("{name} holds no text")), "{error}");
    }
}

#[test]
fn named_sets_that_cannot_be_fetched_say_which_file_to_pass() {
    for (name, split, wanted) in [
        ("wikitext2", Split::Calibration, "train-00000-of-00001.parquet"),
        ("ptb", Split::Evaluation, "0000.parquet"),
        ("c4", Split::Evaluation, "c4-validation.00000-of-00008.json.gz"),
    ] {
        let set = named::set(name).unwrap();
        assert!(set.file(split).ends_with(wanted));
        let error = or_own_file(Error::machine("no network").hint("wait"), name, set.file(split));
        assert_eq!(error.kind(), Kind::Machine);
        assert_eq!(error.message(), format!("the text set `{name}` cannot be fetched"));
        let hint = error.hint_text().unwrap();
        assert!(hint.starts_with("wait\n"), "{hint}");
        assert!(hint.contains(&format!("`{name}=FILE` reads {wanted}")), "{hint}");
    }
}

#[test]
fn a_named_sets_own_file_is_read_as_the_set_is() {
    let load = |name: &str, file_name: &str, content: &str| {
        load_as(&format!("{name}="), file_name, content.as_bytes())
    };
    let raw = " = Title = \n \n One line .\n";
    let set = load("wikitext2", "wiki.test.raw", raw).unwrap();
    assert_eq!(set.text, " = Title = \n\n\n\n\n One line .\n");
    assert!(set.name.starts_with("wikitext2="));
    let set = load("ptb", "ptb.valid.txt", " aer banknote \n no it was n't \n").unwrap();
    assert_eq!(set.text, "aer banknote\n\nno it was n't");
    let set = load("ptb", "ptb.jsonl", "{\"sentence\": \"a\"}\n{\"text\": \"b\"}\n").unwrap();
    assert_eq!(set.text, "a\n\nb");

    let error = load("c4", "c4.txt", "text").err().unwrap();
    assert!(error.message().contains("plain text, in which no document ends"), "{error}");
    let error = load("c4", "c4.jsonl", "").err().unwrap();
    assert!(error.message().ends_with("c4.jsonl holds no text"), "{error}");
    let error = TextSet::load("ptb=absent", Split::Evaluation, &hub()).err().unwrap();
    assert_eq!(error.message(), "absent of `ptb=absent` does not exist");
}

#[test]
fn rows_are_read_in_every_form() {
    let rows = "{\"text\": \"a\"}\n{\"text\": \"b\"}\n";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(rows.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    for (name, content) in
        [("a.jsonl", rows.as_bytes()), ("a.jsonl.gz", &gzip), ("a.json.gz", &gzip)]
    {
        assert_eq!(load(name, content).unwrap().text, "a\n\nb", "{name}");
    }
    assert_eq!(load("a.txt.gz", &gzip).unwrap().text, rows);
    let error = load("cut.json.gz", &gzip[..gzip.len() - 12]).err().unwrap();
    assert!(error.message().ends_with("cut.json.gz cannot be read"), "{error}");

    // What Python joins of the same file.
    let paragraphs = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/paragraphs.parquet");
    for (spec, sha256) in [
        (paragraphs.to_owned(), "0217705fbd1079d440cfc2935209b6877fa7d5938e79965b4fd49674879d892d"),
        (
            format!("ptb={paragraphs}"),
            "706da4e745127b13bdf8c51586c8a5fe22ffef9dc8f41e09b5886da81bb9f02c",
        ),
        (
            format!("c4={paragraphs}"),
            "05eaccf4c1552764bc7138983cda61cf8a4dda959cd3a9c68811adbe8c5a7dcf",
        ),
    ] {
        let set = TextSet::load(&spec, Split::Calibration, &hub()).unwrap();
        assert_eq!(set.sha256(), sha256, "{spec}");
    }
}

/// The paragraphs of the sample, as documents.
fn documents() -> (tempfile::TempDir, TextSet, Vec<String>) {
    let sample = TextSet::sample(Split::Calibration);
    let paragraphs: Vec<String> = sample.text().split("\n\n").map(str::to_owned).collect();
    let rows = paragraphs.iter().map(|text| serde_json::json!({ "text": text }).to_string() + "\n");
    let (directory, path) = file("c4.jsonl", rows.collect::<String>().as_bytes());
    let set = TextSet::load(&format!("c4={path}"), Split::Calibration, &hub()).unwrap();
    (directory, set, paragraphs)
}

#[test]
fn documents_are_drawn_as_the_reference_draws_them() {
    let (_directory, set, paragraphs) = documents();
    let tokenizer = tiny_llama();
    // Document and place of each window: get_c4 of the reference's datautils.py on these paragraphs,
    // with Python's tokenizers.
    for (seed, seq_len, places) in [
        (0, 64, &[(864, 49), (776, 53), (41, 66), (497, 25), (802, 106)][..]),
        (42, 100, &[(114, 6), (759, 35), (228, 8), (754, 3)]),
        (0, 160, &[(41, 66), (802, 9), (223, 129)]),
    ] {
        let expected = places.iter().flat_map(|(document, start)| {
            tokenizer.encode(&paragraphs[*document], &Silent).unwrap()[*start..start + seq_len]
                .to_vec()
        });
        let drawn = set
            .calibration_windows(
                &tokenizer,
                &WindowDraw::once(places.len(), seq_len, seed),
                &Silent,
            )
            .unwrap()
            .tokens;
        assert_eq!(drawn, expected.collect::<Vec<_>>());
        if seed == 0 {
            let limit = Some(places.len());
            assert_eq!(set.evaluation_windows(&tokenizer, seq_len, limit, &Silent).unwrap(), drawn);
        }
    }
    assert_eq!(set.evaluation_windows(&tokenizer, 64, None, &Silent).unwrap().len(), 256 * 64);
    assert_eq!(set.evaluation_windows(&tokenizer, 64, Some(900), &Silent).unwrap().len(), 256 * 64);
}

#[test]
fn no_document_is_long_enough() {
    let (_directory, set, paragraphs) = documents();
    let error =
        set.calibration_windows(&tiny_llama(), &WindowDraw::once(1, 5000, 0), &Silent).unwrap_err();
    assert_eq!(error.kind(), Kind::Input);
    assert_eq!(
        error.causes(),
        [format!("none of the {} documents has more than 5000 tokens", paragraphs.len())]
    );
}

#[test]
fn a_mix_divides_the_samples_and_draws_each_set_as_if_alone() {
    let (_directory, text) =
        file("other.txt", "One word and another word . ".repeat(200).as_bytes());
    let mix = TextSet::load(&format!("sample,{text}"), Split::Calibration, &hub()).unwrap();
    let alone = |spec: &str| TextSet::load(spec, Split::Calibration, &hub()).unwrap();
    let (sample, other) = (alone("sample"), alone(&text));
    let tokenizer = tiny_llama();
    for (samples, shares) in [(7, [4, 3]), (8, [4, 4]), (2, [1, 1])] {
        let draw = |set: &TextSet, samples| {
            set.calibration_windows(&tokenizer, &WindowDraw::once(samples, 32, 5), &Silent).unwrap()
        };
        let expected = [draw(&sample, shares[0]).tokens, draw(&other, shares[1]).tokens].concat();
        let drawn = draw(&mix, samples);
        assert_eq!(drawn.tokens, expected, "{samples}");
        assert_eq!(drawn.sets.iter().map(|set| set.samples).collect::<Vec<_>>(), shares);
        assert_eq!(drawn.sets[1].sha256, other.sha256());
        let hashes = format!("{}\n{}\n", sample.sha256(), other.sha256());
        assert_eq!(drawn.sha256, sha256_hex(hashes.as_bytes()));
    }
    assert_eq!(mix.name, format!("sample,{text}"));
    let alone =
        sample.calibration_windows(&tokenizer, &WindowDraw::once(7, 32, 5), &Silent).unwrap();
    assert!(alone.sets.is_empty(), "one file says all by its name and hash");
    let error =
        mix.calibration_windows(&tokenizer, &WindowDraw::once(1, 32, 5), &Silent).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);

    for (spec, split) in [("sample,ptb", Split::Evaluation), ("sample,sample", Split::Calibration)]
    {
        assert_eq!(TextSet::load(spec, split, &hub()).err().unwrap().kind(), Kind::Usage, "{spec}");
    }
}

/// Keeps what the user is told.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Progress for Told {
    fn begin(&self, _stage: &str, _steps: usize) {}
    fn advance(&self, _detail: &str) {}
    fn end(&self) {}
    fn info(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
    fn warn(&self, _message: &str) {}
    fn stop_requested(&self) -> bool {
        false
    }
}

#[test]
fn no_set_gives_more_windows_than_it_holds_and_the_user_is_told() {
    let (_directory, text) =
        file("other.txt", "One word and another word . ".repeat(200).as_bytes());
    let tokenizer = tiny_llama();
    let ids = TextSet::load(&text, Split::Calibration, &hub()).unwrap().text();
    let ids = tokenizer.encode(&ids, &Silent).unwrap();
    let held = ids.len() / 32;
    let mix = TextSet::load(&format!("sample,{text}"), Split::Calibration, &hub()).unwrap();
    let told = Told::default();
    let drawn =
        mix.calibration_windows(&tokenizer, &WindowDraw::once(2 * held + 5, 32, 0), &told).unwrap();
    assert_eq!(drawn.sets.iter().map(|set| set.samples).collect::<Vec<_>>(), [held + 3, held]);
    assert_eq!(drawn.tokens.len(), 32 * (2 * held + 3));
    let (mut windows, mut once): (Vec<_>, Vec<_>) =
        (drawn.tokens[32 * (held + 3)..].chunks(32).collect(), ids.chunks_exact(32).collect());
    assert_ne!(windows, once, "they are shuffled");
    windows.sort_unstable();
    once.sort_unstable();
    assert_eq!(windows, once);
    let (given, wanted) = (2 * held + 3, 2 * held + 5);
    let line = format!(
        "calibrating on {given} windows of 32 tokens instead of {wanted}: `{text}` holds {held}"
    );
    assert_eq!(told.0.into_inner().unwrap(), [line]);
}

#[test]
fn documents_give_no_more_windows_than_they_hold() {
    let row = |words: usize| serde_json::json!({ "text": "word ".repeat(words) }).to_string();
    let rows = [row(100), row(3), row(40)].join("\n");
    let (_directory, path) = file("c4.jsonl", rows.as_bytes());
    let set = TextSet::load(&format!("c4={path}"), Split::Calibration, &hub()).unwrap();
    let tokenizer = tiny_llama();
    let held = |words: usize| tokenizer.encode(&"word ".repeat(words), &Silent).unwrap().len() / 16;
    let held = held(100) + held(40);
    for (samples, given) in [(held - 1, held - 1), (held, held), (200, held)] {
        let drawn = set
            .calibration_windows(&tokenizer, &WindowDraw::once(samples, 16, 0), &Silent)
            .unwrap();
        // The windows are the reference's, of which an evaluation has as many as requested.
        let reference = set.evaluation_windows(&tokenizer, 16, Some(samples), &Silent).unwrap();
        assert_eq!(drawn.tokens, reference[..given * 16]);
    }
}

#[test]
fn a_file_whose_name_has_a_comma_is_one_file() {
    let (_directory, path) = file("a,b.txt", b"text");
    assert_eq!(TextSet::load(&path, Split::Evaluation, &hub()).unwrap().text(), "text");
}

#[test]
fn an_unknown_name_gets_the_known_ones() {
    let error = TextSet::load("wikitext3", Split::Evaluation, &hub()).err().unwrap();
    assert_eq!(error.message(), "`wikitext3` is neither a known text set nor a file that exists");
    assert_eq!(error.hint_text(), Some("known text sets are `sample`, `c4`, `ptb`, `wikitext2`"));
    let directory = tempfile::tempdir().unwrap();
    let error =
        TextSet::load(directory.path().to_str().unwrap(), Split::Evaluation, &hub()).err().unwrap();
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
    assert!(calibration.text().len() >= 150 << 10, "{} bytes", calibration.text().len());
    assert_ne!(calibration.sha256(), evaluation.sha256());

    let tokenizer = tiny_llama();
    let ids = tokenizer.encode(&calibration.text(), &Silent).unwrap();
    let drawn = calibration
        .calibration_windows(&tokenizer, &WindowDraw::once(128, 2048, 0), &Silent)
        .unwrap();
    assert_eq!(drawn.tokens.len(), ids.len() / 2048 * 2048, "each token once");
    // Broad vocabulary: most of the ids that the tokenizer has should occur.
    let distinct: std::collections::HashSet<_> = ids.iter().collect();
    assert!(distinct.len() > 3000, "{} distinct ids of {}", distinct.len(), ids.len());

    for (seq_len, limit, windows) in [(1024, None, 2..5), (2048, Some(1), 1..2)] {
        let tokens = evaluation.evaluation_windows(&tokenizer, seq_len, limit, &Silent).unwrap();
        assert!(windows.contains(&(tokens.len() / seq_len)), "{} tokens", tokens.len());
        let ids = tokenizer.encode(&evaluation.text(), &Silent).unwrap();
        assert_eq!(tokens, ids[..tokens.len()]);
    }
}

#[test]
fn no_paragraph_of_the_sample_is_in_both_parts_or_twice() {
    let mut seen = std::collections::HashSet::new();
    for split in [Split::Calibration, Split::Evaluation] {
        for line in TextSet::sample(split).text().lines() {
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
            .text()
    };
    let rows = load("test.jsonl");
    let raw = load("wiki.test.raw");
    // The published file is the concatenation of the rows, an empty row being " \n". The
    // reference's join keeps the rows' own "\n" and puts a blank line between: two texts.
    let mut from_raw = String::new();
    for (index, line) in raw.split_inclusive('\n').enumerate() {
        from_raw.push_str(if index > 0 { "\n\n" } else { "" });
        from_raw.push_str(if line == " \n" { "" } else { line });
    }
    assert_eq!(from_raw, rows);
    // Named as what it is, the file is read as its rows.
    let path = directory.join("wiki.test.raw");
    let spec = format!("wikitext2={}", path.display());
    let named = TextSet::load(&spec, Split::Evaluation, &hub()).unwrap();
    assert!(named.text() == rows, "wikitext2=wiki.test.raw is not its rows");

    let Some(model) = std::env::var_os("ATOM_SMOLLM2") else {
        eprintln!("skipped: set ATOM_SMOLLM2 to a directory made by tests/smollm2.py");
        return;
    };
    let path = PathBuf::from(model).join("tokenizer.json");
    let tokenizer = Tokenizer::from_bytes(&fs::read(&path).unwrap(), "tokenizer.json").unwrap();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    for (text, tokens) in [(raw, 303_415), (rows, 304_978)] {
        let ids = tokenizer.encode(&text, &Silent).unwrap();
        assert_eq!(ids.len(), tokens);
        assert_eq!(ids.len() / 2048, 148);
    }
}

#[test]
fn byte_order_marks_and_blank_lines_are_no_text() {
    assert_eq!(load("a.txt", b"\xef\xbb\xbfabc").unwrap().text, "abc");
    assert_eq!(
        load("a.txt", b"\xef\xbb\xbfabc").unwrap().sha256,
        load("b.txt", b"abc").unwrap().sha256
    );
    let rows = b"\xef\xbb\xbf{\"text\": \"a\"}\n\n  \r\n{\"text\": \"b\"}\n\n";
    assert_eq!(load("a.jsonl", rows).unwrap().text, "a\n\nb");
    assert_eq!(load_as("wikitext2=", "wiki.raw", b"\xef\xbb\xbf a \n").unwrap().text, " a \n");
}

#[test]
fn csv_is_read_by_its_header() {
    let rows = "id,text,more\n1,\"a, \"\"b\"\"\nc\",x\n2,d,\n";
    assert_eq!(load("a.csv", rows.as_bytes()).unwrap().text, "a, \"b\"\nc\n\nd");
    let marked = format!("\u{feff}{}", rows.replace(',', "\t"));
    assert_eq!(load("a.tsv", marked.as_bytes()).unwrap().text, "a\t \"b\"\nc\n\nd");
    for (rows, message) in [
        ("id,body\n1,a\n", "line 2: it has no field `text`; its fields are id, body"),
        ("id,text\n1\n", "line 2: it has 1 fields, but the first row names 2 columns"),
        ("text\n", "a.csv holds no text"),
        ("", "a.csv holds no text"),
    ] {
        let error = load("a.csv", rows.as_bytes()).unwrap_err();
        assert!(error.message().ends_with(message), "{error}");
    }
}

#[test]
fn utf_16_is_called_so() {
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    for content in [utf16("\u{feff}abc"), utf16("an ordinary text in UTF-16")] {
        for name in ["a.txt", "a.jsonl", "a.csv"] {
            let error = load(name, &content).unwrap_err();
            let message = format!("{name} is not UTF-8 text: it looks like UTF-16");
            assert!(error.message().ends_with(&message), "{error}");
        }
    }
    assert_eq!(load("a.txt", &[b"zeros ".to_vec(), vec![0; 99]].concat()).unwrap().text.len(), 105);
}

#[test]
fn evaluation_windows_stay_when_the_file_changes() {
    let (directory, path) = file("text.txt", "One word and another word . ".repeat(200).as_bytes());
    let set = TextSet::load(&path, Split::Evaluation, &hub()).unwrap();
    let tokenizer = tiny_llama();
    let before = set.evaluation_windows(&tokenizer, 32, Some(3), &Silent).unwrap();
    fs::write(&path, "Something else .").unwrap();
    assert_eq!(set.evaluation_windows(&tokenizer, 32, Some(3), &Silent).unwrap(), before);
    drop(directory);
    assert_eq!(set.evaluation_windows(&tokenizer, 32, Some(3), &Silent).unwrap(), before);
    assert!(set.evaluation_windows(&tokenizer, 32, Some(2), &Silent).is_err());
}

/// A part of a long text is a way out, which the message names.
#[test]
fn only_an_evaluation_of_the_full_text_refuses_a_long_one() {
    let (_directory, path) = file("long.txt", "Some words . ".repeat(1 << 19).as_bytes());
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len((4 << 30) + 1).unwrap();
    let set = TextSet::load(&path, Split::Evaluation, &hub()).unwrap();
    let error = set.evaluation_windows(&tiny_llama(), 8, None, &Silent).unwrap_err();
    assert!(error.message().contains("more than 4 GB of text"), "{error}");
    assert_eq!(set.evaluation_windows(&tiny_llama(), 8, Some(2), &Silent).unwrap().len(), 16);
}

/// A text whose letters end late: its windows of white space are no evaluation.
#[test]
fn white_space_is_no_text_however_long() {
    let blank = " \n".repeat(300_000);
    let (_directory, path) = file("blank.txt", blank.as_bytes());
    let set = TextSet::load(&path, Split::Evaluation, &hub()).unwrap();
    let error = set.evaluation_windows(&tiny_llama(), 8, Some(1), &Silent).unwrap_err();
    assert!(error.message().ends_with("blank.txt holds no text"), "{error}");
    fs::write(&path, blank + "word").unwrap();
    assert_eq!(set.evaluation_windows(&tiny_llama(), 8, Some(1), &Silent).unwrap().len(), 8);
}
