"""What Penjing expects of a network before a run, and what the run then measures: three networks, INT8 in two runtimes.

EfficientNet-Lite0 (`examples/imagenet_lite0`), ResNet-50 (Penjing's own, random weights, norms as after training) and
MiniLM-L6 (`examples/embeddings`, 64 tokens). Static quantization alone, outlier channels mitigated. Beside them what
an operator takes to start: a chain of tiny convolutions in each runtime.

    python benchmarks/diagnosis.py [--only lite0 resnet50 minilm] [--seconds 2] [--out FILE]
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from rich.console import Console
from torch import nn

import penjing as pj
from penjing import measure, runtimes
from penjing.cli.console import Progressing
from penjing.network.capture import capture_network
from penjing.pipeline.building import build
from penjing.report import expected
from penjing.steps.draft import Draft
from penjing.tasks.opening import open_task

RUNTIMES = ("onnxruntime", "openvino")
SAMPLES = 64
LINKS = 64  # of the chain


def lite0():
    """The trained network, and its task."""
    from examples.imagenet_lite0.network import lite0

    task = open_task(f"{ROOT}/examples/imagenet_lite0/task.py:task")
    return lite0(), _shortened(task)


def resnet50():
    """A network of that shape; its weights are random."""
    from penjing.architectures.resnet import resnet50

    torch.manual_seed(0)
    network = resnet50()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as after training, so that ranges are not degenerate
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    images = torch.randn(3 * SAMPLES // 2, 3, 224, 224)
    return network.eval(), pj.Task(example=images[:1], calibration=list(images.split(8)), name="random images")


def minilm():
    """Sentence embeddings, and the task of finding the rest of a post."""
    from examples.embeddings.network import minilm

    return minilm(), _shortened(open_task(f"{ROOT}/examples/embeddings/task.py:task"))


def _shortened(task: pj.Task) -> pj.Task:
    """The task without its metric: agreement with the source on held-out calibration data takes its place."""
    return dataclasses.replace(task, evaluate=None, select=None)


NETWORKS = {"lite0": lite0, "resnet50": resnet50, "minilm": minilm}


def diagnosed(name: str, seconds: float) -> dict:
    """One run, with what was expected of it and what came of it."""
    network, task = NETWORKS[name]()
    recipe = pj.quantize.Static(samples=SAMPLES, outliers="mitigate")
    with tempfile.TemporaryDirectory() as aside, Progressing(Console(stderr=True)) as progress:
        record = pj.compress(
            network, task, "minimize latency_ms", runtime=RUNTIMES, recipe=recipe, out=Path(aside) / name,
            seconds=seconds, listeners=[progress],
        ).record  # fmt: skip
    assert record.diagnosis is not None
    return {
        "diagnosis": dataclasses.asdict(record.diagnosis),
        "lines": expected.lines(record.diagnosis),
        "diagnose_s": next(step.wall_s for step in record.steps if step.name == "diagnose"),
        "latency_ms": {
            c.name: dataclasses.asdict(c.measured.latency_ms) for c in record.candidates if c.measured.latency_ms
        },
        "machine": dataclasses.asdict(record.machine),
        "versions": record.versions,
    }


def started(seconds: float) -> dict[str, float]:
    """Microseconds of a tiny convolution in each runtime."""
    example = torch.zeros(2, 8, 4, 4)
    chains = {n: nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(n))).eval() for n in (1, LINKS)}
    threads = measure.machine(1).cores
    spent = {}
    with tempfile.TemporaryDirectory() as aside:
        for runtime in (name for name in RUNTIMES if runtimes.installed(name)):
            targets = []
            for links, chain in chains.items():
                folder = Path(aside) / f"{runtime}-{links}"
                folder.mkdir()
                task = pj.Task(example=example)
                build(Draft(capture_network(chain, (example,))), runtime, "fp32", task, {"kind": "tensor"}, folder)
                targets.append(measure.Target(folder.name, folder, [example[:1].numpy()], 1))
            timings = measure.compare(targets, threads=threads, seconds=seconds)
            short, long = (timings[f"{runtime}-{links}"].latency.rounds for links in chains)
            spent[runtime] = 1e3 * (min(long) - min(short)) / (LINKS - 1)
    return spent


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/diagnosis.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {"networks": {}}
    results["operator_us"] = started(arguments.seconds)
    print({name: f"{us:.2f} µs an operator" for name, us in results["operator_us"].items()}, flush=True)
    for name in arguments.only:
        results["networks"][name] = diagnosed(name, arguments.seconds)
        print(name, *results["networks"][name]["lines"], sep="\n  ", flush=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
