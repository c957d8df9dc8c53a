/*! Settings in f32 are written as the decimals that people gave: 0.9, not the 0.8999999761581421 that
it becomes on the way through f64. */

use serde::Serializer;

/// Writes the shortest decimal that reads back as `value`.
pub(crate) fn serialize<S: Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    let decimal = value.to_string().parse().unwrap_or(f64::from(*value));
    serializer.serialize_f64(decimal)
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    #[derive(Serialize)]
    struct Setting {
        #[serde(serialize_with = "super::serialize")]
        clip: f32,
    }

    #[test]
    fn a_setting_is_written_as_it_was_given() {
        for (clip, text) in [(0.9, "0.9"), (0.85, "0.85"), (1.0, "1.0"), (0.01, "0.01")] {
            let value = serde_json::to_value(Setting { clip }).unwrap();
            assert_eq!(value["clip"].to_string(), text);
            assert_eq!(value["clip"].as_f64().unwrap() as f32, clip);
        }
    }
}
