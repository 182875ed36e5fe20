"""A chart of where EfficientNet-Lite0's INT8 noise comes from, operator by operator, before and after repair.

Every operator is quantized alone; the signal-to-noise ratio of the logits is in dB. Held-out calibration images.

    python benchmarks/lite0_noise.py [--shown 24] [--picture docs/assets/lite0_noise.svg]
"""

import argparse
import dataclasses
import json
import math
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
QUIET, LOUD = 60.0, 15.0  # dB at the left and at the right end of a bar
COLOURS = {"weights_db": "#c8553d", "repaired_db": "#2a9d8f", "activations_db": "#8d99ae"}
WORDS = {
    "weights_db": "weights, rounded to the nearest",
    "repaired_db": "weights, CoordinateRounding",
    "activations_db": "inputs",
}


def image(rows: list[dict]) -> str:
    """An SVG of bars: the longer, the more noise."""
    left, width, bar, gap = 250, 470, 7, 10
    step = 3 * bar + gap
    height = 70 + step * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 70} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="100%" height="{height}" fill="white"/>',
    ]
    for i, (key, word) in enumerate(WORDS.items()):
        x = 20 + i * 240
        parts += [f'<rect x="{x}" y="14" width="12" height="12" fill="{COLOURS[key]}"/>']
        parts += [f'<text x="{x + 18}" y="24">{word}</text>']
    for decibel in range(20, 61, 10):
        x = left + width * (QUIET - decibel) / (QUIET - LOUD)
        parts += [f'<line x1="{x:.0f}" x2="{x:.0f}" y1="46" y2="{height - 10}" stroke="#ddd"/>']
        parts += [f'<text x="{x:.0f}" y="42" text-anchor="middle" fill="#666">{decibel} dB</text>']
    for i, row in enumerate(rows):
        top = 54 + i * step
        parts += [f'<text x="{left - 8}" y="{top + 15}" text-anchor="end">{escape(row["name"])}</text>']
        for j, key in enumerate(WORDS):
            if row[key] is not None:
                length = max(1.0, width * (QUIET - row[key]) / (QUIET - LOUD))
                y = top + j * bar
                parts += [
                    f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 1}" fill="{COLOURS[key]}">'
                    f"<title>{escape(row['name'])}, {WORDS[key]}: {row[key]:.1f} dB</title></rect>"
                ]
    return "\n".join([*parts, "</svg>", ""])


def _loudest(row: dict) -> float:
    return min((value for key in WORDS if (value := row[key]) is not None), default=math.inf)


def main() -> None:
    """Measure, print, write JSON and image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shown", type=int, default=24)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/assets/lite0_noise.svg")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/lite0_noise.json")
    arguments = parser.parse_args()
    import torch
    from rich.console import Console

    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import task as lite0_task
    from penjing import measure, runtimes
    from penjing.network.capture import capture_network
    from penjing.quantize.explanation import explain
    from penjing.report import table
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    torch.set_num_threads(THREADS)
    task = lite0_task()
    capabilities = runtimes.get("openvino").capabilities(measure.machine(THREADS).instruction_sets)
    noise_rows = explain(Draft(capture_network(lite0(), *task.call())), Context(task=task, capabilities=capabilities))
    Console().print(table.noise(noise_rows, arguments.shown))
    rows = [dataclasses.asdict(row) for row in noise_rows]
    noisiest = sorted(rows, key=_loudest)[: arguments.shown]
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    arguments.picture.write_text(image(noisiest), encoding="utf-8")
    data = {"machine": vars(measure.machine(THREADS)), "versions": measure.versions(), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"{arguments.out}\n{arguments.picture}")


if __name__ == "__main__":
    main()
