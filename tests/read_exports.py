import json, pathlib, re, numpy as np

def tensor(folder, name):
    index = pathlib.Path(folder, "model.safetensors.index.json")
    shard = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with open(pathlib.Path(folder, shard), "rb") as file:
        entry = json.loads(file.read(int.from_bytes(file.read(8), "little")))[name]
        kind = {"U8": "u1", "F8_E4M3": "u1", "I32": "<u4", "I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}[entry["dtype"]]
        values = np.memmap(file, kind, "r", file.tell() + entry["data_offsets"][0], tuple(entry["shape"]))
    return (values.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else values

def quantization(folder): return json.loads(pathlib.Path(folder, "config.json").read_text())["quantization_config"]

def e4m3(bits): return ((bits & 127).astype("<u2") << 7 | (bits & 128).astype("<u2") << 8).view("<f2") * 256.0  # exponents of E4M3 count from 7, of f16 from 15

def dense(folder, name): return tensor(folder, f"{name}.weight").astype(float)

def compressed_tensors(folder, name):
    """The linear `name` as a matrix [out, in]."""
    matches = lambda target: target in ("Linear", name) or target.startswith("re:") and re.match(target[3:], name)
    groups = quantization(folder)["config_groups"].values()
    args = next(group["weights"] for group in groups if any(map(matches, group["targets"])))
    packed, scales, bits = tensor(folder, f"{name}.weight_packed"), tensor(folder, f"{name}.weight_scale"), args["num_bits"]
    stored = np.unpackbits(packed.view("u1"), axis=1, bitorder="little").reshape(len(packed), -1, bits) @ 2 ** np.arange(bits)
    if args["type"] == "int":
        codes = stored - 2.0 ** (bits - 1)
        assert list(codes.shape) == list(tensor(folder, f"{name}.weight_shape"))
    else:
        codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[stored & 7] * np.where(stored & 8, -1, 1)
        scales = 2.0 ** (scales - 127.0) if args["group_size"] == 32 else e4m3(scales) / tensor(folder, f"{name}.weight_global_scale")
    return codes * scales.astype(float).repeat(args["group_size"], axis=1)

def gptq(folder, name):
    """The linear `name` as a matrix [out, in]."""
    bits, part = quantization(folder)["bits"], lambda part: tensor(folder, f"{name}.{part}")
    shifts = np.arange(0, 32, bits, dtype="<u4")
    codes = (part("qweight")[:, None, :] >> shifts[:, None] & 2**bits - 1).reshape(-1, part("qweight").shape[1])
    zeros = (part("qzeros")[:, :, None] >> shifts & 2**bits - 1).reshape(len(part("qzeros")), -1) + 1.0  # version 1 stores one less
    return ((codes - zeros[part("g_idx")]) * part("scales")[part("g_idx")].astype(float)).T
