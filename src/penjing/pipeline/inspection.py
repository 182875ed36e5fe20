"""Inspection: the cost of a network, its coupled channels, and what keeps it from integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import fx

from penjing import measure, runtimes
from penjing.analyze.activations import Activations, activations
from penjing.analyze.cost import cost, peak_activation_bytes
from penjing.analyze.coupling import Group, couple
from penjing.analyze.samples import in_chunks
from penjing.pipeline import gains, targeting
from penjing.pipeline.diagnosis import diagnose, prepared
from penjing.pipeline.findings import Prepared
from penjing.pipeline.fitting import Excess, expected, would_break
from penjing.pipeline.refusals import Refusal, check_files, refused
from penjing.pipeline.repeatable import capture_repeatable
from penjing.prune.channels import scanned
from penjing.quantize.explanation import explain
from penjing.quantize.output_branches import SAMPLES, meeting
from penjing.records import (
    BranchesRow,
    CutRow,
    DeviceFigures,
    Diagnosis,
    GainRow,
    GroupRow,
    LayerRow,
    NoiseRow,
    SensitivityRow,
)
from penjing.sources.source import Source, check_forward
from penjing.steps.draft import Draft
from penjing.steps.plan import Capabilities
from penjing.steps.step import Context
from penjing.targets import Target
from penjing.tasks.task import Task


@dataclass(frozen=True)
class Inspection:
    """Cost per layer, coupled channels, and for every runtime the operators that would stay in floating point."""

    name: str
    layers: tuple[LayerRow, ...]
    parameters: int
    macs: int
    peak_activation_bytes: int
    floats: dict[str, dict[str, str]]
    notes: dict[str, tuple[str, ...]]
    noise: tuple[NoiseRow, ...] = ()
    groups: tuple[GroupRow, ...] = ()
    not_prunable: Mapping[str, str] = field(
        default_factory=dict
    )  # tensor and axis of outputs that never change → reason
    sensitivity: tuple[SensitivityRow, ...] = ()
    branches: tuple[BranchesRow, ...] = ()  # where values of different kinds meet on the way to an output
    refused: Mapping[str, tuple[Refusal, ...]] = field(default_factory=dict)  # by runtime, of those that were asked
    activations: Activations | None = None  # in the order that needs least, elementwise operators in place
    gains: tuple[GainRow, ...] = ()  # what optimizations before export remove
    excesses: tuple[Excess, ...] = ()  # limits of the target that the network breaks
    device: DeviceFigures | None = None  # what it needs on the target, in the narrowest usual format there
    int8_activations: Activations | None = None  # the same with one byte for every value
    diagnosis: Diagnosis | None = None  # what it will gain at most, and why not more

    @property
    def runs(self) -> bool:
        """Whether every runtime that was asked takes the network, and it fits into the target."""
        return not any(self.refused.values()) and not self.excesses


def inspect(
    source: Source,
    task: Task,
    noise: str | None = None,
    events: Callable[..., None] | None = None,
    sensitivity: Path | None = None,
    *,
    asked: Sequence[str] = (),
    save_failing: Path | None = None,
    target: str | Path | Target | None = None,
) -> Inspection:
    """Analyse a source; needs the example of the task alone.

    Args:
        source: The network.
        task: Its example; for `noise` and `sensitivity` its calibration data too.
        noise: A runtime, for whose integers the noise of every operator is looked for.
        events: Reports progress.
        sensitivity: A JSON file: every group of channels is pruned alone, and what the outputs lose is written there,
            or read from there.
        asked: Runtimes in which the network is exported, opened and run, to tell which operators they can't take.
        save_failing: The smallest part that fails is written there (see `penjing.pipeline.refusals.refused`).
        target: A device other than this machine, for which floats and notes are told.
    """
    device = targeting.as_target(target)
    if save_failing is not None:
        check_files(save_failing)
    check_forward(source, task)
    network = capture_repeatable(source, task)
    rows = cost(network, task.call())
    parameters = sum(p.numel() for p in network.parameters())
    peak = peak_activation_bytes(network, task.call())
    explained: tuple[NoiseRow, ...] = ()
    if noise is not None:
        capabilities = targeting.capabilities(noise, measure.machine(1).instruction_sets, device)
        context = Context(task=task, capabilities=capabilities, source=network)
        explained = explain(Draft(network), replace(context, events=events) if events else context)
    coupling = couple(network, task.call())
    groups = tuple(_group_row(network, group, rows) for group in coupling.groups.values())
    scan: tuple[SensitivityRow, ...] = ()
    if sensitivity is not None:
        context = Context(task=task, source=network)
        curves = scanned(network, coupling, replace(context, events=events) if events else context, sensitivity)
        macs_of = {group.name: group.macs for group in groups}
        scan = tuple(
            SensitivityRow(
                name=name,
                units=curve.units,
                macs=macs_of[name],
                removed=curve.removed,
                snr_db=tuple(-10 * math.log10(ratio) if ratio > 0 else None for ratio in curve.noise),
            )
            for name, curve in curves.items()
        )
    known_here = _known(device, asked)
    ready = {name: prepared(network, task.call(), known) for name, known in known_here.items()}
    refusals = _refused(network, task, asked, save_failing, events)
    macs = sum(r.macs for r in rows)
    return Inspection(
        source.name,
        rows,
        parameters,
        macs,
        int(peak),
        {name: mine.placement.floats for name, mine in ready.items()},
        {name: mine.capabilities.notes for name, mine in ready.items()},
        explained,
        groups,
        dict(coupling.not_prunable),
        scan,
        branches=_branches(network, task),
        refused=refusals,
        activations=activations(network, task.call()),
        int8_activations=activations(network, task.call(), 1),
        gains=gains.before_export(network, task.call(), known_here.items()),
        excesses=() if device is None else would_break(device, network, task.call()),
        device=None if device is None else expected(device, network, task.call()),
        diagnosis=_diagnosis(network, ready, device, refusals),
    )


def _branches(network: fx.GraphModule, task: Task) -> tuple[BranchesRow, ...]:
    if task.calibration is None:
        return meeting(network)
    return meeting(network, (call for batch in in_chunks(Context(task=task), network, SAMPLES) for call in batch))


def _refused(
    network: fx.GraphModule, task: Task, asked: Sequence[str], save: Path | None, events: Callable[..., None] | None
) -> dict[str, tuple[Refusal, ...]]:
    """By runtime; where several are asked, each has files of its own name."""
    rows: dict[str, tuple[Refusal, ...]] = {}
    for name in asked:
        if events is not None:
            events("stage", name=f"export for {name}, open and run")
        mine = save.with_stem(f"{save.stem}-{name}") if save is not None and len(asked) > 1 else save
        rows[name] = refused(network, task, name, mine, events)
    return rows


def _group_row(network: fx.GraphModule, group: Group, rows: tuple[LayerRow, ...]) -> GroupRow:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    layers = {member.tensor.rpartition(".")[0] for member in group.members}
    cuts = tuple(
        CutRow(
            tensor=m.tensor,
            axis=m.axis,
            role=m.role,
            length=tensors[m.tensor].shape[m.axis],
            positions=tuple(m.positions.tolist()),
            units=tuple(m.units.tolist()),
        )
        for m in group.members
    )
    return GroupRow(
        name=group.name,
        units=group.units,
        macs=sum(row.macs for row in rows if row.name in layers),
        parameters=sum(tensors[c.tensor].numel() * len(c.positions) // c.length for c in cuts),
        cuts=cuts,
        because=group.because,
        statistics=group.statistics,
    )


def _known(target: Target | None, asked: Sequence[str]) -> dict[str, Capabilities]:
    """What the runtimes accelerate here, those that are considered and those that were asked; or on a target."""
    sets = measure.machine(1).instruction_sets
    if target is None:
        considered = (name for name in runtimes.DEPLOYED if runtimes.installed(name))
        return {name: runtimes.get(name).capabilities(sets) for name in dict.fromkeys((*considered, *asked))}
    here = {f"{n} on {target.name}": targeting.capabilities(n, sets, target) for n in targeting.usable(target)}
    return here or {f"any runtime on {target.name}": targeting.expected(target)}


def _diagnosis(
    network: fx.GraphModule,
    ready: Mapping[str, Prepared],
    target: Target | None,
    refused: Mapping[str, tuple[Refusal, ...]],
) -> Diagnosis:
    here = measure.machine(1)
    sets = here.instruction_sets if target is None else target.instruction_sets
    return diagnose(network, ready, sets, here.cores, here=target is None, refused=refused)
