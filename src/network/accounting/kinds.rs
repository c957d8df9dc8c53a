/*! What tensors are that a network does not use, told from their names, and what to do about each kind. */

use std::collections::{BTreeSet, HashSet};

use super::{HEAD, counted};
use crate::Error;
use crate::checkpoint::{Source, foreign};
use crate::model::Architecture;
use crate::model::sites::EMBEDDING;

/// What a tensor is that the network does not use. The first kinds explain the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Unused {
    /// Part of an adapter: LoRA and its relatives.
    Adapter,
    /// Codes, scales or zero points of quantized weights or caches.
    Quantized,
    /// Under the names of Meta's own checkpoints.
    Meta,
    /// All experts of a block in one tensor.
    FusedExperts,
    /// Several projections in one tensor.
    FusedProjections,
    /// Layers that predict more than the next token.
    Prediction,
    /// A layer beyond those that the configuration counts.
    Layer,
    /// Vision, audio, and what joins them with the text network.
    Modality,
    /// The head of a classifier or a reward model.
    Classifier,
    /// A bias of a linear or a norm that is in the network without one.
    Bias,
    /// A norm that the family does not have.
    Norm,
    /// Experts or a router in a network without.
    Experts,
    /// Anything else.
    Other,
}

/// Tensors of one kind, by stored name.
pub(super) struct Group<'a> {
    pub(super) kind: Unused,
    pub(super) names: Vec<&'a str>,
}

/// Whether a tensor is a buffer that the families' own code computes again and never reads: RoPE's
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

/// What the tensor stored under this name is.
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

