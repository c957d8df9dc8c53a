/*! Every stored tensor of a source is accounted for: used by the network, known to change nothing, ignored
at the user's wish, or the reason to stop before any work. */

mod common;

use std::path::Path;

use common::{Home, Run, StoredModel, StoredTensor};
use fs_err as fs;
use serde_json::{Value, json};

const HIDDEN: usize = 256;
const MLP: usize = 768;
const EVAL: &str = "eval-ppl --device cpu --seq-len 256 --windows 4";
const QUANTIZE: &str =
    "quantize --group 64 --outliers 32 --samples 2 --seq-len 64 --no-gptq --no-eval";
/// Perplexity of the unchanged model.
const UNCHANGED: f64 = 87.78;

/// A home with `model`, the bundled model changed.
fn home_of(change: impl FnOnce(StoredModel) -> StoredModel) -> Home {
    let home = Home::new();
    change(StoredModel::tiny_llama()).write(&home.path("model"));
    let row = json!({"goal": "To say", "sol1": "yes", "sol2": "no", "label": 0});
    fs::write(home.path("rows.jsonl"), format!("{row}\n")).unwrap();
    home
}

#[track_caller]
fn perplexity(home: &Home, flags: &str) -> f64 {
    home.json(&format!("{EVAL} --model model {flags}"))["perplexity"].as_f64().unwrap()
}

#[track_caller]
fn assert_unchanged(perplexity: f64) {
    assert!((perplexity - UNCHANGED).abs() < 0.005, "{perplexity}");
}

