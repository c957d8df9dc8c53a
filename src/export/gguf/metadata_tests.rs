use serde_json::{Value as Json, json};

use super::*;
use crate::checkpoint::HubOrigin;

fn architecture(changes: Json) -> Architecture {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "rope_theta": 50000.0,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    Architecture::from_config(&config).unwrap()
}

fn number(metadata: &Metadata, key: &str) -> u32 {
    match metadata.get(key) {
        Some(Value::U32(number)) => *number,
        other => panic!("{key}: {other:?}"),
    }
}

#[test]
fn a_network_is_said_in_llama_cpps_words() {
    let plain = network("llama", &architecture(json!({ "head_dim": 24 })));
    for (key, expected) in [
        ("context_length", 4096),
        ("embedding_length", 64),
        ("block_count", 2),
        ("feed_forward_length", 96),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 24),
        ("attention.value_length", 24),
        ("rope.dimension_count", 24),
        ("vocab_size", 128),
    ] {
        assert_eq!(number(&plain, &format!("llama.{key}")), expected, "{key}");
    }
    assert_eq!(plain.get("llama.rope.freq_base"), Some(&Value::F32(50000.0)));
    assert_eq!(plain.get("llama.attention.layer_norm_rms_epsilon"), Some(&Value::F32(1e-5)));
    assert_eq!(plain.get("llama.rope.scaling.type"), None);
    assert_eq!(plain.get("llama.expert_count"), None);
    let scaled = architecture(json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } }));
    let scaled = network("llama", &scaled);
    assert_eq!(scaled.get("llama.rope.scaling.type"), Some(&Value::Text("linear".into())));
    assert_eq!(scaled.get("llama.rope.scaling.factor"), Some(&Value::F32(4.0)));
    assert_eq!(number(&scaled, "llama.context_length"), 16384);
}

#[test]
fn a_sliding_window_bounds_the_context() {
    let mistral = architecture(json!({
        "model_type": "mistral", "sliding_window": 1024, "max_position_embeddings": 32768
    }));
    let metadata = network("llama", &mistral);
    assert_eq!(number(&metadata, "llama.context_length"), 1024);
    assert_eq!(number(&metadata, "llama.attention.sliding_window"), 1024);
}

#[test]
fn experts_are_counted() {
    let mixtral = architecture(json!({
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2
    }));
    let metadata = network("llama", &mixtral);
    assert_eq!(number(&metadata, "llama.expert_count"), 4);
    assert_eq!(number(&metadata, "llama.expert_used_count"), 2);
    assert_eq!(number(&metadata, "llama.expert_feed_forward_length"), 96);
    assert!(unsupported(&mixtral).is_empty());
}

#[test]
fn what_llama_cpp_does_not_compute_is_named() {
    let settings = |changes| {
        let found = unsupported(&architecture(changes));
        found.into_iter().map(|unsupported| unsupported.setting).collect::<Vec<_>>()
    };
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024
    });
    let none: [&str; 0] = [];
    let biased = json!({ "attention_bias": true, "mlp_bias": true, "rope_scaling": llama3 });
    assert_eq!(settings(biased), none, "llama.cpp's llama has all of these");
    assert_eq!(settings(json!({ "model_type": "qwen2" })), none);
    assert_eq!(
        settings(json!({ "model_type": "qwen2", "rope_scaling": llama3 })),
        ["rope_scaling"]
    );
    assert_eq!(
        settings(json!({ "model_type": "qwen3", "attention_bias": true })),
        ["attention_bias"]
    );
    let moe = |changes: Json| {
        let mut all = json!({
            "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "norm_topk_prob": true
        });
        for (key, value) in changes.as_object().unwrap() {
            all[key] = value.clone();
        }
        settings(all)
    };
    assert_eq!(moe(json!({})), none);
    assert_eq!(moe(json!({ "norm_topk_prob": false })), ["norm_topk_prob"]);
    assert_eq!(moe(json!({ "mlp_only_layers": [1] })), ["mlp_only_layers"]);
}

#[test]
fn the_source_is_named() {
    let mut source = SourceRecord {
        name: "tiny".into(),
        fingerprint: String::new(),
        bytes: 0,
        hub: None,
        ignored_tensors: Vec::new(),
    };
    let text = |text: &str| Some(Value::Text(text.into()));
    let local = general("llama", &source);
    assert_eq!(local.get("general.name").cloned(), text("tiny"));
    assert_eq!(local.get("general.base_model.count"), None);
    source.hub = Some(HubOrigin {
        repo: "org/Tiny-1B".into(),
        revision: "main".into(),
        commit: "c0ffee".into(),
    });
    let hub = general("llama", &source);
    assert_eq!(hub.get("general.name").cloned(), text("Tiny-1B"));
    assert_eq!(hub.get("general.base_model.0.organization").cloned(), text("org"));
    let url = text("https://huggingface.co/org/Tiny-1B");
    assert_eq!(hub.get("general.base_model.0.repo_url").cloned(), url);
    assert_eq!(number(&hub, "general.file_type"), 2);
}
