"""Atoms: one for every position along every axis of every stored tensor, and the operators that couple them.

An atom is the smallest thing that can be removed. Every value in the network has *labels*: for each axis an array with
the atom of every position, or None where the axis never changes (batch, height, width, tokens). Operators join
atoms (an addition needs the same channels on both sides), rearrange labels (a concatenation), or mark atoms as not
prunable where nothing can be proven. Joined atoms are removed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx

from penjing.network.graph import site

# Atoms along an axis, FIXED where a position is never removed; None: the whole axis never changes. Where several axes
# are flattened into one, (several, length): a position is removed with any of its atoms.
Axis = np.ndarray | None
Labels = tuple[Axis, ...]
FIXED = -1
STORED = "a stored value"  # the role of an axis until an operator determines it


@dataclass(frozen=True)
class Literal:
    """A constant in the graph that depends on how many positions of an axis remain.

    Attributes:
        where: The operator's site.
        argument: Name of the argument (or of the layer's attribute), with an index into a list: ("shape", 2).
        labels: The constant is the number of these positions that remain, divided by `divisor`.
        divisor: See `labels`.
        value: If given, the new constant as soon as any of `labels` is removed.
    """

    where: str
    argument: tuple[str | int, ...]
    labels: np.ndarray
    divisor: int = 1
    value: float | None = None


@dataclass(frozen=True)
class Partition:
    """A split whose part lengths become explicit."""

    where: str
    axis: int
    parts: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Reordering:
    """A chain of operators from `first` to `last` that permutes one axis: position i comes from `order[i]`."""

    first: str
    last: str
    axis: int
    order: np.ndarray
    labels: np.ndarray  # of the input


Change = Literal | Partition | Reordering


@dataclass
class Walk:
    """The state of the analysis while the operators of a network are visited in execution order."""

    network: fx.GraphModule
    shapes: dict[str, tuple[int, ...]]
    stored_tensors: dict[str, torch.Tensor]
    names: dict[int, str]  # id of a tensor → its first name
    values: dict[fx.Node, Any] = field(default_factory=dict)  # Labels; a list of them for several results
    changes: list[Change] = field(default_factory=list)
    tensors: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # (name, axis) → first atom, length
    roles: dict[tuple[str, int], str] = field(default_factory=dict)  # the role of an axis in its layer
    joins: list[tuple[np.ndarray, np.ndarray, str]] = field(default_factory=list)
    holds: list[tuple[np.ndarray, str]] = field(default_factory=list)
    statistics: list[tuple[np.ndarray, str]] = field(default_factory=list)
    free: list[tuple[int, int]] = field(default_factory=list)  # atoms that no stored tensor holds
    layouts: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # atoms (n,), what they stand for (k, n)
    count: int = 0

    @classmethod
    def start(cls, network: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> Walk:
        """The state before the first operator, with the shapes of all values (`penjing.network.graph.shapes`)."""
        tensors: dict[str, torch.Tensor] = dict(network.named_parameters(remove_duplicate=False))
        tensors.update(network.named_buffers(remove_duplicate=False))
        names: dict[int, str] = {}
        for name, tensor in tensors.items():
            names.setdefault(id(tensor), name)
        return cls(network, shapes, tensors, names)

    # --- atoms ----------------------------------------------------------------------------------------------------

    def new(self, length: int) -> np.ndarray:
        """New atoms that belong to no stored tensor: lengths that can follow others."""
        self.count += length
        self.free.append((self.count - length, self.count))
        return np.arange(self.count - length, self.count)

    def is_free(self, axis: np.ndarray) -> bool:
        """Whether an axis was made by `new`."""
        return any(first <= axis.flat[0] < last for first, last in self.free)

    def stored(self, name: str, axis: int, role: str) -> Axis:
        """The atoms of an axis of a parameter or buffer; an axis of length 1 never changes.

        A tensor that is stored under several names has the atoms of its first name.
        """
        tensor = self.stored_tensors[name]
        name, size = self.names[id(tensor)], tensor.shape[axis]
        if size == 1 or not tensor.is_floating_point():
            return None
        key = (name, axis)
        if key not in self.tensors:
            self.tensors[key] = (self.count, size)
            self.count += size
            self.roles[key] = role
        first, length = self.tensors[key]
        return np.arange(first, first + length)

    def name_role(self, name: str, axis: int, role: str) -> None:
        """Set the role of an axis of a stored value, once an operator determines it."""
        key = (self.names[id(self.stored_tensors[name])], axis) if name in self.stored_tensors else (name, axis)
        if self.roles.get(key) == STORED:
            self.roles[key] = role

    def join(self, a: Axis, b: Axis, why: str) -> None:
        """Couple the positions of two axes; where one never changes, the other must not change either."""
        if a is None or b is None:
            self.hold(b if a is None else a, why)
            return
        if a.ndim > 1 or b.ndim > 1:
            self._join_parts(a, b, why)
            return
        free = (a != FIXED) & (b != FIXED)
        if not free.all():
            self.hold(np.where(b == FIXED, a, FIXED), why)
            self.hold(np.where(a == FIXED, b, FIXED), why)
        if not np.array_equal(a[free], b[free]):
            self.joins.append((a[free], b[free], why))

    def _join_parts(self, a: np.ndarray, b: np.ndarray, why: str) -> None:
        """Couple the parts of flattened axes that vary in the same way; parts without a counterpart are not prunable.

        A plain axis with distinct atoms takes the layout of the other side.
        """
        rows, others = sorted((list(np.atleast_2d(side)) for side in (a, b)), key=len)
        for row in rows:
            alike = (i for i, other in enumerate(others) if _pattern(other) == _pattern(row))
            place = next(alike, None)
            if place is None and len(rows) == 1:
                known = all((side != FIXED).all() for side in (row, *others))
                if known and len(np.unique(row)) == len(row):
                    self.layouts.append((row, np.stack(others)))
                    return
                place = max(range(len(others)), key=lambda i: (not self.is_free(others[i]), i))
            if place is None:
                self.hold(row, why)
            else:
                self.join(row, others.pop(place), why)
        for row in others:
            self.hold(row, why)

    def hold(self, axis: Axis, why: str) -> None:
        """Mark these atoms as not prunable."""
        if axis is not None and (axis != FIXED).any():
            self.holds.append((axis[axis != FIXED], why))

    def depends(self, axis: Axis, where: str) -> None:
        """Note that the operator `where` computes statistics over these atoms: removing some changes the others."""
        if axis is not None:
            self.statistics.append((axis[axis != FIXED], where))

    def components(self) -> np.ndarray:
        """The connected component of every atom."""
        if not self.joins:
            return np.arange(self.count)
        rows, columns = (np.concatenate([join[side] for join in self.joins]) for side in (0, 1))
        graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), (self.count, self.count))
        component: np.ndarray = connected_components(graph, directed=False)[1]
        return component

    # --- values ---------------------------------------------------------------------------------------------------

    def of(self, node: Any) -> Labels:
        """Labels of a tensor."""
        labels: Labels = self.values[node]
        return labels

    def shape(self, node: Any) -> tuple[int, ...]:
        """Shape of a tensor, for the example."""
        return self.shapes[node.name]

    def length(self, node: fx.Node, argument: tuple[str | int, ...], given: Any, axis: Axis, divisor: int = 1) -> bool:
        """Note that the constant `given` depends on an axis; False where it is computed and can't be edited."""
        if axis is None or given == -1:
            return True
        if not isinstance(given, int):
            return False
        self.changes.append(Literal(site(node), argument, axis, divisor))
        return True


def _pattern(row: np.ndarray) -> bytes:
    """A key of which positions share an atom."""
    _, first, number = np.unique(row, return_index=True, return_inverse=True)
    return bytes(first[number].tobytes())


def fixed(rank: int) -> Labels:
    """Labels of a value none of whose axes ever changes."""
    return (None,) * rank


def concatenated(axes: Sequence[Axis], lengths: Sequence[int]) -> Axis:
    """Labels of concatenated parts."""
    if all(axis is None for axis in axes):
        return None
    return np.concatenate([np.full(n, FIXED) if axis is None else axis for axis, n in zip(axes, lengths, strict=True)])
