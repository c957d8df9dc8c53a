"""Makes tests/families: for each kind of network a tiny random checkpoint and the logits that transformers computes for
it in f32, which src/network/family_tests.rs compares ours with.

    pip install torch transformers safetensors
    python3 tests/families.py tests/families [NAME ...]

The committed files were made with transformers 5.23.0, from llama-yarn on with 5.24.0. Weights are drawn with a fixed seed and stored in the type named."""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS, WINDOWS, VOCABULARY = 40, 2, 96
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
)
# Of the families from llama-yarn on; they have one window of tokens.
LATER = dict(pad_token_id=None)
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, rope_theta=10000.0)
SIGMOIDS = dict(
    n_routed_experts=5, num_experts_per_tok=2, n_shared_experts=2, moe_intermediate_size=16, first_k_dense_replace=1, norm_topk_prob=True,
    routed_scaling_factor=1.7, num_hidden_layers=3, **LATER,
)
LONGROPE = dict(rope_type="longrope", short_factor=[1.1, 1.4], long_factor=[1.5, 6.0], partial_rotary_factor=0.5)
ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
FAMILIES = {
    # name: (model_type, changes, element type, shards)
    "llama": ("llama", dict(num_key_value_heads=4), torch.float32, 1),
    "llama-gqa": ("llama", dict(rope_theta=50000.0, tie_word_embeddings=True), torch.bfloat16, 2),
    "llama-3": ("llama", dict(rope_theta=500000.0, rope_scaling=ROPE), torch.float16, 1),
    "llama-linear": ("llama", dict(rope_scaling=dict(rope_type="linear", factor=4.0), attention_bias=True, mlp_bias=True), torch.float16, 1),
    "mistral": ("mistral", dict(sliding_window=9, head_dim=10), torch.bfloat16, 1),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None), torch.bfloat16, 3),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True, use_sliding_window=False), torch.bfloat16, 1),
    "qwen3": ("qwen3", dict(head_dim=16), torch.float16, 1),
    "qwen3-moe": (
        "qwen3_moe",
        dict(head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[0], num_hidden_layers=3),
        torch.float16, 1,
    ),
    "qwen3-moe-raw": (
        "qwen3_moe",
        dict(head_dim=16, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=False, decoder_sparse_step=2),
        torch.float32, 1,
    ),
    # YaRN with the factor of attention that follows from its own, and pairs that are not rounded.
    "llama-yarn": ("llama", dict(head_dim=16, rope_scaling=dict(YARN, truncate=False, beta_fast=4.0, beta_slow=0.5), **LATER), torch.bfloat16, 1),
    "smollm3": (
        "smollm3",
        dict(no_rope_layer_interval=2, num_hidden_layers=3, use_sliding_window=True, sliding_window=9, attention_bias=True, tie_word_embeddings=True, **LATER),
        torch.bfloat16, 1,
    ),
    # transformers has no class of MiMo: its repository's own is Qwen2's with blocks that predict further tokens.
    "mimo": ("qwen2", dict(head_dim=10, use_sliding_window=False, **LATER), torch.bfloat16, 1),
    "seed-oss": ("seed_oss", dict(head_dim=10, attention_out_bias=True, mlp_bias=True, **LATER), torch.bfloat16, 1),
    "phi3": ("phi3", dict(rope_scaling=LONGROPE, original_max_position_embeddings=16, **LATER), torch.bfloat16, 1),
    "phi3-short": ("phi3", dict(rope_scaling=LONGROPE, original_max_position_embeddings=64, sliding_window=30, **LATER), torch.bfloat16, 1),
    "granite": (
        "granite",
        dict(head_dim=16, embedding_multiplier=3.0, residual_multiplier=0.22, attention_multiplier=0.3, logits_scaling=5.0, mlp_bias=True, **LATER),
        torch.bfloat16, 1,
    ),
    "ministral3": (
        "ministral3",
        dict(head_dim=16, rope_parameters=dict(YARN, type="yarn", mscale=1.0, mscale_all_dim=0.5, llama_4_scaling_beta=0.6), **LATER),
        torch.bfloat16, 1,
    ),
    "ernie4-5": ("ernie4_5", dict(head_dim=16, use_bias=True, rope_theta=1000.0, tie_word_embeddings=True, **LATER), torch.bfloat16, 1),
    "glm4": ("glm4", dict(head_dim=16, rope_theta=100.0, **LATER), torch.bfloat16, 1),
    "olmo2": ("olmo2", dict(head_dim=16, attention_bias=True, **LATER), torch.bfloat16, 1),
    "olmo3": (
        "olmo3",
        dict(num_hidden_layers=3, layer_types=[SLIDING, FULL, SLIDING], sliding_window=9, rope_scaling=dict(YARN, rope_theta=5000.0), **LATER),
        torch.bfloat16, 1,
    ),
    "exaone4": ("exaone4", dict(num_hidden_layers=3, sliding_window_pattern=2, sliding_window=9, **LATER), torch.bfloat16, 1),
    "gemma3": (
        "gemma3_text",
        dict(
            num_hidden_layers=3, layer_types=[SLIDING, FULL, SLIDING], sliding_window=9, head_dim=16, query_pre_attn_scalar=24, tie_word_embeddings=True,
            rope_local_base_freq=100.0, rope_scaling=dict(rope_type="linear", factor=4.0), **LATER,
        ),
        torch.bfloat16, 1,
    ),
    "qwen2-moe": (
        "qwen2_moe",
        dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40, norm_topk_prob=True, **LATER),
        torch.bfloat16, 1,
    ),
    "glm4-moe": ("glm4_moe", dict(SIGMOIDS, head_dim=16, use_qk_norm=True, attention_bias=True), torch.bfloat16, 1),
    "dots1": ("dots1", dict(SIGMOIDS, sliding_window=9, max_window_layers=2), torch.bfloat16, 1),
}


def make(name, to):
    model_type, changes, dtype, shards = FAMILIES[name]
    torch.manual_seed(sum(name.encode()))
    config = AutoConfig.for_model(model_type, **{**COMMON, **changes})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            if tensor.dim() == 1 and "norm" in tensor_name:
                tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
            elif tensor.dim() == 1:
                tensor.copy_(0.3 * torch.randn_like(tensor))
            else:
                # Large enough that attention and routers are decided.
                tensor.copy_(torch.randn_like(tensor) * 2.0 / tensor.shape[-1] ** 0.5)
            tensor.copy_(tensor.to(dtype).float())
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_((0.3 * torch.randn_like(buffer)).to(dtype).float())
    tokens = torch.randint(0, VOCABULARY, (1 if "pad_token_id" in changes else WINDOWS, TOKENS))
    with torch.no_grad():
        logits = model(tokens).logits
    folder = to / name
    shutil.rmtree(folder, ignore_errors=True)
    # Names and layout as transformers writes them.
    total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    model.to(dtype).save_pretrained(folder, max_shard_size=total // shards + 1000 if shards > 1 else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"tokens": tokens.to(torch.int32), "logits": logits.contiguous()}, folder / "logits.st")
    if name == "mimo":
        predict_further(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    print(name, tuple(logits.shape), f"range {logits.max() - logits.min():.2f}", sorted(p.name for p in folder.iterdir()))


def predict_further(folder):
    """Makes MiMo of a Qwen2."""
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="mimo", architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = load_file(folder / "model.safetensors")
    weights["model.mtp_layers.0.input_proj.weight"] = torch.ones(32, 64, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    to = Path(sys.argv[1])
    for name in sys.argv[2:] or FAMILIES:
        make(name, to)
