"""From an exported program to ExecuTorch's file: delegates, bounds of sizes that vary, where operators come from.

It runs in the process of the runtime, which has ExecuTorch imported.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from penjing.errors import ExportError
from penjing.runtimes.decomposed import site
from penjing.runtimes.executorch_sizes import bound, named_symbols, outputs, restore_ranges, sizes_of

SITES = "penjing_sites"
"""The method of the file that returns, as JSON, which operators of the network its operators come from."""
_LARGEST_FLOAT = torch.finfo(torch.float32).max
MOST_AXES = 6  # of a tensor in XNNPACK (XNN_MAX_TENSOR_DIMS)
PLANNED_BYTES = 32 << 20  # of memory that is set aside when the file is loaded, for the largest sizes that it takes
COMPUTED_BYTES = 512 << 20  # of all values in floating point: XNNPACK lays them out for the largest sizes at first
WHOLE_COMPUTED_BYTES = 8 << 30
WHOLE_BYTES = 1 << 30  # the same, of a network whose samples can't be passed in several calls


def lower(path: str, file: str, axes: list[dict[str, str]], divisible: bool) -> list[list[Any]]:
    """Write `file` from the exported program in `path`.

    Args:
        path: A .pt2 file, with quantizers of `quantized_decomposed` where it is quantized.
        file: The .pte file to write.
        axes: For every input its axes that vary, by number, each with its name.
        divisible: Whether its samples may be passed in several calls, so that fewer have to fit into one.

    Returns:
        For every output its type and its sizes, a name where one varies.

    Raises:
        ExportError: ExecuTorch has no kernel for an operator, or can't lower it.
    """
    with _quiet():
        program = torch.export.load(path)
        bound(program, axes, COMPUTED_BYTES if divisible else WHOLE_COMPUTED_BYTES)
        manager = _lowered(program)
        lowered = manager.exported_program()
        restore_ranges(lowered)
        names = named_symbols(lowered, axes)
        bound(lowered, axes, PLANNED_BYTES if divisible else WHOLE_BYTES)
        manager._config_methods = {SITES: json.dumps(_sites(lowered), separators=(",", ":"))}
        check_axes(lowered)
        check_kernels(lowered)
        data = _emitted(manager)
    Path(file).write_bytes(data)
    return [[str(v.dtype).removeprefix("torch."), sizes_of(v, names)] for v in outputs(lowered)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ExecuTorch and torchao warn of what they themselves call, and of libraries for other processors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _lowered(program: Any) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    # Its check of types asks how long the first result of a split is, which fixes the number of samples to the
    # example's (1.5.1, arg_validator.py). Kernels that are missing are found by `check_kernels`.
    config = EdgeCompileConfig(_check_ir_validity=False)
    try:
        return to_edge_transform_and_lower(
            program, transform_passes=[prepare], partitioner=[XnnpackPartitioner()], compile_config=config
        )
    except Exception as error:
        raise _refusal(error) from error


def _emitted(manager: Any) -> bytes:
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass

    # An input is read where it lies. An output is not: it would be set aside at its largest size in every call.
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=True)
    try:
        data: bytes = manager.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer
        return data
    except Exception as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> ExportError:
    return ExportError(
        "ExecuTorch can't lower the network",
        code="unreadable",
        got=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
        expected="operators that ExecuTorch lowers",
        remedy="write that operator with others, or choose another runtime",
    )


def check_axes(program: Any) -> None:
    """Raise ExportError where XNNPACK would permute more axes than its tensors have: it can't open what was written."""
    for node in program.graph.nodes:
        module: Any = getattr(program.graph_module, str(node.target), None) if node.op == "get_attr" else None
        for inner in module.original_module.graph.nodes if hasattr(module, "original_module") else ():
            value = inner.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.dim() <= MOST_AXES:
                continue
            where = next(filter(None, map(site, (inner, *inner.users))), "")
            raise ExportError(
                f"XNNPACK computes with at most {MOST_AXES} axes" + (f", and {where} has more" if where else ""),
                code="axes",
                got=f"a tensor of {value.dim()} axes" + (f" at {where}" if where else ""),
                expected=f"tensors of at most {MOST_AXES} axes",
                remedy="join axes that stay together with reshape, or choose another runtime",
            )


