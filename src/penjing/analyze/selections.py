"""How labels move through operators that select positions of an axis: select, slice, index, gather."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from penjing.analyze.atoms import Labels, Literal, Reordering, Walk, fixed
from penjing.analyze.relations import hold_all
from penjing.network.graph import arguments, kind, site


def getitem(walk: Walk, node: fx.Node) -> Any:
    """One of the results of an operator that returns several."""
    results: Any = walk.values[node.args[0]]  # type: ignore[index]
    index: Any = node.args[1]
    return results[index]


def select(walk: Walk, node: fx.Node) -> Labels:
    """One position of an axis, which is removed from the result."""
    given = arguments(node)
    x, shape = walk.of(given["self"]), walk.shape(given["self"])
    dim = int(given["dim"]) % len(x)
    axis = x[dim]
    if axis is not None:
        index = given["index"]
        if isinstance(index, int):
            index %= shape[dim]
            walk.hold(axis[index : index + 1], f"{site(node)} selects it")
            if index:
                walk.changes.append(Literal(site(node), ("index",), axis[:index]))
        else:
            hold_all(walk, node, [axis], "its index is computed")
    return (*x[:dim], *x[dim + 1 :])


def slice_(walk: Walk, node: fx.Node) -> Labels:
    """Positions start, start + step, … up to end of an axis."""
    given = arguments(node)
    x, shape = walk.of(given["self"]), walk.shape(given["self"])
    dim = int(given["dim"]) % len(x)
    axis, size = x[dim], shape[dim]
    if axis is None:
        return x
    start, end, step = (given[w] for w in ("start", "end", "step"))
    if not all(isinstance(n, int) or n is None for n in (start, end, step)):
        return _held(walk, node, x, dim, "its bounds are computed")
    first, last, _ = slice(start, end).indices(size)
    if step not in (1, None):
        if size % step or first >= step or last < size:
            return _held(walk, node, x, dim, f"it takes one of every {step} positions, and not to the end")
        rows = axis.reshape(-1, step)
        for k in range(1, step):
            walk.join(rows[:, 0], rows[:, k], f"{site(node)} takes one of every {step}")
        return (*x[:dim], rows[:, first], *x[dim + 1 :])
    if first:
        walk.changes.append(Literal(site(node), ("start",), axis[:first]))
    if end is not None and last < size:
        walk.changes.append(Literal(site(node), ("end",), axis[:last]))
    elif end is not None and end <= size:
        walk.changes.append(Literal(site(node), ("end",), axis))
    return (*x[:dim], axis[first:last], *x[dim + 1 :])


def _held(walk: Walk, node: fx.Node, x: Labels, dim: int, why: str) -> Labels:
    """One axis keeps all of its positions, the others pass: the width of a table that is cut to a sequence's length."""
    hold_all(walk, node, [x[dim]], why)
    return (*x[:dim], None, *x[dim + 1 :])


def narrow(walk: Walk, node: fx.Node) -> Labels:
    """Consecutive positions of an axis, given by start and length."""
    given = arguments(node)
    x = walk.of(given["self"])
    dim = int(given["dim"]) % len(x)
    axis = x[dim]
    if axis is None:
        return x
    start, length = given["start"], given["length"]
    if not isinstance(start, int) or not isinstance(length, int):
        return _held(walk, node, x, dim, "its bounds are computed")
    part = axis[start : start + length]
    walk.changes.append(Literal(site(node), ("length",), part))
    if start:
        walk.changes.append(Literal(site(node), ("start",), axis[:start]))
    return (*x[:dim], part, *x[dim + 1 :])


def index_select(walk: Walk, node: fx.Node) -> Labels:
    """Positions of one axis given by an index tensor; one that an earlier reordering stored can be edited."""
    given = arguments(node)
    x = walk.of(given["self"])
    dim = int(given["dim"]) % len(x)
    order, last = _stored_order(walk, node)
    axis = x[dim]
    if axis is not None and order is not None:
        walk.changes.append(Reordering(site(node), site(last), dim, order, axis))
        walk.values[last] = (*x[:dim], axis[order], *x[dim + 1 :])
        return fixed(len(x))
    hold_all(walk, node, [x[dim]], "it selects positions by computed indices")
    return (*x[:dim], None, *x[dim + 1 :])


def _stored_order(walk: Walk, node: fx.Node) -> tuple[np.ndarray | None, fx.Node]:
    """The permutation that a `reorder` edit stored, or None; and its last operator, which drops the extra position."""
    positions = arguments(node)["index"]
    cut = next(iter(node.users)) if len(node.users) == 1 else node
    stored = walk.stored_tensors.get(str(positions.target)) if positions.op == "get_attr" else None
    if stored is None or kind(walk.network, cut) != "slice":
        return None, node
    given = arguments(cut)
    if (given["start"], given["end"], given["step"]) != (0, len(stored) - 1, 1):
        return None, node
    return stored[:-1].cpu().numpy(), cut


def index(walk: Walk, node: fx.Node) -> Labels:
    """Advanced indexing x[…, i, j, …] with index tensors, as in NumPy."""
    given = arguments(node)
    x, indices = walk.of(given["self"]), list(given["indices"])
    indices += [None] * (len(x) - len(indices))
    indexed = [d for d, index in enumerate(indices) if index is not None]
    hold_all(walk, node, [x[d] for d in indexed], "it selects positions by computed indices")
    rank = len(walk.shape(node))
    index_rank = rank - (len(x) - len(indexed))
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    first = indexed[0] if adjacent else 0
    rest = [axis for d, axis in enumerate(x) if d not in indexed]
    return (*rest[:first], *fixed(index_rank), *rest[first:])


def gather(walk: Walk, node: fx.Node) -> Labels:
    """Positions of one axis given by an index tensor of the result's shape, whose other axes are coupled with x's."""
    given = arguments(node)
    x, indices = walk.of(given["self"]), walk.of(given["index"])
    dim = int(given["dim"]) % len(x)
    hold_all(walk, node, [x[dim]], "it selects positions by computed indices")
    for d in range(len(x)):
        if d != dim:
            walk.join(x[d], indices[d], f"{site(node)} reads it")
    return indices
