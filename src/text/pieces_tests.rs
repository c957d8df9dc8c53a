use std::fmt::Write;

use serde_json::{Value, json};

use super::*;
use crate::progress::Silent;
use crate::text::PythonRandom;

const TINY_LLAMA: &[u8] = include_bytes!("../../models/tiny-llama/tokenizer.json");
const SAMPLE: &str = include_str!("../../calibration-data/sample.txt");

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// tiny-llama's tokenizer: byte-level BPE after GPT-2's expression.
fn byte_level() -> Value {
    serde_json::from_slice(TINY_LLAMA).unwrap()
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

/// The same after other expressions.
fn byte_level_after(splits: &[Value]) -> Value {
    let mut json = byte_level();
    let mut parts = splits.to_vec();
    parts.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
    json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": parts});
    json
}

/// Merges across spaces and within runs, with a fallback to bytes: as Llama 2's tokenizer.
fn sentencepiece() -> Value {
    let mut json = byte_level();
    let mut vocabulary = serde_json::Map::new();
    let mut add = |token: &str| {
        let id = vocabulary.len();
        vocabulary.entry(token.to_owned()).or_insert(id.into());
    };
    ["<s>", "</s>", "<unk>"].iter().for_each(|token| add(token));
    (0..256).for_each(|byte| add(&format!("<0x{byte:02X}>")));
    (' '..='~').chain(['▁', 'é', '中']).for_each(|character| add(&character.to_string()));
    let mut merges = Vec::new();
    let mut merge = |one: &str, other: &str| {
        add(&format!("{one}{other}"));
        merges.push(json!([one, other]));
    };
    for pair in json["model"]["merges"].as_array().unwrap() {
        let part = |index: usize| pair[index].as_str().unwrap().replace('Ġ', "▁");
        let plain = |text: &str| text.chars().all(|c| ('!'..='~').contains(&c) || c == '▁');
        if plain(&part(0)) && plain(&part(1)) {
            merge(&part(0), &part(1));
        }
    }
    for (one, other) in [("▁", "▁"), ("▁▁", "▁▁"), ("▁▁▁▁", "▁▁▁▁"), ("a", "a"), ("aa", "aa")]
    {
        merge(one, other);
    }
    for (one, other) in [("e", "▁t"), ("▁the", "▁"), (".", "▁"), ("▁of", "▁the"), ("aa", "a")]
    {
        merge(one, other);
    }
    json["model"]["vocab"] = vocabulary.into();
    json["model"]["merges"] = merges.into();
    json["model"]["byte_fallback"] = true.into();
    json["model"]["fuse_unk"] = true.into();
    json["model"]["unk_token"] = "<unk>".into();
    json["pre_tokenizer"] = Value::Null;
    json["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    json
}

fn metaspace(split: bool, scheme: &str) -> Value {
    let mut json = sentencepiece();
    json["normalizer"] = Value::Null;
    json["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁",
        "prepend_scheme": scheme, "split": split});
    json
}

/// The words of the sample and their beginnings.
fn words() -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for word in SAMPLE.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        words.push(word.to_owned());
        words.push(word.chars().take(3).collect());
    }
    words.sort();
    words.dedup();
    words
}

