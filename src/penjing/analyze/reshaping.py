"""How labels move where axes are merged and split: reshapes, and chains of moves that shuffle channels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from penjing.analyze.atoms import FIXED, Axis, Labels, Literal, Reordering, Walk, fixed
from penjing.analyze.relations import hold_all
from penjing.network.graph import arguments, is_tensor, kind, operator_name, site, tensor_inputs

_PARTS = (
    "select",
    "getitem",
    "unbind",
    "split",
    "chunk",
    "split_with_sizes",
    "slice",
    "cat",
    "expand",
    "repeat",
    "repeat_interleave",
)
MERGES = "it merges two axes that both could change"
MOVES = ("reshape", "transpose", "identity")
_ON_THE_WAY = (*MOVES, *_PARTS, "dropout", "softmax", "layer_norm", "rms_norm", "mean")


def reshape(walk: Walk, node: fx.Node) -> Labels:
    """Axes are merged and split in blocks of equal size; a split axis is pruned by whole rows or by columns.

    Merged axes that could both change are tracked as parts of one axis (`Axis`), until an operator needs a single one.
    """
    if shuffle(walk, node):
        return fixed(len(walk.shape(node)))
    source = tensor_inputs(node)[0]
    before, after = walk.shape(source), walk.shape(node)
    x = list(walk.of(source))
    out: list[Axis] = [None] * len(after)
    for ins, outs in blocks(before, after):
        apart = _apart(walk, node, [x[i] for i in ins], [before[i] for i in ins], [after[i] for i in outs])
        if apart is not None:
            for i, axis in zip(outs, apart, strict=True):
                out[i] = axis
            continue
        labels = _merged(walk, node, [x[i] for i in ins], [before[i] for i in ins])
        if labels is not None:
            sizes = [after[i] for i in outs]
            for i, axis in zip(outs, _split(walk, node, labels, sizes, outs), strict=True):
                out[i] = axis
    _sizes(walk, node, out)
    return tuple(out)


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes with equal products; axes of length 1 are left out.

    >>> blocks((2, 12, 49), (2, 3, 4, 49))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    left = [i for i, n in enumerate(before) if n != 1]
    right = [i for i, n in enumerate(after) if n != 1]
    runs: list[tuple[list[int], list[int]]] = []
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (a := math.prod(before[i] for i in ins)) != (b := math.prod(after[i] for i in outs)):
            if a < b:
                ins.append(left.pop(0))
            else:
                outs.append(right.pop(0))
        runs.append((ins, outs))
    return runs


def _apart(walk: Walk, node: fx.Node, axes: list[Axis], before: list[int], after: list[int]) -> list[Axis] | None:
    """Assign every axis, or part of one, to the axis of the result along which it varies; None if one has to be split.

    The rows of a generated kernel are split here too: its outputs and its inputs are pruned independently.
    """
    if all(axis is None for axis in axes):
        return [None] * len(after)
    fine = _common(before, after)
    if fine is None:
        return None
    parts: list[tuple[list[int], np.ndarray]] = []  # (the fine axes that it covers, its atoms)
    for axis, run in zip(axes, _runs(before, fine), strict=True):
        for row in [] if axis is None else np.atleast_2d(axis):
            table = row.reshape([fine[f] for f in run])
            along = [f for d, f in enumerate(run) if _changes(table, d)]
            goes = {_owner(f, fine, after) for f in along}
            if len(goes) == 1:
                parts.append((run, row) if len(along) > 1 else (along, _line(table, run.index(along[0]))))
            elif len(goes) < 1 or len(np.unique(row)) < len(row) or FIXED in row or not _is_kernel(walk, node):
                return None
            else:
                new = [walk.new(fine[f]) for f in run]
                shape = [fine[f] for f in run]
                walk.layouts.append((row, np.stack([_spread(a, d, shape) for d, a in enumerate(new)])))
                parts += [([f], a) for f, a in zip(run, new, strict=True)]
    out: list[Axis] = []
    for run in _runs(after, fine):
        shape = [fine[f] for f in run]
        rows = []
        for along, row in parts:
            if along[0] in run:
                size = [fine[f] if f in along else 1 for f in run]
                rows.append(np.broadcast_to(row.reshape(size), shape).reshape(-1))
        out.append(None if not rows else rows[0] if len(rows) == 1 else np.stack(rows))
    return out


def _common(before: Sequence[int], after: Sequence[int]) -> list[int] | None:
    """The coarsest common refinement of two runs of axes; None where they don't nest.

    >>> _common((2, 720), (16, 10, 9))
    [2, 8, 10, 9]
    """
    ends = sorted({*np.cumprod(before).tolist(), *np.cumprod(after).tolist()})
    if any(large % small for small, large in itertools.pairwise(ends)):
        return None
    return [large // small for small, large in itertools.pairwise([1, *ends]) if large > small]


def _runs(sizes: Sequence[int], fine: Sequence[int]) -> list[list[int]]:
    """For every axis the run of finer axes that it consists of."""
    runs: list[list[int]] = []
    place = 0
    for size in sizes:
        run: list[int] = []
        while math.prod(fine[f] for f in run) < size:
            run.append(place)
            place += 1
        runs.append(run)
    return runs


def _owner(place: int, fine: Sequence[int], sizes: Sequence[int]) -> int:
    return next(i for i, run in enumerate(_runs(sizes, fine)) if place in run)


def _changes(table: np.ndarray, axis: int) -> bool:
    """Whether the table varies along `axis`."""
    return bool((table != table.take([0], axis)).any())


def _line(table: np.ndarray, axis: int) -> np.ndarray:
    return table[tuple(slice(None) if d == axis else 0 for d in range(table.ndim))]


def _spread(line: np.ndarray, axis: int, shape: Sequence[int]) -> np.ndarray:
    """A line along one axis, broadcast along the others and flattened."""
    return np.broadcast_to(line.reshape([-1 if d == axis else 1 for d in range(len(shape))]), shape).reshape(-1)


def _is_kernel(walk: Walk, node: fx.Node) -> bool:
    """Whether the value reaches a convolution as its weight, through moves, scaling or sums.

    A convolution for every sample is a product behind which samples and outputs are merged
    (`penjing.network.varying_groups`).
    """
    queue, seen = [node], {node}
    while queue:
        value = queue.pop()
        for user in value.users:
            if user in seen or not is_tensor(user) or not isinstance(user.target, torch._ops.OpOverload):
                continue
            seen.add(user)
            what = kind(walk.network, user)
            if what in ("conv", "conv_transpose") and arguments(user)["weight"] is value:
                return True
            if what == "matmul" and user.args[0] is value:
                behind = next(iter(user.users))
                return operator_name(behind) == "flatten" and behind.args[1:] == (1, 2)
            if what in (*MOVES, "sum", "flip") or torch.Tag.pointwise in user.target.tags:
                queue.append(user)
    return False


def _merged(walk: Walk, node: fx.Node, axes: list[Axis], sizes: list[int]) -> Axis:
    """Merge axes into one, of which only one may change."""
    changing = [i for i, axis in enumerate(axes) if axis is not None]
    if not changing:
        return None
    # An axis that only repeats values can keep its length; of two axes with weights the last one may change.
    keep = max(changing, key=lambda i: (not walk.is_free(axes[i]), i))  # type: ignore[arg-type]
    others = [axes[i] for i in changing if i != keep]
    hold_all(walk, node, others, MERGES)
    shape = [1] * len(sizes)
    shape[keep] = sizes[keep]
    labels = one_part(walk, node, axes[keep])
    assert labels is not None
    return np.broadcast_to(labels.reshape(shape), sizes).reshape(-1)


def one_part(walk: Walk, node: fx.Node, axis: Axis) -> Axis:
    """Of several flattened axes let the last one change (one with weights before one that repeats); fix the others."""
    if axis is None or axis.ndim == 1:
        return axis
    keep = max(range(len(axis)), key=lambda i: (not walk.is_free(axis[i]), i))
    hold_all(walk, node, [row for i, row in enumerate(axis) if i != keep], MERGES)
    row: np.ndarray = axis[keep]
    return row


def _split(walk: Walk, node: fx.Node, labels: np.ndarray, sizes: list[int], places: list[int]) -> list[Axis]:
    """Split an axis into several, at these places: one of them may change, and positions along the others couple."""
    if len(sizes) == 1:
        return [labels]
    table = labels.reshape(sizes)
    constant = [d for d in range(len(sizes)) if _varies_along(table, d)]
    apart = {places.index(d) for d in {*_taken_apart(walk, node), *_stuck(node)} if d in places}
    free = [d for d in range(len(sizes)) if d not in apart] or list(range(len(sizes)))
    if len(constant) == 1:
        pick = constant[0]
    elif _reaches_product(walk, node):
        pick = free[-2:][0] if apart else _heads(sizes)
    else:
        pick = max(free, key=sizes.__getitem__)
    rows = np.moveaxis(table, pick, 0).reshape(sizes[pick], -1)
    for k in range(1, rows.shape[1]):
        walk.join(rows[:, 0], rows[:, k], f"{site(node)} splits the axis into {' × '.join(map(str, sizes))}")
    if (rows == -1).any():
        walk.hold(rows.reshape(-1), f"{site(node)}: some of it never changes")
    result: list[Axis] = [None] * len(sizes)
    result[pick] = rows[:, 0]
    return result


def _stuck(node: fx.Node) -> set[int]:
    """Axes of a reshape's result with computed sizes, where another size is −1: these can't change."""
    given = arguments(node)
    sizes = given.get("shape") or given.get("size") or ()
    return {i for i, size in enumerate(sizes) if isinstance(size, fx.Node)} if -1 in sizes else set()


def _varies_along(table: np.ndarray, axis: int) -> bool:
    """Whether the table varies along `axis` alone."""
    first = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
    return bool((first == first[:, :1]).all())


def _taken_apart(walk: Walk, node: fx.Node) -> set[int]:
    """Axes of a reshape's result along which a later operator selects single positions or takes a maximum.

    Query, key and value of one projection, the pieces of a maxout unit: such a position is not one channel among many.
    """
    apart: set[int] = set()
    for start in range(len(walk.shape(node))):
        queue = [(node, start)]
        seen = {node}
        while queue:
            value, axis = queue.pop()
            for user in value.users:
                if user in seen or not isinstance(user.target, torch._ops.OpOverload):
                    continue
                seen.add(user)
                what, rank = kind(walk.network, user), len(walk.shape(value))
                if what in _APART:
                    if axis in _axes_of(user, rank):
                        apart.add(start)
                elif (place := _follow(walk, user, value, axis)) is not None:
                    queue.append((user, place))
    return apart


_APART = ("select", "unbind", "amax", "amin", "max", "min")


def _axes_of(node: fx.Node, rank: int) -> list[int]:
    axes = arguments(node).get("dim")
    return [d % rank for d in (axes if isinstance(axes, list | tuple) else [axes]) if d is not None]


def _follow(walk: Walk, node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """The place of an axis of `source` after an operator that moves axes; None where it can't be determined."""
    before = walk.shape(source)
    if node.name not in walk.shapes or tensor_inputs(node) != [source]:
        return None
    after, what = walk.shape(node), kind(walk.network, node)
    if what == "transpose":
        numbered = torch.empty_strided((2,) * len(before), tuple(2**i for i in range(len(before))), device="meta")
        return _moved(walk, node, numbered).stride().index(2**axis)
    if what == "reshape":
        alone = [
            (outs[0] if len(ins) == len(outs) == 1 else None) for ins, outs in blocks(before, after) if axis in ins
        ]
        return alone[0] if alone else None
    return axis if after == before else None


