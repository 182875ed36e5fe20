"""How an operator couples the channels of its inputs and outputs: products, reductions, pointwise operators.

Each rule takes the `Walk` and a node, couples atoms, and returns the labels of the result. The rules of layers with
weights are in `penjing.analyze.layers`, those of operators that only move values in `penjing.analyze.rearrangements`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from penjing.analyze.atoms import Axis, Labels, Literal, Walk, fixed
from penjing.network.graph import arguments, operator_name, site, tensor_inputs

Rule = Callable[[Walk, fx.Node], Any]


def refuse(walk: Walk, node: fx.Node, why: str) -> Any:
    """Mark everything that this operator reads as not prunable."""
    for x in tensor_inputs(node):
        if x in walk.values and isinstance(walk.values[x], tuple):
            for axis in walk.of(x):
                walk.hold(axis, f"{site(node)}: {why}")
    return unchanged(walk, node)


def unchanged(walk: Walk, node: fx.Node) -> Any:
    """Labels of a result that never changes."""
    if node.name in walk.shapes:
        return fixed(len(walk.shape(node)))
    return [fixed(len(walk.shape(user))) if user.name in walk.shapes else () for user in _results(node)]


def _results(node: fx.Node) -> list[fx.Node]:
    """The nodes that read each of several results, by index."""
    readers: dict[int, fx.Node] = {}
    for user in node.users:
        if len(user.args) == 2 and isinstance(user.args[1], int):
            readers.setdefault(user.args[1], user)
    return [readers.get(i, node) for i in range(max(readers, default=-1) + 1)]


def hold_all(walk: Walk, node: fx.Node, axes: list[Axis], why: str) -> None:
    """Mark axes as not prunable because of an operator."""
    for axis in axes:
        walk.hold(axis, f"{site(node)}: {why}")


# --- products ----------------------------------------------------------------------------------------------------


def product(walk: Walk, node: fx.Node) -> Labels:
    """(…, n, k)·(…, k, m), with vectors on either side, and bias + product."""
    names = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "mv": ("self", "vec")}
    given = arguments(node)
    left, right = (given[w] for w in names.get(operator_name(node), ("self", _second(given))))
    a, b = walk.of(left), walk.of(right)
    walk.join(a[-1], b[-2] if len(b) > 1 else b[-1], f"{site(node)} sums over it")
    own: Labels = (*(a[-2:-1] if len(a) > 1 else ()), *(b[-1:] if len(b) > 1 else ()))
    shape = walk.shape(node)
    rank = len(shape) - len(own)
    outer = [
        aligned(walk, node, d, rank, [(a[:-2], walk.shape(left)[:-2]), (b[:-2], walk.shape(right)[:-2])])
        for d in range(rank)
    ]
    labels = (*outer, *own)
    if isinstance(right, fx.Node) and right.op == "get_attr" and len(b) == 2:  # a linear layer's weight (in, out)
        for axis, role in ((0, "its inputs"), (1, "its outputs")):
            walk.name_role(str(right.target), axis, role)
    if operator_name(node) in ("addmm", "baddbmm"):
        bias = given["self"]
        labels = tuple(
            aligned(walk, node, d, len(shape), [(labels, shape), (walk.of(bias), walk.shape(bias))])
            for d in range(len(shape))
        )
    return labels


def _second(given: dict[str, Any]) -> str:
    return "other" if "other" in given else "mat2" if "mat2" in given else "tensor"


def einsum(walk: Walk, node: fx.Node) -> Labels:
    """Axes with the same letter are coupled."""
    given = arguments(node)
    left, _, right = str(given["equation"]).replace(" ", "").partition("->")
    if "..." in left or not right:
        return refuse(walk, node, "an equation without a written result")  # type: ignore[no-any-return]
    known: dict[str, Axis] = {}
    for term, x in zip(left.split(","), given["tensors"], strict=True):
        for letter, axis in zip(term, walk.of(x), strict=True):
            if letter in known:
                walk.join(known[letter], axis, f"{site(node)} multiplies it")
            else:
                known[letter] = axis
    return tuple(known[letter] for letter in right)


def attention(walk: Walk, node: fx.Node) -> Labels:
    """Query (…, L, E), key (…, S, E), value (…, S, V): heads stand among the first axes."""
    given = arguments(node)
    q, k, v = (walk.of(given[w]) for w in ("query", "key", "value"))
    shapes = [walk.shape(given[w]) for w in ("query", "key", "value")]
    walk.join(q[-1], k[-1], f"{site(node)} sums over it")
    walk.join(k[-2], v[-2], f"{site(node)} sums over it")
    if q[-1] is not None and given["scale"] is None:
        walk.changes.append(Literal(site(node), ("scale",), q[-1], value=1 / float(np.sqrt(shapes[0][-1]))))
    rank = len(walk.shape(node)) - 2
    heads: list[Axis] = []
    for d in range(rank):
        if given["enable_gqa"] and d == rank - 1:
            heads.append(_shared_keys(walk, node, (q[d], k[d], v[d]), shapes[0][d], shapes[1][d]))
            continue
        heads.append(aligned(walk, node, d, rank, [(x[:-2], s[:-2]) for x, s in zip((q, k, v), shapes, strict=True)]))
    if given["attn_mask"] is not None:
        mask = given["attn_mask"]
        scores: Labels = (*heads, q[-2], k[-2])
        shape = (*walk.shape(node)[:-2], shapes[0][-2], shapes[1][-2])
        for d in range(len(shape)):
            aligned(walk, node, d, len(shape), [(scores, shape), (walk.of(mask), walk.shape(mask))])
    return (*heads, q[-2], v[-1])


def _shared_keys(walk: Walk, node: fx.Node, heads: tuple[Axis, Axis, Axis], queries: int, keys: int) -> Axis:
    query, key, value = heads
    if keys == 1:  # it is shared by all that there are
        return query
    walk.join(key, value, f"{site(node)} sums over it")
    share = queries // keys
    if key is None:
        walk.hold(query, f"{site(node)}: its keys are shared")
    else:
        walk.join(query, np.repeat(key, share), f"{site(node)} shares its keys")
    return query


# --- elementwise ---------------------------------------------------------------------------------------------------


def aligned(walk: Walk, node: fx.Node, axis: int, rank: int, operands: list[tuple[Labels, tuple[int, ...]]]) -> Axis:
    """Labels of one axis of a broadcast result; the operands' axes are counted from the last."""
    joined: Axis = None
    sides: list[Axis] = []
    size = 1
    for labels, shape in operands:
        i = axis - (rank - len(shape))
        if i >= 0 and shape[i] != 1:
            sides.append(labels[i])
            size = shape[i]
    if size == 1:
        return None
    for side in sides:
        if joined is None:
            joined = side
    for side in sides:
        walk.join(joined, side, f"{site(node)} combines it")
    return None if any(side is None for side in sides) else joined


