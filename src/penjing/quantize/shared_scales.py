"""Values that can't share a scale: columns or branches of very different magnitude that matter individually.

A detector's boxes are hundreds of pixels, its scores below 1; in one 8-bit tensor with one scale, the scores become 0.
Such a tensor stays in floating point if it reaches an output through operators that keep its columns apart, and so does
a concatenation of such branches unless its result is multiplied by weights.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from penjing.analyze.noise import in_columns
from penjing.network.graph import kind, site, sites, tensor_inputs
from penjing.quantize.histogram import Histogram
from penjing.quantize.placement import Placement
from penjing.quantize.toward_outputs import in_floats, leading, leading_only
from penjing.steps.plan import Entry
from penjing.tasks.task import Call

FAINT_DB = 20.0  # signal-to-noise ratio of a column or branch, below which about eight levels are left of it
APART_DB = 10.0  # and this far below that of the whole tensor, since few bits alone are not a reason
DECODED_DB = 30.0  # of a column of 8 bits that is decoded on the way to an output: boxes have to keep one percent
RARE = 0.02  # share of a column's values that are not 0, from which on they tell its magnitude
SAMPLES = 8  # decoded to the outputs
_BIT_DB = 6.0  # what a bit less costs
_MOVES = frozenset(
    "reshape transpose select slice split split_with_sizes chunk unbind getitem cat stack expand identity dropout pad "
    "resize pixel_shuffle movedim index index_select".split()
)


class Columns:
    """Mean squares of a value's columns along axis 1 and along the last axis."""

    def __init__(self) -> None:
        self.sums: dict[int, torch.Tensor] = {}
        self.counts: dict[int, int] = {}
        self.used: dict[int, torch.Tensor] = {}  # how many values of each column are not 0

    def update(self, x: torch.Tensor) -> None:
        """Add the values of x (samples, …); axes of varying size are left out."""
        square = x.detach().double().square()
        for axis in {1, x.dim() - 1} if x.dim() > 1 else ():
            others = [a for a in range(x.dim()) if a != axis]
            total, used = square.sum(others), (square > 0).sum(others)
            known = self.sums.get(axis, torch.zeros_like(total))
            if known.shape != total.shape:
                self.sums[axis], self.counts[axis] = total.new_zeros(0), 0
                continue
            self.sums[axis] = known + total
            self.used[axis] = self.used.get(axis, 0) + used
            self.counts[axis] = self.counts.get(axis, 0) + x.numel() // max(1, x.shape[axis])

    def powers(self) -> list[torch.Tensor]:
        """Return (columns,) mean squares for every axis of constant size."""
        return [total / self.counts[axis] for axis, total in self.sums.items() if self.counts[axis]]

    def active(self) -> list[torch.Tensor]:
        """Return the same of the values that are not 0; 0 for a column that hardly has any.

        A ReLU leaves little of some channels, whose few values are as large as others, or the last of a tail.
        """
        powers = []
        for axis, total in self.sums.items():
            if count := self.counts[axis]:
                mean = total / self.used[axis].clamp(min=1)
                powers.append(torch.where(self.used[axis] < RARE * count, torch.zeros_like(mean), mean))
        return powers


def to_watch(network: fx.GraphModule, placement: Placement) -> set[str]:
    """Return the names of the nodes whose columns have to be observed in calibration."""
    on_way = {site(node) for node in leading(network)}
    return {value for edge, value in placement.edges.items() if _consumer(edge) in on_way}


@dataclass(frozen=True)
class Apart:
    """What is excluded from a plan.

    Attributes:
        edges: Edges that get no quantizer.
        floats: Site → why it stays in floating point.
    """

    edges: frozenset[str]
    floats: Mapping[str, str]


def apart(
    network: fx.GraphModule,
    placement: Placement,
    entries: Mapping[str, Entry],
    statistics: Mapping[str, Histogram],
    columns: Mapping[str, Columns],
    calls: Iterable[Call] = (),
) -> Apart:
    """Find the edges whose scale would erase a column or a branch.

    Args:
        network: The network that the plan is for.
        placement: Where quantizers are placed.
        entries: Their scales.
        statistics: Statistics of the values by node name.
        columns: Column statistics of the values of `to_watch`.
        calls: A few samples.
    """
    operators, nodes = sites(network), {n.name: n for n in network.graph.nodes}
    on_way = {site(node) for node in leading(network)}
    decoded = _decoded(network, placement, entries, columns, calls)
    edges: set[str] = set()
    floats: dict[str, str] = {}
    for edge, value in placement.edges.items():
        name = _consumer(edge)
        if edge in placement.results and value in decoded:
            edges.add(edge)
            floats[_writer(network, nodes[value])] = decoded[value]
            continue
        step = entries[edge].scale[0] if entries[edge].scale and entries[edge].spec.grid == "uniform" else 0.0
        if not step:
            continue
        ratio = _inputs_apart(network, nodes[value], step, placement, statistics)
        if ratio and (name in on_way or edge in placement.results):
            reason = f"its inputs differ by {ratio:.0f}×: they can't share a scale"
        elif name in on_way and (ratio := _columns_apart(columns[value].active(), step)):
            reason = f"its columns differ by {ratio:.0f}×: they can't share a scale"
        else:
            continue
        edges.add(edge)
        if edge in placement.results:
            floats[_writer(network, nodes[value])] = reason
        elif name in operators and kind(network, operators[name]) not in _MOVES - {"cat"}:
            floats[name] = reason.replace("its", f"{_writer(network, nodes[value])}'s", 1)
    return Apart(frozenset(edges), floats)


