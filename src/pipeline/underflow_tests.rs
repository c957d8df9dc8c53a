use half::f16;
use serde_json::json;

use super::*;
use crate::checkpoint::Dtype;
use crate::model::Architecture;
use crate::pipeline::energies::Energies;
use crate::pipeline::plan::plan_network;
use crate::quant::codebook::Codebook;
use crate::quant::number::{LinearFormat, NumberFormat, RowFormat, ScaleFormat};
use crate::recipe::{Group, Outliers, Recipe};

/// Two rows of two groups of 16 channels and one INT8 outlier, with these scales of row 0.
fn linear(scales: [f32; 2], outlier: f32) -> QuantizedLinear {
    let numbers =
        NumberFormat { bits: 4, codebook: Codebook::Int, group_size: 16, scale: ScaleFormat::F16 };
    let row =
        RowFormat { numbers, groups: 2, outlier_channels: 1, outlier_format: OutlierFormat::Int8 };
    QuantizedLinear {
        rows: 2,
        format: LinearFormat { row, rows_per_scale: 1 },
        codes: vec![0; 2 * 32],
        scales: [scales[0], scales[1], 1.0, 1.0].map(f16::from_f32).to_vec(),
        outliers: OutlierBlock::Int8 {
            codes: vec![0; 2],
            scales: [outlier, 1.0].map(f16::from_f32).to_vec(),
        },
    }
}

/// Whether a linear with weights of 1 in row 0 and `second` in row 1 is held.
fn held(linear: &QuantizedLinear, second: f32, energy: &[f64]) -> bool {
    let values = [vec![1f32; 33], vec![second; 33]].concat();
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let shape = [2, 33];
    let source = Tensor::in_memory("w", Dtype::F32, &shape, &bytes);
    let order: Vec<i32> = (0..33).collect();
    check_weights("w", linear, &source, &order, energy).is_ok()
}

#[test]
fn weights_whose_scales_vanish_are_refused_where_they_matter() {
    let even = vec![1.0; 33];
    assert!(held(&linear([1.0, -1.0], 1.0), 1.0, &even));
    assert!(held(&linear([5e-7, -5e-7], 1.0), 1.0, &even), "an eighth is held");
    for lost in [linear([0.0, 1.0], 1.0), linear([1.0, -1e-7], 1.0), linear([1.0, 1.0], 1e-8)] {
        assert!(!held(&lost, 0.0, &even));
        // The other row gives nearly all of the output.
        assert!(held(&lost, 100.0, &even));
    }
    // The channels of the lost group are hardly ever active.
    let mut energy = even;
    energy[..16].fill(1e-6);
    assert!(held(&linear([0.0, 1.0], 1.0), 1.0, &energy));
}

#[test]
fn activations_too_small_for_their_scales_are_refused() {
    let config = json!({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64,
        "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100});
    let architecture = Architecture::from_config(&config).unwrap();
    let recipe = Recipe {
        group: Group::Size(32),
        outliers: Outliers::Count(16),
        ..Recipe::default_recipe()
    };
    let plan = plan_network(&recipe, &architecture).unwrap().remove(0);
    let energies = |rms: f64| -> Energies {
        plan.iter().map(|site| vec![100.0 * rms * rms; site.channels]).collect()
    };
    let specs = architecture.sites(0);
    let check = |energies: &Energies| check_activations(&specs, None, &plan, energies, 100);
    assert!(check(&energies(1.0)).is_ok() && check(&energies(1e-4)).is_ok());
    let error = check(&energies(1e-6)).unwrap_err();
    assert!(error.to_string().contains("attn_in are too small"), "{error}");
    // One site alone, and of it the weak channels alone.
    let mut mixed = energies(1.0);
    mixed[3][..100].fill(1e-12);
    assert!(check(&mixed).is_ok());
    mixed[3].fill(1e-12);
    assert!(check(&mixed).unwrap_err().to_string().contains("mlp_act"));
    mixed[3].fill(0.0);
    assert!(check(&mixed).is_ok(), "zeros need no scale");
}
