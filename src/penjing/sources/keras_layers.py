"""Layers of Keras as modules of torch that compute the same, with their weights in torch's order of axes.

`BUILDERS` is the table: the name of a class of Keras → a function that makes the module, or None where the layer has
settings that the module lacks. A layer without a row, or one whose class is the user's own, computes by its own `call`.
Keras' names become torch's: ``kernel`` → ``weight``, ``gamma`` → ``weight``, ``beta`` → ``bias``, ``moving_mean`` →
``running_mean``, ``moving_variance`` → ``running_var``. Values have channels on the axis that the layer says;
`penjing.network.layouts` removes the permutations between one layer and the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from penjing.sources.keras_parts import Part, activated, parameter, to_first, to_last, value
from penjing.sources.keras_recurrent import bidirectional, recurrent

Tensor = torch.Tensor
_CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAXIMA: tuple[Any, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


@dataclass(frozen=True, kw_only=True)
class Window:
    """How a convolution moves over a value with channels on axis 1.

    Attributes:
        strides: By axis.
        dilation: By axis.
        padding: "valid", "same" or "causal".
        groups: Groups of channels.
    """

    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str
    groups: int = 1

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve (batch, in, *sizes) with a weight (out, in / groups, *window)."""
        spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], self.dilation, strict=True)]
        x, padding = padded(x, spans, self.strides, self.padding)
        convolution = _CONVOLUTIONS[len(spans) - 1]
        result: Tensor = convolution(x, weight, bias, self.strides, padding, self.dilation, self.groups)
        return result


def padded(x: Tensor, spans: Sequence[int], strides: Sequence[int], padding: str) -> tuple[Tensor, list[Any]]:
    """The value with the zeros that the operator can't be told of, and the padding of both sides that it can."""
    if padding == "valid":
        return x, [0] * len(spans)
    if padding == "causal":
        return F.pad(x, (spans[0] - 1, 0)), [0]
    sides = [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], spans, strides, strict=True)]
    if all(before == after for before, after in sides):
        return x, [before for before, _ in sides]
    return F.pad(x, [n for both in reversed(sides) for n in both]), [0] * len(spans)


