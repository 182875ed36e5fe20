"""Decompositions of operators that a runtime lacks, or computes incorrectly.

`REWRITES` is the table: the name of an ATen operator (in-place forms without their underscore) → a function that builds
its replacement. To add an operator, add a row. Rewrites are applied at capture, so that every step, every runtime and
the source in torch see the same network.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true

from penjing.network.functional import mutates
from penjing.network.graph import arguments, operator_name
from penjing.network.orderings import cummax, cummin, cumprod, index_reduce, kthvalue, scatter_reduce
from penjing.network.projected_lstm import lstm
from penjing.network.recurrent_steps import gru_cell, lstm_cell, rnn, rnn_cell
from penjing.network.rewriting import END, Builder, Rewrite, editable
from penjing.network.varying_groups import conv, conv_transpose

aten = torch.ops.aten
MOST_DIFFERENCES = 25  # rows above which torch, and so the exporter, computes distances by matrix products


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """Apply `REWRITES` to a program; returns the program itself if it has no such operator."""
    if not any(_rewrite(node) for node in program.graph.nodes):
        return program
    program = editable(program)
    renamed: dict[str, str] = {}
    for node in list(program.graph.nodes):
        rewrite = _rewrite(node)
        results = rewrite(Builder(program, node), arguments(node)) if rewrite else None
        if results is None:
            continue
        if mutates(node):
            results = Builder(program, node)(aten.copy_.default, node.args[0], results)
        for old, new in _places(node, results):
            if new is not None:  # otherwise it is unused
                old.replace_all_uses_with(new)
                renamed[old.name] = new.name
            program.graph.erase_node(old)
        if not isinstance(results, fx.Node):
            program.graph.erase_node(node)
    for spec in program._graph_signature.output_specs:
        if getattr(spec.arg, "name", None) in renamed:
            object.__setattr__(spec.arg, "name", renamed[spec.arg.name])
    program.graph_module.recompile()
    return program


def _rewrite(node: fx.Node) -> Rewrite | None:
    known = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    return REWRITES.get(operator_name(node)) if known else None


def _places(node: fx.Node, results: Any) -> list[tuple[fx.Node, fx.Node | None]]:
    """Pairs of a node and its replacement."""
    if isinstance(results, fx.Node):
        return [(node, results)]
    return [(user, results[int(str(user.args[1]))]) for user in list(node.users)]


def _reads(node: fx.Node, position: int) -> bool:
    """Whether one of an operator's results is used."""
    return any(user.target is operator.getitem and user.args[1] == position and user.users for user in node.users)


def _rrelu(build: Builder, a: dict[str, Any]) -> Any:
    # In eval mode the slope is the mean of the bounds.
    return None if a["training"] else build(aten.leaky_relu.default, a["self"], (a["lower"] + a["upper"]) / 2)


def _pad(build: Builder, a: dict[str, Any]) -> Any:
    if a["mode"] != "circular" or any(not isinstance(p, int) or p < 0 for p in a["pad"]):
        return None
    x = a["self"]
    for i, (before, after) in enumerate(zip(a["pad"][::2], a["pad"][1::2], strict=True)):
        dim = build.value(x).dim() - 1 - i
        front = [build(aten.slice.Tensor, x, dim, -before, END)] if before else []
        back = [build(aten.slice.Tensor, x, dim, 0, after)] if after else []
        x = build(aten.cat.default, [*front, x, *back], dim) if front or back else x
    return x


def _channel_shuffle(build: Builder, a: dict[str, Any]) -> Any:
    parts = build(aten.unflatten.int, a["self"], 1, [a["groups"], -1])
    return build(aten.flatten.using_ints, build(aten.transpose.int, parts, 1, 2), 1, 2)