def elementwise(walk: Walk, node: fx.Node) -> Labels:
    """Every position of the result comes from the same position of every operand, broadcast."""
    operands = [(walk.of(x), walk.shape(x)) for x in tensor_inputs(node)]
    rank = len(walk.shape(node))
    return tuple(aligned(walk, node, d, rank, operands) for d in range(rank))


def gated(walk: Walk, node: fx.Node) -> Labels:
    """One half of an axis are values, the other half their gates: each value is coupled with its gate."""
    x = walk.of(tensor_inputs(node)[0])
    dim = int(arguments(node)["dim"]) % len(x)
    axis = x[dim]
    if axis is None:
        return x
    values, gates = np.split(axis, 2)
    walk.join(values, gates, f"{site(node)} gates one with the other")
    return (*x[:dim], values, *x[dim + 1 :])


def same(walk: Walk, node: fx.Node) -> Any:
    """The labels of the first operand."""
    first = tensor_inputs(node)[0]
    return walk.of(first)


# --- reductions ----------------------------------------------------------------------------------------------------


def _axes(walk: Walk, node: fx.Node, rank: int) -> list[int]:
    given = arguments(node)
    axes = given.get("dim", given.get("axis"))
    if axes is None or axes == []:
        return list(range(rank))
    return [d % rank for d in (axes if isinstance(axes, list | tuple) else [axes])] if rank else []


def _reduced(walk: Walk, node: fx.Node) -> Any:
    """Labels after a reduction, one for every result (the values and their positions of a maximum)."""
    x = walk.of(tensor_inputs(node)[0])
    axes = _axes(walk, node, len(x))
    keep = bool(arguments(node).get("keepdim", False))
    left = tuple(None if d in axes else axis for d, axis in enumerate(x) if keep or d not in axes)
    return left if node.name in walk.shapes else [left for _ in _results(node)]


