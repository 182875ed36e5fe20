"""What a network costs and what stands in the way of integers, before anything is run on data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from penjing import measure, runtimes
from penjing.analyze.cost import cost, peak_activation_bytes
from penjing.network import raise_network
from penjing.quantize.placement import place
from penjing.records import LayerRow
from penjing.source import Source, check_forward
from penjing.surgery import fold_batch_norms
from penjing.task import Task


@dataclass(frozen=True)
class Inspection:
    """Cost per layer, and for every runtime the operators that would stay in floating point, with the reason."""

    name: str
    layers: tuple[LayerRow, ...]
    parameters: int
    macs: int
    peak_activation_bytes: int
    floats: dict[str, dict[str, str]]
    notes: dict[str, tuple[str, ...]]


def inspect(source: Source, task: Task) -> Inspection:
    """Analyse a source; needs the example of the task alone."""
    check_forward(source, task)
    network = raise_network(source.module, *task.call(), task.dynamic)
    rows = cost(network, task.call())
    parameters = sum(p.numel() for p in network.parameters())
    peak = peak_activation_bytes(network, task.call())
    floats, notes = _blockers(network)
    return Inspection(source.name, rows, parameters, sum(r.macs for r in rows), int(peak), floats, notes)


def _blockers(network: fx.GraphModule) -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, ...]]]:
    fold_batch_norms(network)
    sets = measure.machine(1).instruction_sets
    floats, notes = {}, {}
    for name in runtimes.DEPLOYED:
        if runtimes.installed(name):
            accelerates = runtimes.get(name).accelerates(sets)
            floats[name] = place(network, accelerates, {}).floats
            notes[name] = accelerates.notes
    return floats, notes
