"""Functions that are steep near zero, and what they read: a small error there becomes a large one.

A magnitude is √(re² + im²): squares from 0 to 400 on a grid of 256 steps come back from the root with errors of more
than 1 where they are small. So sums, joins and layers in front of a root or a logarithm keep floating point.
"""

from __future__ import annotations

from torch import fx

from penjing.network.graph import kind, operator_name, tensor_inputs

REASON = "its result goes into {}, which is steep near zero: an error of a small value would grow"
_STEEP = frozenset(("log", "log10", "log2", "rsqrt", "sqrt"))
_BETWEEN = frozenset((
    "abs", "add", "clamp", "clamp_min", "clip", "div", "dropout", "expand", "identity", "maximum", "mul", "pad",
    "permute", "relu", "reshape", "select", "slice", "squeeze", "to", "transpose", "unsqueeze", "view",
))  # fmt: skip
"""Operators with one tensor that leave small values small."""


def before_steep(network: fx.GraphModule) -> dict[str, str]:
    """Name of a node → why it keeps floating point."""
    reasons: dict[str, str] = {}
    for steep in network.graph.nodes:
        if not _is_steep(steep):
            continue
        waiting = list(tensor_inputs(steep))[:1]
        while waiting:
            node = waiting.pop()
            if node.name in reasons or node.op not in ("call_function", "call_module"):
                continue
            reasons[node.name] = REASON.format(operator_name(steep))
            tensors = list(tensor_inputs(node))
            if len(tensors) == 1 and {kind(network, node), _name(node)} & _BETWEEN:
                waiting += tensors
    return reasons


def _name(node: fx.Node) -> str:
    return operator_name(node) if node.op == "call_function" else ""


def _is_steep(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    name = operator_name(node)
    power = node.args[1] if name == "pow" and len(node.args) > 1 else None
    return name in _STEEP or (isinstance(power, int | float) and power < 1)


__all__ = ["REASON", "before_steep"]
