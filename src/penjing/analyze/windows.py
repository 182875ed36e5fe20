"""How labels move through operators that extract sliding windows, and sum them back."""

from __future__ import annotations

import numpy as np
from torch import fx

from penjing.analyze.atoms import Labels, Walk
from penjing.analyze.relations import hold_all
from penjing.network.graph import arguments, site, tensor_inputs


def im2col(walk: Walk, node: fx.Node) -> Labels:
    """(N, C, H, W) to (N, C·positions of a window, windows)."""
    source = tensor_inputs(node)[0]
    x = walk.of(source)
    hold_all(walk, node, list(x[-2:]), "a window slides along this axis")
    positions = walk.shape(node)[-2] // walk.shape(source)[-3]
    return (*x[:-3], None if x[-3] is None else np.repeat(x[-3], positions), None)


def col2im(walk: Walk, node: fx.Node) -> Labels:
    """(N, C·positions of a window, windows) to (N, C, H, W)."""
    x = walk.of(tensor_inputs(node)[0])
    hold_all(walk, node, [x[-1]], "a window slides along this axis")
    axis = x[-2]
    if axis is not None:
        rows = axis.reshape(walk.shape(node)[-3], -1)
        for k in range(1, rows.shape[1]):
            walk.join(rows[:, 0], rows[:, k], f"{site(node)} makes one channel of {rows.shape[1]}")
        axis = rows[:, 0]
    return (*x[:-2], axis, None, None)


def unfold(walk: Walk, node: fx.Node) -> Labels:
    """Windows along one axis, which becomes their number; the positions within a window become a new last axis."""
    given = arguments(node)
    x = walk.of(given["self"])
    dim = int(given["dimension"]) % len(x)
    hold_all(walk, node, [x[dim]], "a window slides along this axis")
    return (*x[:dim], None, *x[dim + 1 :], None)
