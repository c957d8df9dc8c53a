"""Draws bits.svg from bits.csv: perplexity against bits per weight, a panel a model.

    python3 docs/figures/bits.py

Each row of bits.csv is model, series, bits per weight, perplexity; the series `source` is a level line.
"""

import csv
import math
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, TOP, GAP = 420, 300, 64, 40, 80
COLORS = ["#0a5fb4", "#8a5a00", "#888888"]


def panel(model, rows, x0):
    source = [p for s, _, p in rows if s == "source"][0]
    points = [(s, b, p) for s, b, p in rows if s != "source"]
    low_b, high_b = math.floor(min(b for _, b, _ in points)), math.ceil(max(b for _, b, _ in points))
    low, high = math.log(source * 0.99), math.log(max(p for _, _, p in points) * 1.02)

    def x(bits):
        return x0 + (bits - low_b) / (high_b - low_b) * WIDTH

    def y(perplexity):
        return TOP + (high - math.log(perplexity)) / (high - low) * HEIGHT

    out = [
        f'<rect x="{x0}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{x0 + WIDTH / 2}" y="{TOP - 14}" text-anchor="middle" font-weight="bold">{model}</text>',
        f'<text x="{x0 + WIDTH / 2}" y="{TOP + HEIGHT + 38}" text-anchor="middle">bits per weight, everything counted</text>',
        f'<line x1="{x0}" x2="{x0 + WIDTH}" y1="{y(source):.1f}" y2="{y(source):.1f}" stroke="#444" stroke-dasharray="5 4"/>',
        f'<text x="{x0 + WIDTH - 4}" y="{y(source) - 5:.1f}" text-anchor="end">source {source:.2f}</text>',
    ]
    for bits in range(low_b, high_b + 1):
        out.append(f'<text x="{x(bits):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{bits}</text>')
    for shown in range(math.ceil(math.exp(low)), math.floor(math.exp(high)) + 1, 2):
        out.append(f'<text x="{x0 - 6}" y="{y(shown) + 4:.1f}" text-anchor="end">{shown}</text>')
        out.append(f'<line x1="{x0}" x2="{x0 + WIDTH}" y1="{y(shown):.1f}" y2="{y(shown):.1f}" stroke="#eee"/>')
    series_of = sorted({s for s, _, _ in points})
    for at, (series, color) in enumerate(zip(series_of, COLORS)):
        own = sorted((b, p) for s, b, p in points if s == series)
        path = " ".join(f"{x(b):.1f},{y(p):.1f}" for b, p in own)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [f'<circle cx="{x(b):.1f}" cy="{y(p):.1f}" r="3.5" fill="{color}"/>' for b, p in own]
        out.append(f'<text x="{x0 + WIDTH - 8}" y="{TOP + 20 + 18 * at}" text-anchor="end" fill="{color}">{series}</text>')
    return out


def main():
    models = {}
    with open(HERE / "bits.csv", newline="") as file:
        for model, series, bits, perplexity in csv.reader(file):
            models.setdefault(model, []).append((series, float(bits or 0), float(perplexity)))
    body, x0 = [], LEFT
    for model, rows in models.items():
        body += panel(model, rows, x0)
        x0 += WIDTH + GAP
    size = f'width="{x0 - GAP + 20}" height="{TOP + HEIGHT + 56}"'
    style = '<style>text { font: 13px sans-serif; fill: #222 }</style><rect width="100%" height="100%" fill="white"/>'
    (HERE / "bits.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}\n' + "\n".join(body) + "\n</svg>\n"
    )


main()
