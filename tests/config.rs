//! config.json: each field is read as transformers reads it, or refused with the file, the field and what would be right.
//! Perplexities are those of the bundled networks in full precision on the bundled sample.

mod common;

use std::path::Path;

use common::{Dtype, Home, RandomModel, Run, SMALL};
use fs_err as fs;
use serde_json::{Value, json};

const MEASURE: &str = "eval-ppl --model model --device cpu --seq-len 256 --windows 4";

/// A bundled checkpoint as `model`, its config.json with `changes`; null takes a field out.
fn bundled(name: &str, changes: &Value) -> Home {
    let home = Home::new();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name);
    let to = home.path("model");
    fs::create_dir_all(&to).unwrap();
    for file in common::names(&from) {
        fs::copy(from.join(&file), to.join(&file)).unwrap();
    }
    change(&to.join("config.json"), changes);
    home
}

/// Sets fields of a JSON file. `"(null)"` sets null, null takes the field out.
fn change(path: &Path, changes: &Value) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let fields = value.as_object_mut().unwrap();
    for (key, change) in changes.as_object().unwrap() {
        match change {
            Value::Null => drop(fields.remove(key)),
            _ if *change == json!("(null)") => drop(fields.insert(key.clone(), Value::Null)),
            _ => drop(fields.insert(key.clone(), change.clone())),
        }
    }
    fs::write(path, value.to_string()).unwrap();
}

#[track_caller]
fn assert_perplexity(model: &str, changes: Value, expected: f64) {
    let found = bundled(model, &changes).json(MEASURE)["perplexity"].as_f64().unwrap();
    assert!((found - expected).abs() < 0.01, "{model} {changes}: {found}, not {expected}");
}

/// Runs a command, which must be refused as bad input with nothing written.
#[track_caller]
fn assert_refused(home: &Home, line: &str, parts: &[&str]) -> Run {
    let before = (home.names(), common::contents(&home.path("model")));
    let run = home.run(line).fails(3, parts);
    assert!(run.stderr.contains("hint: ") && run.stdout.is_empty(), "{}", run.stderr);
    assert_eq!((home.names(), common::contents(&home.path("model"))), before, "{line}");
    run
}

