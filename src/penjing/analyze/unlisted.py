"""Weights that no group of channels removes rows of, and that no layer speaks for: recurrent matrices, bare tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from penjing.analyze.atoms import STORED, Walk

INPUTS = frozenset({"its inputs", "the inputs of its gates", "the state that its gates read"})
UNKNOWN = "nothing is known about its channels"


def unlisted(walk: Walk, unit: np.ndarray, not_prunable: Mapping[int, str], listed: Collection[str]) -> dict[str, str]:
    """Output axis of every weight of more than one row that is not listed yet → why it can't be pruned.

    The channels of a table lie in its last axis, those of a recurrent matrix, whose rows are gates, in its first.

    Args:
        walk: The finished analysis.
        unit: Component of every atom.
        not_prunable: Component → the reason.
        listed: Weights whose outputs a group removes, and those with a reason already.
    """
    reasons: dict[str, str] = {}
    for name, weight in walk.network.named_parameters():
        if name in listed or weight.dim() < 2 or len(weight) == 1 or not weight.is_floating_point():
            continue
        known = {axis: walk.roles[name, axis] for axis in range(weight.dim()) if (name, axis) in walk.tensors}
        outputs = [axis for axis, role in known.items() if role not in INPUTS]
        ordered = sorted(outputs, key=lambda axis: -axis if known[axis] == STORED else axis)
        stuck = {axis: reason for axis in ordered if (reason := _reason(walk, unit, not_prunable, (name, axis)))}
        axis, reason = next(iter(stuck.items()), (ordered[0] if ordered else 0, UNKNOWN))
        reasons[f"{name}:{axis}"] = reason
    return reasons


def _reason(walk: Walk, unit: np.ndarray, not_prunable: Mapping[int, str], key: tuple[str, int]) -> str | None:
    first, length = walk.tensors[key]
    components = np.unique(unit[first : first + length]).tolist()
    return next((not_prunable[component] for component in components if component in not_prunable), None)