/// The kinds that a name alone gives away.
fn by_name(stored: &str) -> Option<Unused> {
    let ends = |ends: &[&str]| ends.iter().any(|end| stored.ends_with(end));
    let has = |parts: &[&str]| parts.iter().any(|part| stored.contains(part));
    let part = |names: &[&str]| stored.split('.').any(|part| names.contains(&part));
    let adapters = ["lora_", "ia3_", "modules_to_save", "base_layer", "magnitude_vector", "vera_"];
    let scales = [
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
    let meta =
        ["tok_embeddings", "wq", "wk", "wv", "wo", "attention_norm", "ffn_norm", "feed_forward"];
    let modality = [
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
    let fused = [
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
    let classifier =
        ["score", "classifier", "v_head", "value_head", "qa_outputs", "reward_head", "summary"];
    Some(match () {
        () if has(&adapters) => Unused::Adapter,
        () if ends(&scales) || has(&[".quant_state."]) => Unused::Quantized,
        () if part(&["mtp", "mtp_block", "nextn", "eh_proj", "enorm", "hnorm", "shared_head"]) => {
            Unused::Prediction
        }
        () if part(&modality) => Unused::Modality,
        () if part(&meta) => Unused::Meta,
        () if ends(&[
            "experts.gate_up_proj",
            "experts.down_proj",
            "experts.up_proj",
            "experts.gate_proj",
        ]) =>
        {
            Unused::FusedExperts
        }
        () if part(&fused) => Unused::FusedProjections,
        () if stored.split('.').next().is_some_and(|first| classifier.contains(&first)) => {
            Unused::Classifier
        }
        () => return None,
    })
}

/// The number of the layer that a tensor is of.
fn layer_of(source: &Source, stored: &str) -> Option<usize> {
    let embedding = source.stored_name(EMBEDDING);
    let body = embedding.strip_suffix("embed_tokens.weight")?;
    let rest = stored.strip_prefix(body)?.strip_prefix("layers.")?;
    rest.split('.').next()?.parse().ok()
}

/// The part of a name before the last: `q_proj` of `model.layers.0.self_attn.q_proj.bias`.
fn module_of(stored: &str) -> &str {
    stored.rsplit('.').nth(1).unwrap_or(stored)
}

impl Group<'_> {
    /// What they are, how many, and which is the first.
    fn sentence(&self, source: &Source, architecture: &Architecture) -> String {
        let family = &architecture.family;
        let modules = || {
            let modules: BTreeSet<&str> = self.names.iter().map(|name| module_of(name)).collect();
            let shown: Vec<&str> = modules.iter().copied().take(7).collect();
            let more = modules.len() - shown.len();
            let more = if more > 0 { format!(" and {more} others") } else { String::new() };
            format!("{}{more}", shown.join(", "))
        };
        let what = match self.kind {
            Unused::Adapter => "parts of an adapter (LoRA or a relative)".to_owned(),
            Unused::Quantized => {
                "codes or scales of quantized weights (GPTQ, AWQ, FP8 or a relative)".to_owned()
            }
            Unused::Meta => "weights under the names of Meta's own checkpoints".to_owned(),
            Unused::FusedExperts => "all experts of a block in one tensor".to_owned(),
            Unused::FusedProjections => {
                format!("several projections in one tensor ({})", modules())
            }
            Unused::Prediction => {
                "layers of multi-token prediction, which text is not generated with".to_owned()
            }
            Unused::Layer => {
                let layers = self.names.iter().filter_map(|name| layer_of(source, name));
                let last = layers.max().unwrap_or(0);
                format!(
                    "layers up to number {last}, where num_hidden_layers is {} and counts from 0",
                    architecture.blocks
                )
            }
            Unused::Modality => "a vision or audio part".to_owned(),
            Unused::Classifier => "the head of a classifier or reward model".to_owned(),
            Unused::Bias => format!("biases of {} that are not zero", modules()),
            Unused::Norm => {
                format!("norms that networks of type {family} do not have ({})", modules())
            }
            Unused::Experts => {
                format!("experts that networks of type {family} do not have ({})", modules())
            }
            Unused::Other => "tensors of a use that is not known".to_owned(),
        };
        let first = self.names.first().copied().unwrap_or_default();
        let (form, file) = source.described(first).unwrap_or_default();
        let count = counted(self.names.len(), "tensor");
        format!("{what}: {count}, the first is `{first}`, {form}, of {file}")
    }

    /// What to do about them.
    fn next_step(&self, source: &Source, architecture: &Architecture) -> String {
        let family = &architecture.family;
        match self.kind {
            Unused::Adapter => foreign::MERGE.to_owned(),
            Unused::Quantized => original(source),
            Unused::Meta => "convert it with transformers' convert_llama_weights_to_hf.py, or take the \
                             repository in transformers' format"
                .to_owned(),
            Unused::FusedExperts => "load it with the version of transformers that wrote it, and save it with \
                                     one tensor for each expert, as the Hub's repository has it"
                .to_owned(),
            Unused::FusedProjections => "this version reads q_proj, k_proj, v_proj, gate_proj and up_proj as \
                                         tensors of their own: split them, or take the model in Llama's layout"
                .to_owned(),
            Unused::Layer => {
                let all = self.names.iter().filter_map(|name| layer_of(source, name)).max();
                format!(
                    "set num_hidden_layers to {} in config.json if they belong to the network",
                    all.unwrap_or(0).saturating_add(1)
                )
            }
            Unused::Modality => "give the text model's own repository".to_owned(),
            Unused::Classifier => "give the checkpoint of the causal language model".to_owned(),
            Unused::Bias => bias_step(self, architecture),
            Unused::Norm | Unused::Experts => format!(
                "config.json's model_type `{family}` may be another model's: take the config.json that \
                 was published with the weights"
            ),
            Unused::Prediction | Unused::Other => {
                "take the config.json that was published with the weights".to_owned()
            }
        }
    }

    /// A pattern that fits all of them.
    fn pattern(&self) -> String {
        let [first, rest @ ..] = &self.names[..] else { return "*".to_owned() };
        let same =
            |same: fn(&str, &str) -> bool, part: &str| rest.iter().all(|name| same(name, part));
        let dots = || first.match_indices('.').map(|(at, _)| at);
        if rest.is_empty() {
            return (*first).to_owned();
        }
        let prefix = || {
            let mut dots = dots().rev();
            let at = dots.find(|at| same(|name, part| name.starts_with(part), &first[..=*at]));
            at.map(|at| format!("{}*", &first[..=at]))
        };
        let suffix = || {
            let at = dots().find(|at| same(|name, part| name.ends_with(part), &first[*at..]));
            at.map(|at| format!("*{}", &first[at..]))
        };
        // What all have in common is where a layer lies, and what other tensors are.
        let found = match self.kind {
            Unused::Layer | Unused::Prediction | Unused::Modality => prefix().or_else(suffix),
            _ => suffix().or_else(prefix),
        };
        found.unwrap_or_else(|| (*first).to_owned())
    }
}

/// The flags that give a family's linears biases.
fn bias_step(group: &Group<'_>, architecture: &Architecture) -> String {
    let attention = group.names.iter().any(|name| name.contains("attn."));
    let mlp = group.names.iter().any(|name| name.contains("mlp."));
    let biases = &architecture.biases;
    let flags = [biases.attention_flag.filter(|_| attention), biases.mlp_flag.filter(|_| mlp)];
    let flags: Vec<String> =
        flags.into_iter().flatten().map(|flag| format!("\"{flag}\": true")).collect();
    match flags.is_empty() {
        true => format!(
            "networks of type {} have no such biases: take the config.json that was published with the \
             weights",
            architecture.family
        ),
        false => format!("set {} in config.json if the network has them", flags.join(" and ")),
    }
}

/// Where the weights are that were quantized.
fn original(source: &Source) -> String {
    let config = source.config();
    let of = config.get("_name_or_path").and_then(serde_json::Value::as_str);
    // A path of the machine that wrote it helps nobody.
    let id = of.filter(|name| name.matches('/').count() == 1 && !name.starts_with(['.', '/']));
    const ENDS: [&str; 9] =
        ["-GPTQ", "-AWQ", "-FP8", "-INT4", "-INT8", "-bnb-4bit", "-bnb-8bit", "-W4A16", "-W8A8"];
    let upper = source.name().to_uppercase();
    let stem = ENDS.iter().find_map(|end| {
        let at = upper.find(&end.to_uppercase())?;
        source.name().get(..at).filter(|stem| !stem.is_empty())
    });
    match (stem, id) {
        (Some(stem), _) => {
            format!("give the unquantized repository that it was made from, such as {stem}")
        }
        (None, Some(id)) if !id.ends_with(source.name()) => {
            format!("give the unquantized repository that it was made from, such as {id}")
        }
        _ => {
            "give the unquantized repository that it was made from, in F16, BF16 or F32".to_owned()
        }
    }
}

/// The error of a source with tensors that have no part in its network.
pub(super) fn refusal(source: &Source, architecture: &Architecture, groups: &[Group<'_>]) -> Error {
    let sentences: Vec<String> =
        groups.iter().map(|group| group.sentence(source, architecture)).collect();
    let message = format!(
        "{} holds tensors that have no part in the network of its config.json: {}",
        source.title(),
        sentences.join("; ")
    );
    let steps: Vec<String> =
        groups.iter().map(|group| group.next_step(source, architecture)).collect();
    let mut hint = steps.into_iter().fold(String::new(), |mut all, step| {
        if !all.contains(&step) {
            all.push_str(if all.is_empty() { "" } else { "; " });
            all.push_str(&step);
        }
        all
    });
    let patterns: Vec<String> = groups.iter().map(Group::pattern).collect();
    hint.push_str(&format!("; or leave them out with --ignore-tensors '{}'", patterns.join(",")));
    Error::input(message).hint(hint)
}

/// The error of a source that lacks `name`, which the network needs: what is there says why.
pub(super) fn missing(source: &Source, architecture: &Architecture, name: &str) -> Error {
    if source.lacks(name)
        && let Err(error) = source.tensor(name)
    {
        return error;
    }
    let lacks = format!("{} has no tensor `{}`", source.title(), source.stored_name(name));
    let because = |why: String, hint: String| Error::input(format!("{lacks}: {why}")).hint(hint);
    let config = source.config_file();
    if let Some(group) = telling(source, architecture, name) {
        let why = format!("it holds {}", group.sentence(source, architecture));
        return because(why, group.next_step(source, architecture));
    }
    if name == HEAD {
        return because(
            format!("{config} does not tie the output head to the embedding, and no head is stored"),
            "a tie flag is missing: set \"tie_word_embeddings\": true in config.json if the embedding \
             is the head; if not, the file of the head is missing"
                .to_owned(),
        );
    }
    if name.ends_with(".bias") {
        return because(
            format!("{config} gives the linears of {} biases, the weights have none", module_of(name)),
            "take the config.json that was published with the weights, or set its attention_bias and \
             mlp_bias to false"
                .to_owned(),
        );
    }
    let layers = source.names().filter_map(|stored| layer_of(source, stored)).max();
    let layers = layers.map_or(0, |last| last.saturating_add(1));
    if layers < architecture.blocks && layers > 0 {
        return because(
            format!("num_hidden_layers of {config} is {}, the weights have {layers}", architecture.blocks),
            "finish the download if a file is missing; if not, take the config.json that was published \
             with the weights"
                .to_owned(),
        );
    }
    let first = source.names().next().unwrap_or("none");
    because(
        format!(
            "its {} have other names than {} networks give them, such as `{first}`",
            counted(source.names().count(), "tensor"),
            architecture.family
        ),
        "finish the download if a file is missing; if not, take the config.json that was published with \
         the weights, or convert the model with transformers"
            .to_owned(),
    )
}

/// The tensors that explain why `name` is not there, if some do.
fn telling<'a>(source: &'a Source, architecture: &Architecture, name: &str) -> Option<Group<'a>> {
    let explains = |kind: &Unused| match kind {
        Unused::Adapter | Unused::Quantized | Unused::Meta => name != HEAD,
        Unused::FusedExperts => name.contains(".experts."),
        Unused::FusedProjections => name.contains("_proj."),
        Unused::Classifier => name == HEAD,
        _ => false,
    };
    let none = HashSet::new();
    let kinds = source.names().map(|stored| (kind_of(source, architecture, &none, stored), stored));
    let mut telling: Vec<(Unused, &str)> = kinds.filter(|(kind, _)| explains(kind)).collect();
    telling.sort_unstable();
    let kind = telling.first()?.0;
    let names = telling.into_iter().filter(|(own, _)| *own == kind).map(|(_, name)| name).collect();
    Some(Group { kind, names })
}
