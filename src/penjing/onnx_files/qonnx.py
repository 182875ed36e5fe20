"""Integer files as QONNX, which hls4ml and FINN read: every quantizer with its dequantizer is one Quant operator.

Pappalardo et al., "QONNX: Representing Arbitrary-Precision Quantized Neural Networks", 2022 (arXiv:2206.07527). Weights
are stored as the floats that their integers stand for; int32 biases are constants.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import ArtifactError

DOMAIN = "qonnx.custom_op.general"
_BIASES = 32  # bits


def convert(path: Path | str, into: Path | str) -> None:
    """Write an INT8 file of Penjing, `model.onnx`, as QONNX.

    Raises:
        ArtifactError: It is no ONNX file, or has a quantizer whose scale is computed.
    """
    import onnx

    try:
        model = onnx.load(os.fspath(path))
    except Exception as error:  # of the parser, whose kinds differ by version
        raise _unfit(f"{path}: {' '.join(str(error).split())[:200]}") from error
    as_quant_nodes(model)
    Path(into).write_bytes(model.SerializeToString(deterministic=True))


def as_quant_nodes(model: Any) -> None:
    """Replace QuantizeLinear and DequantizeLinear by Quant operators, in place."""
    from onnx import helper, numpy_helper

    graph = model.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    writers = {name: node for node in graph.node for name in node.output}
    nodes: list[Any] = []
    constants: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            continue  # taken with its dequantizer
        if node.op_type != "DequantizeLinear":
            nodes.append(node)
            continue
        name, source, grid = node.output[0], node.input[0], _grid(node, stored)
        if source in stored:
            value = ((stored[source].astype(np.int64) - grid.zero) * grid.scale).astype(np.float32)
            if grid.bits == _BIASES:
                constants[name] = value
                continue
            source = f"{name}_values"
            constants[source] = value
        else:
            writer = writers.get(source)
            if writer is None or writer.op_type != "QuantizeLinear" or not _same(grid, _grid(writer, stored)):
                raise _unfit(f"{node.name or name}: a dequantizer without its quantizer")
            source = writer.input[0]
        parts = {f"{name}_scale": grid.scale, f"{name}_zero": grid.zero, f"{name}_bits": np.asarray(grid.bits)}
        constants |= {key: np.asarray(value, np.float32) for key, value in parts.items()}
        settings: dict[str, Any] = {
            "signed": int(grid.signed),
            "narrow": int(node.input[0] in stored),
            "rounding_mode": "ROUND",
        }
        nodes.append(helper.make_node("Quant", [source, *parts], [name], domain=DOMAIN, name=node.name, **settings))
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    initializers += [numpy_helper.from_array(value, name) for name, value in constants.items() if name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


class _Grid:
    """Scale and zero point of a quantizer, in a shape that its tensor broadcasts with."""

    def __init__(self, scale: np.ndarray, zero: np.ndarray) -> None:
        self.scale, self.zero = scale, zero.astype(np.int64)
        self.bits, self.signed = 8 * zero.dtype.itemsize, zero.dtype.kind == "i"


def _grid(node: Any, stored: dict[str, np.ndarray]) -> _Grid:
    given = [stored.get(name) for name in node.input[1:3]]
    if len(given) < 2 or any(value is None for value in given):
        raise _unfit(f"{node.name or node.output[0]}: a scale or zero point that is computed")
    scale, zero = (np.asarray(value) for value in given)
    if scale.ndim:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        rank = stored[node.input[0]].ndim if node.input[0] in stored else axis + 1
        shape = [-1 if i == axis % rank else 1 for i in range(rank)]
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    return _Grid(scale, zero)


def _same(one: _Grid, other: _Grid) -> bool:
    return np.array_equal(one.scale, other.scale) and np.array_equal(one.zero, other.zero)


def _unfit(got: str) -> ArtifactError:
    return ArtifactError(
        "the file can't be written as QONNX",
        code="qonnx",
        got=got,
        expected="model.onnx of an artifact in INT8, with ranges that are fixed",
        remedy="compress with --target fpga",
    )
