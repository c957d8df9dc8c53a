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
# Families of which fields of their own and a few common ones are changed.
LATER = {
    "smollm3": dict(),
    "seed_oss": dict(),
    "phi3": dict(),
    "granite": dict(),
    "ministral3": dict(rope_parameters=dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, llama_4_scaling_beta=0.1)),
    "ernie4_5": dict(),
    "glm4": dict(),
    "olmo2": dict(),
    "olmo3": dict(),
    "exaone4": dict(),
    "gemma3_text": dict(),
    "qwen2_moe": dict(),
    "glm4_moe": dict(n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=24),
}
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

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8)
PER_TYPE = {FULL: dict(rope_theta=7000.0, rope_type="default"), SLIDING: dict(rope_theta=8000.0, rope_type="default")}

# Changes of the later families, every family with all of them: a field that one does not have must change nothing.
LATER_CHANGES = [
    {},
    *[{key: x} for key, values in dict(
        num_key_value_heads=(1, 4), head_dim=(16, 64), rms_norm_eps=(1e-5, 0.0), max_position_embeddings=(64, 4096), tie_word_embeddings=(True, False),
        rope_theta=(5000.0, 123456.5), attention_bias=(True, False), mlp_bias=(True, False), use_bias=(True, False), qkv_bias=(True, False),
        attention_out_bias=(True, False), sliding_window=(16, 4096), no_rope_layers=([1, 0, 0, 1], [1, 1, 1, 1, 0]), no_rope_layer_interval=(1, 2, 3),
        partial_rotary_factor=(1.0, 0.5, 0.25), embedding_multiplier=(1.0, 12.0), residual_multiplier=(1.0, 0.22), attention_multiplier=(1.0, 0.015625),
        logits_scaling=(1.0, 8.0), sliding_window_pattern=(1, 2, 4), query_pre_attn_scalar=(256, 168), rope_local_base_freq=(5000.0,),
        num_experts=(4,), num_experts_per_tok=(1, 3), moe_intermediate_size=(24,), shared_expert_intermediate_size=(40,), norm_topk_prob=(True, False),
        decoder_sparse_step=(1, 2), mlp_only_layers=([], [1]), n_routed_experts=(6,), n_shared_experts=(1, 2), first_k_dense_replace=(0, 2, 9),
        routed_scaling_factor=(1.0, 2.5), n_group=(1,), topk_group=(1,), use_qk_norm=(True, False), max_window_layers=(0, 2, 28),
    ).items() for x in values],
    *[dict(layer_types=x, sliding_window=16) for x in ([FULL] * 4, [FULL, SLIDING] * 2)],
    *[dict(use_sliding_window=True, sliding_window=16, **more) for more in ({}, dict(no_rope_layer_interval=2))],
    *[{key: x} for key in ("rope_scaling", "rope_parameters") for x in (LINEAR, YARN, dict(YARN, llama_4_scaling_beta=0.2), LONGROPE, PER_TYPE)],
    dict(rope_scaling=LONGROPE, original_max_position_embeddings=32), dict(rope_scaling=dict(LONGROPE, rope_type="su"), original_max_position_embeddings=32),
]

