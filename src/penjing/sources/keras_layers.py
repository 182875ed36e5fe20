"""Layers of Keras as modules of torch that compute the same, with their weights in torch's order of axes.

`BUILDERS` is the table: the name of a class of Keras → a function that makes the module, or None where the layer has
settings that the module lacks. A layer without a row, or one whose class is the user's own, computes by its own `call`.
Keras' names become torch's: ``kernel`` → ``weight``, ``gamma`` → ``weight``, ``beta`` → ``bias``, ``moving_mean`` →
``running_mean``, ``moving_variance`` → ``running_var``. Values have channels on the axis that the layer says;
`penjing.network.layouts` removes the permutations between one layer and the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from penjing.sources.keras_convolutions import MaxPooling, Separable, convolution, depthwise, transposed, upsampling
from penjing.sources.keras_parts import Part, activated, parameter, to_first, to_last, value
from penjing.sources.keras_recurrent import bidirectional, recurrent

Tensor = torch.Tensor


class Dense(Part):
    """A product of the last axis."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.weight = parameter(value(layer.kernel).T, layer.trainable)
        self.bias = parameter(value(layer.bias), layer.trainable) if layer.use_bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        return activated(self.layer, F.linear(inputs, self.weight, self.bias))


class EinsumDense(Part):
    """A product that sums the last axes of the value and gives new last axes, as in attention.

    Args:
        layer: The layer.
        summed: Axes that are summed.
    """

    def __init__(self, layer: Any, summed: int) -> None:
        super().__init__(layer)
        kernel = value(layer.kernel)
        self.summed, self.sizes = summed, list(kernel.shape[summed:])
        self.weight = parameter(kernel.reshape(math.prod(kernel.shape[:summed]), -1).T, layer.trainable)
        bias = value(layer.bias).reshape(-1) if layer.bias is not None else None
        self.bias = None if bias is None else parameter(bias, layer.trainable)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        x = inputs.flatten(-self.summed) if self.summed > 1 else inputs
        x = F.linear(x, self.weight, self.bias)
        return activated(self.layer, torch.unflatten(x, -1, self.sizes) if len(self.sizes) > 1 else x)


class Embedding(Part):
    """Rows of a table; the mask of padding is the layer's own business."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.weight = parameter(value(layer.embeddings), layer.trainable)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        indices = inputs if inputs.dtype in (torch.int32, torch.int64) else inputs.to(torch.int32)
        return F.embedding(indices, self.weight)


class BatchNorm(Part):
    """Batch normalization with the statistics of the training."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        mean = value(layer.moving_mean)
        self.weight, self.bias = scale_and_shift(layer, mean)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", value(layer.moving_variance))

    def forward(self, inputs: Tensor, mask: Any = None) -> Tensor:
        """What the layer computes."""
        layer = self.layer
        last = layer.axis in (-1, inputs.dim() - 1)
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        x = to_first(inputs, last)
        x = F.batch_norm(x, mean, variance, self.weight, self.bias, False, 1 - layer.momentum, layer.epsilon)
        return to_last(x, last)


class LayerNorm(Part):
    """Normalization over the last axis."""

    def __init__(self, layer: Any, size: int) -> None:
        super().__init__(layer)
        self.weight, self.bias = scale_and_shift(layer, torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        return F.layer_norm(inputs, self.weight.shape, self.weight, self.bias, self.layer.epsilon)


class GroupNorm(Part):
    """Normalization over groups of channels."""

    def __init__(self, layer: Any, size: int) -> None:
        super().__init__(layer)
        self.weight, self.bias = scale_and_shift(layer, torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        layer, last = self.layer, self.layer.axis in (-1, inputs.dim() - 1)
        groups = self.weight.shape[0] if layer.groups == -1 else layer.groups
        return to_last(F.group_norm(to_first(inputs, last), groups, self.weight, self.bias, layer.epsilon), last)


class Dropout(Part):
    """Dropout that comes back when the captured network trains."""

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        return F.dropout(inputs, self.layer.rate, False)


def scale_and_shift(layer: Any, like: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Factor and addend of a normalization; ones and zeros that do not train where it has none."""
    scale, shift = getattr(layer, "gamma", None), getattr(layer, "beta", None)
    return (
        parameter(torch.ones_like(like), False) if scale is None else parameter(value(scale), layer.trainable),
        parameter(torch.zeros_like(like), False) if shift is None else parameter(value(shift), layer.trainable),
    )


def _einsum(layer: Any) -> Part | None:
    """The rows "...abc,bcde->...ade": the last axes are summed, the new ones come last, and the bias is of these."""
    inputs, arrow, result = layer.equation.replace(" ", "").replace("...", "").partition("->")
    x, _, w = inputs.partition(",")
    summed = [letter for letter in w if letter not in result]
    new = "".join(letter for letter in w if letter in result)
    n = len(summed)
    plain = n and "".join(summed) == w[:n] == x[len(x) - n :] and result == x[: len(x) - n] + new and not {*new} & {*x}
    own_bias = layer.bias is None or list(layer.bias.shape) == list(layer.kernel.shape[n:])
    return EinsumDense(layer, n) if arrow and plain and own_bias else None


def _batch_norm(layer: Any) -> Part | None:
    plain = isinstance(layer.axis, int) and (layer.axis in (-1, 1) or layer.axis == layer.input_spec.ndim - 1)
    return BatchNorm(layer) if plain and not getattr(layer, "renorm", False) else None


def _layer_norm(layer: Any) -> Part | None:
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    known = next((v for v in (layer.gamma, layer.beta) if v is not None), None)
    if known is None or len(known.shape) != 1 or len(axes) != 1 or getattr(layer, "rms_scaling", False):
        return None
    last = axes[0] == -1 or axes[0] == getattr(layer, "_rank", 0) - 1
    return LayerNorm(layer, known.shape[0]) if last else None


def _group_norm(layer: Any) -> Part | None:
    known = next((v for v in (layer.gamma, layer.beta) if v is not None), None)
    return GroupNorm(layer, known.shape[0]) if known is not None and layer.axis in (-1, 1) else None


def _dropout(layer: Any) -> Part | None:
    return Dropout(layer) if layer.noise_shape is None and layer.rate > 0 else None


def _adapted(layer: Any) -> bool:
    """Whether the weight of a layer has an adapter beside it, or is stored in integers."""
    return bool(getattr(layer, "lora_enabled", False)) or getattr(layer, "quantization_mode", None) is not None


BUILDERS: dict[str, Callable[[Any], Part | None]] = {
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), convolution),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), depthwise),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), Separable),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), transposed),
    **dict.fromkeys(("MaxPooling1D", "MaxPooling2D", "MaxPooling3D"), MaxPooling),
    **dict.fromkeys(("UpSampling1D", "UpSampling2D"), upsampling),
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN"), recurrent),
    "Bidirectional": bidirectional,
    "Dense": Dense,
    "EinsumDense": _einsum,
    "Embedding": Embedding,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "Dropout": _dropout,
}


def part_for(layer: Any) -> Part | None:
    """The module that computes what a layer of Keras itself does; None where the layer's own call has to."""
    kind = type(layer)
    if not kind.__module__.startswith("keras.src.layers.") or not layer.built or _adapted(layer):
        return None
    builder = BUILDERS.get(kind.__name__)
    return None if builder is None else builder(layer)