/// Every command that uses a source refuses it with exit code 3 and changes nothing on the disk.
#[track_caller]
fn refused(home: &Home, parts: &[&str]) {
    let before = (home.names(), common::contents(&home.path("model")));
    for line in [
        "eval-ppl --model model --seq-len 64 --windows 1".to_owned(),
        format!("{QUANTIZE} --model model --out out"),
        format!("{QUANTIZE} --model model --out out --dry-run"),
        "calibrate --model model --samples 1 --seq-len 64 --out c".to_owned(),
        "eval-tasks --model model --tasks piqa=rows.jsonl".to_owned(),
    ] {
        let run = home.run(&line).fails(3, parts);
        assert!(run.stderr.contains("hint: "), "{}", run.stderr);
        assert!(run.stdout.is_empty());
        assert!(before == (home.names(), common::contents(&home.path("model"))), "{line}");
    }
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn warnings(run: &Run) -> Vec<&str> {
    run.stderr.lines().filter(|line| line.starts_with("warning:")).collect()
}

const PROJECTIONS: [(&str, usize); 7] = [
    ("self_attn.q_proj", HIDDEN),
    ("self_attn.k_proj", HIDDEN / 2),
    ("self_attn.v_proj", HIDDEN / 2),
    ("self_attn.o_proj", HIDDEN),
    ("mlp.gate_proj", MLP),
    ("mlp.up_proj", MLP),
    ("mlp.down_proj", HIDDEN),
];

/// The model with a bias of every linear.
fn with_biases(mut model: StoredModel, value: impl Fn(usize) -> f32) -> StoredModel {
    for layer in 0..4 {
        for (name, rows) in PROJECTIONS {
            let name = format!("model.layers.{layer}.{name}.bias");
            model.tensors.push(StoredTensor::f16(&name, &[rows], &value));
        }
    }
    model
}

fn wave(at: usize) -> f32 {
    (at as f32).sin() / 4.0
}

#[test]
fn biases_without_their_flags_stop_the_run() {
    let parts = [
        "model holds tensors that have no part in the network of its config.json",
        "biases of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj that are not zero: 28 tensors",
        "the first is `model.layers.0.mlp.down_proj.bias`, F16 [256], of model/model.safetensors",
        "hint: set \"attention_bias\": true and \"mlp_bias\": true in config.json",
        "--ignore-tensors '*.bias'",
    ];
    let home = home_of(|model| with_biases(model, |_| 0.5));
    refused(&home, &parts);
    // An older field that networks of this type do not read.
    let home = home_of(|mut model| {
        model.config.as_object_mut().unwrap().remove("attention_bias");
        model.config.as_object_mut().unwrap().remove("mlp_bias");
        model.config["bias"] = json!(true);
        with_biases(model, |_| 0.5)
    });
    refused(&home, &parts);
    assert_unchanged(perplexity(&home, "--ignore-tensors *.bias"));

    let home = home_of(|mut model| {
        model.config["attention_bias"] = json!(true);
        model.config["mlp_bias"] = json!(true);
        with_biases(model, |_| 0.5)
    });
    let used = perplexity(&home, "");
    assert!((used - 2941.03).abs() < 0.5, "{used}");
    home.run("eval-tasks --model model --tasks piqa=rows.jsonl").done();
    home.run(&format!("{QUANTIZE} --model model --out out")).done();
    home.run("verify --model out --no-eval --device cpu").done();
    // One flag of the two.
    let home = home_of(|mut model| {
        model.config["attention_bias"] = json!(true);
        with_biases(model, |_| 0.5)
    });
    refused(
        &home,
        &["biases of down_proj, gate_proj, up_proj that", "12 tensors", "\"mlp_bias\": true"],
    );
}

#[test]
fn biases_of_zeros_change_nothing_and_are_named() {
    let home = home_of(|model| with_biases(model, |_| 0.0));
    assert_unchanged(perplexity(&home, ""));
    let run = home.run(&format!("{QUANTIZE} --model model --out zero")).done();
    let found = warnings(&run);
    assert_eq!(found.len(), 1, "{}", run.stderr);
    assert!(found[0].contains("28 biases of model are all zero and left out"), "{found:?}");
    StoredModel::tiny_llama().write(&home.path("model"));
    let run = home.run(&format!("{QUANTIZE} --model model --out none")).done();
    assert!(warnings(&run).is_empty(), "{}", run.stderr);
    let weights = |out: &str| fs::read(home.path(out).join("model.safetensors")).unwrap();
    assert!(weights("zero") == weights("none"));
}

#[test]
fn the_flags_without_biases_are_named() {
    for (flag, name) in [("attention_bias", "self_attn.q_proj"), ("mlp_bias", "mlp.gate_proj")] {
        let home = home_of(|mut model| {
            model.config[flag] = json!(true);
            model
        });
        let lacks = format!("no tensor `model.layers.0.{name}.bias`");
        refused(&home, &[&lacks, "model/config.json gives the linears", "the weights have none"]);
    }
}

/// A tensor that the network does not use: refused with these parts of the message, and read without it.
#[track_caller]
fn assert_foreign(name: &str, shape: &[usize], parts: &[&str]) {
    let home = home_of(|model| model.with(StoredTensor::f16(name, shape, |_| 0.5)));
    let first = format!("the first is `{name}`");
    let all = [parts, &[&first, "of model/model.safetensors"]].concat();
    let before = home.names();
    home.run("eval-ppl --model model --seq-len 64 --windows 1").fails(3, &all);
    home.run(&format!("{QUANTIZE} --model model --out out --dry-run")).fails(3, &all);
    assert_eq!(home.names(), before);
    let ignored = home
        .run(&format!("eval-ppl --model model --seq-len 64 --windows 1 --ignore-tensors {name}"));
    ignored.done();
}

/// A tensor that the network does not use, and its message.
#[test]
fn each_kind_of_foreign_tensor_has_its_own_sentence_and_next_step() {
    let layer = |name: &str| format!("model.layers.0.{name}");
    for (name, shape, parts) in [
        (
            layer("self_attn.q_norm.weight"),
            &[64][..],
            &[
                "norms that networks of type llama do not have (q_norm): 1 tensor",
                "model_type `llama` may be another",
            ][..],
        ),
        (
            "model.layers.4.mlp.up_proj.weight".to_owned(),
            &[MLP, HIDDEN],
            &["layers up to number 4, where num_hidden_layers is 4", "set num_hidden_layers to 5"],
        ),
        (
            "score.weight".to_owned(),
            &[2, HIDDEN],
            &["the head of a classifier or reward model", "causal language model"],
        ),
        (
            layer("mlp.up_proj.weight_scale"),
            &[1],
            &["codes or scales of quantized weights", "give the unquantized repository"],
        ),
        (layer("mlp.up_proj.weight_scale_inv"), &[6, 2], &["codes or scales of quantized weights"]),
        (layer("mlp.up_proj.g_idx"), &[HIDDEN], &["codes or scales of quantized weights"]),
        (
            layer("self_attn.q_proj.lora_A.weight"),
            &[8, HIDDEN],
            &["parts of an adapter", "merge_and_unload"],
        ),
        (
            "mtp.layers.0.embed_norm.weight".to_owned(),
            &[HIDDEN],
            &[
                "layers of multi-token prediction",
                "--ignore-tensors 'mtp.layers.0.embed_norm.weight'",
            ],
        ),
        (
            "vision_tower.patch_embed.weight".to_owned(),
            &[4, 4],
            &["a vision or audio part", "the text model's own repository"],
        ),
        (
            "lm_head.bias".to_owned(),
            &[4096],
            &["biases of lm_head", "networks of type llama have no such"],
        ),
        (
            layer("mlp.experts.gate_up_proj"),
            &[2, 4, 8],
            &["all experts of a block in one tensor", "one tensor for each expert"],
        ),
        (
            layer("mlp.gate_up_proj.weight"),
            &[4, 8],
            &["several projections in one tensor (gate_up_proj)"],
        ),
        (
            layer("block_sparse_moe.gate.weight"),
            &[4, HIDDEN],
            &["experts that networks of type llama"],
        ),
        (
            "tok_embeddings.weight".to_owned(),
            &[4, 8],
            &["Meta's own", "convert_llama_weights_to_hf.py"],
        ),
        ("model.pooler.dense".to_owned(), &[4], &["tensors of a use that is not known"]),
        ("scalar".to_owned(), &[], &["tensors of a use that is not known", "`scalar`, F16 []"]),
    ] {
        assert_foreign(&name, shape, parts);
    }
}

#[test]
fn kinds_are_reported_together() {
    let home = home_of(|model| {
        model
            .with(StoredTensor::f16("score.weight", &[2, HIDDEN], |_| 1.0))
            .with(StoredTensor::f16("model.layers.1.self_attn.k_norm.weight", &[64], |_| 1.0))
    });
    refused(
        &home,
        &[
            "the head of a classifier",
            "; norms that networks",
            "--ignore-tensors 'score.weight,model.layers.1",
        ],
    );
    let ignore = "--ignore-tensors score.*,*.k_norm.weight";
    assert_unchanged(perplexity(&home, ignore));
    assert_unchanged(perplexity(
        &home,
        "--ignore-tensors score.* --ignore-tensors *.k_norm.weight",
    ));
    home.run(&format!("{EVAL} --model model --ignore-tensors score.*"))
        .fails(3, &["1 tensor", "k_norm"]);
}

#[test]
fn what_is_ignored_is_recorded_and_part_of_the_job() {
    let home = home_of(|mut model| {
        let fifth: Vec<StoredTensor> =
            model.tensors.iter().filter(|own| own.name.contains("layers.3.")).cloned().collect();
        model.tensors.extend(fifth.into_iter().map(|own| {
            let name = own.name.replace("layers.3.", "layers.4.");
            StoredTensor { name, ..own }
        }));
        model
    });
    refused(&home, &["layers up to number 4", "9 tensors", "--ignore-tensors 'model.layers.4.*'"]);
    // A pattern that is wider than it need be hides nothing that the network needs.
    for pattern in ["model.layers.4.*", "*", "model.*"] {
        assert_unchanged(perplexity(&home, &format!("--ignore-tensors {pattern}")));
    }
    let line = format!("{QUANTIZE} --model model --ignore-tensors model.layers.4.*");
    home.run(&format!("{line} --out out")).done();
    let atom = json_of(&home.path("out/atom.json"));
    let ignored = atom["source"]["ignored_tensors"].as_array().unwrap();
    assert_eq!(ignored.len(), 9);
    assert_eq!(ignored[0], "model.layers.4.input_layernorm.weight");
    let verify = "verify --model out --reference model --seq-len 64 --windows 1 --device cpu";
    home.run(&format!("{verify} --ignore-tensors model.layers.4.*")).done();
    let without =
        home.run("verify --model out --reference model --seq-len 64 --windows 1 --device cpu");
    without.fails(3, &["layers up to number 4"]);
    // In stages, and with a fifth layer that is asked for.
    let stages = "--model model --ignore-tensors model.layers.4.*";
    home.run(&format!("calibrate {stages} --samples 2 --seq-len 64 --out c")).done();
    home.run("plan c --group 64 --outliers 32 --no-gptq --out p").done();
    home.run("pack --model model --plan p --no-eval --out packed")
        .fails(3, &["layers up to number 4"]);
    home.run(&format!("pack {stages} --plan p --no-eval --out packed")).done();
    assert_eq!(
        json_of(&home.path("packed/atom.json"))["source"]["ignored_tensors"],
        json!(ignored)
    );
    let weights = |out: &str| fs::read(home.path(out).join("model.safetensors")).unwrap();
    assert!(weights("packed") == weights("out"));
}

/// Two runs that leave out other tensors are two jobs.
#[test]
fn an_unfinished_run_goes_on_with_the_same_tensors_only() {
    let home = home_of(|mut model| {
        let head = head(&mut model);
        let down = model.tensor("model.layers.3.mlp.down_proj.weight");
        let middle = down.bytes.len() / 2;
        down.bytes[middle..middle + 2].copy_from_slice(&[0, 0x7e]);
        model.with(head)
    });
    let line = format!("{QUANTIZE} --model model --out out");
    let ignoring = format!("{line} --ignore-tensors lm_head.*");
    home.run(&ignoring).fails(3, &["model.layers.3.mlp.down_proj.weight` of model/", "holds NaN"]);
    let parts = ["ignored_tensors was [\"lm_head.weight\"], now null"];
    home.run(&format!("{line} --resume")).fails(3, &parts);
    let mut sound = StoredModel::tiny_llama();
    let head = head(&mut sound);
    sound.with(head).write(&home.path("model"));
    assert_eq!(home.json(&format!("{ignoring} --resume"))["resumed_blocks"], 3);
    let written = StoredModel::read(&home.path("out"));
    assert!(written.tensors.iter().all(|tensor| tensor.name != "lm_head.weight"));
    assert_eq!(written.config["tie_word_embeddings"], true);
}

#[test]
fn a_pattern_that_ignores_nothing_is_wrong_usage() {
    let home = home_of(|model| model);
    let line = format!("{EVAL} --model model --ignore-tensors");
    let parts = ["--ignore-tensors *.bais fits no tensor of model", "hint: "];
    home.run(&format!("{line} *.bais")).fails(2, &parts);
    let parts =
        ["--ignore-tensors *.up_proj.weight fits `model.layers.0.mlp.up_proj.weight`", "needs"];
    home.run(&format!("{line} *.up_proj.weight")).fails(2, &parts);
    home.run(&format!("{QUANTIZE} --model model --out out")).done();
    home.run("eval-ppl --model out --ignore-tensors x").fails(2, &["is for sources", "hint: "]);
    home.run("verify --model out --no-eval --ignore-tensors x").fails(2, &["--reference"]);
}

/// A head unlike the embedding.
fn head(model: &mut StoredModel) -> StoredTensor {
    let mut head = model.tensor("model.embed_tokens.weight").clone();
    head.name = "lm_head.weight".to_owned();
    // Each token has the row of the next.
    head.bytes.rotate_left(2 * HIDDEN);
    head
}

#[test]
fn a_stored_head_unlike_the_embedding_is_used_with_a_warning() {
    let home = home_of(|mut model| {
        let head = head(&mut model);
        model.with(head)
    });
    let run = home.run(&format!("{EVAL} --model model --json")).done();
    let own = run.json()["perplexity"].as_f64().unwrap();
    assert!((own / 25165.43 - 1.0).abs() < 1e-4, "{own}");
    // A head of random rows guesses: that is the other warning.
    let found = warnings(&run);
    assert_eq!(found.len(), 2, "{}", run.stderr);
    assert!(
        found[0].contains("model/config.json ties the output head to the embedding"),
        "{found:?}"
    );
    assert!(found[0].contains("`lm_head.weight` differs from it: the stored head is used"));

    // The same as a model that says so.
    let mut untied = StoredModel::read(&home.path("model"));
    untied.config["tie_word_embeddings"] = json!(false);
    untied.write(&home.path("untied"));
    let line = format!("{EVAL} --json --model");
    let run = home.run(&format!("{line} untied")).done();
    assert!(!run.stderr.contains("ties the output head"), "{}", run.stderr);
    assert_eq!(run.json()["perplexity"].as_f64().unwrap(), own);

    // It is part of what is written, which says so.
    let eight = QUANTIZE.replace("--no-eval", "--bits 8 --act-bits 8 --kv-bits 8 --windows 2");
    let run = home.run(&format!("{eight} --model model --out out")).done();
    let ties = warnings(&run).iter().filter(|text| text.contains("ties the output head")).count();
    assert_eq!(ties, 1, "{}", run.stderr);
    assert_eq!(json_of(&home.path("out/config.json"))["tie_word_embeddings"], false);
    let mut written = StoredModel::read(&home.path("out"));
    assert!(written.tensor("lm_head.weight").bytes == untied.tensor("lm_head.weight").bytes);
    home.run("verify --model out --no-eval --device cpu").done();
    let quantized = home.json(&format!("{line} out"))["perplexity"].as_f64().unwrap();
    assert!((quantized.ln() / own.ln() - 1.0).abs() < 0.01, "{quantized} against {own}");
    home.run(&format!("{eight} --model untied --out out2")).done();
    let weights = |out: &str| fs::read(home.path(out).join("model.safetensors")).unwrap();
    assert!(weights("out") == weights("out2"));
    let calibrate = "calibrate --model model --sensitivity --group 64 --outliers 32 --outlier-counts 32 --samples 1 --seq-len 64";
    let sensitivity = home.json(&format!("{calibrate} --out c"));
    let as_untied =
        home.json(&format!("{} --out d", calibrate.replace("--model model", "--model untied")));
    assert_eq!(sensitivity["sensitivity"], as_untied["sensitivity"]);

    // At the user's request.
    assert_unchanged(perplexity(&home, "--ignore-tensors lm_head.weight"));
}

#[test]
fn a_stored_head_that_is_the_embedding_changes_nothing() {
    for dtype in ["F16", "F32"] {
        let home = home_of(|mut model| {
            let mut head = model.tensor("model.embed_tokens.weight").clone();
            head.name = "lm_head.weight".to_owned();
            if dtype == "F32" {
                let halves = head.bytes.as_chunks::<2>().0.iter();
                let values = halves.map(|own| half::f16::from_le_bytes(*own).to_f32());
                head.bytes = values.flat_map(f32::to_le_bytes).collect();
                head.dtype = dtype.to_owned();
            }
            model.with(head)
        });
        let run = home.run(&format!("{EVAL} --model model --json")).done();
        assert!(warnings(&run).is_empty(), "{}", run.stderr);
        assert_unchanged(run.json()["perplexity"].as_f64().unwrap());
        home.run(&format!("{QUANTIZE} --model model --out out")).done();
        let written = StoredModel::read(&home.path("out"));
        assert!(written.tensors.iter().all(|tensor| tensor.name != "lm_head.weight"));
        assert_eq!(written.config["tie_word_embeddings"], true);
    }
}

#[test]
fn a_missing_tie_flag_is_called_one() {
    for value in [json!(false), Value::Null] {
        let home = home_of(|mut model| {
            match value {
                Value::Null => {
                    drop(model.config.as_object_mut().unwrap().remove("tie_word_embeddings"))
                }
                _ => model.config["tie_word_embeddings"] = value,
            }
            model
        });
        refused(
            &home,
            &[
                "model has no tensor `lm_head.weight`",
                "does not tie the output head to the embedding",
                "hint: a tie flag is missing: set \"tie_word_embeddings\": true",
            ],
        );
    }
}

#[test]
fn a_head_of_another_shape_is_named() {
    let home =
        home_of(|model| model.with(StoredTensor::f16("lm_head.weight", &[4100, HIDDEN], wave)));
    refused(
        &home,
        &[
            "tensor `lm_head.weight` of model/model.safetensors has shape [4100, 256]",
            "[4096, 256]",
        ],
    );
}

#[test]
fn frequencies_and_masks_that_older_versions_stored_change_nothing() {
    let home = home_of(|model| {
        let names = ["self_attn.rotary_emb.inv_freq", "attn.masked_bias"];
        let tensors =
            names.map(|name| StoredTensor::f16(&format!("model.layers.2.{name}"), &[32], wave));
        tensors.into_iter().fold(model, StoredModel::with)
    });
    let run = home.run(&format!("{EVAL} --model model --json")).done();
    assert!(warnings(&run).is_empty(), "{}", run.stderr);
    assert_unchanged(run.json()["perplexity"].as_f64().unwrap());
}

#[test]
fn names_with_another_prefix_are_read() {
    let bare = |name: &str| name.trim_start_matches("model.").to_owned();
    for prefix in ["", "language_model.model.", "model.language_model.", "_orig_mod.model."] {
        let home = home_of(|model| model.renamed(|name| format!("{prefix}{}", bare(name))));
        let run = home.run(&format!("{EVAL} --model model --json")).done();
        assert!(warnings(&run).is_empty(), "{}", run.stderr);
        assert_unchanged(run.json()["perplexity"].as_f64().unwrap());
        home.run(&format!("{QUANTIZE} --model model --out out")).done();
        StoredModel::tiny_llama().write(&home.path("usual"));
        home.run(&format!("{QUANTIZE} --model usual --out usual-out")).done();
        let weights = |out: &str| fs::read(home.path(out).join("model.safetensors")).unwrap();
        assert!(weights("out") == weights("usual-out"), "{prefix}");
    }
    // Without a tie the base model alone is no language model.
    let home = home_of(|mut model| {
        model.config["tie_word_embeddings"] = json!(false);
        model.renamed(bare)
    });
    refused(&home, &["no tensor `lm_head.weight`", "hint: a tie flag is missing"]);
}

#[test]
fn the_text_part_of_a_larger_model_is_read() {
    for (prefix, head_name) in [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ] {
        let home = home_of(|mut model| {
            let head = StoredTensor { name: head_name.to_owned(), ..head(&mut model) };
            let mut text = std::mem::take(&mut model.config);
            text["tie_word_embeddings"] = json!(false);
            model.config = json!({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
                "text_config": text, "vision_config": {"hidden_size": 8}});
            model
                .renamed(|name| format!("{prefix}{}", name.trim_start_matches("model.")))
                .with(head)
                .with(StoredTensor::f16("vision_tower.a.weight", &[8, 8], wave))
                .with(StoredTensor::f16("multi_modal_projector.linear_1.bias", &[8], wave))
        });
        let run = home.run(&format!("{EVAL} --model model --json")).done();
        assert!(run.json()["perplexity"].as_f64().unwrap() > 1000.0);
        let found = warnings(&run);
        assert_eq!(found.len(), 2, "{}", run.stderr);
        assert!(
            found[0].contains("only the text network of model is read: 2 tensors of other parts"),
            "{found:?}"
        );
        home.run(&format!("{QUANTIZE} --model model --out out")).done();
        home.run("verify --model out --no-eval --device cpu").done();
        let config = json_of(&home.path("out/config.json"));
        assert_eq!((&config["model_type"], config.get("text_config")), (&json!("llama"), None));
        let ignored = &json_of(&home.path("out/atom.json"))["source"]["ignored_tensors"];
        assert_eq!(
            *ignored,
            json!(["multi_modal_projector.linear_1.bias", "vision_tower.a.weight"])
        );
        // The text part itself is accounted for all the same.
        let mut model = StoredModel::read(&home.path("model"));
        model.tensors.push(StoredTensor::f16(
            &format!("{prefix}layers.0.mlp.up_proj.bias"),
            &[MLP],
            wave,
        ));
        model.write(&home.path("model"));
        refused(&home, &["biases of up_proj that are not zero: 1 tensor"]);
    }
}

#[test]
fn other_layouts_say_what_they_are() {
    let meta = |name: &str| {
        name.trim_start_matches("model.")
            .replace("embed_tokens", "tok_embeddings")
            .replace("self_attn.q_proj", "attention.wq")
            .replace("mlp.up_proj", "feed_forward.w3")
    };
    let fused = |name: &str| name.replace("q_proj", "qkv_proj");
    let quantized = |name: &str| name.replace("up_proj.weight", "up_proj.qweight");
    let adapter = |name: &str| name.replace("up_proj.weight", "up_proj.base_layer.weight");
    let other = |name: &str| name.replace("model.layers", "transformer.h");
    type Rename<'a> = &'a dyn Fn(&str) -> String;
    let renames: [(Rename<'_>, &[&str]); 5] = [
        (
            &meta,
            &[
                "weights under the names of Meta's own checkpoints",
                "convert_llama_weights_to_hf.py",
            ],
        ),
        (
            &fused,
            &[
                "`model.layers.0.self_attn.q_proj.weight`: it holds several projections in one tensor (qkv_proj)",
            ],
        ),
        (
            &quantized,
            &[
                "it holds codes or scales of quantized weights",
                "hint: give the unquantized repository",
            ],
        ),
        (&adapter, &["it holds parts of an adapter", "merge_and_unload"]),
        (&other, &["have other names than llama networks give them, such as `model.embed_tokens"]),
    ];
    for (rename, parts) in renames {
        refused(&home_of(|model| model.renamed(rename)), parts);
    }
    // The unquantized repository is named where a name says which.
    let home = Home::new();
    StoredModel::tiny_llama().renamed(quantized).write(&home.path("Tiny-7B-GPTQ"));
    home.run(&format!("{EVAL} --model ./Tiny-7B-GPTQ")).fails(3, &["made from, such as Tiny-7B"]);
    let home = home_of(|mut model| {
        model.config["num_hidden_layers"] = json!(5);
        model
    });
    refused(
        &home,
        &[
            "no tensor `model.layers.4.",
            "num_hidden_layers of model/config.json is 5, the weights have 4",
        ],
    );
}

#[test]
fn counts_beyond_the_weights_end_at_once() {
    for (key, value) in [
        ("num_hidden_layers", 1_000_000_000u64),
        ("hidden_size", 1 << 40),
        ("intermediate_size", 1 << 40),
        ("head_dim", 1_000_000_000_000),
    ] {
        let home = home_of(|mut model| {
            model.config[key] = json!(value);
            model
        });
        refused(&home, &["model/config.json", key.split('_').next().unwrap()]);
        home.run("inspect model").fails(3, &["model/config.json", "hint: "]);
    }
}
