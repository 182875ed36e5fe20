"""The demo: compress a trained ResNet-20 on Fashion-MNIST, print source and artifact, and the path of the report.

If Fashion-MNIST is unavailable, scikit-learn's digits and a small network for them are used instead.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rich.console import Console

import penjing as pj
from examples.data import DataUnavailable, fashion_mnist
from penjing.cli.console import Progressing
from penjing.report import table

GOAL = "minimize latency_ms, drop<=0.5%"


def main() -> int:
    """Compress and print; return the exit code of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    out = parser.parse_args().out
    started, console = time.monotonic(), Console()
    source, task = f"{ROOT / 'examples/fashion_mnist/network.py'}:resnet20", "examples/fashion_mnist/task.py:task"
    try:
        fashion_mnist()
    except DataUnavailable as error:
        console.print(f"[bold red]Fashion-MNIST can't be had here, the demo runs on digits instead.[/]\n{error}")
        if os.environ.get("PENJING_REQUIRE_FASHION_MNIST") == "1":
            return 1
        source, task = f"{ROOT / 'examples/digits/network.py'}:trained", "examples/digits/task.py:task"
    console.print(f"goal: {GOAL}\nthe same by hand: penjing compress {Path(source).relative_to(ROOT)} --task {task} \\")
    console.print(f'    --goal "{GOAL}" --out {out.name}\n', highlight=False)
    with Progressing(Console(stderr=True)) as progress:
        from penjing.tasks.opening import open_task

        opened = open_task(f"{ROOT / task}")
        result = pj.compress(source, opened, GOAL, out=out, force=True, listeners=[progress])
    console.print(table.candidates(result.record))
    console.print(table.comparison(result.record))
    console.print(f"\n{'goal met' if result.met else 'goal NOT met'}: {result.record.goal.reason}", highlight=False)
    console.print(f"{time.monotonic() - started:.0f} s; report: {result.folder / 'report.html'}", soft_wrap=True)
    return 0 if result.met else 3


if __name__ == "__main__":
    sys.exit(main())
