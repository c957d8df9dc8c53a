//! How large a network may be, to the last one that may.

use super::*;
use serde_json::{Value, json};

fn network(changes: &Value) -> Result<Architecture> {
    let mut config = json!({"model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10, "num_local_experts": 4});
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    Architecture::from_config(&config)
}

#[test]
fn all_weights_are_counted() {
    let attention = 2 * (4 + 2) * 2 * 8;
    let experts = 4 * (3 * 16 + 1) * 8;
    assert_eq!(network(&json!({})).unwrap().weights(), 2 * 10 * 8 + 2 * (attention + experts));
    let dense = network(&json!({"model_type": "llama"})).unwrap();
    assert_eq!(dense.weights(), 2 * 10 * 8 + 2 * (attention + 3 * 16 * 8));
}

#[test]
fn a_network_at_the_bounds_is_read_and_one_beyond_is_not() {
    let at = json!({"num_hidden_layers": 4, "num_local_experts": 1 << 16});
    network(&at).unwrap();
    let beyond = json!({"num_hidden_layers": 5, "num_local_experts": 1 << 16});
    let error = network(&beyond).unwrap_err();
    assert!(error.message().contains("5 blocks of 65536 experts"), "{error}");
    // Embedding and head alone: 2^49 weights, then 2^50 and the blocks.
    network(&json!({"vocab_size": 1u64 << 31, "hidden_size": 1 << 17})).unwrap();
    let error = network(&json!({"vocab_size": 1u64 << 31, "hidden_size": 1 << 18})).unwrap_err();
    assert!(error.message().contains("is larger than this version reads"), "{error}");
}

#[test]
fn blocks_are_counted_by_the_names_of_tensors() {
    let network = network(&json!({})).unwrap();
    let check = |names: &[&str]| {
        network.check_blocks(names.iter().copied(), "f").map_err(|error| error.to_string())
    };
    assert_eq!(check(&["model.layers.0.a", "layers.1.b", "lm_head.weight"]), Ok(()));
    for (names, stored) in [
        (&["model.layers.0.a"][..], 1),
        (&["model.layers.2.a", "model.layers.0.a"], 3),
        (&["vision.layers.1.a", "model.layers.x.a"], 0),
    ] {
        let expected =
            format!("f: `num_hidden_layers` is 2, but the weights are those of {stored} blocks");
        assert_eq!(check(names), Err(expected));
    }
}
