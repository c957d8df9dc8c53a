"""Makes tests/families: for each kind of network a tiny random checkpoint and the logits that transformers computes for
it in f32, which src/network/family_tests.rs compares ours with.

    pip install torch transformers safetensors
    python3 tests/families.py tests/families

The committed files were made with transformers 5.23.0. Weights are drawn with a fixed seed and stored in the type named."""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS, WINDOWS, VOCABULARY = 40, 2, 96
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
)
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
    tokens = torch.randint(0, VOCABULARY, (WINDOWS, TOKENS))
    with torch.no_grad():
        logits = model(tokens).logits
    folder = to / name
    shutil.rmtree(folder, ignore_errors=True)
    # Names and layout as transformers writes them.
    total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    model.to(dtype).save_pretrained(folder, max_shard_size=total // shards + 1000 if shards > 1 else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"tokens": tokens.to(torch.int32), "logits": logits.contiguous()}, folder / "logits.st")
    for path in folder.iterdir():
        path.chmod(0o644)
    print(name, tuple(logits.shape), f"range {logits.max() - logits.min():.2f}", sorted(p.name for p in folder.iterdir()))


if __name__ == "__main__":
    to = Path(sys.argv[1])
    for name in FAMILIES:
        make(name, to)
