use std::collections::HashSet;

use super::kinds::{Unused, is_buffer, kind_of};
use super::network;
use crate::hub;
use crate::model::Architecture;
use crate::progress::Silent;

#[test]
fn names_decide_the_kinds() {
    let source = hub::tiny_llama().unwrap();
    let architecture = Architecture::from_config(source.config()).unwrap();
    let used: HashSet<String> = source.names().map(str::to_owned).collect();
    let layer = |layer: usize, rest: &str| format!("model.layers.{layer}.{rest}");
    for (name, kind) in [
        (layer(0, "self_attn.q_proj.bias"), Unused::Bias),
        (layer(3, "mlp.down_proj.bias"), Unused::Bias),
        (layer(0, "input_layernorm.bias"), Unused::Bias),
        ("lm_head.bias".to_owned(), Unused::Bias),
        (layer(4, "self_attn.q_proj.weight"), Unused::Layer),
        (layer(4, "self_attn.q_proj.bias"), Unused::Layer),
        (layer(4, "eh_proj.weight"), Unused::Prediction),
        ("mtp.layers.0.input_layernorm.weight".to_owned(), Unused::Prediction),
        (layer(0, "self_attn.q_norm.weight"), Unused::Norm),
        (layer(0, "pre_feedforward_layernorm.weight"), Unused::Norm),
        ("score.weight".to_owned(), Unused::Classifier),
        ("v_head.summary.weight".to_owned(), Unused::Classifier),
        (layer(0, "mlp.up_proj.weight_scale_inv"), Unused::Quantized),
        (layer(0, "mlp.up_proj.weight_scale"), Unused::Quantized),
        (layer(0, "self_attn.k_scale"), Unused::Quantized),
        (layer(0, "mlp.up_proj.qweight"), Unused::Quantized),
        (layer(0, "mlp.up_proj.qzeros"), Unused::Quantized),
        (layer(0, "mlp.up_proj.g_idx"), Unused::Quantized),
        (layer(0, "mlp.up_proj.weight.absmax"), Unused::Quantized),
        (layer(0, "mlp.up_proj.weight.quant_state.bitsandbytes__nf4"), Unused::Quantized),
        (layer(0, "mlp.up_proj.SCB"), Unused::Quantized),
        (layer(0, "mlp.up_proj.lora_A.weight"), Unused::Adapter),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight".to_owned(), Unused::Adapter),
        (layer(0, "mlp.up_proj.base_layer.weight"), Unused::Adapter),
        ("layers.0.attention.wq.weight".to_owned(), Unused::Meta),
        ("tok_embeddings.weight".to_owned(), Unused::Meta),
        (layer(0, "mlp.experts.gate_up_proj"), Unused::FusedExperts),
        (layer(0, "mlp.gate_up_proj.weight"), Unused::FusedProjections),
        (layer(0, "self_attn.qkv_proj.weight"), Unused::FusedProjections),
        (layer(0, "mlp.shared_expert.up_proj.weight"), Unused::Experts),
        (layer(0, "block_sparse_moe.gate.weight"), Unused::Experts),
        ("vision_tower.encoder.weight".to_owned(), Unused::Modality),
        ("model.visual.blocks.0.attn.qkv.weight".to_owned(), Unused::Modality),
        ("extra".to_owned(), Unused::Other),
        ("layers".to_owned(), Unused::Other),
        ("".to_owned(), Unused::Other),
    ] {
        assert_eq!(kind_of(&source, &architecture, &used, &name), kind, "{name}");
    }
}

#[test]
fn only_buffers_change_nothing() {
    for (name, expected) in [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", true),
        ("model.rotary_emb.inv_freq", true),
        ("rotary_emb.inv_freq", true),
        ("model.layers.0.attn.masked_bias", true),
        ("model.layers.0.self_attn.masked_bias", true),
        ("model.layers.0.rotary_emb.inv_freq.weight", false),
        ("model.layers.0.my_rotary_emb.inv_freq", false),
        ("model.layers.0.self_attn.q_proj.bias", false),
    ] {
        assert_eq!(is_buffer(name), expected, "{name}");
    }
}

#[test]
fn the_bundled_model_is_accounted_for_without_a_warning() {
    let source = hub::tiny_llama().unwrap();
    let found = network(&source, &Silent).unwrap();
    assert!(found.warnings.is_empty() && found.ignored.is_empty(), "{found:?}");
    assert_eq!(found.architecture, Architecture::from_config(source.config()).unwrap());
    let error = network(&source.ignoring(vec!["*.bias".to_owned()]), &Silent).unwrap_err();
    assert_eq!(error.message(), "--ignore-tensors *.bias fits no tensor of the bundled tiny-llama");
}
