"""Decomposing an exported program for the ONNX exporter, without tracing it again where that isn't needed.

torch traces a program a second time to replace the operators that have no ONNX form, whether it has any or not: two
thirds of the time that an export takes. The usual ones are replaced here, node by node and by the same operators; a
program with any other is left to torch.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._export.utils import _check_valid_to_preserve, _is_cia_op
from torch.export import ExportedProgram
from torch.fx.node import map_arg
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

_aten = torch.ops.aten
_CHECKS = (_aten._assert_tensor_metadata.default, _aten._assert_scalar.default)  # the exporter removes them


@contextlib.contextmanager
def node_by_node() -> Iterator[None]:
    """Let `torch.onnx.export` decompose without tracing where it can, inside the block."""
    original = _fx_passes.decompose_with_registry

    def decompose(program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        return program if _replace_all(program, registry) else original(program, registry)

    _fx_passes.decompose_with_registry = decompose  # type: ignore[assignment]
    try:
        yield
    finally:
        _fx_passes.decompose_with_registry = original


def _replace_all(program: ExportedProgram, registry: ONNXRegistry) -> bool:
    """Replace every operator that the exporter doesn't write; False where one remains.

    Nodes keep their names, which the signature of the program refers to.
    """
    graph = program.graph_module.graph
    for node in graph.nodes:
        if node.op == "get_attr":  # the body of a branch or a loop
            return False
        if node.op != "call_function" or _is_written(node.target, registry):
            continue
        rule = _RULES.get(node.target)
        with graph.inserting_before(node):
            replacement = rule(node, *node.args, **node.kwargs) if rule is not None else None
        if replacement is None:
            return False
        node.target, node.args, node.kwargs = replacement
    program.graph_module.recompile()
    return True


def _is_written(target: Any, registry: ONNXRegistry) -> bool:
    """Whether the exporter has a translation of what torch's own decomposition would leave as it is."""
    if target is operator.getitem or target in _CHECKS:
        return True
    if not registry.is_registered(target):
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return not target._schema.is_mutable and (not _is_cia_op(target) or _check_valid_to_preserve(target))


Replacement = tuple[Any, tuple[Any, ...], dict[str, Any]] | None  # operator, arguments, keyword arguments