def _heads(sizes: list[int]) -> int:
    """The axis of the heads in heads × width, 3 × heads × width or heads × 3 × width, 3 being query, key and value."""
    return 0 if len(sizes) == 3 and sizes[1] == 3 != sizes[0] else len(sizes) - 2


def _reaches_product(walk: Walk, node: fx.Node) -> bool:
    """Whether the value reaches a product of two activations through moves or scaling, so that it has heads."""
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if user in seen or not is_tensor(user):
                continue
            seen.add(user)
            what = kind(walk.network, user)
            if what in ("attention", "matmul", "einsum", "baddbmm"):
                return True
            pointwise = isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags
            if pointwise or what in _ON_THE_WAY:
                queue.append(user)
    return False


def _sizes(walk: Walk, node: fx.Node, out: list[Axis]) -> None:
    """Note the sizes that stand in the call; what is left over once the others are known can take the place of one.

    A size that the forward computes (batch × channels) need not be understood: where the call has no −1 yet, −1 gives
    the same, whatever is removed.
    """
    name, given = operator_name(node), arguments(node)
    word = next((w for w in ("shape", "size", "sizes") if w in given), None)
    if word is None or name not in ("view", "reshape", "unflatten", "_unsafe_view"):
        return
    offset = int(given["dim"]) % len(walk.shape(tensor_inputs(node)[0])) if name == "unflatten" else 0
    open_size = -1 in given[word]
    for i, size in enumerate(given[word]):
        axis = out[offset + i]
        if axis is None or walk.length(node, (word, i), size, axis):
            continue
        if open_size:
            hold_all(walk, node, [axis], "the size is computed, and another one is open")
        else:
            walk.changes.append(Literal(site(node), (word, i), axis, value=-1))
            open_size = True


