/*! What a GGUF file says of the model and its network: the keys `general.*` and those of the architecture. */

use super::container::{Metadata, Value};
use crate::checkpoint::SourceRecord;
use crate::model::Architecture;
use crate::model::architecture::Biases;
use crate::model::rope::RopeScaling;

/// llama.cpp's number of files whose matrices are mostly `Q4_0`.
const MOSTLY_Q4_0: usize = 2;
/// The version of ggml's blocks.
const QUANTIZATION_VERSION: usize = 2;
/// The most blocks and the most experts that llama.cpp is compiled for.
const MOST_BLOCKS: usize = 512;
const MOST_EXPERTS: usize = 512;

/// llama.cpp's name of a family's architecture. Mistral and Mixtral are Llamas to it.
pub(super) fn architecture_name(architecture: &Architecture) -> Option<&'static str> {
    match architecture.family.as_str() {
        "llama" | "mistral" | "mixtral" => Some("llama"),
        "qwen2" => Some("qwen2"),
        "qwen3" => Some("qwen3"),
        "qwen3_moe" => Some("qwen3moe"),
        _ => None,
    }
}

/// Something of a network that llama.cpp does not compute as the model does: what it is, and what would be right.
pub(super) struct Unsupported {
    pub(super) setting: &'static str,
    pub(super) found: String,
    pub(super) needed: String,
}

/// Everything of a network that llama.cpp's graph of its architecture (src/models/ of llama.cpp) does not compute.
pub(super) fn unsupported(architecture: &Architecture) -> Vec<Unsupported> {
    let Some(name) = architecture_name(architecture) else {
        return vec![Unsupported {
            setting: "model_type",
            found: architecture.family.clone(),
            needed: "llama, mistral, mixtral, qwen2, qwen3 or qwen3_moe".to_owned(),
        }];
    };
    let mut all = Vec::new();
    let mut check = |fits: bool, setting, found: String, needed: String| {
        if !fits {
            all.push(Unsupported { setting, found, needed });
        }
    };
    let is_llama = name == "llama";
    let Biases { attn_out, mlp, .. } = architecture.biases;
    check(
        is_llama || !attn_out,
        "attention_bias",
        "true".into(),
        format!("false: llama.cpp's {name} has no bias of o"),
    );
    let dense = architecture.experts.is_none();
    check(!mlp || (is_llama && dense), "mlp_bias", "true".into(), "false".into());
    let scaling = architecture.common_rope().map(|rope| &rope.scaling);
    let llama3 = matches!(scaling, Some(RopeScaling::Llama3 { .. }));
    let scales = match scaling {
        Some(RopeScaling::None | RopeScaling::Linear(_) | RopeScaling::Llama3 { .. }) => None,
        Some(RopeScaling::Yarn { .. }) => Some("yarn"),
        Some(RopeScaling::LongRope { .. }) => Some("longrope"),
        None => Some("of its own in each block"),
    };
    check(
        scales.is_none(),
        "rope_scaling",
        scales.unwrap_or_default().into(),
        "llama3, linear or none".into(),
    );
    check(
        is_llama || !llama3,
        "rope_scaling",
        "llama3".into(),
        format!("linear or none: llama.cpp's {name} has no other"),
    );
    let blocks = architecture.blocks;
    check(
        blocks <= MOST_BLOCKS,
        "num_hidden_layers",
        blocks.to_string(),
        format!("at most {MOST_BLOCKS}"),
    );
    if let Some(experts) = &architecture.experts {
        check(
            experts.count <= MOST_EXPERTS,
            "num_experts",
            experts.count.to_string(),
            format!("at most {MOST_EXPERTS}"),
        );
        check(
            experts.normalized,
            "norm_topk_prob",
            "false".into(),
            "true: llama.cpp always makes the routing weights of a token add up to one".into(),
        );
        check(
            experts.dense_blocks.is_empty(),
            "mlp_only_layers",
            format!("{} dense blocks", experts.dense_blocks.len()),
            format!("none: llama.cpp's {name} has experts in every block"),
        );
    }
    all
}

/// The tokens for which llama.cpp computes what the model does: it has no sliding window in these architectures.
pub(super) fn context(architecture: &Architecture) -> usize {
    let positions = architecture.positions();
    architecture.sliding_window().map_or(positions, |window| window.min(positions))
}

/// The model's name: that of its repository, if it came from the Hub.
pub(super) fn model_name(source: &SourceRecord) -> &str {
    let hub = source.hub.as_ref().and_then(|hub| hub.repo.rsplit('/').next());
    hub.unwrap_or(&source.name)
}

/// The keys `general.*`.
pub(super) fn general(architecture: &str, source: &SourceRecord) -> Metadata {
    let mut metadata = Metadata::default();
    metadata.text("general.architecture", architecture);
    metadata.text("general.type", "model");
    metadata.text("general.name", model_name(source));
    metadata.text("general.quantized_by", concat!("atom ", env!("CARGO_PKG_VERSION")));
    if let Some(hub) = &source.hub {
        let (organization, name) = hub.repo.split_once('/').unwrap_or(("", &hub.repo));
        metadata.count("general.base_model.count", 1);
        metadata.text("general.base_model.0.name", name);
        metadata.text("general.base_model.0.version", &hub.commit);
        if !organization.is_empty() {
            metadata.text("general.base_model.0.organization", organization);
        }
        let url = format!("https://huggingface.co/{}", hub.repo);
        metadata.text("general.base_model.0.repo_url", url);
    }
    metadata.count("general.file_type", MOSTLY_Q4_0);
    metadata.count("general.quantization_version", QUANTIZATION_VERSION);
    metadata
}

/// The keys of the network, below llama.cpp's name of its architecture.
pub(super) fn network(name: &str, architecture: &Architecture) -> Metadata {
    let mut metadata = Metadata::default();
    let key = |rest: &str| format!("{name}.{rest}");
    let Architecture { hidden, intermediate, blocks, heads, kv_heads, head_dim, .. } =
        *architecture;
    for (rest, count) in [
        ("context_length", context(architecture)),
        ("embedding_length", hidden),
        ("block_count", blocks),
        ("feed_forward_length", intermediate),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("vocab_size", architecture.vocabulary),
    ] {
        metadata.count(key(rest), count);
    }
    let epsilon = Value::F32(architecture.norm_epsilon);
    metadata.add(key("attention.layer_norm_rms_epsilon"), epsilon);
    let rope = architecture.common_rope().expect("`unsupported` refuses blocks that differ");
    metadata.add(key("rope.freq_base"), Value::F32(rope.theta as f32));
    // Llama 3's scaling is a tensor of its own, `rope_freqs.weight`.
    if let RopeScaling::Linear(factor) = rope.scaling {
        metadata.text(key("rope.scaling.type"), "linear");
        metadata.add(key("rope.scaling.factor"), Value::F32(factor as f32));
    }
    if let Some(window) = architecture.sliding_window() {
        metadata.count(key("attention.sliding_window"), window);
    }
    if let Some(experts) = &architecture.experts {
        metadata.count(key("expert_count"), experts.count);
        metadata.count(key("expert_used_count"), experts.per_token);
        metadata.count(key("expert_feed_forward_length"), experts.intermediate);
    }
    metadata
}

#[cfg(test)]
#[path = "metadata_tests.rs"]
mod tests;
