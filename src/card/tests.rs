use super::*;
use crate::checkpoint::{DataFile, HubOrigin, Provenance, SetUsed, SourceRecord};
use crate::recipe::Recipe;

fn manifest(recipe: Recipe) -> Manifest {
    Manifest {
        format_version: 1,
        tool_version: "0.1.0".into(),
        source: SourceRecord {
            name: "model".into(),
            fingerprint: "f00d".into(),
            bytes: 269_000_000,
            hub: None,
            ignored_tensors: Vec::new(),
        },
        calibration: Provenance {
            dataset: "sample".into(),
            sha256: "0".repeat(64),
            samples: 128,
            seq_len: 2048,
            seed: 0,
            sets: Vec::new(),
        },
        kv: recipe.kv(),
        recipe,
        bits_per_weight: 4.413,
        distillation: None,
        blocks: Vec::new(),
    }
}

fn text(manifest: &Manifest, source: &SourceCard, perplexities: &[Perplexity]) -> String {
    let form = Form::atom(manifest);
    Card { manifest, source, bytes: 99_000_000, perplexities, form: &form }.text()
}

#[test]
fn a_card_says_what_was_made_of_what_and_how() {
    let mut manifest = manifest(Recipe::paper());
    let hub = |repo: &str| HubOrigin {
        repo: repo.into(),
        revision: "main".into(),
        commit: "0123abcd".into(),
    };
    manifest.source.hub = Some(hub("org/model"));
    manifest.calibration.dataset = "wikitext2,/home/me/own.jsonl".into();
    let set =
        |name: &str, file| SetUsed { name: name.into(), sha256: "0".into(), samples: 64, file };
    let file = DataFile {
        path: "/cache/x".into(),
        repo: "Salesforce/wikitext".into(),
        file: "train.parquet".into(),
        revision: "main".into(),
        commit: "beef".into(),
        sha256: "1".into(),
    };
    manifest.calibration.sets = vec![set("wikitext2", Some(file)), set("/home/me/own.jsonl", None)];
    let source = SourceCard {
        license: vec!["other".into()],
        license_name: Some("llama 3".into()),
        license_link: Some("LICENSE".into()),
        language: vec!["en".into(), "no".into()],
    };
    let measured = Perplexity {
        dataset: "/home/me/test.txt".into(),
        windows: 8,
        seq_len: 2048,
        before: 20.97,
        after: 30.48,
    };
    let text = text(&manifest, &source, &[measured]);
    let (text, signature) = text.rsplit_once("\n<!-- ").unwrap();
    assert!(signature.starts_with("Written by atom. SHA-256"), "{signature}");
    assert_eq!(
        text,
        "\
---
license: other
license_name: \"llama 3\"
license_link: LICENSE
language:
- en
- \"no\"
base_model: org/model
base_model_relation: quantized
library_name: atom
pipeline_tag: text-generation
tags:
- atom
- quantized
- \"4-bit\"
- w4a4
datasets:
- Salesforce/wikitext
---

# model-atom-w4a4-g128

This is an Atom checkpoint of [org/model](https://huggingface.co/org/model/tree/0123abcd) at commit `0123abcd`, quantized with `atom` `0.1.0`.

| | |
|---|---|
| size of all tensors | 269.0 MB -> 99.0 MB (2.72 x smaller) |
| bits per quantized weight | 4.41, with scales, outliers and channel orders |

## Recipe

- weights int4, groups of 128, clip 0.85, rows share scales by two, GPTQ (damping 0.01)
- channels ordered by energy, 128 outliers in int8
- activations int4, clip 0.9
- KV cache int4, before RoPE, clip 1

## Calibration

128 windows of 2048 tokens, seed 0.

| text | windows | file |
|---|---:|---|
| `wikitext2` | 64 | `Salesforce/wikitext/train.parquet at beef` |
| `own.jsonl` | 64 | - |

## Accuracy

| perplexity on | windows | source | quantized | change |
|---|---:|---:|---:|---:|
| `test.txt` | 8 of 2048 tokens | 20.970 | 30.480 | +45.4 % |

Measured by the run that wrote this, source and result on the same windows; a few windows show that nothing broke, and are no benchmark.

## Use

Write text:

```sh
atom generate --model ORG/NAME --prompt 'Once upon a time'
```

Measure perplexity:

```sh
atom eval-ppl --model ORG/NAME --dataset wikitext2
```

Look at what is in it:

```sh
hf download ORG/NAME && atom inspect ORG/NAME
```

## How it was made

With `atom` `0.1.0`:

```sh
atom quantize --model org/model@0123abcd --recipe paper --calib wikitext2,own.jsonl --samples 128 --seq-len 2048 --seed 0
```
"
    );
}

#[test]
fn what_is_not_known_is_left_out_or_said() {
    let text = text(&manifest(Recipe::default_recipe()), &SourceCard::default(), &[]);
    for absent in ["license", "language", "base_model", "datasets", "| perplexity"] {
        assert!(!text.contains(absent), "{absent}: {text}");
    }
    for part in [
        "of `model` (fingerprint `f00d`)",
        "Not measured in the run that wrote this.",
        "drawn from `sample`.",
        "atom quantize --model model --calib sample --samples",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn foreign_names_stay_text() {
    let mut manifest = manifest(Recipe::default_recipe());
    manifest.source.name = "a`\n# B <script> | [x](y)\n```".into();
    manifest.source.hub = Some(HubOrigin {
        repo: "x](javascript:0)".into(),
        revision: String::new(),
        commit: "c\nd".into(),
    });
    manifest.calibration.dataset = "../x\n---\nlicense: mit|".into();
    let text = text(&manifest, &SourceCard::default(), &[]);
    assert_eq!(text.matches("\n---\n").count(), 1, "{text}");
    assert_eq!(text.matches("\n# ").count(), 1, "{text}");
    assert_eq!(text.matches("\n```").count(), 8, "{text}");
    let (_, body) = text.split_once("\n---\n").unwrap();
    assert!(!body.contains("<script>"), "{body}");
    assert!(body.contains("of `x](javascript:0)` at commit `c\\u{a}d`"), "{body}");
}

#[test]
fn the_command_that_publishes_is_one_for_a_shell() {
    assert_eq!(
        upload_command(Path::new("./my model-atom")),
        "hf upload 'ORG/my model-atom' './my model-atom'"
    );
    assert_eq!(upload_command(Path::new("/x/m")), "hf upload ORG/m /x/m");
}
