"""Edits that follow from removed atoms: constants, split lengths and permutations in the graph."""

from __future__ import annotations

import numpy as np

from penjing.analyze.atoms import FIXED, Change, Literal, Partition
from penjing.steps.draft import Edit
from penjing.steps.positions import to_text


def remaining(axis: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Mask of the positions of an axis that remain, (length,), given the mask of removed atoms, (atoms,)."""
    present = np.ones(axis.shape, bool)
    known = axis != FIXED
    present[known] = ~gone[axis[known]]
    every: np.ndarray = np.logical_and.reduce(np.atleast_2d(present))  # of the atoms that a position stands for
    return every


def edits_of(change: Change, gone: np.ndarray) -> list[Edit]:
    """The edits of one constant, split or permutation when these atoms are removed; none if it does not change."""
    if isinstance(change, Literal):
        left = remaining(change.labels, gone)
        if left.all():
            return []
        value = change.value if change.value is not None else int(left.sum()) // change.divisor
        return [{"edit": "literal", "site": change.where, "argument": list(change.argument), "value": value}]
    if isinstance(change, Partition):
        sizes = [int(remaining(part, gone).sum()) for part in change.parts]
        if sizes == [len(part) for part in change.parts]:
            return []
        return [{"edit": "partition", "site": change.where, "axis": change.axis, "sizes": sizes}]
    left = remaining(change.labels, gone)
    if left.all():
        return []
    renumbered = np.cumsum(left) - 1
    order = renumbered[change.order[left[change.order]]]
    return [
        {
            "edit": "reorder",
            "first": change.first,
            "last": change.last,
            "axis": change.axis,
            "order": to_text(order.tolist()),
        }
    ]
