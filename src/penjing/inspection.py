"""What a network costs and what stands in the way of integers, before anything is run on data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from penjing import measure, runtimes
from penjing.analyze.cost import cost, peak_activation_bytes
from penjing.draft import Draft
from penjing.network import raise_network
from penjing.quantize.explanation import explain
from penjing.quantize.placement import place
from penjing.records import LayerRow, NoiseRow
from penjing.source import Source, check_forward
from penjing.step import Context
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
    noise: tuple[NoiseRow, ...] = ()


def inspect(
    source: Source, task: Task, noise: str | None = None, events: Callable[..., None] | None = None
) -> Inspection:
    """Analyse a source; needs the example of the task alone.

    Args:
        source: The network.
        task: Its example; for `noise` its calibration data too.
        noise: A runtime, for whose integers the noise of every operator is looked for.
        events: Reports progress.
    """
    check_forward(source, task)
    network = raise_network(source.module, *task.call(), task.dynamic)
    rows = cost(network, task.call())
    parameters = sum(p.numel() for p in network.parameters())
    peak = peak_activation_bytes(network, task.call())
    explained: tuple[NoiseRow, ...] = ()
    if noise is not None:
        accelerates = runtimes.get(noise).accelerates(measure.machine(1).instruction_sets)
        context = Context(task=task, accelerates=accelerates, source=network)
        explained = explain(Draft(network), replace(context, events=events) if events else context)
    floats, notes = _blockers(network)
    return Inspection(source.name, rows, parameters, sum(r.macs for r in rows), int(peak), floats, notes, explained)


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
