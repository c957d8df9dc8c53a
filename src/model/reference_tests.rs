//! What we read of a config.json compared with what transformers reads of it (tests/configs.py): every field, for every family,
//! in right and wrong types.

use serde_json::{Value, json};

use super::architecture::{Architecture, BlockAttention};
use super::families::{FAMILIES, Family};
use super::rope::{Rope, RopeScaling};
use crate::backend::AttentionSpec;

/// Files that transformers 5 refuses by a type alone and whose meaning is not in doubt: earlier versions read them so.
fn is_lenient(family: &Family, changes: &Value) -> bool {
    let whole = changes["rms_norm_eps"].is_u64();
    let null = |key: &str| changes.get(key).is_some_and(Value::is_null);
    let flags = ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"];
    let more = ["norm_topk_prob", "attention_out_bias", "qkv_bias", "use_qk_norm"];
    let null_flag = flags.iter().chain(&more).any(|key| null(key));
    let derived = null("num_key_value_heads") || null("head_dim") && family.head_dim.is_none();
    // Earlier versions read any width of heads.
    let width = changes.get("hidden_size").is_some() && changes.get("head_dim").is_some();
    // The last where no window is used.
    // The older name of `longrope`, and a network without a window, of which transformers makes a remainder by zero.
    let old_name = changes["rope_scaling"]["rope_type"] == "su";
    let windowless = family.name == "exaone4" && null("sliding_window");
    old_name || windowless || whole || width || null_flag || derived || null("max_window_layers")
}

/// What we read, in the file's terms.
fn read(config: &Value) -> Result<Value, String> {
    let read = Architecture::read(config, "DIR/config.json").map_err(|error| error.to_string())?;
    if !OLDER.contains(&&*read.family) {
        return Ok(later(&read));
    }
    let Rope { theta, scaling, .. } = read.common_rope().unwrap();
    let mut rope = json!({"rope_type": "default", "rope_theta": theta});
    match scaling {
        RopeScaling::None => {}
        RopeScaling::Linear(factor) => {
            rope["rope_type"] = json!("linear");
            rope["factor"] = json!(factor);
        }
        RopeScaling::Llama3 { factor, low, high, original } => {
            rope = json!({"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
                "high_freq_factor": high, "original_max_position_embeddings": original});
        }
        RopeScaling::Yarn { factor, original, .. } => {
            rope = json!({"rope_type": "yarn", "rope_theta": theta, "factor": factor,
                "original_max_position_embeddings": original});
        }
        RopeScaling::LongRope { original, .. } => {
            rope = json!({"rope_type": "longrope", "rope_theta": theta, "original_max_position_embeddings": original});
        }
    }
    let biases = read.biases;
    let mut found = json!({
        "layers": read.blocks, "hidden": read.hidden, "intermediate": read.intermediate, "heads": read.heads,
        "kv_heads": read.kv_heads, "head_dim": read.head_dim, "vocabulary": read.vocabulary,
        "epsilon": read.norm_epsilon, "tied": read.tied, "positions": read.max_positions, "rope": rope,
        "windows": windows(&read), "biases": [biases.attn_in, biases.attn_out, biases.mlp],
    });
    if let Some(experts) = read.experts {
        found["experts"] = json!([
            experts.count,
            experts.per_token,
            experts.intermediate,
            experts.normalized,
            experts.dense_blocks
        ]);
    }
    Ok(found)
}

/// The different windows of the blocks, as Python sorts them by their texts.
fn windows(read: &Architecture) -> Vec<Option<usize>> {
    let mut windows: Vec<_> = read.attention.iter().map(|block| block.window).collect();
    windows.sort_by_key(|window| window.map_or("None".to_owned(), |window| window.to_string()));
    windows.dedup();
    windows
}

/// The families of which entire blocks are compared.
const OLDER: [&str; 6] = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"];

