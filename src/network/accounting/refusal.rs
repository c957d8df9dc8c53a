/*! Messages about tensors that the network does not use, and about missing ones. */

use std::collections::{BTreeSet, HashSet};

use super::kinds::{Unused, kind_of, layer_of, module_of};
use super::{HEAD, counted};
use crate::Error;
use crate::checkpoint::{Source, foreign};
use crate::model::Architecture;

/// Tensors of one kind, by stored name.
pub(super) struct Group<'a> {
    pub(super) kind: Unused,
    pub(super) names: Vec<&'a str>,
}

impl Group<'_> {
    /// Their kind, their number and the first of them.
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

    /// What the user can do about them.
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
        // Tensors of a layer have a prefix in common, others a suffix.
        let found = match self.kind {
            Unused::Layer | Unused::Prediction | Unused::Modality => prefix().or_else(suffix),
            _ => suffix().or_else(prefix),
        };
        found.unwrap_or_else(|| (*first).to_owned())
    }
}

/// The flags that turn on biases of a family's linears.
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

/// Where the unquantized weights are.
fn original(source: &Source) -> String {
    let config = source.config();
    let of = config.get("_name_or_path").and_then(serde_json::Value::as_str);
    // A path of the machine that wrote it is of no use.
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

/// The error of a source that lacks `name`, which the network needs. The tensors that it has say why.
pub(super) fn missing(source: &Source, architecture: &Architecture, name: &str) -> Error {
    if source.lacks(name)
        && let Err(error) = source.tensor(name)
    {
        return error;
    }
    let lacks = format!("{} has no tensor `{}`", source.title(), source.stored_name(name));
    let because = |why: String, hint: String| Error::input(format!("{lacks}: {why}")).hint(hint);
    let config = source.config_file();
    if let Some(group) = explanation(source, architecture, name) {
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

/// The tensors that explain why `name` is missing, if some do.
fn explanation<'a>(
    source: &'a Source,
    architecture: &Architecture,
    name: &str,
) -> Option<Group<'a>> {
    let explains = |kind: &Unused| match kind {
        Unused::Adapter | Unused::Quantized | Unused::Meta => name != HEAD,
        Unused::FusedExperts => name.contains(".experts."),
        Unused::FusedProjections => name.contains("_proj."),
        Unused::Classifier => name == HEAD,
        _ => false,
    };
    let none = HashSet::new();
    let kinds = source.names().map(|stored| (kind_of(source, architecture, &none, stored), stored));
    let mut explaining: Vec<(Unused, &str)> = kinds.filter(|(kind, _)| explains(kind)).collect();
    explaining.sort_unstable();
    let kind = explaining.first()?.0;
    let names =
        explaining.into_iter().filter(|(own, _)| *own == kind).map(|(_, name)| name).collect();
    Some(Group { kind, names })
}
