"""Coupled channels: which channels of a network can only be removed together.

Dependencies are derived operator by operator on the captured network. Every position along every axis of every stored
tensor is an atom; operators couple atoms, and coupled atoms are one *unit*: the rows and columns of the weights that
belong to one channel, one head, one neuron. Units that the same layers produce form a *group*. What can't be proven to
be removable is marked as not prunable, with the operator's name, and the analysis goes on.

The idea of coupled groups is that of Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import fx

from penjing.analyze.atoms import STORED, Reordering, Walk, fixed
from penjing.analyze.cuts import edits_of, remaining
from penjing.analyze.laid_out import LaidOut, laid_out, not_prunable_components
from penjing.analyze.layers import COMPUTED, LAYERS
from penjing.analyze.rearrangements import MOVING, single
from penjing.analyze.relations import POINTWISE, RULES, elementwise, refuse
from penjing.analyze.reshaping import MOVES
from penjing.analyze.unlisted import INPUTS, unlisted
from penjing.errors import RecipeError
from penjing.network.graph import is_tensor, kind, shapes, site, tensor_inputs
from penjing.steps.draft import Edit
from penjing.steps.positions import to_text


@dataclass(frozen=True, eq=False)
class Member:
    """The slices of one axis of one stored tensor that belong to a group.

    Attributes:
        tensor: Name of the parameter or buffer.
        axis: Its axis.
        positions: (n,) positions along that axis, those of the first unit first.
        units: (n,) the unit of each.
        role: What the axis is to its layer, for example "its outputs".
    """

    tensor: str
    axis: int
    positions: np.ndarray
    units: np.ndarray
    role: str

    def of(self, units: Collection[int]) -> np.ndarray:
        """The positions of these units."""
        positions: np.ndarray = self.positions[np.isin(self.units, list(units))]
        return positions

    def __str__(self) -> str:
        units = len(np.unique(self.units))
        each = len(self.positions) // units
        many = f"{units} × {each}" if each > 1 else f"{units}"
        return f"{self.tensor} axis {self.axis} ({self.role}): {many} positions"


@dataclass(frozen=True, eq=False)
class Group:
    """A group of coupled channels: units that the same layers produce, each of which can be removed by itself.

    A member may have only some of the units: after a shuffle or a split, different layers read different channels.

    Attributes:
        name: The first layer that produces the channels.
        units: The number of units.
        members: Every axis of a stored tensor that is sliced, those that produce the units first.
        because: Why the members are coupled: the operators that couple them.
        statistics: Norms and averages that are computed over these channels. Where there are any, removing units
            changes the values of the others: the result is an approximation.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    because: tuple[str, ...]
    statistics: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.units} units"]
        lines += [f"  {member}" for member in self.members]
        lines += [f"  because {reason}" for reason in self.because]
        lines += [f"  approximate: {where} takes statistics over them" for where in self.statistics]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Coupling:
    """The groups of coupled channels of a network, and what is not prunable.

    Attributes:
        groups: Groups by name.
        not_prunable: Output axis of a weight that can't be pruned → the reason.
    """

    groups: Mapping[str, Group]
    not_prunable: Mapping[str, str]
    _walk: Walk
    _unit: np.ndarray  # component of every atom
    _units: Mapping[str, np.ndarray]  # group → components of its units
    _laid_out: LaidOut

    @property
    def held(self) -> Mapping[str, str]:
        """`not_prunable`, by its name in earlier scripts."""
        return self.not_prunable

    def edits(self, removed: Mapping[str, Collection[int]]) -> tuple[Edit, ...]:
        """The edits that remove these units of these groups from the network.

        Raises:
            RecipeError: A group does not exist, or a layer would lose its last channel.
        """
        gone = self.removed_atoms(removed)
        if not gone.any():
            return ()
        edits: list[Edit] = []
        for (tensor, axis), (first, length) in self._walk.tensors.items():
            cut = np.flatnonzero(gone[first : first + length])
            if len(cut) == length:
                raise RecipeError(
                    f"every channel of {tensor} would be removed",
                    code="every-channel",
                    got=f"{length} of {length} along axis {axis}",
                    expected="at least one remaining channel",
                    remedy="remove fewer channels",
                )
            if len(cut):
                edits.append({"edit": "slice", "tensor": tensor, "axis": axis, "removed": to_text(cut.tolist())})
        for change in self._walk.changes:
            edits.extend(edits_of(change, gone))
        return tuple(edits)

    def removed_atoms(self, removed: Mapping[str, Collection[int]]) -> np.ndarray:
        """Whether each atom is removed."""
        flags = np.zeros(int(self._unit.max(initial=-1)) + 1, bool)
        for name, units in removed.items():
            if name not in self.groups:
                near = difflib.get_close_matches(name, self.groups, n=3)
                raise RecipeError(
                    "this group of channels does not exist",
                    code="unknown-group",
                    got=name,
                    expected=f"one of {len(self.groups)} groups",
                    remedy=f"did you mean {' or '.join(near)}?" if near else None,
                )
            flags[self._units[name][list(units)]] = True
        self._laid_out.spread(flags)
        gone: np.ndarray = flags[self._unit]
        return gone

    def emptied(self, removed: Mapping[str, Collection[int]]) -> list[list[tuple[str, int]]]:
        """For every axis of a tensor that would lose all of its positions, the units that it has."""
        gone = self.removed_atoms(removed)
        owner = {int(c): (name, i) for name, units in self._units.items() for i, c in enumerate(units)}
        emptied: list[list[tuple[str, int]]] = []
        for first, length in self._walk.tensors.values():
            if gone[first : first + length].all():
                components = np.unique(self._unit[first : first + length])
                components = np.unique(np.concatenate([components, *self._laid_out.sides(components)]))
                emptied.append(
                    [
                        unit
                        for c in components.tolist()
                        if (unit := owner.get(c)) and unit[1] in removed.get(unit[0], ())
                    ]
                )
        return emptied

    def sizes(self, gone: np.ndarray) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """Shapes of all values by node, and of all sliced tensors by name, without the removed atoms."""
        values: dict[str, tuple[int, ...]] = {}
        for node in self._walk.network.graph.nodes:
            shape = self._walk.shapes.get(node.name)
            if shape is not None:
                positions = self.kept_positions(node.name, gone) or [None] * len(shape)
                values[node.name] = tuple(
                    n if k is None else int(k.sum()) for n, k in zip(shape, positions, strict=True)
                )
        stored: dict[str, tuple[int, ...]] = {}
        for (name, axis), (first, length) in self._walk.tensors.items():
            shape = stored.get(name, tuple(self._walk.stored_tensors[name].shape))
            stored[name] = (*shape[:axis], int((~gone[first : first + length]).sum()), *shape[axis + 1 :])
        return values, stored

    @cached_property
    def _labels(self) -> dict[str, Any]:
        return {node.name: labels for node, labels in self._walk.values.items()}

    def kept_positions(self, node: str, gone: np.ndarray) -> list[np.ndarray | None]:
        """For every axis of a node's value the mask of remaining positions; None where the axis never changes."""
        labels = self._labels.get(node)
        if not isinstance(labels, tuple):
            return []
        return [None if axis is None else remaining(axis, gone) for axis in labels]


