//! Nothing that an architecture says and the forward pass does not compute passes.

use super::*;
use serde_json::json;

fn network() -> Architecture {
    let config = json!({"model_type": "mixtral", "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100, "num_local_experts": 4});
    Architecture::from_config(&config).unwrap()
}

type Change = fn(&mut Architecture);

#[test]
fn what_is_not_computed_is_refused_by_name() {
    const BOTH: &str = "experts, and norms, factors or activations of its own";
    let changes: [(&str, Change); 6] = [
        ("no norms", |n| n.norms.before = None),
        ("another activation than SiLU and GELU", |n| n.mlp.activation = Activation::ReluSquared),
        ("an MLP without a gate", |n| n.mlp.gated = false),
        (BOTH, |n| n.norms = Norms::OLMO),
        (BOTH, |n| n.multipliers.residual = 0.22),
        (BOTH, |n| n.mlp.activation = Activation::GeluTanh),
    ];
    network().check_supported("config.json").unwrap();
    for (what, change) in changes {
        let mut network = network();
        change(&mut network);
        let error = network.check_supported("config.json").unwrap_err();
        let expected = format!(
            "config.json: a network of type mixtral with {what}, which this version does not compute"
        );
        assert_eq!(error.message(), expected);
        assert_eq!(error.kind(), crate::Kind::Input);
    }
}
