"""All candidates of the two example networks, measured side by side: metric, drop, latency, size, parity.

ResNet-20 on Fashion-MNIST, and EfficientNet-Lite0 against its fp32 version on images. Every row's metric is
`Task.evaluate`, the source's and the candidates' alike: the examples' `Task.select`, on other images, is left out.

    python benchmarks/examples.py [--only resnet20] [--out benchmarks/results/examples.json]
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console

import penjing as pj
from penjing.cli.console import Progressing
from penjing.report import table
from penjing.tasks.opening import open_task

RUNS = {
    "resnet20": ("fashion_mnist/network.py:resnet20", "fashion_mnist/task.py:task", "minimize latency_ms, drop<=0.5%"),
    "lite0": ("imagenet_lite0/network.py:lite0", "imagenet_lite0/task.py:task", "minimize size_bytes, drop<=14%"),
}


def row(name: str, measured: pj.records.Measured, candidate: pj.records.Candidate | None = None) -> dict:
    """One line of the table as plain data."""
    against = {p.against: p.snr_db for p in candidate.parity} if candidate else {}
    return {
        "name": name,
        "metric": measured.metric,
        "latency_ms": dataclasses.asdict(measured.latency_ms),
        "size_bytes": measured.size_bytes,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "snr_db": against.get("source"),
        "integer_operators": sum(candidate.integer_operators.values()) if candidate else 0,
        "float_operators": sum(candidate.float_operators.values()) if candidate else 0,
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RUNS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/examples.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in [arguments.only] if arguments.only else RUNS:
        source, task, goal = RUNS[name]
        with tempfile.TemporaryDirectory() as aside, Progressing(Console(stderr=True)) as progress:
            judged = dataclasses.replace(open_task(f"{ROOT / 'examples' / task}"), select=None)
            result = pj.compress(
                f"{ROOT / 'examples' / source}", judged, goal,
                out=Path(aside) / name, listeners=[progress],
            )  # fmt: skip
        record = result.record
        Console().print(table.candidates(record))
        results[name] = {
            "goal": record.goal.text,
            "metric_name": record.metric_name,
            "machine": dataclasses.asdict(record.machine),
            "versions": record.versions,
            "rows": [row("source (torch)", record.source)] + [row(c.name, c.measured, c) for c in record.candidates],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
