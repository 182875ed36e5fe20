"""ONNX operators of signal processing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from penjing.onnx_files.node import Node, Value, bounded, number, tensor


def _window(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def apply(node: Node, size: Value) -> Any:
        import onnx

        count = int(number(node, size, "size"))
        bounded(node, [count])
        whole = count if node.get("periodic", 1) else count - 1
        kind = onnx.helper.tensor_dtype_to_np_dtype(node.get("output_datatype", 1))
        return torch.from_numpy(np.asarray(function(2 * np.pi * np.arange(count) / whole), kind))

    return apply


def _turns(count: int, rows: int, inverse: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a discrete Fourier transform, (rows, count)."""
    angle = 2 * np.pi * np.outer(np.arange(rows), np.arange(count)) / count
    sign = 1.0 if inverse else -1.0
    return torch.from_numpy(np.cos(angle)).to(dtype), torch.from_numpy(sign * np.sin(angle)).to(dtype)


def _dft(node: Node, x: Value, length: Value = None, axis: Value = None) -> torch.Tensor:
    value = tensor(x)
    along = node.get("axis", 1) if node.opset < 20 else (-2 if axis is None else int(number(node, axis, "axis")))
    along = along % value.dim()
    inverse, onesided = bool(node.get("inverse", 0)), bool(node.get("onesided", 0))
    count = value.shape[along] if not (inverse and onesided) else 2 * (value.shape[along] - 1)
    count = count if length is None else int(number(node, length, "length"))
    bounded(node, [count, count])
    moved = value.movedim(along, -2)
    if inverse and onesided:
        return _transformed(moved, count, inverse, onesided, node).movedim(-2, along)
    if moved.shape[-2] > count:
        moved = moved[..., :count, :]
    elif moved.shape[-2] < count:
        moved = torch.nn.functional.pad(moved, (0, 0, 0, count - moved.shape[-2]))
    return _transformed(moved, count, inverse, onesided, node).movedim(-2, along)


def _transformed(moved: torch.Tensor, count: int, inverse: bool, onesided: bool, node: Node) -> torch.Tensor:
    """(…, count, 1 or 2) → (…, rows, 2), or (…, count, 1) of a one-sided inverse."""
    if inverse and onesided:
        # The other half is the mirror of the first, conjugated.
        full = count
        half = moved[..., : full // 2 + 1, :]
        mirror = half[..., 1 : (full + 1) // 2, :].flip(-2)
        mirror = torch.stack([mirror[..., 0], -mirror[..., 1]], -1)
        moved = torch.cat([half, mirror], -2)
    rows = count // 2 + 1 if onesided and not inverse else count
    cos, sin = _turns(count, rows, inverse, moved.dtype)
    real = moved[..., 0]
    imaginary = moved[..., 1] if moved.shape[-1] == 2 else None
    a, b = real @ cos.t(), real @ sin.t()
    if imaginary is not None:
        a, b = a - imaginary @ sin.t(), b + imaginary @ cos.t()
    scale = 1 / count if inverse else 1.0
    if inverse and onesided:
        return (a * scale).unsqueeze(-1)
    return torch.stack([a, b], -1) * scale


def _stft(node: Node, x: Value, step: Value, window: Value = None, length: Value = None) -> torch.Tensor:
    value = tensor(x)
    value = value.unsqueeze(-1) if value.dim() == 2 else value
    hop = int(number(node, step, "frame step"))
    width = int(number(node, length, "frame length")) if length is not None else tensor(window).shape[0]
    frames = value.unfold(1, width, hop).transpose(2, 3)
    if window is not None:
        frames = frames * tensor(window).reshape(-1, 1).to(frames.dtype)
    return _transformed(frames, width, False, bool(node.get("onesided", 1)), node)


def _mel(node: Node, bins: Value, length: Value, rate: Value, low: Value, high: Value) -> Any:
    import onnx

    count, size, hertz = (int(number(node, v, "sizes")) for v in (bins, length, rate))
    bounded(node, [size // 2 + 1, count])
    first, last = (float(number(node, v, "edges")) for v in (low, high))

    def mel(f: float) -> float:
        return 2595 * math.log10(1 + f / 700)

    step = (mel(last) - mel(first)) / (count + 2)
    points = np.arange(count + 2) * step + mel(first)
    places = np.floor((size + 1) * (700 * (10 ** (points / 2595) - 1)) / hertz).astype(np.int64)
    result = np.zeros((size // 2 + 1, count))
    for i in range(count):
        a, b, c = places[i : i + 3]
        if b == a:
            result[b, i] = 1
        else:
            for j in range(a, b + 1):
                result[j, i] = (j - a) / (b - a)
        if c > b:
            for j in range(b, c):
                result[j, i] = (c - j) / (c - b)
    return torch.from_numpy(result.astype(onnx.helper.tensor_dtype_to_np_dtype(node.get("output_datatype", 1))))


OPERATORS: dict[str, Callable[..., Any]] = {
    "BlackmanWindow": _window(lambda t: 0.42 - 0.5 * np.cos(t) + 0.08 * np.cos(2 * t)),
    "DFT": _dft,
    "HammingWindow": _window(lambda t: 25 / 46 - 21 / 46 * np.cos(t)),
    "HannWindow": _window(lambda t: 0.5 - 0.5 * np.cos(t)),
    "MelWeightMatrix": _mel,
    "STFT": _stft,
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {
    "BlackmanWindow": (0,),
    "DFT": (1, 2),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "STFT": (1, 3),
}

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
