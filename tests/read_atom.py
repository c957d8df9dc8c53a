import json, sys, numpy as np

def tensor(folder, name):
    try: shard = json.load(open(f"{folder}/model.safetensors.index.json"))["weight_map"][name]
    except FileNotFoundError: shard = "model.safetensors"
    file = np.memmap(f"{folder}/{shard}", np.uint8, "r")
    start = 8 + int.from_bytes(file[:8].tobytes(), "little")
    entry = json.loads(file[8:start].tobytes())[name]
    kind = {"U8": "u1", "I8": "i1", "I32": "<i4", "F16": "<f2", "F32": "<f4"}[entry["dtype"]]
    first, last = entry["data_offsets"]
    return file[start + first : start + last].view(kind).reshape(entry["shape"])

def dequantize(folder, name):
    """The linear `name` as a float32 matrix [out, in], columns in the source's order."""
    atom = json.load(open(f"{folder}/atom.json"))
    linear = atom["linears"][name]; site = atom["sites"][linear["site"]]
    rows, bits, size = linear["rows"], linear["bits"], linear["group_size"]
    stream = np.unpackbits(tensor(folder, f"{name}.weight_codes"), axis=1, bitorder="little")
    codes = stream.reshape(rows, -1, bits) @ np.r_[2 ** np.arange(bits - 1), -(2 ** (bits - 1))]
    scales = tensor(folder, f"{name}.weight_scales").astype("f4")
    scales = scales.repeat(linear["rows_per_scale"], axis=0)[:rows]
    weight = (codes.reshape(rows, -1, size) * scales[:, :, None]).astype("f4")
    if site["transform"] == "hadamard":
        block = np.ones((1, 1), "f4")
        while size % (2 * len(block)) == 0: block = np.block([[block, block], [block, -block]])
        weight = weight.reshape(rows, -1, len(block)) @ block / np.sqrt(len(block))
    weight = weight.reshape(rows, -1)
    if site["outlier_channels"] and site["outlier_format"] == "int8":
        outliers = tensor(folder, f"{name}.outlier_codes").astype("f4")
        weight = np.c_[weight, outliers * tensor(folder, f"{name}.outlier_scales").astype("f4")[:, None]]
    elif site["outlier_channels"]:
        weight = np.c_[weight, tensor(folder, f"{name}.outlier_weights").astype("f4")]
    order = tensor(folder, f"{linear['site']}.order")
    dense = np.zeros((rows, site["channels"]), "f4")
    dense[:, order[order >= 0]] = weight[:, order >= 0]
    return dense

if __name__ == "__main__":
    sys.stdout.buffer.write(dequantize(sys.argv[1], sys.argv[2]).astype("<f4").tobytes())
