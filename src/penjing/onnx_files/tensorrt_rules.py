"""TensorRT's rules of explicit quantization, checked on an ONNX file, and two rewrites that obey them.

NVIDIA, "Explicit Quantization" and "Working with Quantized Types", TensorRT documentation, 2025: integers are signed
and symmetric, activations have one scale, weights one or one for every output channel, stored weights are dequantized
directly in front of the operator that reads them, and a bias is floating point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from penjing.errors import ExportError

_OPSET = 13  # the first whose QuantizeLinear has an axis
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_OTHER_FORMS = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits")


@dataclass(frozen=True)
class Broken:
    """A rule that a file breaks.

    Attributes:
        layer: The operator that it is broken at.
        got: What stands there.
        expected: What TensorRT takes.
        remedy: What to do about it.
    """

    layer: str
    got: str
    expected: str
    remedy: str


def check(model: Any) -> None:
    """Raise ExportError with the first layer that breaks a rule, and how many others do."""
    rows = broken(model)
    if not rows:
        return
    first, others = rows[0], len({row.layer for row in rows} - {rows[0].layer})
    raise ExportError(
        f"TensorRT's rules of explicit quantization are broken at {first.layer}"
        + (f" and at {others} more" if others else ""),
        code="tensorrt-rules",
        field=first.layer,
        got=first.got,
        expected=first.expected,
        remedy=first.remedy,
    )


def broken(model: Any) -> list[Broken]:
    """Every rule that an ONNX model (`onnx.ModelProto`) breaks, in the order of its operators."""
    graph = _Graph(model)
    rows = []
    opset = max((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), default=0)
    for node in graph.nodes:
        if node.op_type in _OTHER_FORMS or node.op_type.startswith("QLinear"):
            rows.append(
                Broken(
                    node.name or node.op_type,
                    f"the operator {node.op_type}",
                    "QuantizeLinear and DequantizeLinear around operators in floating point",
                    "write the file with quantizers and dequantizers (QDQ)",
                )
            )
        elif node.op_type in _PAIR:
            rows += graph.of_quantizer(node, opset)
        elif node.op_type in _PRODUCTS:
            rows += graph.of_product(node)
    return rows


def obey(model: Any) -> None:
    """Biases in floating point, and stored matrices as their operator reads them; in place.

    A bias of int32 becomes the float32 that it stands for. A transposition behind a stored matrix's dequantizer is done
    on its integers.
    """
    from onnx import helper, numpy_helper

    graph = _Graph(model)
    for node in list(graph.nodes):
        if node.op_type == "DequantizeLinear" and graph.type_of(node.input[0]) == np.int32:
            q, scale = (graph.values[name].astype(np.float64) for name in node.input[:2])
            value = (q * scale.reshape(-1) if scale.ndim else q * scale).astype(np.float32)
            model.graph.node.remove(node)
            model.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        elif node.op_type == "Transpose" and (before := graph.producers.get(node.input[0])) is not None:
            stored = graph.values.get(before.input[0]) if before.op_type == "DequantizeLinear" else None
            if stored is None or stored.ndim != 2 or len(graph.readers(before)) != 1:
                continue
            name = f"{before.input[0]}_transposed"
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(stored.T), name))
            axis = next((a.i for a in before.attribute if a.name == "axis"), 1)
            new = helper.make_node(
                "DequantizeLinear", [name, *before.input[1:]], [node.output[0]], name=before.name, axis=1 - axis % 2
            )
            model.graph.node.insert(list(model.graph.node).index(before), new)
            model.graph.node.remove(before)
            model.graph.node.remove(node)


class _Graph:
    """A model's operators, by what they read and write."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.nodes = list(model.graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.values |= {
            node.output[0]: numpy_helper.to_array(a.t)
            for node in self.nodes
            if node.op_type == "Constant"
            for a in node.attribute
            if a.name == "value"
        }

    def readers(self, node: Any) -> list[Any]:
        """The operators that read what one writes."""
        return [other for other in self.nodes if set(other.input) & set(node.output)]

    def layer(self, node: Any) -> str:
        """The name of the operator that a quantizer is for: what reads it, behind the rest of its pair."""
        seen = [node]
        while seen:
            one = seen.pop(0)
            if one.op_type not in (*_PAIR, "Transpose", "Reshape"):
                return str(one.name or one.op_type)
            seen += self.readers(one)
        return str(node.name or node.output[0])

    def type_of(self, name: str) -> Any:
        """The type of a stored tensor, or of what a quantizer writes; None where it is not known."""
        if name in self.values:
            return self.values[name].dtype.type
        node = self.producers.get(name)
        if node is not None and node.op_type == "QuantizeLinear":
            return self.values[node.input[2]].dtype.type if self._zero(node) is not None else np.uint8
        return None

    def _zero(self, node: Any) -> Any:
        return self.values.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None

    def of_quantizer(self, node: Any, opset: int) -> Iterator[Broken]:
        """What a quantizer or a dequantizer breaks."""
        layer, scale, zero = self.layer(node), self.values.get(node.input[1]), self._zero(node)
        stored = node.op_type == "DequantizeLinear" and node.input[0] in self.values
        kind = self.type_of(node.input[0] if node.op_type == "DequantizeLinear" else node.output[0])
        symmetric = "choose symmetric, signed integers: quantize.Static(activation_symmetric=True)"
        if stored and kind == np.int32:
            yield Broken(layer, "a bias of int32", "a bias in floating point", "store it as float32")
            return
        if kind is not None and kind != np.int8:
            yield Broken(layer, f"integers of type {np.dtype(kind).name}", "int8", symmetric)
        if zero is not None and np.any(zero):
            value = int(zero.reshape(-1)[np.flatnonzero(zero.reshape(-1))[0]])
            yield Broken(layer, f"the zero point {value}", "a zero point of 0", symmetric)
        if scale is None:
            yield Broken(layer, "a scale that is computed", "a stored scale", "calibrate it: quantize.Static")
            return
        if not np.all(np.isfinite(scale)) or np.any(scale <= 0):
            yield Broken(layer, "a scale that is not a positive number", "positive scales", "quantize it again")
        if scale.size > 1 and not stored and node.input[0] not in self.values and not self._of_weight(node):
            yield Broken(
                layer,
                f"an activation with {scale.size} scales",
                "one scale for an activation",
                "one scale for the whole tensor; scales for channels are for weights alone",
            )
        if scale.size > 1 and opset < _OPSET:
            yield Broken(layer, f"opset {opset}", f"opset {_OPSET} or later for scales of channels", "write it anew")
        if stored:
            yield from self._of_stored(node, layer, scale)

    def _of_weight(self, node: Any) -> bool:
        before = self.producers.get(node.input[0])
        return before is not None and before.op_type == "QuantizeLinear" and before.input[0] in self.values

    def _of_stored(self, node: Any, layer: str, scale: Any) -> Iterator[Broken]:
        """What a stored weight breaks: what reads it, and which axis its scales are of."""
        for reader in self.readers(node):
            if reader.op_type not in _PRODUCTS:
                yield Broken(
                    layer,
                    f"{reader.op_type} between a stored weight's dequantizer and the product",
                    f"the dequantizer directly in front of {', '.join(_PRODUCTS)}",
                    "do that to the stored integers, or keep the weight in floating point",
                )
                continue
            rank = self.values[node.input[0]].ndim
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % rank
            transposed = any(a.name == "transB" and a.i for a in reader.attribute)
            own = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1, "MatMul": rank - 1}[reader.op_type]
            if scale.size > 1 and (scale.ndim > 1 or axis != own):
                yield Broken(
                    layer,
                    f"scales along axis {axis} of the weight" if scale.ndim == 1 else "scales for blocks of int8",
                    f"one scale, or one for every output channel: axis {own} of {reader.op_type}",
                    "one scale for every output channel",
                )

    def of_product(self, node: Any) -> Iterator[Broken]:
        """A product is in integers when both of its inputs are."""
        quantized = [
            (before := self.producers.get(name)) is not None and before.op_type == "DequantizeLinear"
            for name in node.input[:2]
        ]
        if any(quantized) and not all(quantized):
            which = "weight" if quantized[0] else "input"
            yield Broken(
                node.name or node.op_type,
                f"a product whose {which} is not quantized",
                "both inputs quantized, or neither",
                f"quantize its {which}, or keep the layer in floating point",
            )