# Changes that must be refused, or read as transformers reads them.
LATER_OTHER = [
    *[{key: x} for x in (None, "1", True, -1, 0, 2.5, [], [1], {}, {"a": 1}) for key in (
        "attention_out_bias", "use_bias", "qkv_bias", "no_rope_layers", "no_rope_layer_interval", "embedding_multiplier", "residual_multiplier",
        "attention_multiplier", "logits_scaling", "sliding_window_pattern", "query_pre_attn_scalar", "rope_local_base_freq", "sliding_window",
        "shared_expert_intermediate_size", "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "n_group",
        "topk_group", "use_qk_norm", "hidden_activation", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention",
        "partial_rotary_factor", "original_max_position_embeddings")],
    *[dict(rope_scaling=dict(YARN, **{key: x})) for key in ("factor", "beta_fast", "attention_factor", "mscale", "truncate") for x in (None, "1", 0, -1, [])],
    *[dict(rope_scaling=dict(LONGROPE, **{key: x})) for key in ("short_factor", "long_factor") for x in (None, [], [1.0] * 7, ["1"] * 8, [0.0] * 8)],
    dict(n_group=2, topk_group=1), dict(hidden_activation="gelu"), dict(hidden_act="gelu"), dict(sliding_window_pattern="LLLG"),
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
    scaled = {"linear": ["factor"], "llama3": list(LLAMA3)[1:], "yarn": ["factor", "original_max_position_embeddings"]}.get(rope["rope_type"], [])
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


def read_later(family, changes):
    """The same of a later family, with the window and the base of each block, and with all that its own fields say."""
    given = json.loads(json.dumps({**BASE, **LATER[family], **changes}))
    try:
        config = AutoConfig.for_model(family, **given)
    except Exception:
        return None
    layers, heads, kv_heads = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    if family == "gemma3_text" and not (number(config.query_pre_attn_scalar) and config.query_pre_attn_scalar > 0):
        return None
    act = config.hidden_activation if family == "gemma3_text" else config.hidden_act
    if act != ("gelu_pytorch_tanh" if family == "gemma3_text" else "silu") or config.is_heterogeneous or heads % kv_heads:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    has = lambda key, default=None: getattr(config, key, default)
    flag = lambda key: bool(has(key, False))
    kinds = has("layer_types") or [FULL] * layers
    window = has("sliding_window")
    if family in ("phi3", "ministral3"):
        windows = [window] * layers
    elif family in ("smollm3", "olmo3", "exaone4", "gemma3_text", "dots1"):
        if SLIDING in kinds and window is None:
            return None
        windows = [window if kind == SLIDING and (family != "smollm3" or config.use_sliding_window) else None for kind in kinds]
    else:
        windows = [None] * layers
    rope = config.rope_parameters
    by_type = family in ("olmo3", "gemma3_text")
    ropes = [rope.get(kind) if by_type else rope for kind in kinds]
    if any(not isinstance(rope, dict) or not number(rope.get("rope_theta")) or not isinstance(rope.get("rope_type"), str) for rope in ropes):
        return None
    if family == "smollm3":
        ropes = [rope if config.no_rope_layers[i] else None for i, rope in enumerate(ropes)]
    if family == "exaone4":
        ropes = [rope if window is None or kind == SLIDING else None for rope, kind in zip(ropes, kinds)]
    share = (rope.get("partial_rotary_factor", 1.0) if not by_type else 1.0) if family in ("phi3", "glm4", "glm4_moe") else 1.0
    biases = {
        "smollm3": (flag("attention_bias"), flag("attention_bias"), flag("mlp_bias")),
        "granite": (flag("attention_bias"), flag("attention_bias"), flag("mlp_bias")),
        "seed_oss": (flag("attention_bias"), flag("attention_out_bias"), flag("mlp_bias")),
        "ernie4_5": (flag("use_bias"),) * 3,
        "glm4": (flag("attention_bias"), False, False),
        "glm4_moe": (flag("attention_bias"), False, False),
        "qwen2_moe": (flag("qkv_bias"), False, False),
    }.get(family, (flag("attention_bias"),) * 2 + (False,) if family in ("olmo2", "olmo3", "gemma3_text", "dots1") else (False,) * 3)
    scale = {"granite": lambda: config.attention_multiplier, "gemma3_text": lambda: config.query_pre_attn_scalar**-0.5}
    multipliers = [1.0, 1.0, 1.0]
    if family == "granite":
        multipliers = [config.embedding_multiplier, config.residual_multiplier, 1 / config.logits_scaling]
    if family == "gemma3_text":
        multipliers[0] = config.hidden_size**0.5
    result = dict(
        layers=layers, hidden=config.hidden_size, intermediate=config.intermediate_size, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        vocabulary=config.vocab_size, epsilon=config.rms_norm_eps, tied=bool(config.tie_word_embeddings), positions=config.max_position_embeddings,
        biases=list(biases), blocks=[[window, rope and rope["rope_theta"], rope and rope["rope_type"]] for window, rope in zip(windows, ropes)],
        share=share, scale=scale.get(family, lambda: head_dim**-0.5)(), multipliers=multipliers,
    )
    if family == "qwen2_moe":
        if config.decoder_sparse_step == 0 or config.use_sliding_window:
            return None
        dense = [i for i in range(layers) if i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step]
        counts = [config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size]
        result["experts"] = [*counts, config.norm_topk_prob, dense, config.shared_expert_intermediate_size, 1.0]
    if family in ("glm4_moe", "dots1"):
        if (config.n_group, config.topk_group) != (1, 1) or not config.n_shared_experts:
            return None
        dense = list(range(min(layers, config.first_k_dense_replace)))
        counts = [config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size]
        shared = config.n_shared_experts * config.moe_intermediate_size
        result["experts"] = [*counts, config.norm_topk_prob, dense, shared, config.routed_scaling_factor]
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
    for family, own in LATER.items():
        base, cases = read_later(family, {}), []
        knows = vars(AutoConfig.for_model(family, **{**BASE, **own})).keys() | {"sliding_window_pattern", "partial_rotary_factor", "rope_local_base_freq", "rope_scaling"}
        for good, changes in [*((True, c) for c in LATER_CHANGES), *((False, c) for c in LATER_OTHER)]:
            if not good and not knows & changes.keys():
                continue
            try:
                found = read_later(family, changes)
            except (TypeError, ValueError, KeyError, ZeroDivisionError):
                found = None  # Its network cannot be built either.
            differs = found and {key: value for key, value in found.items() if value != base.get(key)}
            # Of RoPE and windows a family has not all, and what it has not is refused, whatever transformers makes of it.
            must = good and found is not None and not any(key in changes for key in ("rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types"))
            cases.append([must, {**own, **changes}, differs])
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
