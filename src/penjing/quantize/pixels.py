"""Values that are 8-bit integers already: pixels that were only moved, shifted and scaled have a grid that is exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from penjing.network.graph import arguments, flat_inputs, kind
from penjing.steps.plan import QuantSpec
from penjing.tasks.task import Call

_MOVES = frozenset({"reshape", "transpose", "flip", "slice", "select", "identity", "dropout", "expand", "to"})
_NEAR = 1e-3  # of a step: how far a zero point may be from an integer


@dataclass(frozen=True)
class _Line:
    """value = factor · pixel + shift"""

    factor: float = 1.0
    shift: float = 0.0


def grids(network: fx.GraphModule, call: Call) -> dict[str, tuple[float, int]]:
    """Return name of every value that is a pixel, shifted and scaled by numbers → its scale and zero point of 0..255.

    Args:
        network: A captured network.
        call: Example inputs; those of type uint8 hold pixels.
    """
    lines: dict[fx.Node, _Line] = {}
    inputs = iter(flat_inputs(network, call))
    for node in network.graph.nodes:
        if node.op == "placeholder":
            value = next(inputs)
            if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
                lines[node] = _Line()
        elif node.op == "call_function" and node.args and node.args[0] in lines:
            line = _behind(network, node, lines[node.args[0]])
            if line is not None:
                lines[node] = line
    grid_of = {}
    for node, line in lines.items():
        zero = -line.shift / line.factor
        if line.factor > 0 and abs(zero - round(zero)) < _NEAR and 0 <= round(zero) <= 255:
            grid_of[node.name] = line.factor, round(zero)
    return grid_of


def fits(spec: QuantSpec) -> bool:
    """Whether a format has the 256 integers of a pixel."""
    return (spec.bits, spec.signed, spec.symmetric, spec.grid, spec.scale, spec.axis) == (
        8, False, False, "uniform", "free", None,
    )  # fmt: skip


def _behind(network: fx.GraphModule, node: fx.Node, line: _Line) -> _Line | None:
    what = kind(network, node)
    if what in _MOVES:
        return line
    if what not in ("add", "sub", "mul", "div") or len(node.all_input_nodes) != 1:
        return None
    named = arguments(node)
    other = named["other"]
    if not isinstance(other, int | float) or named.get("alpha", 1) != 1 or named.get("rounding_mode") or not other:
        return line if other == 0 and what in ("add", "sub") else None
    if what in ("add", "sub"):
        return _Line(line.factor, line.shift + (other if what == "add" else -other))
    by = other if what == "mul" else 1 / other
    return _Line(line.factor * by, line.shift * by)


__all__ = ["fits", "grids"]
