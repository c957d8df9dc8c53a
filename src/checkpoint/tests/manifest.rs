use serde_json::{Value, json};

use crate::Result;
use crate::checkpoint::plan::bits_per_weight;
use crate::checkpoint::{FORMAT_VERSION, Manifest, Provenance, SourceRecord};
use crate::model::Architecture;
use crate::pipeline::plan::plan_network;
use crate::recipe::{Group, Outliers, Recipe};

/// A manifest of a network of two blocks.
pub(super) fn manifest() -> Manifest {
    let config = json!({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
        "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100});
    let architecture = Architecture::from_config(&config).unwrap();
    let recipe = Recipe {
        group: Group::Size(32),
        outliers: Outliers::Count(16),
        ..Recipe::default_recipe()
    };
    let blocks = plan_network(&recipe, &architecture).unwrap();
    Manifest {
        format_version: FORMAT_VERSION,
        tool_version: "0.1.0".to_owned(),
        source: SourceRecord {
            name: "tiny".to_owned(),
            fingerprint: "0".repeat(64),
            bytes: 100,
            hub: None,
            ignored_tensors: Vec::new(),
        },
        calibration: Provenance {
            dataset: "sample".to_owned(),
            sha256: "0".repeat(64),
            samples: 4,
            seq_len: 64,
            seed: 0,
            sets: Vec::new(),
        },
        kv: recipe.kv(),
        recipe,
        bits_per_weight: bits_per_weight(&blocks),
        distillation: None,
        blocks,
    }
}

fn content(manifest: &Manifest) -> Value {
    serde_json::to_value(manifest).unwrap()
}

fn read(content: &Value) -> Result<Manifest> {
    Manifest::parse(content)
}

#[test]
fn a_manifest_is_read_as_it_was_written() {
    let manifest = manifest();
    let text = content(&manifest).to_string();
    assert_eq!(read(&serde_json::from_str(&text).unwrap()).unwrap(), manifest);
}

#[test]
fn fields_out_of_range_and_of_other_types_are_named() {
    for (pointer, value, part) in [
        ("/kv/bits", json!(0), "`kv`: bits is 0"),
        ("/kv/bits", json!(-1), "invalid value"),
        ("/kv/bits", json!(8), "`kv` is not what `recipe` says"),
        ("/kv/clip", json!(-1), "`kv`: clip is -1"),
        ("/kv/clip", json!("1"), "invalid type"),
        ("/kv/after_rope", json!(false), "`kv`: center needs after_rope"),
        ("/recipe/bits", json!(5), "`recipe`: bits is 5"),
        ("/recipe/group", json!(7), "multiple of 16"),
        ("/bits_per_weight", json!(-4.0), "`bits_per_weight` is -4"),
        ("/bits_per_weight", json!(null), "invalid type"),
        ("/blocks", json!({}), "invalid type"),
        ("/source", json!([]), "invalid"),
        ("/calibration/samples", json!(-3), "invalid value"),
        ("/format_version", json!(2), "`format_version` is 2"),
    ] {
        let mut content = content(&manifest());
        *content.pointer_mut(pointer).unwrap() = value;
        let error = read(&content).unwrap_err().to_string();
        assert!(error.contains(part), "{pointer}: {error}");
    }
    for field in ["kv", "recipe", "blocks", "source", "calibration", "tool_version"] {
        let mut content = content(&manifest());
        content.as_object_mut().unwrap().remove(field);
        let error = read(&content).unwrap_err().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
}
