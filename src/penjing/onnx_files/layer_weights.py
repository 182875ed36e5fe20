"""Weights of recurrent layers that a file computes from the tensors it stores.

Exporters put the gates into ONNX's order by slices and joins. Only what is stored can be pruned and quantized as the
weight of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from penjing.errors import SourceError
from penjing.onnx_files.node import FAILURES, Node, tensor
from penjing.onnx_files.operators import OPERATORS

_MOVES = frozenset((
    "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
))  # fmt: skip
RECURRENT = ("LSTM", "GRU", "RNN")


def moved_weights(
    nodes: Sequence[Node], weights: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray], outputs: Collection[str]
) -> tuple[dict[str, np.ndarray], set[int]]:
    """Values that recurrent layers read as their weights and that only rearrange stored tensors.

    If anything else reads these tensors, or what is computed of them, all stay as they are.

    Args:
        nodes: Of a graph and the graphs within, each before its readers.
        weights: Stored tensors by name.
        known: Other values that are known beforehand.
        outputs: Names that the graph and those within give.

    Returns:
        Name of the value → it, and the ``id`` of every node that it was computed by, which nobody needs then.
    """
    givers = {name: node for node in nodes for name in node.outputs if name}
    layers = {id(node) for node in nodes if node.operator in RECURRENT}
    due = sorted({n for node in nodes if id(node) in layers for n in node.inputs[1:4] if n in givers})
    behind = {name: _behind(name, givers) for name in due}
    moves = {id(node) for parts in behind.values() for node in parts}
    private = {name for node in nodes if id(node) in moves for name in (*node.inputs, *node.outputs)} - {*known, ""}
    for node in nodes:
        places = {*node.inputs[:1], *node.inputs[4:]} if id(node) in layers else {*node.inputs}
        if id(node) not in moves and private & places:
            return {}, set()
    if private & {*outputs} or any(node.operator not in _MOVES for parts in behind.values() for node in parts):
        return {}, set()
    if not all(name in weights or name in givers for name in private):
        return {}, set()
    values: dict[str, Any] = {**known, **weights}
    for node in nodes:
        if id(node) in moves:
            try:
                with torch.no_grad():
                    parts = OPERATORS[node.operator](node, *[values[name] if name else None for name in node.inputs])
            except (SourceError, *FAILURES):
                return {}, set()
            values.update(zip(node.outputs, parts if isinstance(parts, tuple | list) else (parts,), strict=False))
    return {name: tensor(values[name]).numpy() for name in due}, moves


def _behind(name: str, givers: Mapping[str, Node]) -> list[Node]:
    """The nodes that a value is computed by."""
    parts: dict[int, Node] = {}
    waiting = [name]
    while waiting:
        node = givers.get(waiting.pop())
        if node is not None and id(node) not in parts:
            parts[id(node)] = node
            waiting += node.inputs
    return list(parts.values())


__all__ = ["RECURRENT", "moved_weights"]
