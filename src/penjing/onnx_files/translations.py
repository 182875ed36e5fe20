"""What the exporter writes for Penjing's own operators, and for one that it has no translation of."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from penjing.numerics import operators, suppression  # noqa: F401  register the operators that are translated here


def translations() -> dict[Any, Any]:
    """Operator → the function that writes it, as `torch.onnx.export` takes them."""
    import onnxscript

    op: Any = onnxscript.opset18

    def floor_divide(x, y):  # type: ignore[no-untyped-def]
        # Of sizes, as -(-h // 2): ONNX divides integers towards zero.
        return op.Div(op.Sub(x, op.Mod(x, y)), y)

    def suppress(boxes, scores, most: int, overlap: float, least_score: float, centred: bool):  # type: ignore[no-untyped-def]
        # Without a smallest score every box is looked at; negative infinity is no score that a runtime takes.
        least = None if least_score == -math.inf else op.Constant(value_floats=[least_score])
        return op.NonMaxSuppression(
            boxes, scores, op.Constant(value_ints=[most]), op.Constant(value_floats=[overlap]), least,
            center_point_box=int(centred),
        )  # fmt: skip

    def best_boxes(boxes, scores, most: int, overlap: float, least_score: float):  # type: ignore[no-untyped-def]
        selected = suppress(boxes, scores, most, overlap, least_score, False)
        nothing = op.Expand(op.Constant(value_float=suppression.NONE), op.Shape(scores))
        ranked = op.ScatterND(nothing, selected, op.GatherND(scores, selected))
        _, classes, places = scores.shape
        count = min(most, classes * places)
        # Of equal values TopK takes the first, as the order of suppression does.
        values, best = op.TopK(op.Reshape(ranked, [0, -1]), op.Constant(value_ints=[count]))
        return op.Where(op.Greater(values, op.Constant(value_float=suppression.NONE)), best, op.Constant(value_int=-1))

    others = {
        operator.floordiv: floor_divide,
        torch.ops.penjing.non_max_suppression.default: suppress,
        torch.ops.penjing.best_boxes.default: best_boxes,
    }
    return others | _linear(op) | _lstm(op)


def _linear(op: Any) -> dict[Any, Any]:
    def quantize(x, scale, zero_point, axis: int, low: int, high: int):  # type: ignore[no-untyped-def]
        if (low, high) in ((-128, 127), (0, 255)):
            return op.QuantizeLinear(x, scale, zero_point, axis=axis)
        # A narrow range has no ONNX type of its own: clip in integers, where the edges are exact.
        q = op.QuantizeLinear(x, scale, zero_point, axis=axis)
        return op.Clip(q, op.CastLike(op.Constant(value_int=low), q), op.CastLike(op.Constant(value_int=high), q))

    def dequantize(q, scale, zero_point, axis: int):  # type: ignore[no-untyped-def]
        return op.DequantizeLinear(q, scale, zero_point, axis=axis)

    def linear_dynamic(x, weight, scale, zero_point, bias=None):  # type: ignore[no-untyped-def]
        # Runtimes fuse these into one kernel.
        q, step, zero = op.DynamicQuantizeLinear(x)
        product = op.Cast(op.MatMulInteger(q, weight, zero, zero_point), to=1)
        result = op.Mul(product, op.Mul(step, scale))
        return result if bias is None else op.Add(result, bias)

    return {
        torch.ops.penjing.quantize.default: quantize,
        torch.ops.penjing.dequantize.default: dequantize,
        torch.ops.penjing.linear_dynamic.default: linear_dynamic,
    }


def _lstm(op: Any) -> dict[Any, Any]:
    import onnxscript

    lstm_operator = onnxscript.values.Op(
        onnxscript.values.Opset("com.microsoft", 1), "DynamicQuantizeLSTM", _lstm_schema()
    )

    def lstm_dynamic(x, hidden, cell, w, w_scale, r, r_scale, bias):  # type: ignore[no-untyped-def]
        directions, _, gates = w.shape
        y, hidden, cell = lstm_operator(
            x, w, r, bias, None, hidden, cell, None,
            w_scale, op.Cast(op.Mul(w_scale, 0.0), to=3), r_scale, op.Cast(op.Mul(r_scale, 0.0), to=3),
            direction="bidirectional" if directions == 2 else "forward", hidden_size=gates // 4,
        )  # fmt: skip
        return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1]), hidden, cell

    def lstm_static(x, hidden, cell, w, r, scale, bias, step, zero, ratio: float):  # type: ignore[no-untyped-def]
        directions, _, width = hidden.shape

        def on_grid(value: Any) -> Any:
            return op.DequantizeLinear(op.QuantizeLinear(value, step, zero), step, zero)

        def matrix(q: Any) -> Any:
            return op.Reshape(op.DequantizeLinear(q, scale, axis=0), [directions, 4 * width, -1])

        inputs: Any = (
            on_grid(x if ratio == 1 else op.Mul(x, ratio)),
            matrix(w),
            matrix(r),
            bias,
            None,
            on_grid(hidden),
        )
        way = "bidirectional" if directions == 2 else "forward"
        y, hidden, cell = op.LSTM(*inputs, cell, direction=way, hidden_size=width)
        return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1]), hidden, cell

    return {
        torch.ops.penjing.lstm_dynamic.default: lstm_dynamic,
        torch.ops.penjing.lstm_static.default: lstm_static,
    }


def _lstm_schema() -> Any:
    """ONNX Runtime's operator: what the exporter asks of one that is not in the standard."""
    import onnx

    schema = onnx.defs.OpSchema
    inputs = (
        ("X", "T"), ("W", "I"), ("R", "I"), ("B", "T"), ("sequence_lens", "L"), ("initial_h", "T"), ("initial_c", "T"),
        ("P", "T"), ("W_scale", "T"), ("W_zero_point", "I"), ("R_scale", "T"), ("R_zero_point", "I"),
    )  # fmt: skip
    option = schema.FormalParameterOption.Optional
    kinds = onnx.defs.OpSchema.AttrType
    return schema(
        "DynamicQuantizeLSTM",
        "com.microsoft",
        1,
        inputs=[
            schema.FormalParameter(name, kind, param_option=option)
            if name in ("sequence_lens", "P")
            else schema.FormalParameter(name, kind)
            for name, kind in inputs
        ],
        outputs=[schema.FormalParameter(name, "T") for name in ("Y", "Y_h", "Y_c")],
        type_constraints=[("T", ["tensor(float)"], ""), ("I", ["tensor(int8)"], ""), ("L", ["tensor(int32)"], "")],
        attributes=[
            schema.Attribute("direction", kinds.STRING, required=False),
            schema.Attribute("hidden_size", kinds.INT, required=False),
        ],
    )
