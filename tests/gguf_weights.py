"""Compares a GGUF file with the Atom checkpoint that it was exported from, to the bit.

    python3 tests/gguf_weights.py ATOM FILE.gguf [--rounded]

The checkpoint is read by docs/format.md's reader, the file by docs/exports.md's and by the package gguf. With --rounded
the embedding and the head are the nearest numbers of Q8_0. Prints how many tensors and linears were compared.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

import read_atom
import read_gguf

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
}
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp", "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def place(name):
    """Where a tensor of the source is: its name in the file, and the expert."""
    if name in OUTER:
        return OUTER[name], None
    _, _, block, rest = name.split(".", 3)
    module, part = rest.rsplit(".", 1)
    if ".experts." in module:
        _, rest = module.split(".experts.")
        expert, linear = rest.split(".")
        return f"blk.{block}.ffn_{EXPERTS[linear]}_exps.{part}", int(expert)
    return f"blk.{block}.{NAMES[module]}.{part}", None


def in_source_order(rows, heads):
    """Undoes llama.cpp's order of the rows of q and k: halves of a head instead of neighbours."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def tensors(folder):
    """Every tensor of the network, as the checkpoint means it, in f32; and the number of quantized linears."""
    sites = sum(json.loads(Path(folder, "atom.json").read_text())["blocks"], [])
    linears = [linear["name"] for site in sites for linear in site["linears"] if linear["bits"] < 16]
    found = {f"{name}.weight": read_atom.dequantize(folder, name).astype("f4") for name in linears}
    for shard in sorted(Path(folder).glob("*.safetensors")):
        with open(shard, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
            for name, entry in header.items():
                if not name.endswith((".weight", ".bias")):
                    continue
                first, last = entry["data_offsets"]
                file.seek(start + first)
                raw = file.read(last - first)
                if entry["dtype"] == "BF16":
                    values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
                else:
                    values = np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[entry["dtype"]]).astype("f4")
                found[name] = values.reshape(entry["shape"])
    return found, len(linears)


def main():
    folder, path, rounded = sys.argv[1], sys.argv[2], "--rounded" in sys.argv
    config = json.loads(Path(folder, "config.json").read_text())
    expected, linears = tensors(folder)
    metadata, read = read_gguf.read(path)
    reader = GGUFReader(path)
    by_package = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert metadata["general.architecture"] == ARCHITECTURES[config["model_type"]]
    assert list(metadata) == [key for key in reader.fields if not key.startswith("GGUF.")]
    for key, value in metadata.items():
        assert reader.fields[key].contents() == value, key
    assert sorted(read) == sorted(by_package)
    for name, own in read.items():
        other = by_package[name].reshape(own.shape)
        assert other.dtype == own.dtype == np.float32 and np.array_equal(other, own), name

    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config.get("num_key_value_heads") or heads["attn_q"]
    used = set()
    for name, weight in expected.items():
        stored, expert = place(name)
        used.add(stored)
        own = read[stored] if expert is None else read[stored][expert]
        part = stored.split(".")[-2]
        if metadata["general.architecture"] == "llama" and part in heads:
            own = in_source_order(own, heads[part])
        if rounded and stored in ("token_embd.weight", "output.weight"):
            step = np.abs(weight).reshape(-1, 32).max(axis=1).repeat(32).reshape(weight.shape) / 127
            assert np.all(np.abs(own - weight) <= step * 0.51 + np.abs(weight) / 2000), name
            assert not np.array_equal(own, weight), name
        else:
            # Numbers of BF16 that are too small for all their bits in F16 are rounded.
            held = weight.astype("f2").astype("f4") if kinds[stored] == GGMLQuantizationType.F16 else weight
            assert np.array_equal(own, held), name
    assert set(read) - used <= {"rope_freqs.weight"}, set(read) - used
    print(f"{len(read)} tensors, {linears} linears")


if __name__ == "__main__":
    main()
