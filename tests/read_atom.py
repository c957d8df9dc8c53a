import json, pathlib, numpy as np

def tensor(folder, name):
    index = pathlib.Path(folder, "model.safetensors.index.json")
    shard = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with open(pathlib.Path(folder, shard), "rb") as file:
        entry = json.loads(file.read(int.from_bytes(file.read(8), "little")))[name]
        kind = {"U8": "u1", "I8": "i1", "F8_E4M3": "u1", "I32": "<i4", "F16": "<f2"}[entry["dtype"]]
        return np.memmap(file, kind, "r", file.tell() + entry["data_offsets"][0], tuple(entry["shape"]))

def e4m3(bits): return ((bits & 127).astype("<u2") << 7 | (bits & 128).astype("<u2") << 8).view("<f2") * 256.0  # exponents of E4M3 count from 7, of f16 from 15

def dequantize(folder, name):
    """The linear `name` as a matrix [out, channels], channels in the source's order."""
    sites = sum(json.loads(pathlib.Path(folder, "atom.json").read_text())["blocks"], [])
    site, linear = next((s, l) for s in sites for l in s["linears"] if l["name"] == name)
    rows, bits, size = linear["rows"], linear["bits"], site["group_size"]
    half = {"fp4": [0, 1, 2, 3, 4, 6, 8, 12], "fp4-bnb": [0, 1 / 16, 2, 3, 4, 6, 8, 12]}.get(linear.get("format"))
    values = np.r_[half, np.negative(half)] if half else np.r_[:2 ** (bits - 1), -(2 ** (bits - 1)):0]
    stream = np.unpackbits(tensor(folder, f"{name}.weight_codes"), bitorder="little")
    codes = values[stream.reshape(rows, -1, size, bits) @ 2 ** np.arange(bits)]
    grid = {"e4m3": e4m3, "power-of-two": lambda byte: np.where(byte > 0, 2.0 ** (byte - 127.0), 0)}.get(site.get("scales"), np.array)
    scales = grid(tensor(folder, f"{name}.weight_scales")) * 2.0 ** site.get("weight_exponent", 0)
    scales = scales.repeat(linear["rows_per_scale"], axis=0)[:rows]
    weight, h = codes * scales[:, :, None], np.ones((1, 1))
    while site["transform"] == "hadamard" and size % (2 * len(h)) == 0: h = np.block([[h, h], [h, -h]])
    weight = (weight.reshape(rows, -1, len(h)) @ h / len(h) ** 0.5).reshape(rows, -1)
    if site["outlier_channels"]:
        kind, part = site["outlier_format"], lambda part: tensor(folder, f"{name}.outlier_{part}")
        last = part("weights") if kind == "f16" else part("codes") * 1.0 if kind == "int8" else e4m3(part("codes"))
        weight = np.c_[weight, last * (1.0 if kind == "f16" else part("scales").astype(float)[:, None])]
    order = tensor(folder, f"{site['name']}.order")
    return weight[:, order >= 0][:, order[order >= 0].argsort()]
