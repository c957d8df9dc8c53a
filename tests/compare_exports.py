"""Compares exports with the checkpoint they were made from, by the readers of docs/format.md and docs/exports.md.

    python3 tests/compare_exports.py ATOM FORMAT=DIR [FORMAT=DIR ...]

Prints a line for each export, and fails at the first weight that differs.
"""

import json
import pathlib
import sys

import numpy as np

import read_atom
import read_exports


def main():
    atom, *exports = sys.argv[1:]
    manifest = json.loads(pathlib.Path(atom, "atom.json").read_text())
    linears = [(site, linear) for block in manifest["blocks"] for site in block for linear in site["linears"]]
    quantized = [(site, linear) for site, linear in linears if linear["bits"] < 16]
    kept = set(manifest["tensors"]) - {f"{site['name']}.order" for site, _ in linears}
    kept = {name for name in kept if not name.endswith((".key_mean", "_codes", "_scales", "outlier_weights"))}
    assert quantized and kept
    for export in exports:
        form, folder = export.split("=", 1)
        for site, linear in quantized:
            name = linear["name"]
            expected = read_atom.dequantize(atom, name)
            found = getattr(read_exports, form.replace("-", "_"))(folder, name)
            assert found.shape == expected.shape, f"{form}: {name} is {found.shape}"
            exact = True
            if form == "dense":
                exact = site["transform"] == "none"
                file = read_exports.tensor(folder, f"{name}.weight")
                expected = rounded(expected, file.dtype == np.float32)
            # The reader undoes the transform in f64, the program in f32: they may round to neighbours.
            near = np.abs(found - expected) <= 2.0**-7 * np.abs(expected) + 1e-6
            wrong = found != expected if exact else ~near
            assert not wrong.any(), f"{form}: {name} differs at {np.argwhere(wrong)[0]} of {found.shape}"
            assert np.abs(found).max() > 0
            assert (found != expected).mean() < 0.01, f"{form}: {name} is not rounded to nearest"
        for name in kept:
            expected = read_exports.tensor(atom, name)
            found = read_exports.tensor(folder, name)
            if found.dtype == expected.dtype:
                assert (found == expected).all(), f"{form}: {name} is not the source's"
            else:
                assert np.allclose(found, expected, rtol=2.0**-8), f"{form}: {name} is not the source's"
        print(f"{form}: {len(quantized)} linears, {len(kept)} other tensors")


def rounded(values, bfloat):
    """Rounded to F16, or to BF16 as an f32, to nearest, ties to even."""
    if not bfloat:
        return values.astype("<f2").astype(float)
    bits = values.astype("<f4").view("<u4").astype("<u8")
    return (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype("<u4").view("<f4").astype(float)


main()
