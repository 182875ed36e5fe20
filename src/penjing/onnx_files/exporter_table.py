"""The exporter's table of operators, read once.

torch builds it anew for every file, for which onnxscript parses the source of some 500 functions: a quarter of the
time that a small network's export takes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch.onnx._internal.exporter._registration import ONNXRegistry


@functools.cache
def _table(opset: int) -> ONNXRegistry:
    return ONNXRegistry.from_torchlib(opset)


def _copied(opset: int) -> ONNXRegistry:
    """A table of the caller's own, into which it may write."""
    table = ONNXRegistry()
    table._opset_version = opset
    table.functions = {target: list(functions) for target, functions in _table(opset).functions.items()}
    return table


@contextlib.contextmanager
def read_once(opset: int) -> Iterator[None]:
    """Let `torch.onnx.export` copy the table of that opset in the place of building it, inside the block."""
    _table(opset)
    original = ONNXRegistry.__dict__["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(lambda opset_version: _copied(opset_version))  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]
