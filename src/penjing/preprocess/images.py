"""Images as a camera gives them: 8-bit integers, channels last, of any size; resizing and normalizing are inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import SourceError, UsageError
from penjing.sources.modules import as_module

Size = int | tuple[int, int]
_LAYOUTS = ("NHWC", "NCHW")


class Images(nn.Module):
    """A network whose artifact takes uint8 images, and scales, crops and normalizes them itself.

    Pixels are resized bilinearly between their centres, without antialiasing, as cameras' own hardware and OpenCV's
    ``INTER_LINEAR`` do; Pillow antialiases when it shrinks, so a network that was trained on Pillow's images sees
    slightly sharper ones. Then the centre is cropped, and every pixel becomes (pixel · scale − mean) / std.

    With one mean and one standard deviation for all channels and no resizing, the first quantizer gets the scale and
    zero point of the 8-bit pixels themselves where that zero point is an integer, so that nothing is rounded.

    Args:
        network: A module or SOURCE that takes float images (batch, channels, height, width).
        resize: Height and width in pixels; one number is the length of the shorter side, the ratio is kept. The images
            of `Task.example` and all others must then have one size, unless `Task.dynamic` lets both sides vary and
            height and width are given. None does not resize.
        crop: Height and width of the centre that is kept, or one number for both; None keeps all.
        mean: Of every channel, or one number for all, of pixel · scale.
        std: The same for the standard deviation.
        scale: What pixels are multiplied by first.
        bgr: Whether the network wants blue, green, red where images are red, green, blue, or the other way round.
        layout: "NHWC", or "NCHW" for images with channels first.

    Raises:
        UsageError: A setting is out of its range.
    """

    means: torch.Tensor
    stds: torch.Tensor

    def __init__(
        self,
        network: nn.Module | str | Path,
        *,
        resize: Size | None = None,
        crop: Size | None = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        scale: float = 1 / 255,
        bgr: bool = False,
        layout: str = "NHWC",
    ) -> None:
        super().__init__()
        _require("layout", layout, layout in _LAYOUTS, f"one of {', '.join(_LAYOUTS)}")
        _require("scale", scale, scale > 0, "a positive number")
        for name, size in (("resize", resize), ("crop", crop)):
            _require(name, size, size is None or _is_size(size), "a number of pixels, or (height, width)")
        means, stds = ([float(v) for v in ([x] if isinstance(x, int | float) else x)] for x in (mean, std))
        _require("std", std, all(v > 0 for v in stds), "positive numbers")
        _require("mean", mean, len({len(means), len(stds), 1}) <= 2, "as many as std, or one")
        self.network = as_module(network)
        self.resize, self.crop, self.bgr, self.layout = resize, crop, bgr, layout
        # In pixels, so that 8-bit integers become the network's values by one subtraction and one division.
        self.mean = means[0] / scale if len(set(means)) == 1 else None
        self.std = stds[0] / scale if len(set(stds)) == 1 else None
        self.register_buffer("means", torch.tensor(means).view(1, -1, 1, 1) / scale, persistent=False)
        self.register_buffer("stds", torch.tensor(stds).view(1, -1, 1, 1) / scale, persistent=False)
        self.train(self.network.training)

    def forward(self, image: torch.Tensor, *more: Any, **named: Any) -> Any:
        """Return the network's outputs for images (batch, height, width, channels) uint8.

        Raises:
            SourceError: The images are not uint8 in four axes, or smaller than the crop.
        """
        if image.dtype != torch.uint8 or image.dim() != 4:
            raise SourceError(
                "the images are not 8-bit integers",
                code="images",
                got=f"{image.dtype} {tuple(image.shape)}",
                expected=f"torch.uint8, four axes in the order {self.layout}",
                remedy="give pixels as they are: normalizing is inside",
            )
        x = image.permute(0, 3, 1, 2) if self.layout == "NHWC" else image
        x = self._cropped(self._resized(x.float()))
        x = x.flip(1) if self.bgr else x
        x = x - (self.means if self.mean is None else self.mean)
        return self.network(x / (self.stds if self.std is None else self.std), *more, **named)

    def _resized(self, x: torch.Tensor) -> torch.Tensor:
        if self.resize is None:
            return x
        if isinstance(self.resize, int):
            height, width = int(x.shape[2]), int(x.shape[3])
            ratio = self.resize / min(height, width)
            size = (max(self.resize, round(height * ratio)), max(self.resize, round(width * ratio)))
        else:
            size = self.resize
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def _cropped(self, x: torch.Tensor) -> torch.Tensor:
        if self.crop is None:
            return x
        height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        if x.shape[2] < height or x.shape[3] < width:
            raise SourceError(
                "the images are smaller than the crop",
                code="images",
                got=f"{x.shape[2]} × {x.shape[3]} pixels",
                expected=f"at least {height} × {width}",
                remedy="resize= makes them larger",
            )
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        return x[:, :, top : top + height, left : left + width]


def _is_size(size: object) -> bool:
    sides = size if isinstance(size, tuple | list) else (size, size)
    return len(sides) == 2 and all(type(side) is int and 0 < side <= 1 << 15 for side in sides)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(
            f"Images({name}=...) can't be used", code="settings", field=name, got=repr(value), expected=expected
        )


__all__ = ["Images"]
