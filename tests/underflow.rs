/*! Weights and activations that f16 scales cannot hold: the same network in other numbers is refused, not ruined. */

mod common;

use common::{Dtype, Home, RandomModel, SMALL};

/// A random model of one block whose projections are multiplied by these factors; the network stays the same where they
/// cancel out.
fn home_with(factors: &[(&str, f32)]) -> Home {
    let home = Home::new();
    let mut model = RandomModel::new(1);
    for (name, factor) in factors {
        let name = format!("model.layers.0.{name}.weight");
        model.tensor(&name).values.iter_mut().for_each(|value| *value *= factor);
    }
    model.write(&home.path("model"), Dtype::F32, 1);
    home
}

#[test]
fn what_underflows_is_refused_and_named() {
    let line = format!("quantize --model model {SMALL} --no-eval --out out");
    let small = "too small for their scales";
    for (factors, part, reason) in [
        (&[("mlp.up_proj", 1e-5), ("mlp.down_proj", 1e5)][..], "layers.0.mlp", small),
        // GPTQ may make the large ones of a block too large before the small ones are looked at.
        (&[("mlp.up_proj", 1e-6), ("mlp.down_proj", 1e6)], "layers.0.mlp", "scale"),
        (&[("self_attn.v_proj", 1e-6), ("self_attn.o_proj", 1e6)], "layers.0.self_attn", "scale"),
        (&[("self_attn.q_proj", 1e-6)], "q_proj", small),
    ] {
        let home = home_with(factors);
        for flags in ["", "--no-gptq", "--recipe paper", "--act-bits 16"] {
            let run = home.run(&format!("{line} {flags}"));
            run.fails(3, &[part, reason, "hint: multiply"]);
            assert_eq!(home.names(), ["model"], "{flags}");
        }
    }
}

/// Weights times a hundredth are quantized as well as the original ones.
#[test]
fn what_is_small_and_held_is_quantized() {
    let line = format!("quantize --model model {SMALL} --no-gptq --out out --json");
    let increase = |factors: &[(&str, f32)]| {
        let outcome = home_with(factors).run(&line).done().json();
        let perplexity = |key: &str| outcome["perplexity"][key].as_f64().unwrap();
        perplexity("after") / perplexity("before")
    };
    let plain = increase(&[]);
    let scaled = increase(&[("mlp.up_proj", 1.0 / 128.0), ("mlp.down_proj", 128.0)]);
    assert!((scaled / plain - 1.0).abs() < 0.01, "{scaled} for {plain}");
}