#[test]
fn fields_give_the_networks_that_transformers_makes_of_them() {
    let linear = json!({"rope_type": "linear", "factor": 2.0});
    for (changes, expected) in [
        (json!({}), 87.78),
        (json!({"rope_theta": 500_000.0}), 93.69),
        (json!({"rope_scaling": {"rope_theta": 500_000.0}}), 93.69),
        (
            json!({"rope_theta": null, "rope_scaling": {"rope_theta": 500_000.0, "rope_type": "default"}}),
            93.69,
        ),
        (json!({"rope_theta": "(null)", "rope_parameters": {"rope_theta": 500_000}}), 93.69),
        (json!({"rope_scaling": linear}), 100.35),
        (json!({"rope_scaling": {"type": "linear", "factor": 2}}), 100.35),
        (
            json!({"rope_scaling": linear, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
            100.35,
        ),
        (json!({"rope_scaling": {}, "rope_parameters": linear}), 100.35),
        (json!({"rope_scaling": {"rope_type": "default"}, "rope_parameters": linear}), 87.78),
        (
            json!({"rope_theta": null, "head_dim": null, "attention_bias": null, "mlp_bias": null}),
            87.78,
        ),
        (json!({"head_dim": "(null)", "attention_bias": "(null)", "rope_theta": 10000}), 87.78),
        (json!({"partial_rotary_factor": 1.0, "hidden_act": "swish"}), 87.78),
        (json!({"rms_norm_eps": 0.5}), 3760.64),
        (json!({"architectures": null}), 87.78),
        (json!({"architectures": ["LLaMAForCausalLM"], "quantization_config": "(null)"}), 87.78),
        // A field of other families.
        (json!({"sliding_window": 8, "logit_scale": 0.1, "final_logit_softcapping": 30.0}), 87.78),
    ] {
        assert_perplexity("tiny-llama", changes, expected);
    }
}

#[test]
fn absent_fields_have_their_familys_defaults() {
    for (changes, expected) in [
        (json!({}), 91.91),
        (json!({"rope_parameters": null, "rms_norm_eps": null}), 91.91),
        (json!({"rope_parameters": {"rope_type": "default"}, "rms_norm_eps": null}), 91.91),
        (json!({"rope_parameters": null, "num_experts_per_tok": null, "head_dim": null}), 91.91),
        (json!({"sliding_window": null, "max_position_embeddings": null}), 91.91),
        (json!({"num_local_experts": null, "num_experts": 4}), 91.91),
    ] {
        assert_perplexity("tiny-mixtral", changes, expected);
    }
}

#[test]
fn fields_of_a_wrong_type_are_refused() {
    let file = "model/config.json: ";
    for (changes, parts) in [
        (
            json!({"rope_theta": "500000.0"}),
            &["`rope_theta` is \"500000.0\"", "number above zero"][..],
        ),
        (json!({"rope_theta": "(null)"}), &["`rope_theta` is null"]),
        (json!({"rope_theta": 0}), &["`rope_theta` is 0"]),
        (json!({"rope_theta": true}), &["`rope_theta` is true"]),
        (json!({"rms_norm_eps": "0.5"}), &["`rms_norm_eps` is \"0.5\"", "number of zero or more"]),
        (json!({"rms_norm_eps": -1e-5}), &["`rms_norm_eps` is -"]),
        (json!({"rms_norm_eps": "(null)"}), &["`rms_norm_eps` is null"]),
        (json!({"hidden_size": 256.0}), &["`hidden_size` is 256.0", "whole number"]),
        (json!({"hidden_size": "256"}), &["`hidden_size` is \"256\""]),
        (json!({"num_hidden_layers": null}), &["`num_hidden_layers` is missing"]),
        (json!({"num_attention_heads": -4}), &["`num_attention_heads` is -4"]),
        (json!({"num_key_value_heads": "2"}), &["`num_key_value_heads` is \"2\""]),
        (json!({"head_dim": [64]}), &["`head_dim` is [64]"]),
        (json!({"max_position_embeddings": 2048.5}), &["`max_position_embeddings` is 2048.5"]),
        (
            json!({"tie_word_embeddings": "true"}),
            &["`tie_word_embeddings` is \"true\"", "true or false"],
        ),
        (json!({"attention_bias": 0}), &["`attention_bias` is 0", "true or false"]),
        (json!({"mlp_bias": "false"}), &["`mlp_bias` is \"false\""]),
        (json!({"hidden_act": ["silu"]}), &["`hidden_act` is [\"silu\"]"]),
        (json!({"rope_scaling": "linear"}), &["`rope_scaling` is \"linear\"", "object"]),
        (json!({"rope_scaling": 2.0}), &["`rope_scaling` is 2.0"]),
        (json!({"rope_parameters": [1]}), &["`rope_parameters` is [1]"]),
        (
            json!({"rope_scaling": {"type": "linear", "factor": "2"}}),
            &["`rope_scaling.factor` is \"2\""],
        ),
        (json!({"rope_scaling": {"type": "linear"}}), &["`rope_scaling.factor` is missing"]),
        (json!({"layer_types": "full_attention"}), &["`layer_types` is \"full_attention\""]),
        (
            json!({"architectures": "LlamaForCausalLM"}),
            &["`architectures` is \"LlamaForCausalLM\"", "list"],
        ),
        (json!({"auto_map": "modeling.py"}), &["`auto_map` is \"modeling.py\""]),
        (json!({"quantization_config": true}), &["`quantization_config` is true"]),
    ] {
        let home = bundled("tiny-llama", &changes);
        let run = assert_refused(&home, MEASURE, parts);
        assert!(run.stderr.contains(file), "{changes}: {}", run.stderr);
    }
}

#[test]
fn networks_that_are_not_the_familys_are_refused() {
    let per_layer =
        json!({"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}});
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0});
    for (changes, parts) in [
        (
            json!({"rope_parameters": per_layer}),
            &["`rope_parameters.full_attention` is", "the same for all blocks"][..],
        ),
        (json!({"rope_scaling": per_layer}), &["`rope_scaling.full_attention` is"]),
        (
            json!({"rope_scaling": llama3}),
            &["`rope_scaling.high_freq_factor` is 4.0", "greater than `low_freq_factor`"],
        ),
        (
            json!({"rope_scaling": {"rope_type": "yarn"}}),
            &["`rope_scaling.factor` is missing", "a number above zero"],
        ),
        (
            json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
            &["`rope_scaling.type` is \"dynamic\""],
        ),
        (
            json!({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2}}),
            &["`type` is \"linear\""],
        ),
        (
            json!({"rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}}),
            &["mrope_section"],
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2, "attention_factor": 1.5}}),
            &["attention_factor"],
        ),
        (json!({"partial_rotary_factor": 0.5}), &["`partial_rotary_factor` is 0.5"]),
        (
            json!({"rope_parameters": {"partial_rotary_factor": 0.25}}),
            &["`rope_parameters.partial_rotary_factor` is 0.25"],
        ),
        (
            json!({"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]}),
            &["`layer_types` is", "attends to all tokens"],
        ),
        (json!({"layer_types": ["full_attention"]}), &["1 entries for 4 blocks"]),
        (json!({"hidden_act": "gelu"}), &["`hidden_act` is \"gelu\"", "`silu`"]),
        (json!({"is_causal": false}), &["`is_causal` is false"]),
        (
            json!({"per_layer_config": {"0": {"num_key_value_heads": 1}}}),
            &["`per_layer_config` is"],
        ),
        (json!({"num_key_value_heads": 3}), &["4 query heads cannot share 3"]),
        (json!({"head_dim": 63}), &["head_dim 63 is odd"]),
        (
            json!({"architectures": ["LlamaForSequenceClassification"]}),
            &["another head", "a LlamaForCausalLM"],
        ),
        (json!({"architectures": ["LlavaForConditionalGeneration"]}), &["inside a larger network"]),
        (
            json!({"architectures": ["FooForCausalLM"]}),
            &["[\"FooForCausalLM\"]", "model_type `llama`"],
        ),
        (
            json!({"auto_map": {"AutoModelForCausalLM": "modeling_foo.FooForCausalLM"}}),
            &[
                "`auto_map.AutoModelForCausalLM` is \"modeling_foo.FooForCausalLM\"",
                "model_type `llama`",
            ],
        ),
    ] {
        assert_refused(&bundled("tiny-llama", &changes), MEASURE, parts);
    }
}

#[test]
fn weights_that_are_quantized_already_are_refused() {
    for (changes, parts) in [
        (
            json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            &["quantized already, by GPTQ", "BF16, F16 or F32"][..],
        ),
        (json!({"quantization_config": {"quant_method": "awq"}}), &["by AWQ"]),
        (
            json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}),
            &["by bitsandbytes"],
        ),
        (json!({"quantization_config": {"quant_method": "fp8"}}), &["FP8"]),
        (
            json!({"quantization_config": {"quant_method": "compressed-tensors"}}),
            &["by `compressed-tensors`"],
        ),
        (
            json!({"quantization_config": {"load_in_8bit": true}}),
            &["by a method that it does not name"],
        ),
        (json!({"quantization": {"group_size": 64, "bits": 4}}), &["by MLX"]),
    ] {
        assert_refused(&bundled("tiny-llama", &changes), MEASURE, parts);
    }
}

