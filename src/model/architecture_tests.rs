//! What is read of `config.json`, and what is refused.

use super::*;
use crate::model::rope::RopeScaling;
use serde_json::json;

fn config() -> Value {
    json!({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
           "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100})
}

fn plain(theta: f64) -> Rope {
    Rope { theta, scaling: RopeScaling::None, share: 1.0, interleaved: false }
}

#[test]
fn fields_fall_back_as_in_the_models_own_code() {
    let architecture = Architecture::from_config(&config()).unwrap();
    assert_eq!((architecture.kv_heads, architecture.head_dim), (4, 16));
    assert_eq!(architecture.positions(), 2048);
    assert_eq!(
        architecture.attention,
        vec![BlockAttention { rope: Some(plain(10_000.0)), window: None }; 2]
    );
    assert!(!architecture.tied);
}

#[test]
fn unknown_networks_are_refused_by_name() {
    for (key, value, part) in [
        ("model_type", json!("gpt2"), "`gpt2`"),
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("hidden_act", json!("gelu"), "hidden_act"),
        ("hidden_size", json!(null), "hidden_size"),
        ("num_key_value_heads", json!(3), "evenly"),
        ("rope_scaling", json!({"rope_type": "dynamic", "factor": 4.0}), "\"dynamic\""),
        ("rope_scaling", json!({"rope_type": "linear"}), "`rope_scaling.factor` is missing"),
    ] {
        let mut config = config();
        config[key] = value;
        let error = Architecture::from_config(&config).unwrap_err();
        assert!(error.to_string().contains(part), "{key}: {error}");
    }
}

#[test]
fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
    let mut config = config();
    config["rope_theta"] = json!(500_000.0);
    config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let network = Architecture::from_config(&config).unwrap();
    let scaled = network.common_rope().unwrap().frequencies(128, 1);
    let plain = plain(500_000.0).frequencies(128, 1);
    assert_eq!(scaled[0], plain[0]);
    assert_eq!(scaled[63], plain[63] / 8.0);
    assert!(scaled.windows(2).all(|pair| pair[0] > pair[1]));
}

#[test]
fn families_say_what_their_blocks_have() {
    let with = |changes: Value| {
        let mut config = config();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Architecture::from_config(&config)
    };
    let qwen2 = with(json!({"model_type": "qwen2", "sliding_window": 32})).unwrap();
    assert_eq!(qwen2.biases, Biases { attn_in: true, ..Biases::default() });
    assert_eq!((qwen2.sliding_window(), qwen2.qk_norm), (None, QkNorm::None));
    let sliding = json!({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 32,
        "max_window_layers": 1});
    let windows =
        |network: Architecture| network.attention.iter().map(|block| block.window).collect();
    let later: Vec<_> = windows(with(sliding.clone()).unwrap());
    assert_eq!(later, [None, Some(32)]);
    for (whole, window) in [(0, Some(32)), (2, None)] {
        let mut changed = sliding.clone();
        changed["max_window_layers"] = json!(whole);
        assert_eq!(with(changed).unwrap().sliding_window(), window);
    }
    let mistral = with(json!({"model_type": "mistral", "sliding_window": 16})).unwrap();
    assert_eq!((mistral.sliding_window(), mistral.experts), (Some(16), None));
    let biased = with(json!({"attention_bias": true, "mlp_bias": true})).unwrap();
    let Biases { attn_in, attn_out, mlp, .. } = biased.biases;
    assert_eq!([attn_in, attn_out, mlp], [true; 3]);

    let experts =
        json!({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2});
    let mixtral = with(experts).unwrap();
    let experts = mixtral.experts_of(1).unwrap();
    assert_eq!((experts.count, experts.intermediate, experts.normalized), (4, 128, true));
    let mut sparse = json!({"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "norm_topk_prob": true, "decoder_sparse_step": 2});
    let qwen = with(sparse.clone()).unwrap();
    assert!(qwen.qk_norm == QkNorm::PerHead && qwen.experts_of(0).is_none());
    assert_eq!(qwen.experts_of(1).unwrap().intermediate, 24);
    sparse["num_experts_per_tok"] = json!(9);
    assert!(with(sparse).unwrap_err().to_string().contains("9 of 8"));
}

#[test]
fn numbers_that_contradict_each_other_are_refused() {
    for (key, value, part) in [
        ("head_dim", json!(15), "head_dim 15 is odd"),
        ("hidden_size", json!(66), "no multiple of it"),
        ("is_causal", json!(false), "is_causal"),
        ("per_layer_config", json!({}), "per_layer_config"),
        ("rms_norm_eps", json!(-1e-6), "zero or more"),
    ] {
        let mut config = config();
        config[key] = value;
        let error = Architecture::from_config(&config).unwrap_err();
        assert!(error.to_string().contains(part), "{key}: {error}");
    }
    let mut config = config();
    config["is_causal"] = json!(true);
    config["rms_norm_eps"] = json!(0.0);
    assert_eq!(Architecture::from_config(&config).unwrap().norm_epsilon, 0.0);
}

#[test]
fn tables_are_the_cosines_and_sines_of_positions_times_frequencies() {
    let mut config = config();
    config["rope_scaling"] = json!({"rope_type": "linear", "factor": 4.0});
    let network = Architecture::from_config(&config).unwrap();
    assert_eq!(network.positions(), 4 * 2048);
    let [cos, sin] = network.common_rope().unwrap().tables(network.head_dim, 5);
    assert_eq!((cos.len(), sin.len()), (5 * 8, 5 * 8));
    for position in 0..5 {
        for pair in 0..8 {
            let angle = position as f64 / 4.0 / 10_000f64.powf(pair as f64 / 8.0);
            let at = position * 8 + pair;
            assert!((f64::from(cos[at]) - angle.cos()).abs() < 1e-6, "{position}, {pair}");
            assert!((f64::from(sin[at]) - angle.sin()).abs() < 1e-6, "{position}, {pair}");
        }
    }
}

#[test]
fn windows_slide_over_the_blocks_that_are_named() {
    let with = |changes: Value| {
        let mut config = config();
        config["model_type"] = json!("qwen2");
        config["use_sliding_window"] = json!(true);
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Architecture::from_config(&config).map(|network| network.sliding_window())
    };
    let sliding = ["sliding_attention"; 2];
    assert_eq!(with(json!({"layer_types": sliding})).unwrap(), Some(4096));
    assert_eq!(with(json!({"layer_types": ["full_attention", "attention"]})).unwrap(), None);
    let wide =
        |window: u64| with(json!({"layer_types": sliding, "sliding_window": window})).unwrap();
    assert_eq!((wide((1 << 30) - 1), wide(1 << 30)), (Some((1 << 30) - 1), None));
    for (changes, part) in [
        (json!({"layer_types": sliding, "sliding_window": null}), "give no window"),
        (json!({"layer_types": sliding, "use_sliding_window": false}), "give no window"),
        (json!({"layer_types": ["sliding_attention"]}), "1 entries for 2 blocks"),
        (json!({"layer_types": ["conv", "conv"]}), "layer_types"),
        (json!({"max_window_layers": null}), "max_window_layers"),
    ] {
        let error = with(changes).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
