"""Layers of Keras that move a window: convolutions, their transposes, maxima, and what enlarges pictures.

Keras pads and crops unevenly where torch does both sides alike; what an operator can't be told of is done before or
after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from penjing.sources.keras_parts import Part, activated, parameter, to_first, to_last, value

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


def convolution(layer: Any) -> Part:
    """The part for Conv1D to Conv3D."""
    weight = first_axes(value(layer.kernel))
    return Convolution(layer, weight, window_of(layer, weight.dim() - 2, layer.groups))


def depthwise(layer: Any) -> Part:
    """The part for a convolution of each channel by itself."""
    weight = depthwise_weight(value(layer.kernel))
    return Convolution(layer, weight, window_of(layer, weight.dim() - 2, layer.kernel.shape[-2]))


def transposed(layer: Any) -> Part | None:
    """The part for a transposed convolution; None where it is told what to add to its outputs."""
    return Transposed(layer) if getattr(layer, "output_padding", None) is None else None


def upsampling(layer: Any) -> Part | None:
    """The part for nearest and linear enlargement; None for others."""
    return Upsampling(layer) if getattr(layer, "interpolation", "nearest") in ("nearest", "bilinear") else None
