"""Probes: tiny networks of equal layers, whose latency tells that of one layer.

Eight copies follow one another where a layer's output has the size of its input; otherwise all read the same input, and
their results are added. What a call costs without its layers is told by a probe of one small addition.
"""

from __future__ import annotations

import functools
import math
import operator
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from penjing import measure, runtimes
from penjing.errors import PenjingError
from penjing.measure.series import series
from penjing.network.capture import capture_network
from penjing.pipeline.building import INTEGER, build
from penjing.quantize import Static
from penjing.search.layer_shapes import WEIGHTED, LayerShape
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task

COPIES = 8
EMPTY = LayerShape("call", 1, 1)
"""What stands for a call without layers."""
LEAST_MS = 1e-4  # of a layer: less is not told apart from nothing
UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "clip": functional.relu6,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
}
KINDS = frozenset({"conv", "linear", "add", "mul", "avg_pool", "max_pool", *UNARY})
"""Kinds of layer that there are probes of."""


class Probe(nn.Module):
    """Copies of one layer; input (batch, channels, height, width), or (batch, channels) for a linear layer."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape
        layers = [_layer(shape) for _ in range(COPIES)] if shape.kind in WEIGHTED else []
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All copies."""
        kind = self.shape.kind
        if kind in WEIGHTED:
            if self.shape.parallel:
                results: list[torch.Tensor] = [layer(x) for layer in self.layers]
                return functools.reduce(operator.add, results)
            y: torch.Tensor = self.layers[0](x)
            for layer in self.layers[1:]:
                y = layer(functional.relu(y))
            return y + x  # the last layer too has a reader, for which its output becomes integers
        if kind == "avg_pool":
            return functional.adaptive_avg_pool2d(x, 1)
        if kind == "max_pool":
            return functional.max_pool2d(x, self.shape.stride, ceil_mode=True)
        first = x
        for _ in range(1 if kind == EMPTY.kind else COPIES):
            if kind in UNARY:
                x = UNARY[kind](x)
            else:
                x = x * first if kind == "mul" else x + first
        return x


def _sizes(shape: LayerShape) -> tuple[int, ...]:
    """The shape of a sample."""
    if shape.kind != "linear":
        return (shape.inputs, shape.height, shape.width)
    return (shape.inputs,) if shape.height == 1 else (shape.height, shape.inputs)


def _layer(shape: LayerShape) -> nn.Module:
    if shape.kind == "linear":
        return nn.Linear(shape.inputs, shape.outputs)
    return nn.Conv2d(shape.inputs, shape.outputs, shape.kernel, shape.stride, shape.kernel // 2, groups=shape.groups)


def built(
    shape: LayerShape, runtime: str, precisions: Sequence[str], batch: int, folder: Path
) -> dict[str, measure.Target]:
    """Build a layer's probe; precision → what can be timed.

    Args:
        shape: The layer.
        runtime: Its name.
        precisions: Of the runtime.
        batch: Samples of a call.
        folder: Where the artifacts' folders are made.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(2, batch), *_sizes(shape), generator=generator)
    task = Task(example=x[:2], calibration=[x])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = Probe(shape).eval()
    draft = Draft(capture_network(probe, *task.call()))
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    targets = {}
    for precision in precisions:
        current = draft
        if precision in INTEGER:
            try:
                current = Static()(draft, Context(task=task, capabilities=capabilities))
            except PenjingError:  # it has no integers: then it costs in an integer network what it costs in floats
                current = draft
        place = folder / f"{'-'.join(map(str, shape.row()))}-{precision}"
        place.mkdir(parents=True)
        spoken = precision if current is not draft or precision not in INTEGER else "fp32"
        build(current, runtime, spoken, task, {"kind": "tensor"}, place)
        targets[precision] = measure.Target(place.name, place, [x[:batch].numpy()], batch)
    return targets


def times(
    shapes: Iterable[LayerShape],
    runtime: str,
    precisions: Sequence[str],
    *,
    threads: int,
    batch: int,
    seconds: float = 0.1,
) -> dict[str, dict[LayerShape, float]]:
    """Measure layers in a runtime; precision → layer → milliseconds, that of a call without layers as `EMPTY`.

    Args:
        shapes: Layers; those without a probe, or whose probe the runtime does not take, are left out.
        runtime: Its name.
        precisions: Of the runtime.
        threads: That it may use.
        batch: Samples of a call.
        seconds: Timed seconds of each probe.
    """
    with tempfile.TemporaryDirectory(prefix="penjing-") as aside:
        probes = {}
        for shape in (EMPTY, *dict.fromkeys(s for s in shapes if s.kind in KINDS)):
            try:
                probes[shape] = built(shape, runtime, precisions, batch, Path(aside))
            except PenjingError:
                continue
        return timed(probes, precisions, threads=threads, seconds=seconds)


def timed(
    probes: Mapping[LayerShape, Mapping[str, measure.Target]],
    precisions: Sequence[str],
    *,
    threads: int,
    seconds: float = 0.1,
) -> dict[str, dict[LayerShape, float]]:
    """Time probes that are built; as `times`."""
    targets = [(shape, p, target) for shape, row in probes.items() for p, target in row.items()]
    rounds = series([t for _, _, t in targets], threads=threads, seconds=seconds)
    calls: dict[str, dict[LayerShape, float]] = {p: {} for p in precisions}
    for (shape, precision, _), row in zip(targets, rounds, strict=True):
        calls[precision][shape] = steady(row)
    return {precision: _layers(row, precision in INTEGER) for precision, row in calls.items()}


def steady(rounds: Sequence[float]) -> float:
    """The lower quartile of rounds: what disturbs a machine only adds."""
    return float(np.percentile(rounds, 25))


def _layers(calls: Mapping[LayerShape, float], integers: bool) -> dict[LayerShape, float]:
    """Milliseconds of a layer from those of its probe."""
    empty = calls.get(EMPTY, 0.0)
    layers = {EMPTY: empty}
    sums = {s: (ms - empty) / COPIES for s, ms in calls.items() if s.kind == "add"}
    for shape, ms in calls.items():
        if shape == EMPTY:
            continue
        spent = ms - empty
        if integers and shape.kind in WEIGHTED:  # in floats a sum is part of the layer before it
            spent -= (COPIES - 1 if shape.parallel else 1) * _of_sums(sums, shape.outputs * shape.out_pixels)
        layers[shape] = max(LEAST_MS, spent / _copies(shape))
    return layers


def _copies(shape: LayerShape) -> int:
    """How often a probe computes its layer."""
    return 1 if shape.kind in ("avg_pool", "max_pool") else COPIES


def _of_sums(sums: Mapping[LayerShape, float], elements: int) -> float:
    """Milliseconds of an addition: of the one that is nearest in size, in proportion."""
    if not sums:
        return 0.0
    nearest = min(sums, key=lambda s: abs(math.log(s.values / 2 / elements)))
    return max(0.0, sums[nearest]) * elements / (nearest.values / 2)