fn word_piece() -> Value {
    let mut json = byte_level();
    let pieces = words().into_iter().flat_map(|word| [word.to_lowercase(), format!("##{word}")]);
    let letters = ('!'..='~').flat_map(|c| [c.to_string(), format!("##{c}")]);
    let mut all: Vec<String> = ["<s>", "</s>", "[UNK]"]
        .map(str::to_owned)
        .into_iter()
        .chain(letters)
        .chain(pieces)
        .collect();
    let mut seen = std::collections::HashSet::new();
    all.retain(|token| seen.insert(token.clone()));
    let vocabulary: serde_json::Map<_, _> =
        all.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
    json["model"] = json!({"type": "WordPiece", "unk_token": "[UNK]",
        "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocabulary});
    json["normalizer"] = json!({"type": "BertNormalizer", "clean_text": true,
        "handle_chinese_chars": true, "strip_accents": null, "lowercase": true});
    json["pre_tokenizer"] = json!({"type": "BertPreTokenizer"});
    json
}

fn unigram() -> Value {
    let mut json = byte_level();
    let mut vocabulary = vec![json!(["<unk>", 0.0]), json!(["▁", -4.0])];
    for (index, word) in words().into_iter().enumerate() {
        vocabulary.push(json!([format!("▁{word}"), -7.0 - (index % 13) as f64]));
        vocabulary.push(json!([word, -9.0 - (index % 7) as f64]));
    }
    for character in '!'..='~' {
        vocabulary.push(json!([character.to_string(), -13.0]));
    }
    json["model"] =
        json!({"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": false});
    json["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁",
        "prepend_scheme": "always", "split": true});
    json["added_tokens"] = json!([]);
    json["post_processor"] = Value::Null;
    json
}

/// A tokenizer with tokens that swallow white space, are parts of each other and are separate words.
fn with_added(mut json: Value) -> Value {
    let added = json["added_tokens"].as_array_mut().unwrap();
    for (index, (content, lstrip, rstrip, single_word, normalized)) in [
        ("<mask>", true, false, false, false),
        ("<right>", false, true, false, false),
        ("<both>", true, true, false, true),
        ("river", false, false, true, true),
        ("<|im_start|>", false, false, false, false),
        ("\n\n\n", false, false, false, false),
        ("xyxy", false, false, false, true),
    ]
    .into_iter()
    .enumerate()
    {
        added.push(json!({"id": 60_000 + index, "content": content, "lstrip": lstrip,
            "rstrip": rstrip, "single_word": single_word, "normalized": normalized,
            "special": index % 2 == 0}));
    }
    json
}

fn normalized_by(mut json: Value, normalizer: Value) -> Value {
    json["normalizer"] = normalizer;
    json
}

/// Tokenizers by name, and whether they can be cut in ordinary text.
fn tokenizers() -> Vec<(&'static str, Value, bool)> {
    let mut looked_up = byte_level_after(&[split(LLAMA_3)]);
    looked_up["model"]["ignore_merges"] = true.into();
    let deepseek = [
        split(r"\p{N}{1,3}"),
        split(r"[一-龥぀-ゟ゠-ヿ]+"),
        split(
            r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    ];
    let words = json!({"type": "WhitespaceSplit"});
    let mut whitespace = sentencepiece();
    whitespace["normalizer"] = Value::Null;
    whitespace["pre_tokenizer"] = words;
    let mut suffixed = byte_level();
    suffixed["model"]["end_of_word_suffix"] = "</w>".into();
    let mut dropping = byte_level();
    dropping["model"]["dropout"] = json!(0.0);
    let mut fixed = byte_level();
    fixed["pre_tokenizer"] = json!({"type": "FixedLength", "length": 5});
    vec![
        ("byte level", byte_level(), true),
        ("llama 3", looked_up, true),
        ("qwen", normalized_by(byte_level_after(&[split(QWEN)]), json!({"type": "NFC"})), true),
        ("o200k", byte_level_after(&[split(O200K)]), true),
        ("deepseek", byte_level_after(&deepseek), true),
        ("quotes", byte_level_after(&[split(r#""[^"]*"|\S+"#)]), false),
        ("pairs of words", byte_level_after(&[split(r"(\w+ \w+ )+")]), false),
        ("sentencepiece", sentencepiece(), true),
        ("metaspace", metaspace(true, "first"), true),
        ("metaspace, one word", metaspace(false, "always"), true),
        ("white space", whitespace, true),
        ("suffixed", suffixed, true),
        ("no dropout", dropping, true),
        ("word piece", word_piece(), true),
        ("unigram", unigram(), true),
        ("fixed length", fixed, false),
        ("byte level, added", with_added(byte_level()), true),
        ("sentencepiece, added", with_added(sentencepiece()), true),
        (
            "nfkc and strip",
            normalized_by(
                byte_level(),
                json!({"type": "Sequence", "normalizers": [
                {"type": "NFKC"}, {"type": "Strip", "strip_left": true, "strip_right": true},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]}),
            ),
            true,
        ),
    ]
}

/// Parts of random texts.
const PARTS: &[&str] = &[
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\r\n",
    "\t",
    "a",
    "the",
    " the",
    " of",
    "The river",
    ".",
    "...",
    "aaaa",
    "'s",
    "'S",
    "123",
    "4567890",
    "é",
    "e\u{301}",
    "中文",
    "日本語テキスト",
    "👩\u{200d}👩\u{200d}👧",
    "🇩🇪🇫🇷",
    "\u{200b}",
    "\u{a0}",
    "ﬁ",
    "Ω",
    "<s>",
    "</s>",
    "<mask>",
    "<right>",
    " <both> ",
    "river",
    "<|im_start|>",
    "xyxyxy",
    "\"",
    "\"quoted text\"",
    "//",
    "/\n",
    "ABCdef",
    "\0",
    "_",
    "-",
    "▁",
    "<0x0A>",
];

/// Texts with no place, or many odd ones, where they can be cut.
fn texts() -> Vec<(&'static str, String)> {
    let repeated = |text: &str| text.repeat(12_000 / text.len());
    let mut many = String::new();
    let mut random = PythonRandom::new(1);
    while many.len() < 12_000 {
        let times = if random.randint(0, 40) == 0 { random.randint(1, 400) } else { 1 };
        let part = PARTS[random.randint(0, PARTS.len() as u64 - 1) as usize];
        many.push_str(&part.repeat(times as usize));
    }
    let mut numbers = String::new();
    (0..3000).for_each(|number| write!(numbers, "{}", number * 7919).unwrap());
    let spaced = |run: usize| format!("word\n{}\nword {}x ", " ".repeat(run), "\n".repeat(run));
    vec![
        ("sample", SAMPLE[..20_000].to_owned()),
        ("no spaces", SAMPLE[..16_000].replace(char::is_whitespace, "")),
        ("one character", repeated("a")),
        ("capitals", repeated("A") + "b"),
        ("two characters", repeated("ab")),
        ("new lines", repeated("\n")),
        ("spaces", repeated(" ")),
        ("long runs", (0..40).map(|run| spaced(run * 37)).collect()),
        ("slashes", format!("word ....\n{}....{} words. ", repeated("/"), repeated("/"))),
        ("CRLF", SAMPLE[..16_000].replace('\n', "\r\n").replace(". ", ".\r\n\r\n")),
        ("emoji", repeated("👩\u{200d}👩\u{200d}👧🇩🇪")),
        ("flags", repeated("🇩🇪")),
        ("accents", format!("a{}b", repeated("\u{301}\u{323}"))),
        ("chinese", repeated("中文，日本語。")),
        ("digits", numbers),
        ("added tokens", repeated("<mask>  <right>   xyxyxyx <s>river</s> rivers <both> ")),
        ("overlapping tokens", repeated("xy")),
        ("a token after spaces", format!("word {}<mask> {}", repeated(" "), repeated("word "))),
        ("quotes", format!("{} \"{} ", repeated("\"so he said\" "), repeated("and more words "))),
        ("long words", (0..60).map(|len| "z".repeat(len * 7) + " word ").collect()),
        ("everything", many),
        ("little", "a".to_owned()),
        ("nothing", String::new()),
    ]
}

/// All ids by pieces, and the longest text that lay in memory.
fn by_pieces(tokenizer: &Tokenizer, text: &str, piece: usize) -> (Vec<u32>, usize) {
    let (mut ids, mut longest) = (Vec::new(), 0);
    let mut sink = |some: &[u32]| {
        ids.extend_from_slice(some);
        Ok(ControlFlow::Continue(()))
    };
    let mut pieces = Pieces::begin(tokenizer, piece, &Silent, &mut sink).unwrap();
    let mut rest = text;
    while !rest.is_empty() {
        let (part, next) = rest.split_at(rest.ceil_char_boundary(100.min(rest.len())));
        assert!(pieces.push(part).unwrap().is_continue());
        longest = longest.max(pieces.text.len());
        rest = next;
    }
    pieces.finish().unwrap();
    (ids, longest)
}

/// Matches of several characters that follow one another may begin at any of them; those of one character cannot.
#[test]
fn only_literals_of_several_characters_reach_over_their_repetition() {
    for (literal, settled) in [("-", true), ("ab", false)] {
        let split = json!({"type": "Split", "pattern": {"String": literal},
            "behavior": "Isolated", "invert": false});
        let json = byte_level_after(&[split]).to_string();
        let tokenizer = tokenizers::Tokenizer::from_bytes(json.as_bytes()).unwrap();
        let reach = Reach::of(&tokenizer).unwrap();
        assert_eq!(reach.settled_after(&literal.repeat(200)).is_some(), settled, "{literal}");
        assert!(reach.settled_after(&"other words ".repeat(50)).is_some(), "{literal}");
    }
}

#[test]
fn ids_by_pieces_are_those_of_the_text_at_once() {
    let texts = texts();
    for (name, json, cut) in tokenizers() {
        let json = json.to_string();
        let tokenizer = Tokenizer::from_bytes(json.as_bytes(), name).unwrap();
        let plain = tokenizers::Tokenizer::from_bytes(json.as_bytes()).unwrap();
        for (text_name, text) in &texts {
            let expected = plain.encode_fast(&text[..], true).unwrap();
            for piece in [1024, 1500, 4000] {
                let (ids, longest) = by_pieces(&tokenizer, text, piece);
                let differs = ids.iter().zip(expected.get_ids()).position(|(a, b)| a != b);
                assert!(
                    ids == expected.get_ids(),
                    "{name}, {text_name}, pieces of {piece}: token {differs:?} of {} and {}",
                    ids.len(),
                    expected.len()
                );
                if cut && *text_name == "sample" && piece == 4000 {
                    assert!(longest < 4 * piece, "{name} had {longest} bytes of text at a time");
                }
            }
        }
    }
}

/// Which of the texts without ordinary words can be cut, for what is usual.
#[test]
fn odd_texts_are_cut_where_words_or_merges_allow_it() {
    let texts = texts();
    for (name, cut) in [
        ("byte level", &["CRLF", "added tokens", "long words"][..]),
        ("llama 3", &["digits", "CRLF", "long words"]),
        ("sentencepiece", &["no spaces", "digits", "one character", "spaces"]),
        ("word piece", &["CRLF", "chinese"]),
    ] {
        let (_, json, _) = tokenizers().into_iter().find(|(other, ..)| *other == name).unwrap();
        let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes(), name).unwrap();
        for wanted in cut {
            let (_, text) = texts.iter().find(|(text, _)| text == wanted).unwrap();
            let text = text.repeat(3);
            let (_, longest) = by_pieces(&tokenizer, &text, 2000);
            assert!(longest < text.len() / 2, "{name}, {wanted}: {longest} of {}", text.len());
        }
    }
}

#[test]
fn a_text_is_read_no_further_than_its_ids_are_wanted() {
    let tokenizer = Tokenizer::from_bytes(TINY_LLAMA, "tokenizer.json").unwrap();
    let all = tokenizer.encode(SAMPLE, &Silent).unwrap();
    let mut ids = Vec::new();
    let mut sink = |some: &[u32]| {
        ids.extend_from_slice(some);
        Ok(if ids.len() < 500 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    };
    let mut pieces = Pieces::begin(&tokenizer, 2000, &Silent, &mut sink).unwrap();
    let mut read = 0;
    for part in SAMPLE.as_bytes().chunks(100) {
        read += part.len();
        if pieces.push(str::from_utf8(part).unwrap_or("?")).unwrap().is_break() {
            break;
        }
    }
    pieces.finish().unwrap();
    assert!(read < 8000, "{read} bytes were read");
    assert_eq!(ids, all[..ids.len()]);
}

/// Letters of eight scripts, emoji among them, in words of ten.
fn many_scripts(characters: usize) -> String {
    const SCRIPTS: [(u32, u32); 8] = [
        (0xc0, 0x24f),
        (0x391, 0x3a1),
        (0x410, 0x44f),
        (0x627, 0x63a),
        (0x905, 0x939),
        (0x3041, 0x3096),
        (0x4e00, 0x9fa5),
        (0x1f600, 0x1f64f),
    ];
    let mut random = PythonRandom::new(3);
    let mut text = String::new();
    for index in 0..characters {
        let (first, last) = SCRIPTS[(index / 300) % SCRIPTS.len()];
        let code = u32::try_from(random.randint(first.into(), last.into())).unwrap();
        text.push(char::from_u32(code).unwrap());
        if index % 10 == 9 {
            text.push_str([" ", "\n", "。", "  ", ", "][index / 10 % 5]);
        }
    }
    text
}

/// Every file of the program's source, one after another.
fn source_code() -> String {
    let mut files = Vec::new();
    let mut directories = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(directory) = directories.pop() {
        for entry in fs_err::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { directories.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    files.iter().map(|path| fs_err::read_to_string(path).unwrap()).collect()
}

/// At the length that pieces have, with tokenizers as they are published.
#[test]
fn long_texts_of_every_sort_have_the_ids_of_the_text_at_once() {
    let mut models = vec![("tiny-llama", TINY_LLAMA.to_vec())];
    match std::env::var_os("ATOM_SMOLLM2") {
        Some(model) => {
            let path = std::path::Path::new(&model).join("tokenizer.json");
            models.push(("SmolLM2", fs_err::read(path).unwrap()));
        }
        None => eprintln!("skipped: set ATOM_SMOLLM2 to a directory made by tests/smollm2.py"),
    }
    let mut texts = vec![("code", source_code()), ("many scripts", many_scripts(400_000))];
    match std::env::var_os("ATOM_DATA") {
        Some(data) => {
            let path = std::path::Path::new(&data).join("wikitext2/wiki.valid.raw");
            texts.push(("WikiText-2", fs_err::read_to_string(path).unwrap()));
        }
        None => eprintln!("skipped: set ATOM_DATA to a directory that holds wikitext2"),
    }
    for (name, json) in models {
        let tokenizer = Tokenizer::from_bytes(&json, name).unwrap();
        let plain = tokenizers::Tokenizer::from_bytes(&json).unwrap();
        let mut added: Vec<_> = plain.get_added_tokens_decoder().into_iter().collect();
        added.sort_by_key(|(id, _)| *id);
        let words = SAMPLE.split(' ').zip(added.iter().cycle()).enumerate();
        let with_added: String = words
            .map(|(at, (word, (_, token)))| {
                let token = if at % 3 == 0 { &token.content[..] } else { " " };
                format!("{word}{token}")
            })
            .collect();
        let added = ("added tokens", with_added.repeat(1_000_000_usize.div_ceil(with_added.len())));
        for (text_name, text) in texts.iter().chain([&added]) {
            assert!(text.len() > 3 * super::PIECE_BYTES, "{text_name} is too short");
            let (ids, longest) = by_pieces(&tokenizer, text, super::PIECE_BYTES);
            let expected = plain.encode_fast(&text[..], true).unwrap();
            let differs = ids.iter().zip(expected.get_ids()).position(|(a, b)| a != b);
            assert!(ids == expected.get_ids(), "{name}, {text_name}: token {differs:?} differs");
            assert!(
                longest < 3 * super::PIECE_BYTES,
                "{name}, {text_name}: {longest} bytes at a time"
            );
        }
    }
}
