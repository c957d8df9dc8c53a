/*! Where two JSON values differ. */

use serde_json::{Map, Value};

/// A key whose values differ.
pub(crate) struct Difference {
    /// The key, with those of the objects around it: `recipe.bits`.
    pub(crate) key: String,
    /// Both values, cut where they are long.
    pub(crate) values: [String; 2],
}

/// The keys whose values differ.
pub(crate) fn differences(one: &Value, other: &Value) -> Vec<Difference> {
    let mut found = Vec::new();
    compare("", one, other, &mut found);
    found
}

fn compare(key: &str, one: &Value, other: &Value, found: &mut Vec<Difference>) {
    if let (Value::Object(one), Value::Object(other)) = (one, other) {
        let keys = one.keys().chain(other.keys().filter(|key| !one.contains_key(*key)));
        for name in keys {
            let at = |map: &Map<String, Value>| map.get(name).cloned().unwrap_or_default();
            let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            compare(&key, &at(one), &at(other), found);
        }
    } else if one != other {
        found.push(Difference { key: key.to_owned(), values: [one, other].map(short) });
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}