def _zeros_joined(build: Builder, a: dict[str, Any]) -> Any:
    """Zeros concatenated to a single value become padding, so that their other sizes follow the value's."""
    parts, dim = list(a["tensors"]), a["dim"] % build.value(build.node).dim()
    zeros = [operator_name(part) in ("zeros", "new_zeros") and list(part.users) == [build.node] for part in parts]
    alike = {(build.value(part).dtype, build.value(part).dim()) for part in parts}
    place = zeros.index(False) if False in zeros else 0
    if sum(zeros) != len(parts) - 1 or len(alike) > 1 or len(parts) < 2:
        return None  # torch also allows concatenating an empty vector to a tensor of higher rank
    sizes = [build.value(part).shape[dim] for part in parts]
    if not all(isinstance(size, int) for i, size in enumerate(sizes) if i != place):
        return None
    inner = [0, 0] * (build.value(parts[place]).dim() - 1 - dim)
    return build(aten.constant_pad_nd.default, parts[place], [*inner, sum(sizes[:place]), sum(sizes[place + 1 :])], 0.0)


def _adaptive_max_pool(build: Builder, a: dict[str, Any]) -> Any:
    if _reads(build.node, 1) or all(size == 1 for size in a["output_size"]):
        return None
    pooled = _adaptive_pool(build, a["self"], a["output_size"], "max_pool")
    return None if pooled is None else (pooled, None)


def _adaptive_avg_pool3d(build: Builder, a: dict[str, Any]) -> Any:
    return _adaptive_pool(build, a["self"], a["output_size"], "avg_pool")


def _adaptive_avg_pool(build: Builder, a: dict[str, Any]) -> Any:
    sizes = build.value(a["self"]).shape[-len(a["output_size"]) :]
    known = all(isinstance(size, int) for size in sizes) or all(size == 1 for size in a["output_size"])
    return None if known else _adaptive_pool(build, a["self"], a["output_size"], "avg_pool")


