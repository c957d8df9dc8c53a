use serde_json::{Value, json};

use super::*;
use crate::pipeline::allocate::{Allocating, Target, allocate};
use crate::pipeline::outcome::Measured;
use crate::pipeline::plan::plan_network;
use crate::pipeline::sensitivity::{BlockSensitivity, CountSensitivity, SiteSensitivity};
use crate::recipe::{Group, Outliers, Recipe};

fn recipe() -> Recipe {
    Recipe { group: Group::Size(16), outliers: Outliers::Count(8), ..Recipe::default_recipe() }
}

/// A calibration of a network of one block, with a sensitivity.
fn calibration() -> (CalibrationData, Architecture) {
    calibration_of(json!({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32,
        "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 10}))
}

fn calibration_of(config: Value) -> (CalibrationData, Architecture) {
    let architecture = Architecture::from_config(&config).unwrap();
    let sites = architecture.sites(0);
    let energies = sites.iter().map(|site| (0..site.channels).map(|c| c as f64).collect());
    let measured = sites.iter().map(|site| SiteSensitivity {
        effects: vec![0.5; site.linears.len()],
        source_bytes: site.linears.iter().map(|own| 2 * (own.rows * own.columns) as u64).collect(),
        counts: [8, 0]
            .map(|outliers| CountSensitivity {
                outliers,
                activation: 0.25,
                errors: vec![vec![0.4, 0.3, 0.2, 0.1]; site.linears.len()],
            })
            .into(),
    });
    let sensitivity = Sensitivity {
        recipe: recipe(),
        widths: vec![2, 3, 4, 8],
        hessian_windows: 1,
        effect_windows: 1,
        kept_bytes: 100,
        blocks: vec![BlockSensitivity { carry: 1.0, sites: measured.collect() }],
    };
    let provenance = Provenance {
        dataset: "sample".into(),
        sha256: "0".into(),
        samples: 2,
        seq_len: 4,
        seed: 0,
        sets: Vec::new(),
    };
    let statistics = vec![Statistics { energies: energies.collect(), key_mean: vec![0.5; 32] }];
    let data = CalibrationData {
        model: "m".into(),
        fingerprint: "f".into(),
        config,
        provenance,
        tokens: vec![1; 8],
        statistics,
        sensitivity: Some(sensitivity),
    };
    (data, architecture)
}

#[test]
fn a_measurement_reports_each_outlier_count_once() {
    let (data, _) = calibration();
    let measured = Measured::of(&data.sensitivity.unwrap());
    assert_eq!(measured.outlier_counts, [8, 0]);
}

/// The file's header with the text of `atom_calibration` as a value, and its data.
fn take_apart(bytes: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let text = header["__metadata__"][KEY].as_str().unwrap();
    header["__metadata__"][KEY] = serde_json::from_str(text).unwrap();
    (header, bytes[8 + length..].to_vec())
}

fn put_together(header: &Value, data: &[u8]) -> Vec<u8> {
    let mut header = header.clone();
    if let Some(inner) = header.get_mut("__metadata__").and_then(|own| own.get_mut(KEY))
        && !inner.is_string()
    {
        *inner = inner.to_string().into();
    }
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// Reads the file and plans with it in every way, as `atom plan` does.
fn plan(bytes: &[u8]) -> Result<()> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs_err::write(file.path(), bytes).unwrap();
    let (data, architecture, _) = CalibrationData::read(file.path())?;
    for (block, statistics) in plan_network(&recipe(), &architecture)?.iter().zip(&data.statistics)
    {
        block.iter().zip(&statistics.energies).for_each(|(site, energy)| drop(site.order(energy)));
    }
    let Some(sensitivity) = &data.sensitivity else { return Ok(()) };
    for target in [Target::Bits(6.0), Target::Bytes(30_000)] {
        let allocating = Allocating { target, widths: vec![2, 4, 8, 16], outlier_counts: None };
        allocate(sensitivity, &architecture, &sensitivity.recipe, &allocating)?;
    }
    Ok(())
}

#[test]
fn a_sound_file_is_read_and_planned_with() {
    let (data, architecture) = calibration();
    let bytes = data.to_bytes(&architecture).unwrap();
    plan(&bytes).unwrap();
    let (header, rest) = take_apart(&bytes);
    plan(&put_together(&header, &rest)).unwrap();
}

/// Widths of 256 linears on one activation: 4^256 combinations.
#[test]
fn bits_are_allocated_to_the_linears_of_many_experts() {
    let (data, architecture) = calibration_of(json!({"model_type": "qwen3_moe",
        "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": 10, "num_experts": 128, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32}));
    let mut sensitivity = data.sensitivity.unwrap();
    for site in &mut sensitivity.blocks[0].sites {
        let effects = site.effects.iter_mut().enumerate();
        effects.for_each(|(linear, effect)| *effect = 0.001 * 1.05_f64.powi(linear as i32));
    }
    for target in [Target::Bits(7.0), Target::Bytes(1_200_000)] {
        let allocating = Allocating { target, widths: vec![2, 4, 8, 16], outlier_counts: None };
        let (blocks, allocated) =
            allocate(&sensitivity, &architecture, &sensitivity.recipe, &allocating).unwrap();
        let mlp_in = blocks[0].iter().find(|site| site.linears.len() == 256).unwrap();
        assert!(mlp_in.linears.iter().any(|linear| linear.bits != mlp_in.linears[0].bits));
        assert!(allocated.planned.nats <= allocated.least_nats * 1.001, "{allocated:?}");
        match target {
            Target::Bits(bits) => assert!(allocated.planned.bits_per_weight <= bits),
            Target::Bytes(bytes) => assert!(allocated.checkpoint_bytes <= bytes),
        }
    }
}

#[test]
fn arrays_that_do_not_fit_the_network_are_named() {
    let (data, architecture) = calibration();
    let (header, rest) = take_apart(&data.to_bytes(&architecture).unwrap());
    let site = "/__metadata__/atom_calibration/sensitivity/blocks/0/sites/1";
    let sensitivity = "/__metadata__/atom_calibration/sensitivity";
    for (path, value, part) in [
        (format!("{site}/effects"), json!([]), "0 effects and 1 sizes for 1 linears"),
        (format!("{site}/effects"), json!([-1.0]), "has the effects [-1.0]"),
        (format!("{site}/effects/0"), json!(1e300), "has the effects"),
        (format!("{site}/source_bytes"), json!([1, 2]), "1 effects and 2 sizes"),
        (format!("{site}/source_bytes/0"), json!(u64::MAX), "bytes for the 1024 weights"),
        (format!("{site}/counts"), json!([]), "does not begin with the recipe's outlier count, 8"),
        (format!("{site}/counts/0/outliers"), json!(7), "does not begin with the recipe's"),
        (format!("{site}/counts/1/outliers"), json!(u64::MAX), "twice or beyond its channels"),
        (format!("{site}/counts/1/outliers"), json!(8), "twice or beyond its channels"),
        (format!("{site}/counts/0/errors"), json!([[1.0]]), "no sound error"),
        (format!("{site}/counts/0/errors"), json!([]), "no sound error"),
        (format!("{site}/counts/0/activation"), json!(-0.5), "no sound error"),
        (format!("{sensitivity}/blocks"), json!([]), "has 0 blocks, the network 1"),
        (format!("{sensitivity}/blocks/0/sites"), json!([]), "has 0 sites in block 0"),
        (format!("{sensitivity}/blocks/0/carry"), json!(-1.0), "has the carry -1"),
        (format!("{sensitivity}/widths"), json!([2, 3, 4, 4]), "has the widths"),
        (format!("{sensitivity}/widths"), json!([2, 3]), "lacks the width of its recipe, 4"),
        (format!("{sensitivity}/kept_bytes"), json!(u64::MAX), "bytes of unquantized tensors"),
        (format!("{sensitivity}/recipe/clip_kv"), json!(7), "its sensitivity's recipe"),
        ("/__metadata__/atom_calibration/provenance/samples".into(), json!(u64::MAX), "`windows`"),
        (
            "/__metadata__/atom_calibration/provenance/seq_len".into(),
            json!(0),
            "windows of 0 tokens",
        ),
        (
            "/__metadata__/atom_calibration/config/num_hidden_layers".into(),
            json!(1_000_000_000u64),
            "`num_hidden_layers` is 1000000000",
        ),
        ("/__metadata__/atom_calibration".into(), json!([1]), "is not a calibration file"),
        ("/windows/shape".into(), json!([4, 2]), "`windows` has another type or shape"),
        ("/windows/shape".into(), json!([1u64 << 62, 8]), "is not a calibration file"),
        ("/windows".into(), json!([]), "is not a calibration file"),
    ] {
        let mut changed = header.clone();
        *changed.pointer_mut(&path).unwrap_or_else(|| panic!("{path}")) = value;
        let error = plan(&put_together(&changed, &rest)).unwrap_err();
        assert!(error.to_string().contains(part), "{path}: {error}");
        assert_eq!(error.kind(), crate::Kind::Input, "{path}: {error}");
    }
}

#[test]
fn energies_and_keys_that_are_no_sums_of_squares_are_named() {
    let change = |change: fn(&mut Statistics)| {
        let (mut data, architecture) = calibration();
        change(&mut data.statistics[0]);
        plan(&data.to_bytes(&architecture).unwrap()).unwrap_err().to_string()
    };
    for (error, part) in [
        (
            change(|own| own.energies[0][3] = f64::NAN),
            "channel 3 of model.layers.0.self_attn.attn_in has the energy NaN",
        ),
        (change(|own| own.energies[3][1] = f64::INFINITY), "has the energy inf"),
        (change(|own| own.energies[3][1] = -1.0), "has the energy -1"),
        (change(|own| own.energies[3].truncate(47)), "another type or shape"),
        (change(|own| own.key_mean[2] = f32::NAN), "key_mean` holds NaN at 2"),
    ] {
        assert!(error.contains(part), "{error}");
    }
}

/// Every value of the header in turn becomes another; what is read then is planned with.
#[test]
fn no_change_of_the_header_makes_a_panic() {
    let (data, architecture) = calibration();
    let (header, rest) = take_apart(&data.to_bytes(&architecture).unwrap());
    let mut paths = Vec::new();
    collect(&header, String::new(), &mut paths);
    assert!(paths.len() > 200, "{}", paths.len());
    let values = [
        json!(null),
        json!([]),
        json!({}),
        json!([[]]),
        json!("x"),
        json!(0),
        json!(-1),
        json!(1),
        json!(u64::MAX),
        json!(1u64 << 62),
        json!(1e308),
        json!([u64::MAX, 2]),
    ];
    for path in &paths {
        for value in &values {
            let mut changed = header.clone();
            *changed.pointer_mut(path).unwrap() = value.clone();
            if let Err(error) = plan(&put_together(&changed, &rest)) {
                assert!(!error.message().is_empty());
            }
        }
    }
}

fn collect(value: &Value, path: String, paths: &mut Vec<String>) {
    let escaped = |key: &str| key.replace('~', "~0").replace('/', "~1");
    match value {
        Value::Object(map) => {
            map.iter()
                .for_each(|(key, own)| collect(own, format!("{path}/{}", escaped(key)), paths));
        }
        Value::Array(list) => {
            list.iter()
                .enumerate()
                .for_each(|(at, own)| collect(own, format!("{path}/{at}"), paths));
        }
        _ => {}
    }
    if !path.is_empty() {
        paths.push(path);
    }
}
