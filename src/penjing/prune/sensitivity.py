"""Sensitivity of the outputs to pruning one group of channels at a time; per-layer pruning ratios follow from it.

Every group is pruned alone, at several fractions of its units, and the outputs are compared with those of the unpruned
network on calibration data: no labels are needed. A scan depends on the network, the samples and the order in which
units are removed, and on nothing else; it is cached under a digest of these.

Per-layer scans are those of Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017. A budget is spent where a
layer loses least for what it saves, as in Yang et al., "NetAdapt", ECCV 2018.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import fx

from penjing.analyze.coupling import Coupling
from penjing.modes import in_eval_mode
from penjing.network.weights import add_tensor
from penjing.records import reading
from penjing.records.files import write_text
from penjing.steps.step import Context
from penjing.surgery import resize
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Call, calibration_calls

SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
"""Fractions of a group's units that are removed, one after another."""

BATCHES = 4
"""At most this many batches are read: each is run for every fraction of every group."""

FILE = "sensitivity.json"

Scan = dict[str, "Curve"]


@dataclass(frozen=True)
class Curve:
    """Output noise as a function of how many units of one group are removed.

    Attributes:
        units: How many units the group has.
        removed: How many are removed, in ascending order.
        noise: For each of them, noise power over signal power at the outputs.
    """

    units: int
    removed: tuple[int, ...]
    noise: tuple[float, ...]

    def marginal(self) -> np.ndarray:
        """(units,) noise that the n-th removed unit adds, made non-decreasing.

        Noise saturates near 1 once nothing is left of the signal; later units must not look cheap because of that.
        """
        x = np.array([0, *self.removed, self.units])
        y = np.maximum.accumulate(np.array([0.0, *self.noise, max(1.0, *self.noise)]))
        slopes = np.repeat(np.diff(y) / np.diff(x), np.diff(x))
        rising: np.ndarray = np.maximum.accumulate(slopes)
        return rising


def scan(
    network: fx.GraphModule,
    coupling: Coupling,
    ranked: Mapping[str, Sequence[int]],
    context: Context,
    batches: int,
    file: Path | None = None,
    shares: Sequence[float] = SHARES,
) -> Scan:
    """Prune every group alone, at several fractions, and measure the noise at the outputs.

    Args:
        network: A captured network; it stays as it is.
        coupling: Its groups.
        ranked: Group → its units, the first to be removed first; groups that are not named are left out.
        context: Has the calibration data, and is told the progress.
        batches: How many batches of calibration data are read, `BATCHES` at most.
        file: A JSON file that caches finished groups.
        shares: Fractions of a group's units.
    """
    calls = list(calibration_calls(context.task, limit=min(batches, BATCHES)))
    digest = _digest(network, ranked, calls, shares)
    known = _read(file, digest)
    curves: Scan = {}
    with torch.no_grad(), in_eval_mode(network):
        references = [_outputs(network, call) for call in calls]
        for done, (name, units) in enumerate(ranked.items()):
            context.events("progress", label="sensitivity", done=done, total=len(ranked))
            curves[name] = known.get(name) or _curve(network, coupling, name, units, calls, references, shares)
            if file and name not in known:
                _write(file, digest, {**known, **curves})
    context.events("progress", label="sensitivity", done=len(ranked), total=len(ranked))
    return curves


def _curve(
    network: fx.GraphModule,
    coupling: Coupling,
    name: str,
    units: Sequence[int],
    calls: Sequence[Call],
    references: Sequence[list[torch.Tensor]],
    shares: Sequence[float],
) -> Curve:
    counts = sorted({min(max(1, round(share * len(units))), len(units) - 1) for share in shares} - {0})
    curve: dict[int, float] = {}
    for count in counts:
        removed = {name: list(units[:count])}
        if coupling.emptied(removed):  # a layer that reads only some of the units would have no input left
            break
        smaller = copy.deepcopy(network)
        resize(smaller, coupling.edits(removed))
        signal = noise = 0.0
        for call, outputs in zip(calls, references, strict=True):
            for reference, output in zip(outputs, _outputs(smaller, call), strict=True):
                signal += float(reference.square().sum())
                noise += float((reference - output).square().sum())
        ratio = noise / signal if signal else 0.0
        curve[count] = ratio if math.isfinite(ratio) else 1e9
    return Curve(len(units), tuple(curve), tuple(curve.values()))


def _outputs(network: fx.GraphModule, call: Call) -> list[torch.Tensor]:
    args, kwargs = call
    return [x.double() for x in flatten_outputs(network(*args, **kwargs))[0] if x.is_floating_point()]


def _digest(
    network: fx.GraphModule, ranked: Mapping[str, Sequence[int]], calls: Sequence[Call], shares: Sequence[float]
) -> str:
    known = hashlib.sha256(str(network.code).encode())
    stored = [*network.named_parameters(), *network.named_buffers()]
    given = [(str(i), x) for i, (args, kwargs) in enumerate(calls) for x in (*args, *kwargs.values())]
    for name, value in [*stored, *given]:
        if isinstance(value, torch.Tensor):
            add_tensor(known, f"{name}{value.dtype}{tuple(value.shape)}", value)
        else:
            known.update(name.encode())
    known.update(json.dumps([{n: list(map(int, u)) for n, u in ranked.items()}, list(shares)]).encode())
    return known.hexdigest()


def _read(file: Path | None, digest: str) -> Scan:
    """The finished groups of this scan in a file; none if it holds another scan, or is damaged."""
    if file is None or not file.is_file():
        return {}
    try:
        told = reading.json_file(file, finite=False)
        if told["digest"] != digest:
            return {}
        rows = told["groups"].items()
        return {
            n: Curve(int(c["units"]), tuple(map(int, c["removed"])), tuple(map(float, c["noise"]))) for n, c in rows
        }
    except reading.UNREADABLE:
        return {}


def _write(file: Path, digest: str, curves: Scan) -> None:
    rows = {n: {"units": c.units, "removed": list(c.removed), "noise": list(c.noise)} for n, c in curves.items()}
    write_text(file, json.dumps({"digest": digest, "groups": rows}, indent=1) + "\n")


__all__ = ["BATCHES", "FILE", "SHARES", "Curve", "Scan", "scan"]
