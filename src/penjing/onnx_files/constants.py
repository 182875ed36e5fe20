"""How much memory the values take that a file computes from its own tensors alone, known before they are computed.

A file of some hundred bytes can double a constant forty times. Every such value is counted with its shape alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from penjing.errors import SourceError
from penjing.onnx_files.network import Graph, Operation
from penjing.onnx_files.node import FAILURES, is_known, tensor

FREE_BYTES = 1 << 28
"""That any file may compute of its constants."""
TIMES = 8
"""That it may compute besides, as a multiple of the bytes of its own tensors."""


def check_constants(
    operations: Iterable[Operation], known: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]
) -> None:
    """Count what is computed from known values and weights alone.

    Args:
        operations: Of the whole graph, in order.
        known: Values that are known before, by name.
        weights: By name.

    Raises:
        SourceError: It is more than `FREE_BYTES` and `TIMES` what the file holds; names the node that passes it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    held = sum(value.nbytes for value in {**known, **weights}.values())
    with mode, torch.no_grad():
        values = {name: mode.from_tensor(tensor(value)) for name, value in weights.items()}
        _count(operations, {**values, **known}, [FREE_BYTES + TIMES * held])


def _count(operations: Iterable[Any], values: dict[str, Any], room: list[int]) -> None:
    """Compute the shapes of what follows from `values`, which grows; `room` is one number of bytes, which shrinks."""
    for step in operations:
        node = step.node
        for graph in (part for part in step.children() if isinstance(part, Graph)):
            inner = [graph.get_submodule(path) for path in graph._order]
            _count(inner, dict(values) | graph._known, room)
        if node.operator == "If" or step.layer or not all(name in values for name in node.inputs if name):
            continue
        try:
            results = step(*[values[name] if name else None for name in node.inputs])
        except (SourceError, *FAILURES):  # in a branch that is not taken, or it follows from values
            continue
        results = results if isinstance(results, tuple | list) else (results,)
        room[0] -= sum(_bytes(value) for value in results)
        if room[0] < 0:
            raise node.refuse(
                "what the file computes from its constants is too large", "more than 8 times the file and 256 MiB"
            )
        values.update(zip(node.outputs, results, strict=False))


def _bytes(value: Any) -> int:
    if is_known(value):
        return int(value.nbytes)
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


__all__ = ["FREE_BYTES", "TIMES", "check_constants"]
