//! What a model's files say about generation: the tokens that end a text.

use serde_json::Value;

use crate::network::Model;
use crate::{Error, Result};

/// The file that holds them besides `config.json`.
const GENERATION_CONFIG: &str = "generation_config.json";

/// Tokens that end a text: `eos_token_id` of `generation_config.json` and of `config.json`, a number or a list of them,
/// ascending.
///
/// # Errors
/// Input: a file that is no JSON object, or an id that is none.
pub fn stop_tokens(model: &Model) -> Result<Vec<u32>> {
    let mut tokens = eos(model.config(), &model.path_of("config.json"))?;
    if let Some(content) = model.file(GENERATION_CONFIG)? {
        let path = model.path_of(GENERATION_CONFIG);
        let generation: Value = serde_json::from_slice(&content).map_err(|error| {
            Error::input(format!("{path} is not readable JSON: {error}"))
                .hint("download the file again")
        })?;
        tokens.extend(eos(&generation, &path)?);
    }
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens)
}

fn eos(config: &Value, path: &str) -> Result<Vec<u32>> {
    let ids = match config.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(ids)) => &ids[..],
        Some(id) => std::slice::from_ref(id),
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    ids.iter().map(id).collect::<Option<Vec<u32>>>().ok_or_else(|| {
        let found = config["eos_token_id"].to_string();
        Error::input(format!("{path}: `eos_token_id` is {found}, not a token or a list of tokens"))
            .hint("correct the file, or download it again")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_token_a_list_or_none_end_a_text() {
        let of = |value: Value| eos(&json!({ "eos_token_id": value }), "c.json");
        assert_eq!(of(json!(2)).unwrap(), [2]);
        assert_eq!(of(json!([128_001, 128_008])).unwrap(), [128_001, 128_008]);
        assert!(
            of(json!(null)).unwrap().is_empty() && eos(&json!({}), "c.json").unwrap().is_empty()
        );
        for wrong in [json!("2"), json!(-1), json!([1, 2.5]), json!(1u64 << 40), json!({})] {
            let error = of(wrong).unwrap_err();
            assert!(error.message().starts_with("c.json: `eos_token_id` is"), "{error}");
        }
    }
}
