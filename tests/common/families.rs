//! The checkpoints of tests/families as sources, with a tokenizer and text.

use std::path::Path;

use fs_err as fs;
use serde_json::{Value, json};

use super::Home;

/// Tokens of the checkpoints in tests/families.
const VOCABULARY: usize = 96;

/// A tokenizer of so many words, each a token.
fn tokenizer() -> Value {
    let vocabulary: serde_json::Map<String, Value> =
        (0..VOCABULARY).map(|token| (format!("w{token}"), json!(token))).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    })
}

/// Words in no order.
fn text(words: usize, mut seed: u32) -> String {
    let word = |_| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        format!("w{}", seed as usize / 65536 % VOCABULARY)
    };
    (0..words).map(word).collect::<Vec<_>>().join(" ")
}

/// A home with every family's checkpoint as a source, and text for them; their names.
pub(crate) fn home() -> (Home, Vec<String>) {
    let home = Home::new();
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families");
    let names = super::names(&families);
    for name in &names {
        let to = home.path(name);
        fs::create_dir_all(&to).unwrap();
        for file in super::names(&families.join(name)) {
            fs::copy(families.join(name).join(&file), to.join(&file)).unwrap();
        }
        fs::write(to.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    }
    fs::write(home.path("calibration.txt"), text(4000, 1)).unwrap();
    fs::write(home.path("evaluation.txt"), text(400, 2)).unwrap();
    (home, names)
}