def _adaptive_pool(build: Builder, x: fx.Node, sizes: Sequence[Any], kind: str) -> Any:
    """Adaptive pooling to any size, axis by axis: one pooling for equal windows, otherwise one per window."""
    n = len(sizes)
    pool = getattr(aten, f"{kind}{n}d").default
    shape = build.value(x).shape
    dims = range(len(shape) - n, len(shape))
    if not all(isinstance(size, int) for size in (*shape[-n:], *sizes)):
        targets = [build.value(out) if isinstance(out, fx.Node) else out for out in sizes]
        extents = {d: out for d, out in zip(dims, targets, strict=True) if not statically_known_true(out == shape[d])}
        if not all(isinstance(out, int) for out in extents.values()):
            return None  # the number of windows is the size of another value
        for dim, out in extents.items():
            x = _pool_any_size(build, x, dim, out, kind)
        return x

    def window(values: dict[int, int]) -> list[int]:
        return [values.get(dim, 1) for dim in dims]

    even = {d: shape[d] // out for d, out in zip(dims, sizes, strict=True) if shape[d] % out == 0}
    if any(k > 1 for k in even.values()):
        x = build(pool, x, window(even), window(even))
    for dim, out in zip(dims, sizes, strict=True):
        if dim in even:
            continue
        edges = [(i * shape[dim] // out, -(-(i + 1) * shape[dim] // out)) for i in range(out)]
        parts = [(build(aten.slice.Tensor, x, dim, low, high), high - low) for low, high in edges]
        pooled = [part if size == 1 else build(pool, part, window({dim: size}), [1] * n) for part, size in parts]
        x = build(aten.cat.default, pooled, dim)
    return x


def _pool_any_size(build: Builder, x: fx.Node, dim: int, out: int, kind: str) -> Any:
    """Adaptive pooling of a dynamic axis: which position belongs to which window is computed at run time.

    Position p of n lies in window i of `out` if floor(i·n / out) ≤ p < ceil((i + 1)·n / out).
    """
    if out == 1:
        return build(aten.mean.dim if kind == "avg_pool" else aten.amax.default, x, [dim], True)
    dtype = build.value(x).dtype
    place = build(aten.arange.default, build.size(x, dim), dtype=torch.int64, device=torch.device("cpu"))
    window = build(aten.unsqueeze.default, build.constant(torch.arange(out)), 1)  # (out, 1)
    n = build.size(x, dim)
    begun = build(
        aten.gt.Tensor, build(aten.mul.Scalar, build(aten.add.Scalar, place, 1), out), _times(build, window, n)
    )
    ended = build(aten.add.Scalar, window, 1)
    open_ = build(aten.lt.Tensor, build(aten.mul.Scalar, place, out), _times(build, ended, n))
    member = build(aten.logical_and.default, begun, open_)  # (out, n)
    x = build(aten.transpose.int, x, dim, -1)
    if kind == "avg_pool":
        share = build(aten.to.dtype, member, dtype)
        share = build(aten.div.Tensor, share, build(aten.sum.dim_IntList, share, [1], True))
        x = build(aten.matmul.default, x, build(aten.transpose.int, share, 0, 1))
    else:
        other = build(aten.logical_not.default, member)
        x = build(aten.masked_fill.Scalar, build(aten.unsqueeze.default, x, -2), other, float("-inf"))
        x = build(aten.amax.default, x, [-1])
    return build(aten.transpose.int, x, dim, -1)


def _times(build: Builder, x: fx.Node, n: Any) -> Any:
    return build(aten.mul.Scalar if isinstance(n, int) else aten.mul.Tensor, x, n)


def _median(build: Builder, a: dict[str, Any]) -> Any:
    x, whole = a["self"], "dim" not in a
    if whole:
        x = build(aten.reshape.default, x, [-1])
    if not build.value(x).dim():
        return None
    dim = 0 if whole else a["dim"] % build.value(x).dim()
    ordered = build(aten.sort.default, x, dim)
    middle = build.size(x, dim)
    if isinstance(middle, int):
        middle = (middle - 1) // 2
    else:
        middle = build(operator.floordiv, build(operator.sub, middle, 1), 2)
    results = []
    for position in (0,) if whole else (0, 1):
        one = build(aten.select.int, build(operator.getitem, ordered, position), dim, middle)
        results.append(build(aten.unsqueeze.default, one, dim) if a.get("keepdim") else one)
    return results[0] if whole else tuple(results)


def _cdist(build: Builder, a: dict[str, Any]) -> Any:
    p, rows = a["p"], [build.value(a[x]).shape[-2] for x in ("x1", "x2")]
    products = (
        p == 2 and a["compute_mode"] in (None, 0) and any(isinstance(r, int) and r > MOST_DIFFERENCES for r in rows)
    )
    if products or a["compute_mode"] == 1:
        return None
    left, right = build(aten.unsqueeze.default, a["x1"], -2), build(aten.unsqueeze.default, a["x2"], -3)
    difference = build(aten.sub.Tensor, left, right)
    if p == 2:
        return build(
            aten.sqrt.default, build(aten.sum.dim_IntList, build(aten.mul.Tensor, difference, difference), [-1])
        )
    apart = build(aten.abs.default, difference)
    if p == float("inf"):
        return build(aten.amax.default, apart, [-1])
    if p == 0:
        return build(aten.sum.dim_IntList, build(aten.sign.default, apart), [-1])
    if p == 1:
        return build(aten.sum.dim_IntList, apart, [-1])
    total = build(aten.sum.dim_IntList, build(aten.pow.Tensor_Scalar, apart, p), [-1])
    return build(aten.pow.Tensor_Scalar, total, 1 / p)


def _embedding_bag(build: Builder, a: dict[str, Any]) -> Any:
    """An embedding lookup and a sum, mean or maximum: along an axis, or by a mask of the indices of each bag."""
    if any(_reads(build.node, position) for position in (1, 2, 3)):
        return None
    padding = -1 if a.get("padding_idx") is None else a["padding_idx"]
    if padding < 0 and a.get("padding_idx") is not None:
        padding += build.value(a["weight"]).shape[0]
    indices, weights = a["indices"], a["per_sample_weights"]
    table = _table_of(indices) if _table_of(indices) and _even(a["offsets"]) else None
    if table is not None:
        rows = build(aten.embedding.default, a["weight"], table)  # (bags, length, width)
        counts = None if padding < 0 else build(aten.ne.Scalar, table, padding)
        weights = None if weights is None else build(aten.view_as.default, weights, table)
        dim = 1
    else:
        offsets = a["offsets"]
        if a["include_last_offset"]:
            offsets = build(aten.slice.Tensor, offsets, 0, 0, -1)
        positions = build(aten.arange.default, build.size(indices, 0), dtype=torch.int64, device=torch.device("cpu"))
        begun = build(
            aten.ge.Tensor, build(aten.unsqueeze.default, positions, 0), build(aten.unsqueeze.default, offsets, 1)
        )
        number = build(aten.sub.Tensor, build(aten.sum.dim_IntList, begun, [0]), 1)  # bag of each index
        bags = build(aten.arange.default, build.size(offsets, 0), dtype=torch.int64, device=torch.device("cpu"))
        counts = build(aten.eq.Tensor, build(aten.unsqueeze.default, bags, 1), build(aten.unsqueeze.default, number, 0))
        if padding >= 0:
            counts = build(aten.logical_and.default, counts, build(aten.ne.Scalar, indices, padding))
        rows = build(aten.unsqueeze.default, build(aten.embedding.default, a["weight"], indices), 0)
        weights = None if weights is None else build(aten.unsqueeze.default, weights, 0)
        dim = 1
    if weights is not None:
        rows = build(aten.mul.Tensor, rows, build(aten.unsqueeze.default, weights, -1))
    return (_gathered(build, rows, counts, dim, a["mode"]), None, None, None)


def _gathered(build: Builder, rows: fx.Node, counts: fx.Node | None, dim: int, mode: int) -> Any:
    """Reduce rows (bags or 1, length, width) to (bags, width); `counts` (bags, length) masks them."""
    if counts is None:
        way = {0: aten.sum.dim_IntList, 1: aten.mean.dim, 2: aten.amax.default}[mode]
        return build(way, rows, [dim])
    member = build(aten.unsqueeze.default, counts, -1)
    if mode == 2:
        hidden = build(aten.masked_fill.Scalar, rows, build(aten.logical_not.default, member), float("-inf"))
        highest = build(aten.amax.default, hidden, [dim])
        empty = build(aten.logical_not.default, build(aten.any.dim, counts, dim, True))
        return build(aten.masked_fill.Scalar, highest, empty, 0.0)
    dtype = build.value(rows).dtype
    total = build(aten.sum.dim_IntList, build(aten.mul.Tensor, rows, build(aten.to.dtype, member, dtype)), [dim])
    if mode == 0:
        return total
    number = build(aten.clamp.default, build(aten.sum.dim_IntList, counts, [dim], True), 1)
    return build(aten.div.Tensor, total, build(aten.to.dtype, number, dtype))


def _table_of(indices: Any) -> fx.Node | None:
    """The index table (bags, length) that `indices` is flattened from."""
    if not isinstance(indices, fx.Node) or indices.target is not aten.reshape.default:
        return None
    table = indices.args[0]
    assert isinstance(table, fx.Node)
    return table if indices.args[1] == [-1] and table.meta["val"].dim() == 2 else None


def _even(offsets: Any) -> bool:
    """Whether bags start at multiples of a length, as `EmbeddingBag` computes for an index table."""
    return isinstance(offsets, fx.Node) and offsets.target is aten.arange.start_step


def _resize(build: Builder, a: dict[str, Any]) -> Any:
    """Interpolation as a weighted sum of a few pixels along each axis, with weights computed by torch itself.

    OpenVINO does not support antialiasing; ONNX Runtime uses another grid, and lacks bicubic downsampling after its
    integer convolutions have moved the channels to the last axis.
    """
    x: Any = a["input"]
    target: Any = build.node.target
    sizes = [build.value(x).shape[d] for d in (2, 3)]
    results = [build.value(build.node).shape[d] for d in (2, 3)]
    if not all(isinstance(size, int) for size in (*sizes, *results)):
        return None
    if "_aa" not in str(target) and all(result >= size for size, result in zip(sizes, results, strict=True)):
        return None
    dtype = build.value(x).dtype
    for dim, size, result, scale in zip((2, 3), sizes, results, a["scale_factors"] or (None, None), strict=True):
        unit = torch.eye(size, dtype=torch.float64)[None, None]
        shape: dict[str, Any] = {"output_size": [result, size], "scale_factors": None}
        if scale is not None:
            shape = {"output_size": None, "scale_factors": [scale, 1.0]}
        matrix = target(unit, align_corners=a["align_corners"], **shape)[0, 0]  # (result, size), mostly zeros
        taps = int((matrix != 0).sum(1).max())
        pixels = matrix.abs().topk(taps, dim=1).indices.sort(1).values
        weights = matrix.gather(1, pixels).to(dtype)
        x = build(aten.index_select.default, x, dim, build.constant(pixels.flatten()))
        x = build(aten.unflatten.int, x, dim, [result, taps])
        x = build(aten.mul.Tensor, x, build.constant(weights[..., None] if dim == 2 else weights))
        x = build(aten.sum.dim_IntList, x, [dim + 1])
    return x


def _rsub(build: Builder, a: dict[str, Any]) -> Any:
    # A number minus integers or booleans, as for a mask: the exporter has no operator for it.
    dtype = build.value(build.node).dtype
    if build.value(a["self"]).dtype == dtype or build.node.target is not aten.rsub.Scalar:
        return None
    less = build(aten.mul.Scalar, build(aten.to.dtype, a["self"], dtype), -a["alpha"])
    return build(aten.add.Scalar, less, a["other"])


REWRITES: dict[str, Rewrite] = {
    "rrelu": _rrelu,
    "pad": _pad,
    "channel_shuffle": _channel_shuffle,
    "cat": _zeros_joined,
    "concat": _zeros_joined,
    "adaptive_max_pool1d": _adaptive_max_pool,
    "adaptive_max_pool2d": _adaptive_max_pool,
    "adaptive_max_pool3d": _adaptive_max_pool,
    "adaptive_avg_pool1d": _adaptive_avg_pool,
    "adaptive_avg_pool2d": _adaptive_avg_pool,
    "adaptive_avg_pool3d": _adaptive_avg_pool3d,
    "median": _median,
    "cdist": _cdist,
    "embedding_bag": _embedding_bag,
    "upsample_bicubic2d": _resize,
    "_upsample_bicubic2d_aa": _resize,
    "_upsample_bilinear2d_aa": _resize,
    "conv1d": conv,
    "conv2d": conv,
    "conv3d": conv,
    "conv_transpose1d": conv_transpose,
    "conv_transpose2d": conv_transpose,
    "conv_transpose3d": conv_transpose,
    "lstm": lstm,
    "rnn_tanh": rnn(aten.tanh.default),
    "rnn_relu": rnn(aten.relu.default),
    "rnn_tanh_cell": rnn_cell(aten.tanh.default),
    "rnn_relu_cell": rnn_cell(aten.relu.default),
    "lstm_cell": lstm_cell,
    "gru_cell": gru_cell,
    "cumprod": cumprod,
    "cummax": cummax,
    "cummin": cummin,
    "kthvalue": kthvalue,
    "scatter_reduce": scatter_reduce,
    "index_reduce": index_reduce,
    "rsub": _rsub,
}