def same_padding(size: Any, span: int, stride: int) -> tuple[Any, Any]:
    """Zeros before and after an axis for ceil(size / stride) results; the odd one comes after.

    >>> same_padding(8, 3, 1), same_padding(8, 3, 2), same_padding(7, 3, 2)
    ((1, 1), (0, 1), (1, 1))
    """
    total = span - 1 if stride == 1 else max(0, ((size + stride - 1) // stride - 1) * stride + span - size)
    return total // 2, total - total // 2


class Convolution(Part):
    """A convolution with its weights as the part's own.

    Args:
        layer: The layer.
        weight: (out, in / groups, *window).
        window: How it moves.
    """

    def __init__(self, layer: Any, weight: Tensor, window: Window) -> None:
        super().__init__(layer)
        self.weight = parameter(weight, layer.trainable)
        self.bias = parameter(value(layer.bias), layer.trainable) if layer.use_bias else None
        self.window = window

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        last = self.layer.data_format == "channels_last"
        x = self.window.convolve(to_first(inputs, last), self.weight, self.bias)
        return activated(self.layer, to_last(x, last))


class Kernel(nn.Module):
    """One of the two convolutions of a separable one, of values with channels on axis 1."""

    def __init__(self, weight: Tensor, bias: Tensor | None, window: Window, trains: bool) -> None:
        super().__init__()
        self.weight = parameter(weight, trains)
        self.bias = None if bias is None else parameter(bias, trains)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, *sizes) → (batch, out, *sizes)."""
        return self.window.convolve(x, self.weight, self.bias)


class Separable(Part):
    """A convolution of each channel, and one that mixes the channels."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        depthwise = depthwise_weight(value(layer.depthwise_kernel))
        rank = depthwise.dim() - 2
        bias = value(layer.bias) if layer.use_bias else None
        plain = Window(strides=(1,) * rank, dilation=(1,) * rank, padding="valid")
        groups = layer.depthwise_kernel.shape[-2]
        self.depthwise = Kernel(depthwise, None, window_of(layer, rank, groups), layer.trainable)
        self.pointwise = Kernel(first_axes(value(layer.pointwise_kernel)), bias, plain, layer.trainable)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        last = self.layer.data_format == "channels_last"
        return activated(self.layer, to_last(self.pointwise(self.depthwise(to_first(inputs, last))), last))


class Transposed(Part):
    """A transposed convolution; Keras crops it unevenly where torch pads both sides alike."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.weight = parameter(first_axes(value(layer.kernel)), layer.trainable)  # (in, out, *window)
        self.bias = parameter(value(layer.bias), layer.trainable) if layer.use_bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        layer, last = self.layer, self.layer.data_format == "channels_last"
        rank = self.weight.dim() - 2
        strides, dilation = spread(layer.strides, rank), spread(layer.dilation_rate, rank)
        padding: list[int] = []
        extra: list[int] = []
        rest: list[tuple[int, int]] = []
        for k, s, d in zip(self.weight.shape[2:], strides, dilation, strict=True):
            p, more, cut = uneven_crop(*crop((k - 1) * d + 1, s, layer.padding), most=max(s, d) - 1)
            padding.append(p)
            extra.append(more)
            rest.append(cut)
        convolution = _TRANSPOSED[rank - 1]
        x = convolution(to_first(inputs, last), self.weight, self.bias, strides, padding, extra, 1, dilation)
        for axis, (before, after) in enumerate(rest, 2):
            if before or after:
                x = x[(slice(None),) * axis + (slice(before, -after or None),)]
        return activated(layer, to_last(x, last))


def crop(span: int, stride: int, padding: str) -> tuple[int, int]:
    """What Keras cuts from both ends of all (size - 1) * stride + span results; below 0: what it adds at the end."""
    if padding == "valid":
        return 0, -max(0, stride - span)
    total = stride + span - 2
    before = min((total + 1) // 2, span - 1)
    return span - 1 - before, span - 1 - (total - before)


def uneven_crop(before: int, after: int, most: int) -> tuple[int, int, tuple[int, int]]:
    """Torch's padding, its output padding of at most `most`, and what is left to cut from both ends.

    >>> uneven_crop(1, 0, most=1), uneven_crop(0, 1, most=1), uneven_crop(0, -1, most=2)
    ((1, 1, (0, 0)), (0, 0, (0, 1)), (0, 1, (0, 0)))
    """
    if before < after:
        return before, 0, (0, after - before)
    if before - after <= most:
        return before, before - after, (0, 0)
    return 0, max(0, -after), (before, max(0, after))


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


class MaxPooling(Part):
    """Maxima of windows; the odd row of zeros at the end is a window more instead."""

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        layer, last = self.layer, self.layer.data_format == "channels_last"
        x, rank = to_first(inputs, last), inputs.dim() - 2
        spans, strides = spread(layer.pool_size, rank), spread(layer.strides or layer.pool_size, rank)
        pool = _MAXIMA[rank - 1]
        if layer.padding != "same":
            return to_last(pool(x, spans, strides), last)
        sides = [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], spans, strides, strict=True)]
        if all(before == after for before, after in sides):
            return to_last(pool(x, spans, strides, [before for before, _ in sides]), last)
        if all(before == 0 and after < s for (before, after), s in zip(sides, strides, strict=True)):
            return to_last(pool(x, spans, strides, ceil_mode=True), last)
        x = F.pad(x, [n for both in reversed(sides) for n in both], mode="replicate")
        return to_last(pool(x, spans, strides), last)


class Upsampling(Part):
    """Every pixel repeated, or pixels between them."""

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes."""
        layer = self.layer
        last = getattr(layer, "data_format", "channels_last") == "channels_last"
        factors = [float(n) for n in spread(layer.size, inputs.dim() - 2)]
        how: dict[str, Any] = {"mode": "nearest"}
        if getattr(layer, "interpolation", "nearest") == "bilinear":
            how = {"mode": "bilinear", "align_corners": False}
        return to_last(F.interpolate(to_first(inputs, last), scale_factor=factors, **how), last)


def scale_and_shift(layer: Any, like: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Factor and addend of a normalization; ones and zeros that do not train where it has none."""
    scale, shift = getattr(layer, "gamma", None), getattr(layer, "beta", None)
    return (
        parameter(torch.ones_like(like), False) if scale is None else parameter(value(scale), layer.trainable),
        parameter(torch.zeros_like(like), False) if shift is None else parameter(value(shift), layer.trainable),
    )


def first_axes(kernel: Tensor) -> Tensor:
    """(*window, a, b) → (b, a, *window)."""
    rank = kernel.dim()
    return kernel.permute(rank - 1, rank - 2, *range(rank - 2))


def depthwise_weight(kernel: Tensor) -> Tensor:
    """(*window, channels, multiplier) → (channels * multiplier, 1, *window)."""
    return first_axes(kernel.reshape(*kernel.shape[:-2], 1, -1))


def spread(size: Any, rank: int) -> tuple[int, ...]:
    """A size by axis, given as one number or several."""
    return tuple(int(n) for n in size) if isinstance(size, list | tuple) else (int(size),) * rank


def window_of(layer: Any, rank: int, groups: int) -> Window:
    """The window of a layer that convolves."""
    return Window(
        strides=spread(layer.strides, rank),
        dilation=spread(layer.dilation_rate, rank),
        padding=layer.padding,
        groups=int(groups),
    )


def _convolution(layer: Any) -> Part | None:
    weight = first_axes(value(layer.kernel))
    return Convolution(layer, weight, window_of(layer, weight.dim() - 2, layer.groups))


def _depthwise(layer: Any) -> Part | None:
    weight = depthwise_weight(value(layer.kernel))
    return Convolution(layer, weight, window_of(layer, weight.dim() - 2, layer.kernel.shape[-2]))


def _transposed(layer: Any) -> Part | None:
    return Transposed(layer) if getattr(layer, "output_padding", None) is None else None


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


def _upsampling(layer: Any) -> Part | None:
    return Upsampling(layer) if getattr(layer, "interpolation", "nearest") in ("nearest", "bilinear") else None


def _adapted(layer: Any) -> bool:
    """Whether the weight of a layer has an adapter beside it, or is stored in integers."""
    return bool(getattr(layer, "lora_enabled", False)) or getattr(layer, "quantization_mode", None) is not None


BUILDERS: dict[str, Callable[[Any], Part | None]] = {
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _convolution),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _depthwise),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), Separable),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _transposed),
    **dict.fromkeys(("MaxPooling1D", "MaxPooling2D", "MaxPooling3D"), MaxPooling),
    **dict.fromkeys(("UpSampling1D", "UpSampling2D"), _upsampling),
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