#[test]
fn windows_of_qwen2_are_the_references_or_refused() {
    let home = Home::new();
    let mut model = RandomModel::new(2);
    model.config["model_type"] = json!("qwen2");
    model.config["architectures"] = json!(["Qwen2ForCausalLM"]);
    for block in 0..2 {
        for (name, rows) in [("q", 64), ("k", 32), ("v", 32)] {
            let mut bias = RandomModel::new(1).tensors.remove(1);
            bias.name = format!("model.layers.{block}.self_attn.{name}_proj.bias");
            (bias.shape, bias.values) =
                (vec![rows], (0..rows).map(|row| row as f32 / 64.0).collect());
            model.tensors.push(bias);
        }
    }
    model.write(&home.path("model"), Dtype::F32, 1);
    let config = fs::read(home.path("model/config.json")).unwrap();
    let line = "eval-ppl --model model --seq-len 64 --windows 1";
    let with = |changes: Value| {
        fs::write(home.path("model/config.json"), &config).unwrap();
        change(&home.path("model/config.json"), &changes);
        home.json(line)["perplexity"].as_f64().unwrap()
    };
    let (full, sliding) = ("full_attention", "sliding_attention");
    let unwindowed = with(json!({}));
    let windowed =
        with(json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 0}));
    assert!((unwindowed - windowed).abs() > 1e-3, "{unwindowed} {windowed}");
    for (changes, expected) in [
        (json!({"sliding_window": 8}), unwindowed),
        (
            json!({"use_sliding_window": false, "sliding_window": 8, "max_window_layers": 0}),
            unwindowed,
        ),
        // 28 blocks come before those with a window.
        (json!({"use_sliding_window": true, "sliding_window": 8}), unwindowed),
        (
            json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2}),
            unwindowed,
        ),
        (
            json!({"use_sliding_window": true, "sliding_window": "(null)", "max_window_layers": 0}),
            unwindowed,
        ),
        (
            json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": [sliding, sliding]}),
            windowed,
        ),
        (
            json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 0, "layer_types": [full, full]}),
            unwindowed,
        ),
    ] {
        assert_eq!(with(changes.clone()), expected, "{changes}");
    }
    // A window over one of the blocks is another network than either.
    let later =
        with(json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1}));
    let listed = with(
        json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": [full, sliding]}),
    );
    assert_eq!(later, listed);
    assert!([unwindowed, windowed].iter().all(|other| (other - later).abs() > 1e-3));
    for (changes, part) in [
        (json!({"layer_types": [sliding, sliding]}), "give no window"),
        (json!({"use_sliding_window": "true"}), "`use_sliding_window` is \"true\""),
        (
            json!({"use_sliding_window": true, "max_window_layers": "2"}),
            "`max_window_layers` is \"2\"",
        ),
        (json!({"use_sliding_window": true, "sliding_window": 0}), "`sliding_window` is 0"),
    ] {
        fs::write(home.path("model/config.json"), &config).unwrap();
        change(&home.path("model/config.json"), &changes);
        assert_refused(&home, line, &[part]);
    }
}

