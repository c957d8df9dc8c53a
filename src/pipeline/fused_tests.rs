//! A source that stores q, k and v as one tensor, and gate and up as another, is the same network. No family declares it
//! yet, so the declaration is made here.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use safetensors::tensor::{SafeTensors, TensorView, serialize_to_file};
use serde_json::{Value, json};

use crate::backend::cpu::Cpu;
use crate::checkpoint::{Destination, Inputs, Source};
use crate::model::Architecture;
use crate::model::architecture::FusedLinears;
use crate::network::network;
use crate::pipeline::{Calibration, Output, Quantization, quantize};
use crate::progress::Silent;
use crate::recipe::{Group, Outliers, Recipe};
use crate::text::{Split, TextSet};

const FUSED: &[FusedLinears] = &[
    FusedLinears { stored: "qkv_proj", linears: &["q_proj", "k_proj", "v_proj"] },
    FusedLinears { stored: "gate_up_proj", linears: &["gate_proj", "up_proj"] },
];

/// F16 tensors by name: shape and bytes.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama");

/// The bundled model with a bias of every linear.
fn tensors() -> Tensors {
    let bytes = fs_err::read(Path::new(TINY).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = file
        .iter()
        .map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), view.data().to_vec())))
        .collect();
    let linears = tensors.iter().filter(|(name, _)| name.ends_with("_proj.weight"));
    let bias = |(name, (shape, _)): (&String, &(Vec<usize>, Vec<u8>))| {
        let value = |row: usize| f16::from_f32((row as f32).sin() / 16.0).to_le_bytes();
        let bytes = (0..shape[0]).flat_map(value).collect();
        (name.replace(".weight", ".bias"), (vec![shape[0]], bytes))
    };
    let biases: Vec<_> = linears.map(bias).collect();
    tensors.extend(biases);
    tensors
}

/// The same, its linears stored as [`FUSED`] says.
fn fused(mut tensors: Tensors) -> Tensors {
    for layer in 0..4 {
        for (part, fused) in ["self_attn", "mlp"].into_iter().zip(FUSED) {
            for kind in ["weight", "bias"] {
                let name = |own: &str| format!("model.layers.{layer}.{part}.{own}.{kind}");
                let mut parts = fused.linears.iter().map(|own| tensors.remove(&name(own)).unwrap());
                let mut all = parts.next().unwrap();
                for (shape, bytes) in parts {
                    all.0[0] += shape[0];
                    all.1.extend(bytes);
                }
                tensors.insert(name(fused.stored), all);
            }
        }
    }
    tensors
}

