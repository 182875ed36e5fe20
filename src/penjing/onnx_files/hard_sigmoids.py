"""Hard sigmoids in integers, in runtimes that have no kernel for them and one for sums.

A hard sigmoid is a clipped line, min(max(α·x + β, 0), 1), and a quantizer to unsigned integers clips too: x + β/α,
quantized in steps of s/α from 0, are the integers of the hard sigmoid in steps of s.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def hard_sigmoids_as_sums(model: Any) -> None:
    """Replace every HardSigmoid between a DequantizeLinear and 8-bit quantizers by an Add, in place.

    Those that are quantized otherwise than to unsigned integers of 0 to 1 stay as they are.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    writers = {name: node for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    for node in [node for node in graph.node if node.op_type == "HardSigmoid"]:
        quantizers = [reader for reader in graph.node if node.output[0] in reader.input]
        before = writers.get(node.input[0])
        if before is None or before.op_type != "DequantizeLinear" or node.output[0] in outputs:
            continue
        if not quantizers or not all(_takes_zero_to_one(graph, q, stored) for q in quantizers):
            continue
        given = {a.name: a.f for a in node.attribute}
        slope, offset = given.get("alpha", 0.2), given.get("beta", 0.5)
        if slope <= 0 or offset <= 0:
            continue
        name = node.output[0]
        for quantizer in quantizers:
            scale = numpy_helper.to_array(stored[quantizer.input[1]])
            quantizer.input[1] = f"{quantizer.output[0]}_before_clipping"
            graph.initializer.append(numpy_helper.from_array(np.asarray(scale / slope, np.float32), quantizer.input[1]))
        parts = {"offset": np.uint8(1), "offset_scale": np.float32(offset / slope), "offset_zero": np.uint8(0)}
        graph.initializer.extend(numpy_helper.from_array(np.asarray(v), f"{name}_{k}") for k, v in parts.items())
        constant = helper.make_node(
            "DequantizeLinear", [f"{name}_{part}" for part in parts], [f"{name}_shift"], name=f"{node.name}_shift"
        )
        total = helper.make_node("Add", [node.input[0], f"{name}_shift"], [name], name=node.name)
        position = list(graph.node).index(node)
        del graph.node[position]
        graph.node.insert(position, total)
        graph.node.insert(position, constant)


def _takes_zero_to_one(graph: Any, quantizer: Any, stored: dict[str, Any]) -> bool:
    """Whether a node quantizes to unsigned 8-bit integers that are read as such, the last of which is not above 1."""
    from onnx import numpy_helper

    if quantizer.op_type != "QuantizeLinear" or not all(name in stored for name in quantizer.input[1:]):
        return False
    scale, *zero = (numpy_helper.to_array(stored[name]) for name in quantizer.input[1:])
    readers = [reader for reader in graph.node if quantizer.output[0] in reader.input]
    return (
        scale.size == 1
        and len(zero) == 1
        and zero[0].dtype == np.uint8
        and not zero[0].any()
        and float(scale) * 255 <= 1 + float(scale) / 2
        and all(reader.op_type == "DequantizeLinear" for reader in readers)
    )


__all__ = ["hard_sigmoids_as_sums"]
