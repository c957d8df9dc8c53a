use super::*;
use crate::progress::Silent;

const TINY_LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama/tokenizer.json");

fn tiny_llama() -> Tokenizer {
    Tokenizer::from_bytes(&fs_err::read(TINY_LLAMA).unwrap(), TINY_LLAMA).unwrap()
}

/// Ids of single bytes by their characters, as byte-level BPE writes them.
fn byte_level() -> Tokenizer {
    let mut vocabulary = serde_json::Map::new();
    for byte in 0..=255u32 {
        let shown = match byte {
            33..=126 | 161..=172 | 174..=255 => byte,
            0..=32 => 256 + byte,
            127..=160 => 256 + 33 + byte - 127,
            _ => 256 + 33 + 34,
        };
        vocabulary.insert(char::from_u32(shown).unwrap().to_string(), byte.into());
    }
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [] }
    });
    Tokenizer::from_bytes(json.to_string().as_bytes(), "bytes.json").unwrap()
}

/// The pieces that come of each id, and what is left.
fn pieces(tokenizer: &Tokenizer, before: &[u32], ids: &[u32]) -> (Vec<String>, String) {
    let mut detokenizer = Detokenizer::after(tokenizer, before).unwrap();
    let pieces = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
    (pieces, detokenizer.finish().unwrap())
}

#[test]
fn no_piece_ends_within_a_character() {
    let tokenizer = byte_level();
    let text = "aé 漢字 🦀! é";
    let ids: Vec<u32> = text.bytes().map(u32::from).collect();
    let (found, rest) = pieces(&tokenizer, &[], &ids);
    assert_eq!(found.concat(), text);
    assert_eq!(rest, "");
    assert!(found.iter().all(|piece| piece.chars().count() <= 1), "{found:?}");
    // The crab's four bytes come with the last of them.
    let crab = text.find('🦀').unwrap();
    assert_eq!(found[crab..crab + 4], ["", "", "", "🦀"]);
}

#[test]
fn what_never_ends_is_returned_at_the_end_or_after_a_while() {
    let tokenizer = byte_level();
    let (found, rest) = pieces(&tokenizer, &[], &[104, 0xf0, 0x9f]);
    assert_eq!(found, ["h", "", ""]);
    assert_eq!(rest, "\u{fffd}");
    // A stray byte waits for the next character only.
    let (found, rest) = pieces(&tokenizer, &[], &[0xff, 104]);
    assert_eq!((found.concat() + &rest).as_str(), "\u{fffd}h");
    let stray = vec![0x80; 300];
    let (found, rest) = pieces(&tokenizer, &[], &stray);
    assert!(!found.concat().is_empty());
    assert_eq!((found.concat() + &rest).chars().count(), 300);
}

#[test]
fn a_continuation_has_the_text_that_the_entire_text_has() {
    let tokenizer = tiny_llama();
    let text = "The first of all the long lines , and a second one . \n And then 漢 , more 🦀 .";
    let ids = tokenizer.encode(text, &Silent).unwrap();
    let entire = tokenizer.decode(&ids).unwrap();
    for prompt in [0, 1, 2, 5, ids.len() - 1] {
        let (found, rest) = pieces(&tokenizer, &ids[..prompt], &ids[prompt..]);
        let before = tokenizer.decode(&ids[..prompt]).unwrap();
        let before = before.trim_end_matches('\u{fffd}');
        assert_eq!(format!("{before}{}{rest}", found.concat()), entire, "after {prompt}");
    }
}
