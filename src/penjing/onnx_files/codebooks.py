"""Weights with few different values in a file: the values, and for each weight the index of its own, in a byte or less.

The weight is looked up by Gather behind a Cast. ONNX Runtime and OpenVINO fold both when they load the file, so that
they compute with the same weights as from a file that holds them in full, and in the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from penjing.numerics.codebooks import LookedUp, Table

_AS_IT_IS = np.zeros(0, np.float32)  # by nothing
USUAL = 0.6  # the share of an entry from which on indices stay single
_SCALED = 1e-5  # relative; a weight and its batch norm's scale are multiplied in 32 bits


def look_up(model: Any, tensors: Mapping[str, LookedUp]) -> None:
    """Store these tensors of a model as entries and indices, in place, where that takes less than half of the bytes.

    The exporter multiplies the weights of a convolution by the scale of a batch norm behind it; such a scale is stored
    beside the codebook. Matrices that it has transposed are transposed when the file is loaded. A tensor that is found
    neither by its name nor by its values is left as it is.
    """
    from onnx import numpy_helper

    graph = model.graph
    nodes: list[Any] = []
    stored = {tensor.name for tensor in graph.initializer}
    turned = [known for name, known in tensors.items() if name not in stored and len(known.shape) == 2]
    for tensor in list(graph.initializer):
        known = tensors.get(tensor.name)
        scale = None
        if known is not None and tuple(tensor.dims) == known.shape:
            scale = _scale(numpy_helper.to_array(tensor), known.values)
        elif known is None and (known := _transposed(tensor, turned)) is not None:
            scale = _AS_IT_IS
        part = _Part(tensor.name, known, scale) if known is not None and scale is not None else None
        if part is not None and part.size_bytes < len(tensor.raw_data) / 2:
            graph.initializer.remove(tensor)
            graph.initializer.extend(part.stored)
            nodes += part.nodes
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _transposed(tensor: Any, turned: Sequence[LookedUp]) -> LookedUp | None:
    """The codebook whose values, transposed, are this initializer's."""
    from onnx import TensorProto, numpy_helper

    for known in turned:
        if tensor.data_type == TensorProto.FLOAT and tuple(tensor.dims) == known.shape[::-1]:
            if np.array_equal(numpy_helper.to_array(tensor), known.values.T):
                return replace(known, transposed=True)
    return None


def _scale(stored: npt.NDArray[Any], values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
    """By what each slice of an axis is multiplied, in a shape that broadcasts; empty if by nothing; None if it is not.

    Args:
        stored: The tensor of the file.
        values: The values that it had before.
    """
    if stored.dtype != np.float32:
        return None
    if np.array_equal(stored, values):
        return _AS_IT_IS
    for axis in (0, 1):
        others = tuple(a for a in range(values.ndim) if a != axis)
        size = np.abs(values).max(axis=others, keepdims=True)
        largest = np.abs(values) == size
        ratio = np.where(largest, stored / np.where(largest & (values != 0), values, 1), 0)
        mean = ratio.sum(axis=others, keepdims=True, dtype=np.float64) / largest.sum(axis=others, keepdims=True)
        scale: npt.NDArray[np.float32] = mean.astype(np.float32)
        if np.allclose(values * scale, stored, rtol=_SCALED, atol=0):
            return scale
    return None


def _together(table: Table) -> Table:
    """Neighbouring vectors under one index, where all combinations of their entries fit into a byte.

    Of sixteen entries two indices take a byte; packed they take as much as before. Where one entry is the usual one, as
    0 in a pruned layer, single indices stay: they pack better.
    """
    count, size = len(table.entries), table.indices.size
    frequent = np.bincount(table.indices.reshape(-1), minlength=count).max()
    if table.starts is not None or frequent > USUAL * size:
        return table
    for many in (8, 4, 3, 2):
        if count**many > 1 << 8 or size % many:
            continue
        places = np.indices((count,) * many).reshape(many, -1).T
        entries = table.entries[places].reshape(len(places), -1)
        if entries.nbytes + size // many < size:
            powers = count ** np.arange(many - 1, -1, -1)
            return Table(entries, table.indices.reshape(1, -1, many) @ powers)
    return table


class _Part:
    """What stands for one tensor: initializers and nodes, whose last one writes the tensor's name."""

    def __init__(self, name: str, known: LookedUp, scale: npt.NDArray[np.float32]) -> None:
        self.name = name
        self.stored: list[Any] = []
        self.nodes: list[Any] = []
        looked = self._table(known.tables[0], "")
        for number, table in enumerate(known.tables[1:], 2):
            looked = self._node("Add", [looked, self._table(table, f"_{number}")], f"sum_{number}")
        shape = self._store("shape", np.array(known.shape, np.int64))
        if known.transposed:
            self._node("Transpose", [self._node("Reshape", [looked, shape], "shaped")], None, perm=[1, 0])
            return
        if not scale.size:
            self._node("Reshape", [looked, shape], None)
            return
        shaped = self._node("Reshape", [looked, shape], "shaped")
        self._node("Mul", [shaped, self._store("scale", scale)], None)

    def _table(self, table: Table, number: str) -> str:
        """What looks up the values of one table, and its output's name."""
        from onnx import TensorProto

        table = _together(table if table.starts is None or table.starts.any() else replace(table, starts=None))
        starts = None if table.starts is None or not table.starts.any() else table.starts[:, None]
        inside = table.indices if starts is None else table.indices - starts
        width = np.uint8 if inside.max() < 1 << 8 else np.uint16
        stored = self._store(f"indices{number}", inside.astype(width))
        index = self._node("Cast", [stored], f"numbers{number}", to=TensorProto.INT32)
        if starts is not None:
            first = self._store(f"starts{number}", starts.astype(np.int32))
            index = self._node("Add", [index, first], f"places{number}")
        entries = table.entries if table.entries.shape[1] > 1 else table.entries[:, 0]
        return self._node("Gather", [self._store(f"entries{number}", entries), index], f"values{number}", axis=0)

    @property
    def size_bytes(self) -> int:
        """Bytes of what is stored."""
        return sum(len(tensor.raw_data) for tensor in self.stored)

    def _store(self, what: str, values: npt.NDArray[Any]) -> str:
        from onnx import numpy_helper

        self.stored.append(numpy_helper.from_array(values, f"{self.name}_{what}"))
        return f"{self.name}_{what}"

    def _node(self, kind: str, inputs: list[str], what: str | None, **attributes: Any) -> str:
        from onnx import helper

        output = self.name if what is None else f"{self.name}_{what}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes))
        return output
