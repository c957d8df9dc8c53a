/*! Ratios in files: an f32 written with the digits a person gave it, 0.9 and not 0.8999999761581421,
whatever the format. Read back as f32, it is the same number. */

use serde::Serializer;

/// Serializes `ratio` as the f64 of its shortest decimal form.
pub fn serialize<S: Serializer>(ratio: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(ratio.to_string().parse().expect("Display writes what parse reads"))
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Held(#[serde(serialize_with = "super::serialize")] f32);

    #[test]
    fn a_ratio_keeps_its_digits_and_its_value() {
        for ratio in [0.9, 0.85, 0.01, 1.0, 1.0 / 3.0, f32::MIN_POSITIVE] {
            let value = serde_json::to_value(Held(ratio)).unwrap();
            assert_eq!(serde_json::from_value::<Held>(value).unwrap(), Held(ratio));
        }
        assert_eq!(serde_json::to_value(Held(0.85)).unwrap().to_string(), "0.85");
    }
}