def _insert(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A node in front of `node`, with the value that the exporter reads types and shapes from."""
    new = node.graph.call_function(target, args)
    new.meta = dict(node.meta) | {"val": target(*map_arg(args, lambda n: n.meta["val"]))}
    return new


def _sizes(node: fx.Node, source: fx.Node, axes: dict[int, int]) -> list[Any] | None:
    """The sizes of a node's value, those that vary as sizes of `source`; None where another one varies.

    Args:
        node: Whose value.
        source: An input of the node.
        axes: Axis of the node's value → the axis of `source` that it is.
    """
    sizes: list[Any] = list(node.meta["val"].shape)
    for axis, size in enumerate(sizes):
        if not isinstance(size, int):
            if axis not in axes:
                return None
            sizes[axis] = _insert(node, _aten.sym_size.int, source, axes[axis])
    return sizes


def _reshape(node: fx.Node, source: fx.Node, axes: dict[int, int]) -> Replacement:
    sizes = _sizes(node, source, axes)
    if sizes is None or _is_empty(node):
        return None
    # Not a view: of a transposed value there may be none, and the exporter writes both alike.
    return _aten.reshape.default, (source, sizes), {}


def _is_empty(node: fx.Node) -> bool:
    """Whether a size is 0, which the exporter takes for "as in the input" in a reshape, and not in a view."""
    return any(isinstance(size, int) and size == 0 for size in node.meta["val"].shape)


def _copy(node: fx.Node, source: Any, *_: Any, **__: Any) -> Replacement:
    return _aten.clone.default, (source,), {}


def _dropout(node: fx.Node, source: Any, p: float, train: bool) -> Replacement:
    return None if train else _copy(node, source)


def _cast(node: fx.Node, source: Any, *_: Any, **__: Any) -> Replacement:
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        return _copy(node, source)
    return _aten._to_copy.default, (source,), {"dtype": dtype}


def _flatten(node: fx.Node, source: Any, start_dim: int = 0, end_dim: int = -1) -> Replacement:
    rank = source.meta["val"].dim()
    if rank == 0:
        return None
    start, merged = start_dim % rank, end_dim % rank - start_dim % rank
    axes = {axis: axis if axis < start else axis + merged for axis in range(rank - merged)}
    if merged:
        del axes[start]
    return _reshape(node, source, axes)


def _unflatten(node: fx.Node, source: Any, dim: int, sizes: Any) -> Replacement:
    rank = source.meta["val"].dim()
    dim %= rank
    return _reshape(
        node, source, {axis if axis < dim else axis + len(sizes) - 1: axis for axis in range(rank) if axis != dim}
    )


def _expand_as(node: fx.Node, source: Any, other: Any) -> Replacement:
    sizes = _sizes(node, other, {axis: axis for axis in range(other.meta["val"].dim())})
    return None if sizes is None else (_aten.expand.default, (source, sizes), {})


def _chunk(node: fx.Node, source: Any, chunks: int, dim: int = 0) -> Replacement:
    size = source.meta["val"].shape[dim]
    return (_aten.split.Tensor, (source, -(-size // chunks), dim), {}) if isinstance(size, int) and size else None


def _transpose_matrices(node: fx.Node, source: Any) -> Replacement:
    return _aten.transpose.int, (source, -2, -1), {}


def _batch_norm(
    node: fx.Node, source: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float,
    eps: float, cudnn: bool,
) -> Replacement:  # fmt: skip
    if training or mean is None:
        return None
    target = _aten._native_batch_norm_legit_no_training.default
    return operator.getitem, (_insert(node, target, source, weight, bias, mean, variance, momentum, eps), 0), {}


def _transposed_convolution(
    node: fx.Node, source: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Replacement:  # fmt: skip
    rank = weight.meta["val"].dim() - 2
    stride, padding, dilation, output_padding = (
        [value] * rank if isinstance(value, int) else value for value in (stride, padding, dilation, output_padding)
    )
    arguments = (source, weight, bias, stride, padding, dilation, True, output_padding, groups)
    return _aten.convolution.default, arguments, {}


def _adaptive_pool(node: fx.Node, source: Any, sizes: Any) -> Replacement:
    if list(sizes) == [1, 1]:
        return _aten.mean.dim, (source, [-1, -2], True), {}
    pairs = list(zip(source.meta["val"].shape[-2:], sizes, strict=True))
    if not all(isinstance(size, int) and isinstance(out, int) and size % out == 0 for size, out in pairs):
        return None
    kernel = [size // out for size, out in pairs]
    return _aten.avg_pool2d.default, (source, kernel, kernel), {}


def _adaptive_pool_1d(node: fx.Node, source: Any, sizes: Any) -> Replacement:
    if list(sizes) != [1]:
        return None
    mean = _insert(node, _aten.mean.dim, _insert(node, _aten.unsqueeze.default, source, -2), [-1, -2], True)
    return _aten.squeeze.dim, (mean, -2), {}


def _as_it_is(node: fx.Node, *args: Any, **kwargs: Any) -> Replacement:
    return None if _is_empty(node) else (node.target, args, kwargs)


_RULES: dict[Any, Callable[..., Replacement]] = {
    _aten.adaptive_avg_pool1d.default: _adaptive_pool_1d,
    _aten.adaptive_avg_pool2d.default: _adaptive_pool,
    _aten.batch_norm.default: _batch_norm,
    _aten.chunk.default: _chunk,
    _aten.contiguous.default: _copy,
    _aten.conv_transpose1d.default: _transposed_convolution,
    _aten.conv_transpose2d.input: _transposed_convolution,
    _aten.conv_transpose3d.input: _transposed_convolution,
    _aten.dropout.default: _dropout,
    _aten.expand_as.default: _expand_as,
    _aten.flatten.using_ints: _flatten,
    _aten.mT.default: _transpose_matrices,
    _aten.reshape.default: _as_it_is,  # torch makes a view of it, which the exporter writes alike
    _aten.to.dtype: _cast,
    _aten.unflatten.int: _unflatten,
}
