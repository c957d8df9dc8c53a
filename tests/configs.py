"""Makes tests/configs.json: what transformers reads of a config.json, for each family and for each field in right and wrong
types, which src/model/reference_tests.rs compares with what we read.

    pip install transformers            # torch is not needed
    python3 tests/configs.py tests/configs.json

The committed file was made with transformers 5.24.0."""

import json
import sys

from transformers import AutoConfig

BASE = dict(num_hidden_layers=4, hidden_size=512, intermediate_size=96, num_attention_heads=32, vocab_size=100)
FAMILIES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"]
LINEAR = dict(rope_type="linear", factor=2.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
FULL, SLIDING = "full_attention", "sliding_attention"

# Changes that must be read, and as transformers reads them.
GOOD = [
    {},
    *[dict(num_key_value_heads=n) for n in (1, 2, 4)],
    *[dict(head_dim=n) for n in (16, 32)],
    *[dict(rms_norm_eps=x) for x in (1e-5, 1e-6, 0.5, 0.0)],
    *[dict(tie_word_embeddings=x) for x in (True, False)],
    *[dict(max_position_embeddings=n) for n in (64, 4096)],
    *[{key: x} for key in ("attention_bias", "mlp_bias") for x in (True, False)],
    *[dict(rope_theta=x) for x in (5000.0, 1000000, 123456.5)],
    *[{key: None} for key in ("rope_scaling", "rope_parameters", "sliding_window", "mlp_only_layers", "partial_rotary_factor")],
    *[{key: {}} for key in ("rope_scaling", "rope_parameters")],
    *[{key: x} for key in ("rope_scaling", "rope_parameters") for x in (
        LINEAR, LLAMA3, dict(type="linear", factor=4), dict(rope_type="default"), dict(rope_theta=7000.0),
        dict(rope_type="default", rope_theta=7000.0), dict(LINEAR, rope_theta=7000.0), dict(LLAMA3, rope_theta=7000.0),
        dict(rope_type="linear", type="linear", factor=3.0), dict(rope_type="default", partial_rotary_factor=1.0),
        {k: v for k, v in LLAMA3.items() if not k.startswith("original")})],
    dict(rope_theta=5000.0, rope_parameters=dict(rope_type="default")),
    dict(rope_theta=5000.0, rope_parameters=dict(rope_type="default", rope_theta=7000.0)),
    dict(rope_theta=5000.0, rope_scaling=LINEAR, rope_parameters=dict(rope_type="default", rope_theta=7000.0)),
    dict(rope_scaling=LINEAR, rope_parameters=dict(rope_type="default", rope_theta=7000.0)),
    dict(rope_scaling=dict(rope_theta=7000.0), rope_parameters=LINEAR),
    dict(rope_scaling={}, rope_parameters=LINEAR),
    dict(rope_theta=None, rope_parameters=dict(rope_theta=7000.0)),
    *[dict(sliding_window=n) for n in (1, 16, 4096)],
    *[dict(use_sliding_window=True, sliding_window=16, max_window_layers=n) for n in (0, 4, 28)],
    dict(use_sliding_window=True, sliding_window=16),
    dict(use_sliding_window=True, max_window_layers=0),
    dict(use_sliding_window=True, sliding_window=None, max_window_layers=0),
    dict(use_sliding_window=False, sliding_window=16, max_window_layers=0),
    *[dict(num_local_experts=n, num_experts_per_tok=1) for n in (1, 6)],
    *[dict(num_experts=n, num_experts_per_tok=1) for n in (1, 6)],
    *[dict(num_experts_per_tok=n) for n in (1, 3)],
    dict(moe_intermediate_size=24),
    *[dict(norm_topk_prob=x) for x in (True, False)],
    *[dict(decoder_sparse_step=n) for n in (1, 2, 5)],
    *[dict(mlp_only_layers=x) for x in ([], [0], [0, 2], [9])],
    dict(decoder_sparse_step=2, mlp_only_layers=[1]),
]

WRONG = [None, "1", "", True, -1, 0, 4.0, 2.5, [], [1], {}, {"a": 1}, 10**6, 10**19]

# Changes that must be refused, or read as transformers reads them.
OTHER = [
    *[{key: x} for x in WRONG for key in (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "num_key_value_heads",
        "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "rope_theta", "rope_scaling",
        "rope_parameters", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types",
        "hidden_act", "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
        "decoder_sparse_step", "mlp_only_layers", "partial_rotary_factor", "per_layer_config", "is_causal")],
    *[dict(use_sliding_window=True, sliding_window=x, max_window_layers=0) for x in WRONG],
    *[dict(use_sliding_window=True, sliding_window=16, max_window_layers=x) for x in [*WRONG, 1, 2, 3]],
    *[dict(rope_scaling=dict(LINEAR, factor=x)) for x in WRONG],
    *[dict(rope_scaling=dict(LLAMA3, **{key: x})) for x in WRONG for key in LLAMA3],
    *[dict(rope_parameters=dict(rope_theta=x)) for x in WRONG],
    *[dict(rope_scaling=dict(rope_type=x)) for x in ("yarn", "dynamic", "longrope", "mrope", "proportional", "su", None, 1)],
    *[dict(rope_scaling=dict(type=x, factor=2.0)) for x in ("yarn", "dynamic", "longrope", "mrope", None)],
    dict(rope_scaling=dict(rope_type="default", type="linear", factor=2.0)),
    dict(rope_scaling=dict(LLAMA3, low_freq_factor=4.0)),
    dict(rope_scaling=dict(LINEAR, attention_factor=2.0)),
    dict(rope_scaling=dict(rope_type="default", mrope_section=[2, 3, 3])),
    dict(rope_scaling=dict(LLAMA3), original_max_position_embeddings=32),
    *[{key: {FULL: dict(rope_theta=7000.0), SLIDING: dict(rope_theta=8000.0)}} for key in ("rope_scaling", "rope_parameters")],
    dict(rope_parameters={FULL: dict(rope_theta=7000.0, rope_type="default")}),
    dict(rope_parameters={FULL: None}),
    *[dict(partial_rotary_factor=x) for x in (0.5, 1.0, 0)],
    dict(rope_parameters=dict(rope_type="linear", factor=2.0, partial_rotary_factor=0.5)),
    *[dict(layer_types=x) for x in ([FULL] * 4, [SLIDING] * 4, [FULL, SLIDING] * 2, [FULL] * 3, ["attention"] * 4, ["conv"] * 4)],
    *[dict(layer_types=x, use_sliding_window=True, sliding_window=16) for x in ([FULL] * 4, [SLIDING] * 4, [FULL, SLIDING] * 2)],
    dict(num_local_experts=4, num_experts=6),
    *[dict(hidden_act=x) for x in ("silu", "swish", "gelu", "relu")],
    dict(num_attention_heads=3), dict(hidden_size=520, head_dim=16), dict(num_key_value_heads=3),
    dict(is_causal=False), dict(is_causal=True), dict(per_layer_config={"0": dict(num_key_value_heads=1)}),
]


def number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read(family, changes):
    """What the network is made from, or none where transformers refuses the file or its network cannot be built."""
    # A copy through JSON: transformers writes into what it is given.
    if number(changes.get("num_hidden_layers")) and changes["num_hidden_layers"] > 100_000:
        return None  # transformers makes lists of so many.
    given = json.loads(json.dumps({**BASE, **changes}))
    try:
        config = AutoConfig.for_model(family, **given)
    except Exception:
        return None
    rope = config.rope_parameters
    if getattr(config, "is_causal", True) is not True or config.hidden_act not in ("silu", "swish"):
        return None
    if config.is_heterogeneous or "rope_type" not in rope or not number(rope.get("rope_theta")):
        return None
    if not isinstance(rope["rope_type"], str) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return None
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = config.num_key_value_heads
    if layers > 100_000 or not kv_heads or not heads or heads % kv_heads:
        return None
    # Attention reads head_dim as it stands, and without one what the others share.
    head_dim = getattr(config, "head_dim", config.hidden_size // heads)
    if family in ("mistral", "mixtral") and head_dim is None:
        head_dim = config.hidden_size // heads
    if not head_dim or head_dim < 0 or head_dim % 2:
        return None
    window = getattr(config, "sliding_window", None)
    windows = {
        "llama": lambda: [None] * layers,
        "qwen2": lambda: [window if kind == SLIDING else None for kind in config.layer_types],
        "qwen3": lambda: [window if kind == SLIDING else None for kind in config.layer_types],
    }.get(family, lambda: [window] * layers)()
    if family.startswith("qwen") and SLIDING in (getattr(config, "layer_types", None) or []) and window is None:
        return None
    attention_bias = family in ("llama", "qwen3", "qwen3_moe") and config.attention_bias
    result = dict(
        layers=layers, hidden=config.hidden_size, intermediate=config.intermediate_size, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, vocabulary=config.vocab_size, epsilon=config.rms_norm_eps,
        tied=config.tie_word_embeddings, positions=config.max_position_embeddings,
        rope={key: rope.get(key) for key in ("rope_type", "rope_theta")}, windows=sorted(set(windows), key=str),
        biases=[attention_bias or family == "qwen2", attention_bias, family == "llama" and config.mlp_bias],
    )
    scaled = {"linear": ["factor"], "llama3": list(LLAMA3)[1:]}.get(rope["rope_type"], [])
    result["rope"].update({key: rope.get(key) for key in scaled})
    if not all(number(rope.get(key)) for key in scaled):
        return None
    if family == "mixtral":
        result["experts"] = [config.num_local_experts, config.num_experts_per_tok, config.intermediate_size, True, []]
    if family == "qwen3_moe":
        step, listed = config.decoder_sparse_step, config.mlp_only_layers
        if step == 0:
            return None
        dense = [i for i in range(min(layers, 1000)) if i in listed or (i + 1) % step]
        counts = [config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size]
        result["experts"] = [*counts, config.norm_topk_prob, dense]
    return result


def main():
    families = {}
    for family in FAMILIES:
        base = read(family, {})
        cases = []
        for must, changes in [*((True, c) for c in GOOD), *((False, c) for c in OTHER)]:
            found = read(family, changes)
            assert found or not must or "experts" in str(changes), (family, changes)
            differs = found and {key: value for key, value in found.items() if value != base.get(key)}
            cases.append([must and found is not None, changes, differs])
        families[family] = dict(base=base, cases=cases)
    with open(sys.argv[1], "w") as file:
        file.write("{\n" + json.dumps("config") + ": " + json.dumps(BASE))
        for family, made in families.items():
            file.write(f",\n{json.dumps(family)}: {{\"base\": {json.dumps(made['base'])}, \"cases\": [\n")
            file.write(",\n".join(json.dumps(case) for case in made["cases"]) + "\n]}")
        file.write("\n}\n")
    print({family: len(made["cases"]) for family, made in families.items()})


if __name__ == "__main__":
    main()
