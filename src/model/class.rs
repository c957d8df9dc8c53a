/*! The network that the weights belong to, by `architectures` and `auto_map`. */

use serde_json::Value;

use super::config::Config;
use super::families::Family;
use crate::{Error, Result};

/// Classes of transformers for a family: the language model, and its decoder without a head.
fn classes(family: &Family) -> [String; 2] {
    ["ForCausalLM", "Model"].map(|kind| format!("{}{kind}", family.class))
}

/// Early conversions of Llama write `LLaMAForCausalLM`.
fn is_class_of(family: &Family, class: &str) -> bool {
    classes(family).iter().any(|own| own.eq_ignore_ascii_case(class))
}

/// Refuses a network that is not the family's language model. Returns a warning if the repository has its own code.
///
/// # Errors
/// Another class, or a field of a wrong type.
pub(super) fn check(config: &Config, family: &Family) -> Result<Option<String>> {
    check_architectures(config, family)?;
    check_auto_map(config, family)
}

fn check_architectures(config: &Config, family: &Family) -> Result<()> {
    const KEY: &str = "architectures";
    const RIGHT: &str = "a list of names of classes";
    let Some(named) = config.list(KEY, RIGHT)?.filter(|named| !named.is_empty()) else {
        return Ok(());
    };
    let named: Option<Vec<&str>> = named.iter().map(Value::as_str).collect();
    let named = named.ok_or_else(|| config.wrong(KEY, RIGHT))?;
    if named.iter().any(|class| is_class_of(family, class)) {
        return Ok(());
    }
    Err(not_the_familys(config, family, KEY, named[0]))
}

/// transformers runs its own class for a known `model_type` unless it is told to trust the repository's code.
fn check_auto_map(config: &Config, family: &Family) -> Result<Option<String>> {
    let Some(map) = config.object("auto_map")? else { return Ok(None) };
    let mut own_code = None;
    for key in ["AutoModelForCausalLM", "AutoModel"] {
        if map.given(key).is_none() {
            continue;
        }
        // `module.Class`, or `repository--module.Class`.
        let path = map.text(key)?.unwrap_or_default();
        let class = path.rsplit('.').next().unwrap_or(path);
        if !is_class_of(family, class) {
            return Err(not_the_familys(&map, family, key, class));
        }
        own_code = own_code.or(Some(key));
    }
    Ok(own_code.map(|key| {
        format!(
            "{}: the repository has code of its own for the network, which is not run: the network is taken to be {} \
             as transformers has it",
            map.shown(key),
            classes(family)[0]
        )
    }))
}

fn not_the_familys(config: &Config, family: &Family, key: &str, class: &str) -> Error {
    let [causal, _] = classes(family);
    let heads = ["SequenceClassification", "TokenClassification", "QuestionAnswering", "Reward"];
    let (what, hint) = if heads.iter().any(|head| class.contains(head)) {
        let hint = format!("give the language model that it was made from, a {causal}");
        ("a network with another head than a language model's".to_owned(), hint)
    } else if class.ends_with("ForConditionalGeneration") {
        let hint = format!("give a checkpoint of its language model alone, a {causal}");
        ("a language model inside a larger network".to_owned(), hint)
    } else {
        let hint = format!(
            "this version runs {causal}; if the network is that one, write its name there instead"
        );
        (format!("another network than that of model_type `{}`", family.name), hint)
    };
    Error::input(format!("{}: {what}", config.shown(key))).hint(hint)
}
