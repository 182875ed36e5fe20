"""Measured times of layers, kept on disk by machine, runtime, precision, threads, batch and versions.

Every measurement is a file of its own, which is there whole or not at all, so that processes that measure at once do
not take each other's away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from penjing import measure
from penjing.errors import OutputError
from penjing.records import files
from penjing.runtimes import SPECS
from penjing.search.layer_probes import KINDS, times
from penjing.search.layer_shapes import FEW, LayerShape

FOLDER = "layer-times"
MOST = 60  # probes of one network
OWN = 0.7  # of them at most are layers of the network itself
OF_A_KIND = 3  # layers of each kind at least
SHARES = ((0.75, 0.75), (0.5, 0.5), (0.25, 0.25), (0.5, 1.0), (1.0, 0.5))
"""Of the channels in and out of the thinner layers."""
Times = dict[LayerShape, float]


def layer_times(
    shapes: Iterable[LayerShape], runtime: str, precisions: Sequence[str], *, threads: int, batch: int
) -> dict[str, Times]:
    """Precision → layer → milliseconds: what the table has of a runtime, after `shapes` that it lacks were measured.

    Args:
        shapes: Layers that are needed; those without a probe are left out.
        runtime: Its name.
        precisions: Of the runtime.
        threads: That it may use.
        batch: Samples of a call.
    """
    keys = {precision: key(runtime, precision, threads, batch) for precision in precisions}
    known = {precision: read(keys[precision]) for precision in precisions}
    lacking = [s for s in dict.fromkeys(shapes) if s.kind in KINDS and any(s not in row for row in known.values())]
    if lacking:
        for precision, row in times(lacking, runtime, precisions, threads=threads, batch=batch).items():
            add(keys[precision], row)
            known[precision] |= row
    return known


def key(runtime: str, precision: str, threads: int, batch: int) -> dict[str, Any]:
    """What times of layers are true for."""
    machine = measure.machine(threads)
    spec, versions = SPECS[runtime], measure.versions()
    packages = ("penjing", "torch", *spec.packages, *spec.distributions)
    return {
        "processor": machine.processor,
        "instruction_sets": list(machine.instruction_sets),
        "runtime": runtime,
        "precision": precision,
        "threads": threads,
        "batch": batch,
        "versions": {name: versions[name] for name in packages if name in versions},
    }


def read(of: Mapping[str, Any]) -> Times:
    """The times of a key; of a layer that was measured twice, the shorter. What is damaged counts as not there."""
    times: Times = {}
    try:
        paths = sorted(files.cache(FOLDER).glob(f"{_name(of)}-*.json"))
    except OutputError:
        return {}
    for path in paths:
        for shape, ms in _stored(path, of).items():
            times[shape] = min(ms, times.get(shape, math.inf))
    return times


def _stored(path: Path, of: Mapping[str, Any]) -> Times:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        rows = {LayerShape.of_row(row[:-1]): float(row[-1]) for row in stored["layers"]}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}
    return rows if stored["key"] == of and all(0 < ms < math.inf for ms in rows.values()) else {}


def add(of: Mapping[str, Any], times: Mapping[LayerShape, float]) -> None:
    """Keep times of a key. Where the cache can't be written they are measured again another time."""
    rows = [[*shape.row(), ms] for shape, ms in sorted(times.items())]
    text = json.dumps({"key": of, "layers": rows})
    with contextlib.suppress(OutputError):
        files.write_text(files.cache(FOLDER) / f"{_name(of)}-{_digest(text)}.json", text)


def _name(of: Mapping[str, Any]) -> str:
    return f"{of['runtime']}-{of['precision']}-{_digest(json.dumps(of, sort_keys=True))}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def around(shapes: Iterable[LayerShape], most: int = MOST) -> list[LayerShape]:
    """Layers whose times tell those of a network and of its smaller variants.

    Args:
        shapes: The layers of the network.
        most: How many at most; those with the most arithmetic and values stay.

    Returns:
        The heaviest layers of the network, then its convolutions with fewer channels, and those that stand beside a
        convolution when it becomes a product of two.
    """
    own = sorted({s for s in shapes if s.kind in KINDS}, key=lambda s: (-s.macs, -s.values, s))
    convolutions = [s for s in own if s.kind == "conv"]
    rank = {s: sum(other.kind == s.kind for other in own[:i]) for i, s in enumerate(own)}
    every = sorted(own, key=lambda s: rank[s] >= OF_A_KIND)[: round(OWN * most)]  # of every kind some, then the heavy
    for share in SHARES:
        for shape in convolutions:
            thin = thinned(shape, *share)
            if thin not in every:
                every.append(thin)
        if share == SHARES[0]:
            every += [s for shape in convolutions for s in beside(shape) if s not in every]
    return every[:most]


def beside(shape: LayerShape) -> list[LayerShape]:
    """The layer over single positions that a convolution with a window leaves when its rank is halved."""
    if shape.kernel == 1 or shape.groups > 1 or shape.inputs < FEW:
        return []
    return [replace(shape, outputs=_rounded(shape.inputs / 2), kernel=1, stride=1)]


def thinned(shape: LayerShape, of_inputs: float, of_outputs: float) -> LayerShape:
    """A layer with a share of its channels, in fours; an image keeps its own."""
    inputs = shape.inputs if shape.inputs < FEW else _rounded(shape.inputs * of_inputs)
    if shape.depthwise:
        return replace(shape, inputs=inputs, outputs=inputs * shape.outputs // shape.inputs, groups=inputs)
    outputs = _rounded(shape.outputs * of_outputs)
    if inputs % shape.groups or outputs % shape.groups:
        return shape
    return replace(shape, inputs=inputs, outputs=outputs)


def _rounded(channels: float) -> int:
    return max(4, round(channels / 4) * 4)
