"""How labels move through operators that only move values: transpose, concatenation, slices, indexing.

Reshapes are in `penjing.analyze.reshaping`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from penjing.analyze.atoms import Axis, Labels, Literal, Partition, Walk, concatenated
from penjing.analyze.relations import aligned, hold_all, refuse, same, unchanged
from penjing.analyze.reshaping import one_part, reshape
from penjing.analyze.selections import gather, getitem, index, index_select, narrow, select, slice_
from penjing.analyze.windows import col2im, im2col, unfold
from penjing.network.graph import arguments, operator_name, site, tensor_inputs

# --- transposes, parts and wholes ------------------------------------------------------------------------------------


def transpose(walk: Walk, node: fx.Node) -> Labels:
    """Axes in another order, determined by moving an empty tensor whose strides name its axes."""
    x = walk.of(tensor_inputs(node)[0])
    numbered = torch.empty_strided((2,) * len(x), tuple(10**i for i in range(len(x))), device="meta")
    moved = node.target(numbered, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return tuple(x[int(round(math.log10(stride)))] for stride in moved.stride())


def cat(walk: Walk, node: fx.Node) -> Labels:
    """Labels concatenated along one axis, coupled along the others."""
    given = arguments(node)
    parts = list(given["tensors"])
    rank = len(walk.shape(node))
    dim = int(given["dim"]) % rank
    parts = [p for p in parts if len(walk.shape(p)) == rank]  # torch takes empty vectors too
    out: list[Axis] = []
    for d in range(rank):
        sides = [walk.of(p)[d] for p in parts]
        if d == dim:
            out.append(concatenated(sides, [walk.shape(p)[d] for p in parts]))
        else:
            out.append(_joined(walk, node, sides))
    return tuple(out)


def stack(walk: Walk, node: fx.Node) -> Labels:
    """A new axis; the others are coupled."""
    given = arguments(node)
    sides = [walk.of(p) for p in given["tensors"]]
    joined = [_joined(walk, node, list(axes)) for axes in zip(*sides, strict=True)]
    joined.insert(int(given["dim"]) % len(walk.shape(node)), None)
    return tuple(joined)


def _joined(walk: Walk, node: fx.Node, sides: list[Axis]) -> Axis:
    known = next((s for s in sides if s is not None), None)
    for side in sides:
        walk.join(known, side, f"{site(node)} combines it")
    return None if any(s is None for s in sides) else known


def split(walk: Walk, node: fx.Node) -> list[Labels]:
    """Parts of one axis: chunk, split and split_with_sizes."""
    given = arguments(node)
    source = tensor_inputs(node)[0]
    x = walk.of(source)
    dim = int(given["dim"]) % len(x)
    length = walk.shape(source)[dim]
    sizes = _parts(given, length)
    axis = x[dim]
    parts: list[Axis] = [None] * len(sizes)
    if axis is not None:
        ends = np.cumsum(sizes)
        parts = [axis[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        walk.changes.append(Partition(site(node), dim, tuple(p for p in parts if p is not None)))
    return [(*x[:dim], part, *x[dim + 1 :]) for part in parts]


def _parts(given: dict[str, Any], length: int) -> list[int]:
    if "split_sizes" in given:
        return [int(n) for n in given["split_sizes"]]
    each = int(given["split_size"]) if "split_size" in given else -(-length // int(given["chunks"]))
    return [min(each, length - first) for first in range(0, length, each)]


def unbind(walk: Walk, node: fx.Node) -> list[Labels]:
    """One result for every position of an axis."""
    source = tensor_inputs(node)[0]
    x = walk.of(source)
    dim = int(arguments(node)["dim"]) % len(x)
    hold_all(walk, node, [x[dim]], "it gives every position by itself")
    return [(*x[:dim], *x[dim + 1 :])] * walk.shape(source)[dim]


def expand(walk: Walk, node: fx.Node) -> Labels:
    """Axes of length 1 repeated; a constant length can follow what the result is combined with."""
    given = arguments(node)
    x, before, after = walk.of(given["self"]), walk.shape(given["self"]), walk.shape(node)
    out: list[Axis] = []
    sizes = given["size"]
    for i, size in enumerate(sizes):
        old = i - (len(after) - len(before))
        if old >= 0 and before[old] == after[i]:
            axis = x[old]
        else:
            axis = walk.new(after[i]) if isinstance(size, int) and after[i] > 1 else None
        if not walk.length(node, ("size", i), size, axis):
            hold_all(walk, node, [axis], "the size is computed")
        out.append(axis)
    return tuple(out)


def single(walk: Walk, node: fx.Node) -> None:
    """Before an operator without a rule for flattened axes (`Axis`): reduce them to a single one."""
    for x in tensor_inputs(node):
        labels = walk.values.get(x)
        if isinstance(labels, tuple):
            walk.values[x] = tuple(one_part(walk, node, axis) for axis in labels)


def like(walk: Walk, node: fx.Node) -> Labels:
    """expand_as, view_as: the shape of another value."""
    x, other = tensor_inputs(node)[:2]
    if operator_name(node) != "expand_as":
        return refuse(walk, node, "a shape taken from another value")  # type: ignore[no-any-return]
    rank = len(walk.shape(node))
    operands = [(walk.of(n), walk.shape(n)) for n in (x, other)]
    return tuple(aligned(walk, node, d, rank, operands) for d in range(rank))


def repeat(walk: Walk, node: fx.Node) -> Labels:
    """The whole value repeated along every axis."""
    given = arguments(node)
    times = list(given.get("repeats") or given.get("dims") or ())
    x, before = walk.of(tensor_inputs(node)[0]), walk.shape(tensor_inputs(node)[0])
    after = walk.shape(node)
    out: list[Axis] = []
    times = [1] * (len(after) - len(times)) + times
    for i, many in enumerate(times):
        old = i - (len(after) - len(before))
        axis = x[old] if old >= 0 else None
        out.append(axis if axis is None or many == 1 else np.tile(axis, after[i] // before[old]))
    return tuple(out)


def repeat_interleave(walk: Walk, node: fx.Node) -> Labels:
    """Every position repeated."""
    given = arguments(node)
    source = tensor_inputs(node)[0]
    x = walk.of(source)
    if given.get("dim") is None or not isinstance(given.get("repeats"), int):
        return refuse(walk, node, "how often it repeats is computed")  # type: ignore[no-any-return]
    dim = int(given["dim"]) % len(x)
    axis = x[dim]
    return (*x[:dim], None if axis is None else np.repeat(axis, given["repeats"]), *x[dim + 1 :])


def pad(walk: Walk, node: fx.Node) -> Labels:
    """Padding before and after an axis; with a constant the padded positions can be removed too."""
    given = arguments(node)
    source = tensor_inputs(node)[0]
    x, before = list(walk.of(source)), walk.shape(source)
    amounts = given["pad"]
    plain = given.get("mode", "constant") == "constant"
    for pair in range(len(amounts) // 2):
        d = len(x) - 1 - pair
        low, high = amounts[2 * pair], amounts[2 * pair + 1]
        if x[d] is None or (low == 0 and high == 0):
            continue
        if not plain or not isinstance(low, int) or not isinstance(high, int) or min(low, high) < 0:
            return refuse(walk, node, "it pads channels with computed values or amounts")  # type: ignore[no-any-return]
        ends = [walk.new(n) for n in (low, high)]
        for i, axis in enumerate(ends):
            if len(axis):
                walk.changes.append(Literal(site(node), ("pad", 2 * pair + i), axis))
        x[d] = concatenated([ends[0], x[d], ends[1]], [low, before[d], high])
    return tuple(x)


def pixel_shuffle(walk: Walk, node: fx.Node) -> Labels:
    """(N, C·r², H, W) to (N, C, H·r, W·r)."""
    x = walk.of(tensor_inputs(node)[0])
    factor = int(arguments(node)["upscale_factor"])
    axis = x[-3]
    if axis is not None:
        rows = axis.reshape(-1, factor * factor)
        for k in range(1, rows.shape[1]):
            walk.join(rows[:, 0], rows[:, k], f"{site(node)} makes one channel of {factor * factor}")
        axis = rows[:, 0]
    return (*x[:-3], axis, None, None)


def pixel_unshuffle(walk: Walk, node: fx.Node) -> Labels:
    """(N, C, H·r, W·r) to (N, C·r², H, W)."""
    x = walk.of(tensor_inputs(node)[0])
    factor = int(arguments(node)["downscale_factor"])
    return (*x[:-3], None if x[-3] is None else np.repeat(x[-3], factor * factor), None, None)


def roll(walk: Walk, node: fx.Node) -> Labels:
    """Positions shifted along some axes."""
    x = walk.of(tensor_inputs(node)[0])
    dims = arguments(node).get("dims") or range(len(x))
    hold_all(walk, node, [x[d] for d in dims], "it shifts positions along this axis")
    return tuple(None if d in [i % len(x) for i in dims] else axis for d, axis in enumerate(x))


# --- indexing ------------------------------------------------------------------------------------------------------


def flip(walk: Walk, node: fx.Node) -> Labels:
    """The positions of some axes in the opposite order."""
    given = arguments(node)
    x = walk.of(given["self"])
    flipped = {int(d) % len(x) for d in given["dims"]}
    return tuple(a if a is None or d not in flipped else a[..., ::-1] for d, a in enumerate(x))


def filled(walk: Walk, node: fx.Node) -> Labels:
    """A value made from a shape: constant lengths can follow what it is combined with."""
    given = arguments(node)
    sizes = given.get("size")
    if sizes is None or node.name not in walk.shapes:
        return unchanged(walk, node)  # type: ignore[no-any-return]
    out: list[Axis] = []
    for i, size in enumerate(sizes):
        axis = walk.new(size) if isinstance(size, int) and size > 1 else None
        walk.length(node, ("size", i), size, axis)
        out.append(axis)
    return tuple(out)


def counting(walk: Walk, node: fx.Node) -> Labels:
    """A value that does not depend on channels: a range, a constant."""
    return unchanged(walk, node)  # type: ignore[no-any-return]


MOVING = {
    "reshape": reshape,
    "transpose": transpose,
    "cat": cat,
    "stack": stack,
    "split": split,
    "split_with_sizes": split,
    "unsafe_split": split,
    "chunk": split,
    "unsafe_chunk": split,
    "unbind": unbind,
    "getitem": getitem,
    "select": select,
    "slice": slice_,
    "narrow": narrow,
    "expand": expand,
    "broadcast_to": expand,
    "expand_as": like,
    "view_as": like,
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "im2col": im2col,
    "col2im": col2im,
    "unfold": unfold,
    "roll": roll,
    "flip": flip,
    "index_select": index_select,
    "index": index,
    "gather": gather,
    "zeros": filled,
    "ones": filled,
    "full": filled,
    "empty": filled,
    "new_zeros": filled,
    "new_ones": filled,
    "new_full": filled,
    "new_empty": filled,
    "arange": counting,
    "scalar_tensor": counting,
    "full_": counting,
    "eye": counting,
    "tril": same,
    "triu": same,
}
"""Kind of operator → its rule."""