def couple(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]], keep: Iterable[str] = ()) -> Coupling:
    """Derive the groups of coupled channels of a captured network.

    Args:
        network: A captured network.
        call: Example inputs (args, kwargs), batch first.
        keep: Layers, or parts of the network, whose outputs are not pruned.

    Raises:
        RecipeError: `keep` names a layer that does not exist.
    """
    sizes = {name: tuple(int(n) for n in t.shape) for name, t in shapes(network, call).items()}
    walk = Walk.start(network, sizes)
    for node in network.graph.nodes:
        _visit(walk, node)
    _keep(walk, network, keep)
    return _grouped(walk)


OWN = -1  # the side of a layout that is the axis itself
_TAKING_PARTS = (
    *MOVES,
    "matmul",
    "linear",
    "conv",
    "batch_norm",
    "einsum",
    "sum",
    "expand",
)  # rules that know axes laid out along one


def _visit(walk: Walk, node: fx.Node) -> None:
    if node.op == "output":
        for x in tensor_inputs(node):
            for axis in walk.of(x):
                walk.hold(axis, "it is an output of the network")
        return
    if not is_tensor(node) or node in walk.values:
        return
    if node.op == "placeholder":
        walk.values[node] = fixed(len(walk.shapes.get(node.name, ())))
        return
    if node.op == "get_attr":
        name = str(node.target)
        rank = len(walk.shapes[node.name])
        known = name in walk.stored_tensors
        walk.values[node] = tuple(walk.stored(name, d, STORED) if known else None for d in range(rank))
        return
    what = kind(walk.network, node)
    if what not in _TAKING_PARTS and POINTWISE not in getattr(node.target, "tags", ()):
        single(walk, node)
    rules = LAYERS if node.op == "call_module" or what not in COMPUTED else COMPUTED
    rule = rules.get(what) or RULES.get(what) or MOVING.get(what)
    if rule is None and node.op == "call_function" and POINTWISE in getattr(node.target, "tags", ()):
        rule = elementwise
    if rule is None:
        walk.values[node] = refuse(walk, node, f"nothing is known about the channels of {what}")
        return
    noted = len(walk.changes)
    try:
        result = rule(walk, node)
    except (IndexError, KeyError, TypeError, ValueError) as error:  # a form of the operator that no rule foresaw
        del walk.changes[noted:]
        result = refuse(walk, node, f"{what} in a form that is not known ({type(error).__name__}: {error})")
    if node.name in walk.shapes and len(result) != len(walk.shapes[node.name]):
        del walk.changes[noted:]
        result = refuse(walk, node, f"{what} in a form that is not known")
    if node.name in walk.shapes:  # an axis of length 1 is broadcast: it can't be told from one that is repeated
        for axis, size in zip(result, walk.shapes[node.name], strict=True):
            if size == 1:
                walk.hold(axis, f"{site(node)}: a single channel")
        result = tuple(None if n == 1 else a for a, n in zip(result, walk.shapes[node.name], strict=True))
    walk.values.setdefault(node, result)