def check_kernels(program: Any) -> None:
    """Raise ExportError for an operator outside of delegates that the runtime has no kernel for; it names the layer."""
    from executorch.runtime import Runtime

    known = Runtime.get().operator_registry.operator_names
    spaces = {name.partition("::")[0] for name in known}
    for node, whole in _portable(program):
        space, _, name = whole.partition("::")
        if any(known_name.startswith(f"{space}::{name}.") for known_name in known) and space in spaces:
            continue
        where = next(filter(None, map(site, (node, *node.users))), "")
        raise ExportError(
            f"ExecuTorch has no kernel for {space}::{name}" + (f", which {where} computes" if where else ""),
            code="no-kernel",
            got=f"{space}::{name}" + (f" at {where}" if where else ""),
            expected="operators of XNNPACK, or of ExecuTorch's portable kernels",
            remedy="write that operator with others, or choose another runtime",
        )


def _portable(program: Any) -> list[tuple[fx.Node, str]]:
    """The operators of a lowered program that no delegate computes, with their names."""
    operators = [(node, getattr(node.target, "_op", None)) for node in program.graph.nodes]
    return [(node, op._schema.name) for node, op in operators if isinstance(op, torch._ops.OpOverload)]


def _sites(program: Any) -> dict[str, Any]:
    """Sites by the number that XNNPACK's operators carry, and those of other operators in the order of their calls."""
    handles: dict[str, str] = {}
    for node in program.graph.nodes:
        module: Any = getattr(program.graph_module, str(node.target), None) if node.op == "get_attr" else None
        for inner in module.original_module.graph.nodes if hasattr(module, "original_module") else ():
            if site(inner) and "debug_handle" in inner.meta:
                handles[str(inner.meta["debug_handle"])] = site(inner)
    portable: dict[str, list[str]] = {}
    for node, name in _portable(program):
        portable.setdefault(name, []).append(site(node))
    return {"delegated": handles, "portable": portable}


@dataclass(frozen=True)
class _Quantizers:
    """Writes pairs of a quantizer and a dequantizer into a graph of ExecuTorch's dialect."""

    graph: fx.Graph
    quantize: Any
    dequantize: Any

    def grid(self, node: Any) -> tuple[Any, ...] | None:
        """Scale, zero point, limits and type of a quantizer or dequantizer; None for another node."""
        quantizer = isinstance(node, fx.Node) and node.target in (self.quantize, self.dequantize)
        return tuple(node.args[1:]) if quantizer else None

    def behind(self, node: fx.Node, grid: tuple[Any, ...]) -> fx.Node:
        """The value of `node`, on a grid; its readers stay as they are."""
        value = node.meta["val"]
        with self.graph.inserting_after(node):
            q = self.graph.call_function(self.quantize, (node, *grid))
        with self.graph.inserting_after(q):
            x = self.graph.call_function(self.dequantize, (q, *grid))
        q.meta, x.meta = {"val": value.to(grid[-1])}, {"val": value.to(torch.float32)}
        return x


def prepare(module: fx.GraphModule) -> Any:
    """Write what XNNPACK has operators for in the form that its partitioner takes; the values stay what they are."""
    from executorch.exir.dialects._ops import ops
    from executorch.exir.pass_base import PassResult

    aten, integers = ops.edge.aten, ops.edge.quantized_decomposed
    quantizers = _Quantizers(module.graph, integers.quantize_per_tensor.default, integers.dequantize_per_tensor.default)
    moves: tuple[Any, ...] = (
        aten.view_copy.default,
        aten.permute_copy.default,
        aten.slice_copy.Tensor,
        aten.unsqueeze_copy.default,
    )
    moves += (aten.max_pool2d.default, aten.relu.default)
    for node in list(module.graph.nodes):
        if node.target is aten.mean.dim:
            _mean_with_axes(node, quantizers, aten.view_copy.default)
        elif node.target is aten.cat.default:
            _parts_on_one_grid(node, quantizers)
        elif node.target in (aten.relu.default, aten.hardtanh.default, aten.clamp.default):
            before = node.args[0].target
            gemm = before in (aten.convolution.default, aten.linear.default, aten.addmm.default, aten.mm.default)
            fused = node.target is aten.relu.default and before is aten.add.Tensor
            if not fused and not (gemm and node.target is not aten.clamp.default):
                _quantized_before_it_is_clamped(node, quantizers)
    for node in list(module.graph.nodes):
        if node.target is quantizers.dequantize:
            _one_for_every_reader(node, quantizers)
    for node in list(module.graph.nodes):
        if node.target in moves:
            _moved_on_one_grid(node, quantizers)
        if node.target is aten.view_copy.default:
            _with_one_free_size(node)
        if node.target is aten.convolution.default and quantizers.grid(node.args[0]) is not None:
            _behind_floats(node, quantizers, aten.hardtanh.default)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return PassResult(module, True)


