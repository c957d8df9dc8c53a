import numpy as np

def read(path):
    """The metadata of a GGUF file, and its tensors as f32 by name, shapes slowest dimension first."""
    data, at = np.memmap(path, "u1", "r"), 24
    def number(kind):
        nonlocal at
        at += np.dtype(kind).itemsize
        return data[at - np.dtype(kind).itemsize:at].view(kind)[0]
    def value(kind):
        nonlocal at
        if kind == 9:
            kind, count = number("<u4"), number("<u8")
            return [value(kind) for _ in range(count)]
        if kind != 8: return number({4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}[kind])
        length = int(number("<u8"))
        at += length
        return bytes(data[at - length:at]).decode()
    def tensor(shape, kind, first):
        raw, count = data[-(-at // 32) * 32 + first:], int(np.prod(shape))
        if kind < 2: return raw[:count * (4 >> kind)].view(["<f4", "<f2"][kind]).astype("f4").reshape(shape)
        size = {2: 18, 8: 34}[kind]  # blocks of 32: the scale d, then 16 bytes of two codes less -8, or 32 codes
        d, q = np.split(raw[:count // 32 * size].reshape(-1, size), [2], axis=1)
        codes = np.c_[q & 15, q >> 4].astype("i1") - 8 if kind == 2 else q.view("i1")
        return (codes * np.ascontiguousarray(d).view("<f2").astype("f4")).reshape(shape)
    tensors, keys = data[8:24].view("<u8")
    metadata = {value(8): value(number("<u4")) for _ in range(keys)}
    infos = [(value(8), [int(number("<u8")) for _ in range(number("<u4"))][::-1], number("<u4"), int(number("<u8"))) for _ in range(tensors)]
    return metadata, {name: tensor(shape, kind, first) for name, shape, kind, first in infos}