/// What we read of another family, in the file's terms.
fn later(read: &Architecture) -> Value {
    let rope_type = |rope: &Rope| match rope.scaling {
        RopeScaling::None => "default",
        RopeScaling::Linear(_) => "linear",
        RopeScaling::Llama3 { .. } => "llama3",
        RopeScaling::Yarn { .. } => "yarn",
        RopeScaling::LongRope { .. } => "longrope",
    };
    let block = |block: &BlockAttention| {
        let rope = block.rope.as_ref();
        json!([block.window, rope.map(|rope| rope.theta), rope.map(rope_type)])
    };
    let blocks: Vec<Value> = read.attention.iter().map(block).collect();
    let mut share =
        read.attention.iter().filter_map(|block| block.rope.as_ref()).map(|rope| rope.share);
    let scale = read.attention_scale.unwrap_or(AttentionSpec::usual_scale(read.head_dim));
    let (biases, multipliers) = (read.biases, read.multipliers);
    let mut found = json!({
        "layers": read.blocks, "hidden": read.hidden, "intermediate": read.intermediate, "heads": read.heads,
        "kv_heads": read.kv_heads, "head_dim": read.head_dim, "vocabulary": read.vocabulary,
        "epsilon": read.norm_epsilon, "tied": read.tied, "positions": read.max_positions,
        "biases": [biases.attn_in, biases.attn_out, biases.mlp], "blocks": blocks,
        "share": share.next_back().unwrap_or(1.0), "scale": scale,
        "multipliers": [multipliers.embedding, multipliers.residual, multipliers.logits],
    });
    if let Some(experts) = &read.experts {
        found["experts"] = json!([
            experts.count,
            experts.per_token,
            experts.intermediate,
            experts.normalized,
            experts.dense_blocks,
            experts.shared.map(|shared| shared.intermediate),
            experts.scale
        ]);
    }
    found
}

/// Whether both say the same; numbers as f32, the type of all arithmetic, to some units in the last place.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap() as f32, b.as_f64().unwrap() as f32);
            (a - b).abs() <= 1e-6 * b.abs()
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        (a, b) => a == b,
    }
}

fn with(base: &Value, changes: &Value) -> Value {
    let mut changed = base.clone();
    changed.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    // A window that limits no text is none.
    if changed["windows"][0].as_u64().is_some_and(|window| window >= 1 << 30) {
        changed["windows"][0] = Value::Null;
    }
    changed
}

#[test]
fn every_field_is_read_as_transformers_reads_it_or_refused() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/configs.json");
    let file: Value = serde_json::from_slice(&fs_err::read(file).unwrap()).unwrap();
    let mut wrong = Vec::new();
    let (mut equal, mut refused) = (0, 0);
    // transformers does not know MiMo.
    for family in FAMILIES.into_iter().filter(|family| family.name != "mimo") {
        let name = family.name;
        let base = &file[name]["base"];
        let cases = file[name]["cases"].as_array();
        for case in cases.unwrap_or_else(|| panic!("tests/configs.py knows no {name}")) {
            let (must, changes, differs) = (case[0].as_bool().unwrap(), &case[1], &case[2]);
            let mut config = with(&file["config"], changes);
            config["model_type"] = json!(name);
            match read(&config) {
                Err(error) if must => wrong.push(format!("{name} {changes}: refused: {error}")),
                Err(error) if !error.contains("DIR/config.json") => {
                    wrong.push(format!("{name} {changes}: names no file: {error}"));
                }
                Err(_) => refused += 1,
                Ok(found) if differs.is_null() && !is_lenient(family, changes) => {
                    wrong.push(format!("{name} {changes}: transformers refuses it, we: {found}"));
                }
                Ok(found) if !differs.is_null() && !same(&found, &with(base, differs)) => {
                    let expected = with(base, differs);
                    wrong.push(format!("{name} {changes}:\n  {found}\n  {expected}"));
                }
                Ok(_) => equal += 1,
            }
        }
    }
    assert!(wrong.is_empty(), "{} of them:\n{}", wrong.len(), wrong.join("\n"));
    assert!(equal > 1000 && refused > 1000, "{equal} equal, {refused} refused");
}
