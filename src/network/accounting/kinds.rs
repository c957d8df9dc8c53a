/*! Classifies by name the tensors that a network does not use. */

use std::collections::HashSet;

use super::HEAD;
use crate::checkpoint::Source;
use crate::model::Architecture;
use crate::model::sites::EMBEDDING;

/// The kind of a tensor that the network does not use. The first kinds explain the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Unused {
    /// Part of an adapter: LoRA and its relatives.
    Adapter,
    /// Codes, scales or zero points of quantized weights or caches.
    Quantized,
    /// A weight under the name of Meta's own checkpoints.
    Meta,
    /// All experts of a block in one tensor.
    FusedExperts,
    /// Several projections in one tensor.
    FusedProjections,
    /// A layer of multi-token prediction.
    Prediction,
    /// A layer beyond those that the configuration counts.
    Layer,
    /// Vision, audio, and what connects them with the text network.
    Modality,
    /// The head of a classifier or a reward model.
    Classifier,
    /// A bias of a linear or norm that has none in the network.
    Bias,
    /// A norm that the family does not have.
    Norm,
    /// Experts or a router in a network without.
    Experts,
    /// Anything else.
    Other,
}

/// Parts of names of adapters.
const ADAPTERS: &[&str] =
    &["lora_", "ia3_", "modules_to_save", "base_layer", "magnitude_vector", "vera_"];
/// Ends of names of codes, scales and zero points.
const QUANTIZED: &[&str] = &[
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".scales",
    ".zeros",
    "_scale",
    "_scales",
    "_scale_inv",
    "_zero_point",
    ".weight_packed",
    ".weight_shape",
    ".weight_g_idx",
    ".weight_format",
    ".SCB",
    ".absmax",
    ".nested_absmax",
    ".quant_map",
    ".nested_quant_map",
    "_blocks",
    ".biases",
    ".qscale",
    ".codebooks",
];
/// Modules of Meta's own checkpoints.
const META: &[&str] =
    &["tok_embeddings", "wq", "wk", "wv", "wo", "attention_norm", "ffn_norm", "feed_forward"];
/// Modules of vision and audio parts.
const MODALITIES: &[&str] = &[
    "vision_tower",
    "vision_model",
    "visual",
    "vision",
    "vision_encoder",
    "vit",
    "audio_tower",
    "audio_encoder",
    "multi_modal_projector",
    "mm_projector",
    "connector",
    "image_newline",
    "patch_merger",
    "embed_vision",
    "embed_audio",
    "vision_language_adapter",
];
/// Modules of several projections.
const FUSED_PROJECTIONS: &[&str] = &[
    "qkv_proj",
    "query_key_value",
    "Wqkv",
    "wqkv",
    "c_attn",
    "W_pack",
    "qkv",
    "kv_proj",
    "gate_up_proj",
];
/// First modules of heads of classifiers and reward models.
const CLASSIFIERS: &[&str] =
    &["score", "classifier", "v_head", "value_head", "qa_outputs", "reward_head", "summary"];
/// Modules of multi-token prediction.
const PREDICTION: &[&str] =
    &["mtp", "mtp_block", "mtp_layers", "nextn", "eh_proj", "enorm", "hnorm", "shared_head"];
/// Ends of names of tensors with all experts of a block.
const FUSED_EXPERTS: &[&str] =
    &["experts.gate_up_proj", "experts.down_proj", "experts.up_proj", "experts.gate_proj"];

/// Whether a tensor is a buffer that the families' own code recomputes and never reads: RoPE's
/// frequencies and tables, the constant of a causal mask.
pub(super) fn is_buffer(stored: &str) -> bool {
    const BUFFERS: [&str; 5] = [
        "rotary_emb.inv_freq",
        "rotary_emb.original_inv_freq",
        "rotary_emb.cos_cached",
        "rotary_emb.sin_cached",
        "attn.masked_bias",
    ];
    BUFFERS.iter().any(|buffer| {
        stored.strip_suffix(buffer).is_some_and(|rest| {
            // `self_attn.` and `attn.` alike.
            rest.is_empty() || rest.ends_with('.') || rest.ends_with("self_")
        })
    })
}

/// The kind of the tensor that is stored under this name.
pub(super) fn kind_of(
    source: &Source,
    architecture: &Architecture,
    used: &HashSet<String>,
    stored: &str,
) -> Unused {
    let named = by_name(stored);
    if matches!(
        named,
        Some(Unused::Adapter | Unused::Quantized | Unused::Meta | Unused::Prediction)
    ) {
        return named.unwrap_or(Unused::Other);
    }
    if layer_of(source, stored).is_some_and(|layer| layer >= architecture.blocks) {
        return Unused::Layer;
    }
    if let Some(named) = named {
        return named;
    }
    let weight = |bias: &str| format!("{bias}.weight");
    if stored.strip_suffix(".bias").is_some_and(|stem| {
        used.contains(&weight(stem)) || weight(stem) == source.stored_name(HEAD)
    }) {
        return Unused::Bias;
    }
    let module = module_of(stored);
    if module.contains("norm") {
        return Unused::Norm;
    }
    if stored.contains(".experts.") || stored.contains("expert") || stored.contains("sparse_moe") {
        return Unused::Experts;
    }
    Unused::Other
}

/// Whether a tensor belongs to the blocks that predict further tokens, where the configuration says that there are some.
pub(super) fn predicts(
    source: &Source,
    architecture: &Architecture,
    stored: &str,
    kind: Unused,
) -> bool {
    let counted = architecture.blocks..architecture.blocks + architecture.prediction_blocks;
    match (kind, layer_of(source, stored)) {
        (Unused::Prediction | Unused::Layer, Some(layer)) if counted.contains(&layer) => true,
        (Unused::Prediction, _) => architecture.prediction_blocks > 0,
        _ => false,
    }
}

/// The kind, where the name alone decides it.
fn by_name(stored: &str) -> Option<Unused> {
    let ends = |ends: &[&str]| ends.iter().any(|end| stored.ends_with(end));
    let has = |parts: &[&str]| parts.iter().any(|part| stored.contains(part));
    let part = |names: &[&str]| stored.split('.').any(|part| names.contains(&part));
    Some(match () {
        () if has(ADAPTERS) => Unused::Adapter,
        () if ends(QUANTIZED) || has(&[".quant_state."]) => Unused::Quantized,
        () if part(PREDICTION) => Unused::Prediction,
        () if part(MODALITIES) => Unused::Modality,
        () if part(META) => Unused::Meta,
        () if ends(FUSED_EXPERTS) => Unused::FusedExperts,
        () if part(FUSED_PROJECTIONS) => Unused::FusedProjections,
        () if stored.split('.').next().is_some_and(|first| CLASSIFIERS.contains(&first)) => {
            Unused::Classifier
        }
        () => return None,
    })
}

/// The number of the layer that a tensor belongs to.
pub(super) fn layer_of(source: &Source, stored: &str) -> Option<usize> {
    let embedding = source.stored_name(EMBEDDING);
    let body = embedding.strip_suffix("embed_tokens.weight")?;
    let rest = stored.strip_prefix(body)?.strip_prefix("layers.")?;
    rest.split('.').next()?.parse().ok()
}

/// The last but one part of a name: `q_proj` of `model.layers.0.self_attn.q_proj.bias`.
pub(super) fn module_of(stored: &str) -> &str {
    stored.rsplit('.').nth(1).unwrap_or(stored)
}
