/*! The report of `atom bench`: whatever figures its rows name. */

use serde_json::Value;

use super::Report;
use super::layout::{Facts, Side, Table};
use crate::bench::BenchOutcome;

impl Report for BenchOutcome {
    fn text(&self) -> String {
        // Columns in the order in which rows first name them.
        let mut keys: Vec<&str> = Vec::new();
        for key in self.rows.iter().flat_map(|row| row.keys()) {
            if !keys.contains(&key.as_str()) {
                keys.push(key);
            }
        }
        let is_number = |key: &str| {
            self.rows.iter().filter_map(|row| row.get(key)).all(|value| !value.is_string())
        };
        let mut table = Table::new(
            keys.iter().map(|key| (*key, if is_number(key) { Side::Right } else { Side::Left })),
        );
        for row in &self.rows {
            table
                .row(keys.iter().map(|key| row.get(*key).map_or_else(String::new, cell)).collect());
        }
        if self.facts.is_empty() {
            return table.text();
        }
        let mut facts = Facts::default();
        for (name, value) in &self.facts {
            facts.add(name, cell(value));
        }
        format!("{}\n{}", table.text(), facts.text())
    }
}

/// Fractions get the digits that a repeated measurement would confirm.
pub(super) fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => {
            let fraction = number.as_f64().unwrap_or(f64::NAN);
            let digits = if fraction.abs() < 10.0 { 3 } else { 1 };
            format!("{fraction:.digits$}")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_become_an_aligned_table() {
        let row = |value: Value| value.as_object().unwrap().clone();
        let outcome = BenchOutcome {
            rows: vec![
                row(json!({ "name": "f32 product", "m": 2048, "gflops": 141.237, "ratio": 0.98 })),
                row(
                    json!({ "name": "w4a4", "m": 64, "gflops": 1022.0, "ratio": null, "note": "x" }),
                ),
            ],
            facts: row(json!({ "device": "cuda:0", "plain read TB/s": 4.2 })),
        };
        assert_eq!(
            outcome.text(),
            "\
name            m  gflops  ratio  note
f32 product  2048   141.2  0.980
w4a4           64  1022.0      -  x

device           cuda:0
plain read TB/s  4.200
"
        );
        assert_eq!(serde_json::to_value(&outcome).unwrap()["rows"][0]["m"], 2048);
    }
}
