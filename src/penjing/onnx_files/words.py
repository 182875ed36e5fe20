"""The words that attributes of ONNX operators may have. The standard's own check takes any text for them."""

from __future__ import annotations

from penjing.onnx_files.node import Node

_PADS = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID", "")
_ROUNDING = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil", "simple")
_POLICIES = ("stretch", "not_larger", "not_smaller")
_TRANSFORMS = (
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize",
    "tf_half_pixel_for_nn",
)  # fmt: skip
_WAYS = ("forward", "reverse", "bidirectional")
_REDUCTIONS = ("none", "add", "mul", "max", "min")
WORDS: dict[tuple[str, str], tuple[str, ...]] = {
    **{
        (operator, "auto_pad"): _PADS
        for operator in ("AveragePool", "Conv", "ConvTranspose", "LpPool", "MaxPool")
    },
    **{(operator, "direction"): _WAYS for operator in ("GRU", "LSTM", "RNN")},
    **{(operator, "reduction"): _REDUCTIONS for operator in ("ScatterElements", "ScatterND")},
    ("BitShift", "direction"): ("LEFT", "RIGHT"),
    ("DepthToSpace", "mode"): ("DCR", "CRD"),
    ("Gelu", "approximate"): ("none", "tanh"),
    ("GridSample", "mode"): ("bilinear", "linear", "nearest", "bicubic", "cubic"),
    ("GridSample", "padding_mode"): ("zeros", "border", "reflection"),
    ("Pad", "mode"): ("constant", "reflect", "edge", "wrap"),
    ("Resize", "coordinate_transformation_mode"): _TRANSFORMS,
    ("Resize", "keep_aspect_ratio_policy"): _POLICIES,
    ("Resize", "mode"): ("nearest", "linear", "cubic"),
    ("Resize", "nearest_mode"): _ROUNDING,
    ("RoiAlign", "coordinate_transformation_mode"): ("half_pixel", "output_half_pixel"),
    ("RoiAlign", "mode"): ("avg", "max"),
    ("TensorScatter", "mode"): ("linear", "circular"),
    ("Upsample", "mode"): ("nearest", "linear"),
}  # fmt: skip
"""Operator and attribute → what it may say."""


def check_words(node: Node) -> None:
    """Refuse a node with an attribute whose word is not one of the standard."""
    for name, value in node.attributes.items():
        words = WORDS.get((node.operator, name))
        if words is not None and value not in words:
            raise node.refuse(f"{name} is not one of {', '.join(word for word in words if word)}", repr(value)[:100])


__all__ = ["WORDS", "check_words"]
