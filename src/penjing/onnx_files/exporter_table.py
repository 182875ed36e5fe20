"""The exporter's table of operators, read once.

torch builds it anew for every file, for which onnxscript parses the source of some 500 functions: a quarter of the
time that a small network's export takes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry


@functools.lru_cache(maxsize=4)
def _table(opset: int, operators: int) -> ONNXRegistry:
    return ONNXRegistry.from_torchlib(opset)


def table(opset: int) -> ONNXRegistry:
    """The table of an opset, to be read alone."""
    return _table(opset, _operators())


def _operators() -> int:
    """How many operators are registered: the table has rows for packages that were imported before it was built."""
    return len(torch._C._dispatch_get_all_op_names())


def _copied(opset: int, operators: int) -> ONNXRegistry:
    """A table of the caller's own, into which it may write."""
    table = ONNXRegistry()
    table._opset_version = opset
    table.functions = {target: list(functions) for target, functions in _table(opset, operators).functions.items()}
    return table


@contextlib.contextmanager
def read_once(opset: int) -> Iterator[None]:
    """Let `torch.onnx.export` copy the table of that opset in the place of building it, inside the block."""
    operators = _operators()
    _table(opset, operators)
    original = ONNXRegistry.__dict__["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(lambda opset_version: _copied(opset_version, operators))  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]