# --- channel shuffles ----------------------------------------------------------------------------------------------


def shuffle(walk: Walk, node: fx.Node) -> bool:
    """Note a chain of moves, starting here, that permutes one axis as a whole; its last operator gets the labels."""
    source = tensor_inputs(node)[0]
    start, x = walk.shape(source), walk.of(source)
    chain = [node]
    while len(chain[-1].users) == 1:
        follower = next(iter(chain[-1].users))
        moves = is_tensor(follower) and kind(walk.network, follower) in MOVES
        if not moves or tensor_inputs(follower) != [chain[-1]]:
            break
        chain.append(follower)
        if walk.shape(follower) == start and len(chain) > 2:
            break
    if len(chain) < 3 or walk.shape(chain[-1]) != start:
        return False
    axes = [d for d in range(len(start)) if x[d] is not None]
    if len(axes) != 1:
        return False
    order = _order(walk, chain, start, axes[0])
    if order is None or np.array_equal(order, np.arange(len(order))):
        return False
    labels = x[axes[0]]
    assert labels is not None
    walk.changes.append(Reordering(site(chain[0]), site(chain[-1]), axes[0], order, labels))
    for inner in chain[1:-1]:
        walk.values[inner] = fixed(len(walk.shape(inner)))
    shuffled = list(x)
    shuffled[axes[0]] = labels[order]
    walk.values[chain[-1]] = tuple(shuffled)
    return True


def _order(walk: Walk, chain: list[fx.Node], start: tuple[int, ...], axis: int) -> np.ndarray | None:
    """The permutation of `axis` that the chain computes, traced with numbered positions; None where it is not one."""
    positions = torch.arange(math.prod(start)).reshape(start)
    value = positions
    for node in chain:
        value = _moved(walk, node, value)
    shape = [1] * len(start)
    shape[axis] = start[axis]
    stride = math.prod(start[axis + 1 :])
    order = value[tuple(slice(None) if d == axis else 0 for d in range(len(start)))] // stride
    expected = torch.index_select(positions, axis, order)
    return order.numpy() if torch.equal(value, expected) else None


def _moved(walk: Walk, node: fx.Node, x: torch.Tensor) -> torch.Tensor:
    if kind(walk.network, node) == "transpose":
        moved: torch.Tensor = node.target(x, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return moved
    return x.reshape(walk.shape(node))