def _keep(walk: Walk, network: fx.GraphModule, keep: Iterable[str]) -> None:
    layers = {name.rpartition(".")[0] for name, _ in walk.tensors}
    for name in keep:
        keys = [key for key in walk.tensors if key[0] == name or key[0].startswith(f"{name}.")]
        if not keys:
            near = difflib.get_close_matches(name, layers, n=3)
            raise RecipeError(
                "this layer or part of the network does not exist",
                code="no-layer",
                got=name,
                expected="the name of a layer or of a part of the network",
                remedy=f"did you mean {' or '.join(near)}?" if near else None,
            )
        for key in keys:
            if walk.roles[key] != "its inputs":
                first, length = walk.tensors[key]
                walk.hold(np.arange(first, first + length), f"{name} is excluded by keep")


def _grouped(walk: Walk) -> Coupling:
    unit, layouts = laid_out(walk)
    not_prunable = not_prunable_components(walk, unit, layouts)
    standing = set(layouts.of.tolist())
    makers: dict[int, list[tuple[int, int, int]]] = {}  # component → tensor, side of a layout or −1, positions
    others: dict[int, list[tuple[int, int, int]]] = {}
    keys = list(walk.tensors)
    sides = [_sides(walk, unit, layouts, key) for key in keys]
    fixed_axes: dict[str, str] = {}
    for position, key in enumerate(keys):
        makes = walk.roles[key] == "its outputs"
        # Of a convolution in groups, outputs and inputs are one: its weight's first axis speaks for it.
        speaks = makes or (walk.roles[key] == "its channels" and key[1] == 0 and walk.stored_tensors[key[0]].dim() > 1)
        reasons = [not_prunable[c] for c in np.unique(sides[position][OWN]).tolist() if c in not_prunable]
        if reasons and speaks:
            fixed_axes[f"{key[0]}:{key[1]}"] = reasons[0]
        for side, here in sides[position].items():
            components, counts = np.unique(here[here >= 0], return_counts=True)
            for component, count in zip(components.tolist(), counts.tolist(), strict=True):
                if component not in not_prunable and component not in standing:
                    mates = makers if makes and side == OWN else others
                    mates.setdefault(component, []).append((position, side, count))
    joined = _by_component(unit, layouts, walk.joins)
    statistics = _by_component(unit, layouts, [(a, a, w) for a, w in walk.statistics])
    alike: dict[tuple[Any, ...], list[int]] = {}
    for component in sorted({*makers, *others}):
        signature = makers.get(component) or others[component]
        alike.setdefault((tuple(signature), statistics.get(component, ())), []).append(component)
    groups: dict[str, Group] = {}
    units: dict[str, np.ndarray] = {}
    for (_, taken), unit_components in alike.items():
        places = dict.fromkeys(
            (p, side) for c in unit_components for p, side, _ in (*makers.get(c, ()), *others.get(c, ()))
        )
        ordered = sorted(places, key=lambda p: (p[1] != OWN, walk.roles[keys[p[0]]] != "its outputs", p))
        members = tuple(_member(sides[p][side], keys[p], walk.roles[keys[p]], unit_components) for p, side in ordered)
        name = _name(members, groups)
        because = dict.fromkeys(text for c in unit_components for text in joined.get(c, ()))
        groups[name] = Group(name, len(unit_components), members, tuple(because), taken)
        units[name] = np.array(unit_components)
    removed = {member.tensor for group in groups.values() for member in group.members if member.role not in INPUTS}
    fixed_axes |= unlisted(walk, unit, not_prunable, removed | {name.rpartition(":")[0] for name in fixed_axes})
    return Coupling(groups, fixed_axes, walk, unit, units, layouts)


