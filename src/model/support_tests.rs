//! Nothing that an architecture says and the forward pass does not compute passes.

use super::*;
use crate::model::architecture::{QueryScaling, SharedExpert};
use serde_json::json;

fn network() -> Architecture {
    let config = json!({"model_type": "mixtral", "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100, "num_local_experts": 4});
    Architecture::from_config(&config).unwrap()
}

type Change = fn(&mut Architecture);

#[test]
fn what_is_not_computed_is_refused_by_name() {
    fn rope(network: &mut Architecture, block: usize) -> &mut crate::model::rope::Rope {
        network.attention[block].rope.as_mut().unwrap()
    }
    fn experts(network: &mut Architecture) -> &mut Experts {
        network.experts.as_mut().unwrap()
    }
    let changes: [(&str, Change); 20] = [
        ("norms after attention and MLP", |n| n.norms.placement = NormPlacement::After),
        ("norms after attention and MLP", |n| n.norms.placement = NormPlacement::Both),
        ("norm weights that are stored less one", |n| n.norms.unit_offset = true),
        ("blocks without RoPE", |n| n.attention[2].rope = None),
        ("blocks without RoPE", |n| n.attention.iter_mut().for_each(|block| block.rope = None)),
        ("a RoPE of its own in each block", |n| rope(n, 1).theta = 1e4),
        ("RoPE over a part of each head", |n| (0..3).for_each(|at| rope(n, at).share = 0.5)),
        ("RoPE of neighbouring channels", |n| (0..3).for_each(|at| rope(n, at).interleaved = true)),
        ("a factor of attention of its own", |n| n.attention_scale = Some(0.25)),
        ("queries that are scaled by their position", |n| {
            n.query_scaling = Some(QueryScaling { beta: 0.1, original: 64 });
        }),
        ("a factor of the embedding", |n| n.multipliers.embedding = 12.0),
        ("a factor of the residual stream", |n| n.multipliers.residual = 0.22),
        ("a factor of the logits", |n| n.multipliers.logits = 0.125),
        ("a norm over all heads together", |n| n.qk_norm = QkNorm::AllHeads),
        ("another activation than SiLU", |n| n.mlp.activation = Activation::GeluTanh),
        ("another activation than SiLU", |n| n.mlp.activation = Activation::ReluSquared),
        ("an MLP without a gate", |n| n.mlp.gated = false),
        ("a router by sigmoids", |n| experts(n).router = RouterKind::SigmoidWithBias),
        ("a factor of the routing weights", |n| experts(n).scale = 2.5),
        ("a shared expert", |n| {
            experts(n).shared = Some(SharedExpert { intermediate: 32, gated: false });
        }),
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

#[test]
fn blocks_that_attend_differently_are_refused() {
    let with = |windows: [Option<usize>; 3]| {
        let mut network = network();
        network.set_windows(windows);
        network.check_supported("config.json").map_err(|error| error.to_string())
    };
    assert_eq!(with([None; 3]), Ok(()));
    assert_eq!(with([Some(8); 3]), Ok(()));
    for (windows, sliding) in [([None, None, Some(8)], 1), ([Some(8), Some(8), None], 2)] {
        let expected =
            format!("config.json gives {sliding} of 3 blocks a sliding window and the others none");
        assert_eq!(with(windows), Err(expected));
    }
    let expected = "config.json gives blocks sliding windows of several lengths".to_owned();
    assert_eq!(with([Some(8), Some(8), Some(9)]), Err(expected));
}