fn write(directory: &Path, tensors: &Tensors) {
    fs_err::create_dir_all(directory).unwrap();
    let config = fs_err::read(Path::new(TINY).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["attention_bias"] = json!(true);
    config["mlp_bias"] = json!(true);
    fs_err::write(directory.join("config.json"), config.to_string()).unwrap();
    fs_err::copy(Path::new(TINY).join("tokenizer.json"), directory.join("tokenizer.json")).unwrap();
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        let view = TensorView::new(safetensors::Dtype::F16, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    serialize_to_file(views, None, &directory.join("model.safetensors")).unwrap();
}

/// The source in `directory` as a family would open it that declares [`FUSED`].
fn open(directory: &Path) -> Source {
    let source = Source::open(directory).unwrap();
    let mut architecture = Architecture::from_config(source.config()).unwrap();
    architecture.fused = FUSED;
    source.with_row_ranges(architecture.row_ranges())
}

/// The checkpoint's tensors, quantized by the default recipe.
fn quantized(source: &Source, out: &Path) -> Vec<u8> {
    let text = TextSet::sample(Split::Calibration);
    let calibration = Calibration { text, samples: 2, seq_len: 64, seed: 0 };
    let recipe = Recipe {
        group: Group::Size(64),
        outliers: Outliers::Count(32),
        ..Recipe::default_recipe()
    };
    let destination =
        Destination { out: out.to_owned(), overwrite: false, inputs: Inputs::default() };
    let output = Output { destination, resume: false };
    let cpu = Cpu::new().unwrap();
    let quantization = Quantization {
        source,
        calibration: &calibration,
        recipe: &recipe,
        output: &output,
        evaluation: None,
    };
    quantize(&cpu, &quantization, &Silent).unwrap();
    fs_err::read(out.join("model.safetensors")).unwrap()
}

#[test]
fn fused_linears_give_the_codes_of_separate_ones() {
    let home = tempfile::tempdir().unwrap();
    let [plain, one] = ["plain", "fused"].map(|name| home.path().join(name));
    write(&plain, &tensors());
    write(&one, &fused(tensors()));
    let made = [&plain, &one].map(|directory| {
        let source = open(directory);
        let found = network(&source, &Silent).unwrap();
        assert!(found.warnings.is_empty() && found.ignored.is_empty(), "{found:?}");
        quantized(&source, &directory.with_extension("atom"))
    });
    assert!(made[0] == made[1]);
    assert_eq!(open(&plain).total_bytes(), open(&one).total_bytes());
}

#[test]
fn rows_of_a_fused_tensor_lie_where_they_are_stored() {
    let home = tempfile::tempdir().unwrap();
    write(home.path(), &fused(tensors()));
    let source = open(home.path());
    let separate = tensors();
    for (name, (shape, bytes)) in separate.iter().filter(|(name, _)| name.contains(".layers.2.")) {
        let tensor = source.tensor(name).unwrap();
        assert_eq!((tensor.shape, tensor.bytes), (&shape[..], &bytes[..]), "{name}");
    }
    let [k, qkv] =
        ["k_proj", "qkv_proj"].map(|own| format!("model.layers.2.self_attn.{own}.weight"));
    let stored = source.tensor(&qkv).unwrap();
    let offset =
        source.tensor(&k).unwrap().bytes.as_ptr() as usize - stored.bytes.as_ptr() as usize;
    assert_eq!(offset, 256 * 256 * 2, "no copy, after the rows of q");
    assert_eq!(source.stored_name(&k), qkv);
    assert!(source.contains(&k));
    // Not declared, q_proj is missing, and what is there says why.
    let undeclared = Source::open(home.path()).unwrap();
    let error = network(&undeclared, &Silent).unwrap_err();
    assert!(error.message().contains("several projections in one tensor"), "{error}");
}

#[test]
fn a_damaged_fused_tensor_is_named_as_it_is_stored() {
    let home = tempfile::tempdir().unwrap();
    let name = "model.layers.1.mlp.gate_up_proj.weight";
    let mut damaged = fused(tensors());
    let (shape, bytes) = damaged.get_mut(name).unwrap();
    assert_eq!(shape[..], [2 * 768, 256]);
    // The third row of up, column 5.
    let at = 2 * ((768 + 2) * 256 + 5);
    bytes[at..at + 2].copy_from_slice(&f16::NAN.to_le_bytes());
    write(home.path(), &damaged);
    let source = open(home.path());
    let up = source.tensor("model.layers.1.mlp.up_proj.weight").unwrap();
    let message = up.to_f32().unwrap_err().to_string();
    assert!(message.contains(&format!("tensor `{name}`")), "{message}");
    assert!(message.ends_with("holds NaN at [770, 5]"), "{message}");
    source.tensor("model.layers.1.mlp.gate_proj.weight").unwrap().to_f32().unwrap();

    // More rows than the linears have.
    let (shape, bytes) = damaged.get_mut(name).unwrap();
    shape[0] += 1;
    bytes.extend([0; 512]);
    write(home.path(), &damaged);
    let error = network(&open(home.path()), &Silent).unwrap_err();
    let expected = "has shape [1537, 256], config.json makes it [1536, 256]";
    assert!(error.message().ends_with(expected), "{error}");
}

#[test]
fn a_fused_tensor_next_to_its_linears_is_not_used() {
    let home = tempfile::tempdir().unwrap();
    let mut both = tensors();
    both.extend(fused(tensors()));
    write(home.path(), &both);
    let source = open(home.path());
    let name = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(source.stored_name(name), name);
    let error = network(&source, &Silent).unwrap_err();
    assert!(error.message().contains("several projections in one tensor"), "{error}");
}