def average(walk: Walk, node: fx.Node) -> Any:
    """A mean, a maximum: over fewer channels its value changes to that of the remaining ones."""
    if "other" in arguments(node):  # the larger of two values
        return elementwise(walk, node)
    x = walk.of(tensor_inputs(node)[0])
    for d in _axes(walk, node, len(x)):
        walk.depends(x[d], site(node))
    return _reduced(walk, node)


def total(walk: Walk, node: fx.Node) -> Any:
    """A sum or norm: masked channels contribute nothing."""
    return _reduced(walk, node)


def position(walk: Walk, node: fx.Node) -> Any:
    """An operator along axes whose positions matter (argmax, cumsum, sort, topk, variance)."""
    x = walk.of(tensor_inputs(node)[0])
    axes = _axes(walk, node, len(x))
    hold_all(walk, node, [x[d] for d in axes], "every position along this axis counts")
    if node.name in walk.shapes and len(walk.shape(node)) == len(x) and not arguments(node).get("keepdim", False):
        return tuple(None if d in axes else axis for d, axis in enumerate(x))
    if node.name not in walk.shapes and _results(node) and len(walk.shape(_results(node)[0])) == len(x):
        return [tuple(None if d in axes else axis for d, axis in enumerate(x)) for _ in _results(node)]
    return _reduced(walk, node)


def softmax(walk: Walk, node: fx.Node) -> Labels:
    """The remaining channels share the total."""
    x = walk.of(tensor_inputs(node)[0])
    for d in _axes(walk, node, len(x)):
        walk.depends(x[d], site(node))
    return x


def spatial(walk: Walk, node: fx.Node) -> Any:
    """Pooling, resizing: every channel of (N, channels, …) is computed on its own."""
    x = walk.of(tensor_inputs(node)[0])
    shape = walk.shape(node) if node.name in walk.shapes else walk.shape(_results(node)[0])
    hold_all(walk, node, list(x[2:]), "an operator slides along this axis")
    labels = (*x[:2], *fixed(len(shape) - 2))
    return labels if node.name in walk.shapes else [labels for _ in _results(node)]


RULES: dict[str, Rule] = {
    "matmul": product,
    "addmm": product,
    "baddbmm": product,
    "mv": product,
    "einsum": einsum,
    "attention": attention,
    "where": elementwise,
    "floor_divide": elementwise,
    "fill": same,
    "glu": gated,
    "hardswish": same,
    "dropout": same,
    "identity": same,
    "detach": same,
    "to": same,
    "_to_copy": same,
    "type_as": same,
    "lift_fresh_copy": same,
    "zeros_like": same,
    "ones_like": same,
    "full_like": same,
    "empty_like": same,
    "rand_like": same,
    "randn_like": same,
    "sum": total,
    "linalg_vector_norm": total,
    "norm": total,
    "mean": average,
    "amax": average,
    "amin": average,
    "max": average,
    "min": average,
    "logsumexp": average,
    "softmax": softmax,
    "log_softmax": softmax,
    "avg_pool": spatial,
    "max_pool": spatial,
    "max_pool2d_with_indices": spatial,
    "max_pool1d_with_indices": spatial,
    "avg_pool3d": spatial,
    "max_pool3d": spatial,
    "max_pool3d_with_indices": spatial,
    "adaptive_avg_pool3d": spatial,
    "adaptive_max_pool1d": spatial,
    "adaptive_max_pool2d": spatial,
    "adaptive_max_pool3d": spatial,
    "resize": spatial,
    "upsample_bilinear2d": spatial,
    "upsample_bicubic2d": spatial,
    "upsample_linear1d": spatial,
    "upsample_nearest1d": spatial,
    "upsample_trilinear3d": spatial,
    "_upsample_nearest_exact2d": spatial,
    "_upsample_bilinear2d_aa": spatial,
    "reflection_pad2d": spatial,
    "replication_pad2d": spatial,
    "reflection_pad1d": spatial,
    "replication_pad1d": spatial,
    "grid_sampler": spatial,
    "argmax": position,
    "argmin": position,
    "cumsum": position,
    "cumprod": position,
    "sort": position,
    "argsort": position,
    "topk": position,
    "var": position,
    "std": position,
    "var_mean": position,
    "any": position,
    "all": position,
    "prod": position,
}
"""Kind of operator (`penjing.network.graph.kind`) → its rule. Operators with torch's pointwise tag need none."""

POINTWISE = torch.Tag.pointwise