def _mean_with_axes(node: fx.Node, quantizers: _Quantizers, view_copy: Any) -> None:
    """A mean over height and width keeps these axes, as XNNPACK's operator does, and a view drops them."""
    x: Any = node.args[0]
    dims: Any = node.args[1]
    if x.meta["val"].dim() != 4 or node.kwargs.get("dtype") or (len(node.args) > 2 and node.args[2]):
        return
    if sorted(axis % 4 for axis in dims) != [2, 3]:
        return
    readers, flat = list(node.users), node.meta["val"]
    node.args = (x, [2, 3], True)
    node.meta["val"] = flat[:, :, None, None]
    grids = {quantizers.grid(reader) for reader in readers}
    grid = grids.pop() if len(grids) == 1 else None
    # Quantized before it is viewed too, on the grid that it gets anyway: then it is a mean of integers.
    end = node if grid is None else quantizers.behind(node, grid)
    with quantizers.graph.inserting_after(end):
        view = quantizers.graph.call_function(view_copy, (end, [-1, flat.shape[1]]))
    view.meta = {"val": flat}
    for reader in readers:
        reader.replace_input_with(node, view)


def _parts_on_one_grid(node: fx.Node, quantizers: _Quantizers) -> None:
    """Parts of a concatenation get the grid of the whole: XNNPACK's operator copies integers, and fails otherwise."""
    grids = {quantizers.grid(reader) for reader in node.users}
    grid = grids.pop() if len(grids) == 1 else None
    parts: Any = node.args[0]
    if grid is not None:
        each = [part if quantizers.grid(part) == grid else quantizers.behind(part, grid) for part in parts]
        node.args = (each, *node.args[1:])


def _quantized_before_it_is_clamped(node: fx.Node, quantizers: _Quantizers) -> None:
    """What the partitioner does not fuse into the operator before it: that writes integers, and integers are clamped.

    Rounding keeps the order of values, so that it does not matter which of both is first.
    """
    grids = {quantizers.grid(reader) for reader in node.users}
    grid = grids.pop() if len(grids) == 1 else None
    before: Any = node.args[0]
    if grid is not None and quantizers.grid(before) is None and len(before.users) == 1:
        node.replace_input_with(before, quantizers.behind(before, grid))


def _one_for_every_reader(node: fx.Node, quantizers: _Quantizers) -> None:
    """A dequantizer has one reader: one that an integer operator has taken in would not be computed for the others."""
    for reader in list(node.users)[1:]:
        with quantizers.graph.inserting_after(node):
            copy = quantizers.graph.call_function(quantizers.dequantize, node.args)
        copy.meta = dict(node.meta)
        reader.replace_input_with(node, copy)


def _moved_on_one_grid(node: fx.Node, quantizers: _Quantizers) -> None:
    """What only moves or selects values stays on the grid of its input, behind which it gets the one of its reader."""
    before: Any = node.args[0]
    grid = quantizers.grid(before)
    readers = list(node.users)
    if grid is None or len(readers) != 1 or quantizers.grid(readers[0]) in (None, grid):
        return
    readers[0].replace_input_with(node, quantizers.behind(node, grid))


def _behind_floats(node: fx.Node, quantizers: _Quantizers, clamp: Any) -> None:
    """A convolution with weights in floating point reads floats: a clamp to all numbers before it says so.

    Else XNNPACK's passes take the integers behind its dequantizer for what it computes with (1.5.1).
    """
    x: Any = node.args[0]
    weight: Any = node.args[1]
    if "dequantize" in str(weight.target):
        return
    with quantizers.graph.inserting_before(node):
        same = quantizers.graph.call_function(clamp, (x, -_LARGEST_FLOAT, _LARGEST_FLOAT))
    same.meta = {"val": x.meta["val"]}
    node.replace_input_with(x, same)


def _with_one_free_size(node: fx.Node) -> None:
    """A size that varies is written as -1: XNNPACK's reshape takes one such size, and no computed one."""
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if sizes.count(-1) == 1:
        node.args = (node.args[0], sizes)


__all__ = ["SITES", "check_kernels", "lower"]