def _sides(walk: Walk, unit: np.ndarray, layouts: LaidOut, key: tuple[str, int]) -> dict[int, np.ndarray]:
    """Components along an axis: their own, and on every side of a layout those that they stand for."""
    first, length = walk.tensors[key]
    own = unit[first : first + length]
    return {OWN: own, **dict(enumerate(layouts.sides(own)))}


def _by_component(
    unit: np.ndarray, layouts: LaidOut, notes: list[tuple[np.ndarray, np.ndarray, str]]
) -> dict[int, tuple[str, ...]]:
    texts_of: dict[int, dict[str, None]] = {}
    for atoms, _, text in notes:
        components = np.unique(unit[atoms])
        parts = [side[side >= 0] for side in layouts.sides(components)]
        for component in np.unique(np.concatenate([components, *parts])).tolist():
            texts_of.setdefault(component, {})[text] = None
    return {component: tuple(texts) for component, texts in texts_of.items()}


def _member(here: np.ndarray, key: tuple[str, int], role: str, components: list[int]) -> Member:
    order = np.argsort(components)
    place = np.searchsorted(components, here, sorter=order).clip(max=len(components) - 1)
    units = np.where(np.asarray(components)[order[place]] == here, order[place], -1)
    positions = np.flatnonzero(units >= 0)
    positions = positions[np.argsort(units[positions], kind="stable")]
    return Member(key[0], key[1], positions, units[positions], role)


def _name(members: tuple[Member, ...], taken: Mapping[str, Group]) -> str:
    makes = next((m for m in members if m.role == "its outputs"), members[0])
    name = base = makes.tensor.rpartition(".")[0] or makes.tensor
    n = 2
    while name in taken:
        name, n = f"{base} ({n})", n + 1
    return name


__all__ = ["Coupling", "Group", "Member", "Reordering", "couple"]