#[test]
fn counts_beyond_any_network_are_refused_at_once() {
    for (changes, part) in [
        (json!({"num_hidden_layers": 1_000_000_000}), "`num_hidden_layers` is 1000000000"),
        (json!({"head_dim": 1_000_000_000_000u64}), "`head_dim` is 1000000000000"),
        (json!({"hidden_size": u64::MAX}), "`hidden_size` is 18446744073709551615"),
        (json!({"num_attention_heads": 1u64 << 40}), "`num_attention_heads` is"),
        (json!({"vocab_size": 1u64 << 53}), "`vocab_size` is"),
        (json!({"intermediate_size": 1e300}), "`intermediate_size` is"),
        (
            json!({"num_attention_heads": 65536, "num_key_value_heads": 65536, "head_dim": 65536, "num_hidden_layers": 10_000}),
            "larger than this version reads",
        ),
        (
            json!({"num_hidden_layers": 10_000, "intermediate_size": 1 << 24, "hidden_size": 1 << 24}),
            "larger than this version reads",
        ),
    ] {
        let home = bundled("tiny-llama", &changes);
        for line in [MEASURE, "inspect model", &format!("quantize --model model {SMALL} --out out")]
        {
            assert_refused(&home, line, &["model/config.json: ", part]);
        }
    }
    let home =
        bundled("tiny-mixtral", &json!({"num_local_experts": 60_000, "num_hidden_layers": 10_000}));
    assert_refused(&home, MEASURE, &["10000 blocks of 60000 experts"]);
    assert_refused(&home, "inspect model", &["10000 blocks of 60000 experts"]);
    let home = bundled("tiny-mixtral", &json!({"num_experts_per_tok": 5}));
    assert_refused(&home, MEASURE, &["5 of 4 experts"]);
}

#[test]
fn inspect_believes_no_block_that_is_not_there() {
    for blocks in [3, 5, 10_000] {
        let home = bundled("tiny-llama", &json!({"num_hidden_layers": blocks}));
        let part =
            format!("`num_hidden_layers` is {blocks}, but the weights are those of 4 blocks");
        assert_refused(&home, "inspect model", &["model/config.json: ", &part]);
    }
}

/// How often a warning with `part` was given.
fn warned(run: &Run, part: &str) -> usize {
    let lines = run.stderr.lines().filter(|line| line.starts_with("warning: "));
    lines.filter(|line| line.contains(part)).count()
}

