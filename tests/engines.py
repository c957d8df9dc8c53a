"""Loads an export in another program, and prints what that program makes of it as one JSON object.

    python3 tests/engines.py transformers EXPORT --text FILE [--seq-len N] [--windows N] [--dtype TYPE]
    python3 tests/engines.py vllm EXPORT --text FILE [--seq-len N] [--windows N] [--dtype TYPE]

Perplexity is that of `atom eval-ppl`: windows that do not overlap, of the text's rows joined by a blank line.
`logprobs` are those of the first window's tokens. transformers also compares every weight with docs/exports.md's
reader. docs/exports.md says which packages this needs; tests/engines.rs runs it.
"""

import argparse
import json
import math
import os
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import read_exports


def windows(args):
    """The text as windows of token ids, [windows, seq_len]."""
    from tokenizers import Tokenizer

    rows = [json.loads(line)["text"] for line in pathlib.Path(args.text).read_text().splitlines()]
    tokenizer = Tokenizer.from_file(str(pathlib.Path(args.export, "tokenizer.json")))
    ids = np.array(tokenizer.encode("\n\n".join(rows), add_special_tokens=True).ids)
    count = min(len(ids) // args.seq_len, args.windows)
    return ids[: count * args.seq_len].reshape(count, args.seq_len)


def transformers(args):
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from transformers import AutoModelForCausalLM

    form = json.loads(pathlib.Path(args.export, "atom-export.json").read_text())["format"]
    model = AutoModelForCausalLM.from_pretrained(args.export, dtype=getattr(torch, args.dtype)).eval()
    if form == "compressed-tensors":
        config = model.hf_quantizer.compressor
        assert isinstance(config, ModelCompressor)
        config.decompress_model(model=model)
    linears = different = 0
    reader = getattr(read_exports, form.replace("-", "_"))
    for name, weight in loaded_weights(model):
        linears += 1
        different += int((weight.detach().to(torch.float64).numpy() != reader(args.export, name)).sum())
    # FP4 becomes bf16, whatever the model's type; the rest of the network computes in that type.
    model = model.to(getattr(torch, args.dtype))
    losses = []
    for ids in windows(args):
        with torch.no_grad():
            logits = model(torch.tensor(ids)[None]).logits[0, :-1].float()
        logprobs = torch.log_softmax(logits, -1)
        losses.append(logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist())
    return {"linears": linears, "different_weights": different} | measured(losses)


def loaded_weights(model):
    """Name and weight of each quantized linear, an expert's as a part of the tensor that holds all of them."""
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            yield name, module.weight
        elif name.endswith(".experts"):
            config = json.loads(pathlib.Path(model.config.name_or_path, "config.json").read_text())
            mixtral = config["model_type"] == "mixtral"
            names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
            base = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
            for expert, gate_up in enumerate(module.gate_up_proj):
                for own, weight in zip(names, (*gate_up.chunk(2), module.down_proj[expert])):
                    yield f"{base}.{expert}.{own}", weight


def vllm(args):
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    length = args.seq_len + 1
    llm = LLM(args.export, skip_tokenizer_init=True, dtype=args.dtype, max_model_len=length,
              max_num_batched_tokens=length, max_num_seqs=1, enforce_eager=True, enable_prefix_caching=False)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    losses = []
    for ids in windows(args).tolist():
        output = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)[0]
        losses.append([found[token].logprob for token, found in zip(ids[1:], output.prompt_logprobs[1:])])
    return measured(losses)


def measured(losses):
    means = [np.mean(window) for window in losses]
    return {"perplexity": math.exp(-np.mean(means)), "windows": len(losses), "logprobs": losses[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["transformers", "vllm"])
    parser.add_argument("export")
    parser.add_argument("--text", required=True)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    # vLLM prints to stdout while it loads; the result alone belongs there.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    result = transformers(args) if args.engine == "transformers" else vllm(args)
    json.dump(result, out)
    out.write("\n")


if __name__ == "__main__":
    main()
