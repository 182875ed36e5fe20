"""Sizes that vary in a program for ExecuTorch: their bounds, their names, and the memory that they take.

ExecuTorch sets memory aside for the largest sizes when a file is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from penjing.errors import ExportError


def leaves(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that an operator gives."""
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, tuple | list) else [value]) if isinstance(v, torch.Tensor)]


def _environment(program: Any) -> Any:
    """What torch knows of the sizes that vary; None without such sizes."""
    for node in program.graph.nodes:
        for value in leaves(node):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    return size.node.shape_env
    return None


def restore_ranges(program: Any) -> None:
    """Undo what tracing the operators again has narrowed.

    For a convolution torch 2.13 asks whether a batch is below 16, to choose one of its own kernels, and takes the
    answer for the example as a bound of all: for an example of 2, ExecuTorch would refuse 16 samples.
    """
    environment = _environment(program)
    for symbol, limits in program.range_constraints.items() if environment is not None else ():
        environment.var_to_range[symbol] = limits


def _inputs(program: Any) -> list[torch.Tensor]:
    names = set(program.graph_signature.user_inputs)
    return [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names]


def outputs(program: Any) -> list[torch.Tensor]:
    """The outputs of a program."""
    return [n.meta["val"] for n in program.graph.output_node().args[0] if isinstance(n, fx.Node)]


def named_symbols(program: Any, axes: list[dict[str, str]]) -> dict[Any, str]:
    """Size that varies, as an expression → the name of the axis."""
    sizes: list[tuple[Any, str]] = [
        (value.shape[int(axis)], word)
        for value, words in zip(_inputs(program), axes, strict=True)
        for axis, word in words.items()
    ]
    return {size.node.expr: word for size, word in sizes if isinstance(size, torch.SymInt)}


def sizes_of(value: Any, names: Mapping[Any, str]) -> list[Any]:
    """The sizes of a tensor, a name where one varies."""
    return [s if isinstance(s, int) else names.get(s.node.expr, str(s.node.expr)) for s in value.shape]


def bound(program: Any, axes: list[dict[str, str]], budget: int) -> None:
    """Lower the largest sizes until the memory that is set aside for them fits; samples first, down to two.

    Raises:
        ExportError: A size depends on the values of the inputs.
    """
    environment = _environment(program)
    if environment is None:
        return
    shapes: list[Any] = [
        v.shape[int(a)] for v, words in zip(_inputs(program), axes, strict=True) for a in sorted(words, key=int)
    ]
    varying = [size.node for size in shapes if isinstance(size, torch.SymInt)]
    symbols = list(dict.fromkeys(symbol for node in varying for symbol in sorted(node.expr.free_symbols, key=str)))
    least = {symbol: int(environment.backed_var_to_val[symbol]) for symbol in symbols}
    least |= {symbol: 2 for symbol in symbols[:1]}
    while (planned := planned_bytes(program)) > budget:
        largest = {symbol: int(environment.var_to_range[symbol].upper) for symbol in symbols}
        free = [symbol for symbol in symbols if largest[symbol] > least[symbol]]
        if not free:
            return
        symbol = free[0] if free[0] is symbols[0] else max(free, key=lambda s: largest[s] / least[s])
        by = budget / planned if symbol is symbols[0] else 0.5
        upper = max(least[symbol], int(largest[symbol] * by))
        limits = ValueRanges(environment.var_to_range[symbol].lower, upper)
        environment.var_to_range[symbol] = program.range_constraints[symbol] = limits


def planned_bytes(program: Any) -> int:
    """The most memory that values between delegates take at one time, at the largest sizes, in bytes."""
    last: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        for read in node.all_input_nodes:
            last[read] = node
    now = most = 0
    sizes: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and not isinstance(node.meta.get("val"), tuple | list):
            sizes[node] = sum(math.prod(map(_largest, v.shape)) * v.element_size() for v in leaves(node))
            now += sizes[node]
            most = max(most, now)
        for read in node.all_input_nodes:
            if last[read] is node:
                now -= sizes.pop(read, 0)
    return most


def _largest(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    upper = bound_sympy(size.node.expr, size.node.shape_env.var_to_range).upper
    if not upper.is_finite:
        raise ExportError(
            "ExecuTorch sets memory aside for the largest sizes, and a size here depends on values",
            code="unbounded",
            got=str(size.node.expr),
            expected="sizes that follow from those of the inputs",
            remedy="choose among a fixed number of values, as of torch.topk, or choose another runtime",
        )
    return int(upper)