#[test]
fn a_window_longer_than_the_models_positions_is_warned_of_once() {
    let home = Home::new();
    let mut model = RandomModel::new(2);
    model.config["max_position_embeddings"] = json!(48);
    model.write(&home.path("model"), Dtype::F16, 1);
    let harness = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/harness");
    let tasks = format!(
        "eval-tasks --model model --tasks boolq --tasks-dir {} --limit 4",
        harness.display()
    );
    for line in [
        format!("quantize --model model {SMALL} --out out"),
        "calibrate --model model --samples 4 --seq-len 64 --out c".to_owned(),
        "plan c --group 32 --outliers 16 --out p".to_owned(),
        "pack --plan p --model model --out packed --seq-len 64 --windows 2".to_owned(),
        "eval-ppl --model model --seq-len 64 --windows 1".to_owned(),
        "eval-ppl --model out --seq-len 64 --windows 1".to_owned(),
        "verify --model out --reference model --seq-len 64 --windows 1".to_owned(),
        tasks,
    ] {
        let run = home.run(&line).done();
        let expected = usize::from(!line.starts_with("plan"));
        assert_eq!(warned(&run, " 48 positions"), expected, "{line}: {}", run.stderr);
    }
    let fits = home.run("eval-ppl --model model --seq-len 48 --windows 1").done();
    assert_eq!(warned(&fits, " positions"), 0, "{}", fits.stderr);
    // Linear scaling makes room for twice as many.
    change(
        &home.path("model/config.json"),
        &json!({"rope_scaling": {"type": "linear", "factor": 2.0}}),
    );
    let fits = home.run("eval-ppl --model model --seq-len 96 --windows 1").done();
    assert_eq!(warned(&fits, " positions"), 0, "{}", fits.stderr);
    let longer = home.run("eval-ppl --model model --seq-len 97 --windows 1").done();
    assert_eq!(warned(&longer, "windows of 97 tokens are longer than the 96 positions"), 1);
}

#[test]
fn a_norm_of_zeros_and_a_perplexity_of_guessing_are_warned_of() {
    let home = Home::new();
    let mut model = RandomModel::new(2);
    for name in ["model.layers.1.input_layernorm.weight", "model.norm.weight"] {
        model.tensor(name).values.fill(0.0);
    }
    model.write(&home.path("model"), Dtype::F16, 1);
    let run = home.run("eval-ppl --model model --seq-len 64 --windows 1").done();
    let zero = "in 2 of the model's norms, first in `model.layers.1.input_layernorm.weight`";
    assert_eq!(warned(&run, zero), 1, "{}", run.stderr);
    assert_eq!(warned(&run, "a perplexity of 4096.00, no better than guessing among the 4096"), 1);

    let run = bundled("tiny-llama", &json!({})).run(MEASURE).done();
    assert_eq!(warned(&run, ""), 0, "{}", run.stderr);
}

#[test]
fn code_of_a_repositorys_own_is_named_and_not_run() {
    let map = json!({"AutoConfig": "configuration_x.LlamaConfig", "AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"});
    let home = bundled("tiny-llama", &json!({"auto_map": map}));
    let run = home.run(MEASURE).done();
    assert_eq!(warned(&run, "\"modeling_x.LlamaForCausalLM\""), 1, "{}", run.stderr);
    let only_tokenizer = json!({"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}});
    let run = bundled("tiny-llama", &only_tokenizer).run(MEASURE).done();
    assert_eq!(warned(&run, ""), 0, "{}", run.stderr);
}

#[test]
fn a_calibration_files_config_is_read_as_strictly() {
    let home = Home::with_model();
    home.run("calibrate --model model --samples 2 --seq-len 64 --out c").done();
    let mut bytes = fs::read(home.path("c")).unwrap();
    let (old, new) = (&br#"\"rope_theta\":10000.0"#[..], &br#"\"rope_theta\":\"10.\""#[..]);
    let at = bytes.windows(old.len()).position(|part| part == old).unwrap();
    bytes[at..at + old.len()].copy_from_slice(new);
    fs::write(home.path("c"), bytes).unwrap();
    let parts = ["config.json in c: `rope_theta` is \"10.\""];
    assert_refused(&home, "plan c --group 32 --outliers 16 --out p", &parts);
}

#[test]
fn control_characters_of_a_file_are_not_shown() {
    for changes in [
        json!({"model_type": "\u{1b}[31mgpt\u{9b}2"}),
        json!({"rope_theta": "\u{1b}[2J\u{7f}"}),
        json!({"architectures": ["\u{1b}]0;title\u{7}ForCausalLM"]}),
        json!({"quantization_config": {"quant_method": "\u{1b}[31m"}}),
    ] {
        let run = assert_refused(&bundled("tiny-llama", &changes), MEASURE, &["config.json: "]);
        let shown = run.stderr.replace(['\n', '\t'], "");
        assert!(!shown.chars().any(char::is_control), "{shown:?}");
    }
}