def _decoded(
    network: fx.GraphModule,
    placement: Placement,
    entries: Mapping[str, Entry],
    columns: Mapping[str, Columns],
    calls: Iterable[Call],
) -> dict[str, str]:
    """Name of a kernel's result that is only decoded or joined, and loses too much in integers → the reason.

    It loses by itself, where its columns differ in size, or by what decoding makes of it: a step of a score's logit is
    a part of the score, and one of a logarithm a part of a box.
    """
    way, decoding = leading_only(network), in_floats(network)
    grids: dict[str, Entry] = {}
    for edge, value in placement.edges.items():
        if edge in placement.results and entries[edge].scale and entries[edge].spec.grid == "uniform":
            grids[value] = entries[edge]
    nodes = {n.name: n for n in network.graph.nodes}
    grids = {
        value: entry
        for value, entry in grids.items()
        if all(u in way for u in nodes[value].users)
        and any(u.name in decoding for u in _readers(network, nodes[value]))
    }
    reasons: dict[str, str] = {}
    for value, entry in grids.items():
        for powers in columns[value].powers():
            used = powers[powers > 0]
            least = 10 * math.log10(float(used.min()) * 12 / entry.scale[0] ** 2) if len(used) else math.inf
            if least < _least(entry):
                ratio = math.sqrt(float(used.max() / used.min()))
                reasons[value] = f"its columns differ by {ratio:.0f}×: they can't share a scale"
    rest = {value: entry for value, entry in grids.items() if value not in reasons}
    for value, snr in (in_columns(network, rest, calls) if rest else {}).items():
        if snr < _least(rest[value]):
            reasons[value] = f"decoded to an output, its integers alone would leave a column {snr:.0f} dB"
    return reasons


def _least(entry: Entry) -> float:
    return DECODED_DB - _BIT_DB * (8 - entry.spec.bits)


def _readers(network: fx.GraphModule, node: fx.Node) -> set[fx.Node]:
    """The operators that read a value, also through operators that only move it."""
    readers: set[fx.Node] = set()
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user not in readers:
            readers.add(user)
            waiting += user.users if kind(network, user) in _MOVES - {"cat", "stack"} else ()
    return readers


def _inputs_apart(
    network: fx.GraphModule, node: fx.Node, step: float, placement: Placement, statistics: Mapping[str, Histogram]
) -> float:
    """The ratio of a concatenation's branches in magnitude, if one would be erased by another; otherwise 0."""
    if kind(network, node) != "cat":
        return 0.0
    values = [placement.edges.get(f"{site(node)}:in{port}", "") for port in range(len(tensor_inputs(node)))]
    powers = [statistics[v].power for v in values if v in statistics]
    return _lost(torch.tensor(powers, dtype=torch.float64), step) if len(powers) > 1 else 0.0


def _columns_apart(powers: Collection[torch.Tensor], step: float) -> float:
    return max((_lost(power, step) for power in powers), default=0.0)


def _lost(powers: torch.Tensor, step: float) -> float:
    """The largest magnitude over the smallest that rounding by `step` would erase; 0 if it erases none.

    What is always 0 can't be erased.
    """
    used = powers[powers > 0]
    if len(used) < 2:
        return 0.0
    noise = step**2 / 12
    whole, least = (10 * math.log10(float(p) / noise) for p in (powers.mean(), used.min()))
    if least >= FAINT_DB or least > whole - APART_DB:
        return 0.0
    return math.sqrt(float(used.max() / used.min()))


def _writer(network: fx.GraphModule, node: fx.Node) -> str:
    """The site of the operator whose kernel writes a value, before whatever runtimes fuse into it."""
    while kind(network, node) in ("relu", "clip", "dropout", "identity") or node.target is operator.getitem:
        node = tensor_inputs(node)[0]
    return site(node)


def _consumer(edge: str) -> str:
    return edge.rpartition(":")[0]
