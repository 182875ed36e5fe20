"""ONNX operators that sample images between their pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from penjing.onnx_files.node import Node, Value, bounded, sizes, tensor


def _resize(node: Node, x: Value, *more: Value) -> torch.Tensor:
    value = tensor(x)
    if node.opset < 11:
        roi, scales, target = None, more[0] if more else np.asarray(node.get("scales"), np.float32), None
        transform = "asymmetric"
    else:
        roi, scales, target = (*more, None, None, None)[:3]
        transform = node.get("coordinate_transformation_mode", "half_pixel")
    axes = [int(a) % value.dim() for a in node.get("axes", range(value.dim()))]
    factors: dict[int, Any] = {}
    results: dict[int, Any] = {}
    if target is not None and (not isinstance(target, np.ndarray) or target.size):
        listed = sizes(node, target, "sizes")
        policy = node.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            choose = min if policy == "not_larger" else max
            scale = choose(n / value.shape[a] for a, n in zip(axes, listed, strict=True))
            for a in axes:
                factors[a], results[a] = scale, int(math.floor(scale * value.shape[a] + 0.5))
        else:
            for a, n in zip(axes, listed, strict=True):
                results[a] = n
                factors[a] = n / value.shape[a] if isinstance(n, int) and isinstance(value.shape[a], int) else None
    else:
        if not isinstance(scales, np.ndarray):
            raise node.refuse("its scales are computed from the values of tensors", "sizes that change with the values")
        for a, s in zip(axes, scales.reshape(-1), strict=True):
            factors[a] = s if isinstance(s, torch.SymFloat) else float(s)
            n = value.shape[a]
            exact = isinstance(s, torch.SymFloat) or float(s) != int(s)
            results[a] = _whole(n * s) if exact else n * int(s)
    bounded(node, [results.get(a, n) for a, n in enumerate(value.shape)])
    box = None
    if transform == "tf_crop_and_resize":
        flat = [float(v) for v in np.asarray(roi).reshape(-1)]
        box = {a: (flat[i], flat[i + len(axes)]) for i, a in enumerate(axes)}
    changed = [a for a in axes if box is not None or not statically_known_true(results[a] == value.shape[a])]
    mode = node.get("mode", "nearest")
    quick = _interpolated(node, value, changed, results, factors, mode, transform)
    if quick is not None:
        return quick
    for a in changed:
        if not isinstance(value.shape[a], int) or not isinstance(results[a], int):
            value = _resampled(node, value, a, results[a], factors[a], mode, transform)
            continue
        value = _resized(node, value, a, results[a], factors[a], None if box is None else box[a], mode, transform)
    return value


def _whole(size: Any) -> Any:
    """A size rounded down; it may be a symbol."""
    if isinstance(size, torch.SymFloat):
        return torch.sym_int(size)  # type: ignore[no-untyped-call]
    return math.floor(size)


def _interpolated(
    node: Node, x: torch.Tensor, axes: list[int], results: Any, factors: Any, mode: str, transform: str
) -> torch.Tensor | None:
    """By torch's own interpolation, where it is the same; it takes the last axes of an image."""
    rank = x.dim() - 2
    if not axes or not 1 <= rank <= 3 or min(axes) < 2 or node.get("exclude_outside", 0) or node.get("antialias", 0):
        return None
    if not x.is_floating_point():
        return None
    size = [results.get(a, x.shape[a]) for a in range(2, x.dim())]
    exact = all(
        factors.get(a) is None
        or (isinstance(x.shape[a], int) and isinstance(results[a], int) and _near(factors[a] * x.shape[a], results[a]))
        or (not isinstance(x.shape[a], int) and float(factors[a]).is_integer())
        for a in axes
    )
    if not exact:
        return None
    if mode == "nearest":
        shrinks = any(isinstance(results[a], int) and results[a] < x.shape[a] for a in axes)
        default = "round_prefer_floor" if node.opset > 10 else "ceil" if shrinks else "floor"
        rounding = node.get("nearest_mode", default)
        # Where every pixel is repeated as often, all centres lie nearest to the same one.
        repeats = all(isinstance(factors.get(a), float) and factors[a] >= 1 and factors[a].is_integer() for a in axes)
        centred = repeats and transform in _CENTRED and rounding.startswith("round")
        if centred or (transform == "asymmetric" and rounding == "floor"):
            return F.interpolate(x, size, mode="nearest")
        return None
    above = all(not isinstance(results[a], int) or results[a] > 1 for a in axes)
    smooth = transform in ("half_pixel", "half_pixel_symmetric") or (transform == "pytorch_half_pixel" and above)
    if not smooth and not (transform == "align_corners" and above):
        return None
    if mode == "linear":
        kind = ("linear", "bilinear", "trilinear")[rank - 1]
        return F.interpolate(x, size, mode=kind, align_corners=transform == "align_corners")
    if mode == "cubic" and rank == 2 and node.get("cubic_coeff_a", -0.75) == -0.75:
        return F.interpolate(x, size, mode="bicubic", align_corners=transform == "align_corners")
    return None


_CENTRED = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel")


def _near(a: Any, b: Any) -> bool:
    return math.isclose(float(a), float(b), rel_tol=1e-6)


def _resized(
    node: Node, x: torch.Tensor, axis: int, size: int, factor: float, box: Any, mode: str, transform: str
) -> torch.Tensor:
    """One axis, as a product with the matrix of its weights, or by the index of the nearest."""
    count = x.shape[axis]
    factor = size / count if factor is None else factor
    bounded(node, [size, count])
    places = _coordinates(np.arange(size, dtype=np.float64), count, size, factor, box, transform)
    if mode == "nearest":
        # The first sets say no more than their test, in which what shrinks is rounded up.
        default = "round_prefer_floor" if node.opset > 10 else "floor" if factor >= 1 else "ceil"
        index = np.clip(_ROUND[node.get("nearest_mode", default)](places), 0, count - 1).astype(np.int64)
        return x.index_select(axis, torch.from_numpy(index))
    matrix = _weights(node, places, count, factor, mode)
    outside = (places < 0) | (places > count - 1)
    dtype = x.dtype if x.is_floating_point() else torch.float32
    result = torch.matmul(x.to(dtype).movedim(axis, -1), torch.from_numpy(matrix.T.copy()).to(dtype))
    if transform == "tf_crop_and_resize" and outside.any():
        fill = torch.full_like(result, node.get("extrapolation_value", 0.0))
        result = torch.where(torch.from_numpy(outside), fill, result)
    return result.movedim(-1, axis).to(x.dtype)


def _resampled(
    node: Node, x: torch.Tensor, axis: int, size: Any, factor: Any, mode: str, transform: str
) -> torch.Tensor:
    """One axis whose sizes vary, by the indices of the pixels that every result is made of."""
    if transform == "tf_crop_and_resize" or node.get("exclude_outside", 0) or node.get("antialias", 0):
        raise node.refuse("its sizes vary, and it is not computed from pixels alone", f"{mode}, {transform}")
    many, own = (torch.scalar_tensor(n, dtype=torch.float32) for n in (size, x.shape[axis]))
    scale = torch.scalar_tensor(factor, dtype=torch.float32) if isinstance(factor, float) else many / own
    at = torch.arange(size, dtype=torch.float32)
    if transform == "align_corners":
        places = at * (own - 1) / (many - 1).clamp(min=1)
    elif transform == "half_pixel_symmetric":
        places = own / 2 * (1 - many / (scale * own)) + (at + 0.5) / scale - 0.5
    else:
        ahead = 0.0 if transform == "asymmetric" else 0.5
        places = (at + ahead) / scale - (0.0 if transform == "tf_half_pixel_for_nn" else ahead)

    last = torch.scalar_tensor(x.shape[axis] - 1, dtype=torch.int64)

    def pixels(index: torch.Tensor) -> torch.Tensor:
        return x.index_select(axis, torch.minimum(index.clamp(min=0), last))

    if mode == "nearest":
        shrinks = isinstance(factor, float) and factor < 1
        default = "round_prefer_floor" if node.opset > 10 else "ceil" if shrinks else "floor"
        return pixels(_NEAREST[node.get("nearest_mode", default)](places).long())
    dtype, x = x.dtype, x if x.is_floating_point() else x.float()
    low = places.floor().long()
    shape = [-1 if a == axis else 1 for a in range(x.dim())]
    taps = (0, 1) if mode == "linear" else (-1, 0, 1, 2)
    parts = [
        pixels(low + tap) * _weight((places - low - tap).abs(), node, mode).reshape(shape).to(x.dtype) for tap in taps
    ]
    return torch.stack(parts).sum(0).to(dtype)


_NEAREST: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
    "simple": torch.floor,
}


def _weight(distance: torch.Tensor, node: Node, mode: str) -> torch.Tensor:
    """What a pixel counts at a distance from the place, in pixels."""
    if mode == "linear":
        return 1 - distance
    a = node.get("cubic_coeff_a", -0.75)
    near = ((a + 2) * distance - (a + 3)) * distance.square() + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, far)


def _coordinates(at: Any, count: int, size: int, factor: float, box: Any, transform: str) -> Any:
    if transform == "align_corners":
        return np.zeros_like(at) if size == 1 else at * (count - 1) / (factor * count - 1)
    if transform == "asymmetric":
        return at / factor
    if transform == "pytorch_half_pixel":
        return (at + 0.5) / factor - 0.5 if factor * count > 1 else np.full_like(at, -0.5)
    if transform == "tf_half_pixel_for_nn":
        return (at + 0.5) / factor
    if transform == "half_pixel_symmetric":
        adjust = size / (factor * count)
        return count / 2 * (1 - adjust) + (at + 0.5) / factor - 0.5
    if transform == "tf_crop_and_resize":
        start, end = box
        if size > 1:
            return start * (count - 1) + at * (end - start) * (count - 1) / (size - 1)
        return np.full_like(at, 0.5 * (start + end) * (count - 1))
    return (at + 0.5) / factor - 0.5


_ROUND: dict[str, Callable[[Any], Any]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "simple": np.floor,
}


def _weights(node: Node, places: Any, count: int, factor: float, mode: str) -> Any:
    """(size, count): how much of each pixel every result takes."""
    narrow = min(factor, 1.0) if node.get("antialias", 0) else 1.0
    reach = (1 if mode == "linear" else 2) / narrow
    a = node.get("cubic_coeff_a", -0.75)
    matrix = np.zeros((len(places), count))
    for row, place in enumerate(places):
        low = math.ceil(place - reach) if narrow < 1 else math.floor(place) - (0 if mode == "linear" else 1)
        high = math.floor(place + reach) if narrow < 1 else low + (1 if mode == "linear" else 3)
        taps = np.arange(low, high + 1)
        distance = np.abs(taps - place) * narrow
        if mode == "linear":
            weight = np.maximum(1 - distance, 0)
        else:
            near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
            far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
            weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
        if node.get("exclude_outside", 0) or node.get("antialias", 0) and node.get("exclude_outside", 0):
            weight = np.where((taps >= 0) & (taps < count), weight, 0)
        if narrow < 1 or node.get("exclude_outside", 0):
            weight = weight / weight.sum()
        np.add.at(matrix[row], np.clip(taps, 0, count - 1), weight)
    return matrix


def _upsample(node: Node, x: Value, scales: Value = None) -> torch.Tensor:
    return _resize(node, x, np.asarray(node.get("scales"), np.float32) if scales is None else scales)


def _grid_sample(node: Node, x: Value, grid: Value) -> torch.Tensor:
    mode = {
        "bilinear": "bilinear",
        "linear": "bilinear",
        "nearest": "nearest",
        "bicubic": "bicubic",
        "cubic": "bicubic",
    }
    value = tensor(x)
    how = mode[node.get("mode", "linear")]
    if value.dim() not in (4, 5):
        raise node.refuse("torch samples images and volumes", f"{value.dim() - 2} spatial axes")
    return F.grid_sample(
        value, tensor(grid), how, node.get("padding_mode", "zeros"), bool(node.get("align_corners", 0))
    )


def _affine_grid(node: Node, theta: Value, size: Value) -> torch.Tensor:
    return F.affine_grid(tensor(theta), sizes(node, size, "size"), bool(node.get("align_corners", 0)))


def _roi_align(node: Node, x: Value, rois: Value, batch: Value) -> torch.Tensor:
    """Means or maxima of bilinear samples in a grid of cells of every box (He et al., 2017)."""
    value, boxes, owner = tensor(x), tensor(rois), tensor(batch).long()
    high, wide = node.get("output_height", 1), node.get("output_width", 1)
    ratio, scale = node.get("sampling_ratio", 0), node.get("spatial_scale", 1.0)
    half = (
        node.get("coordinate_transformation_mode", "half_pixel" if node.opset >= 16 else "output_half_pixel")
        == "half_pixel"
    )
    if ratio <= 0:
        raise node.refuse("how many samples it takes follows from the values of its boxes", "sampling_ratio 0")
    shift = 0.5 if half else 0.0
    x1, y1, x2, y2 = (boxes[:, i] * scale - shift for i in range(4))
    width, height = x2 - x1, y2 - y1
    if not half:
        width, height = width.clamp(min=1.0), height.clamp(min=1.0)
    rows, columns = value.shape[2:]
    steps_y = (torch.arange(high * ratio) + 0.5) / (high * ratio)
    steps_x = (torch.arange(wide * ratio) + 0.5) / (wide * ratio)
    ys = y1.unsqueeze(1) + height.unsqueeze(1) * steps_y
    xs = x1.unsqueeze(1) + width.unsqueeze(1) * steps_x
    taken = value.index_select(0, owner).flatten(2)

    def corners(at: torch.Tensor, count: Any) -> Any:
        outside = (at < -1) | (at > count)
        place = at.clamp(0, count - 1)
        low = place.floor()
        part = place - low
        return outside, low.long(), (low.long() + 1).clamp(max=count - 1), part

    out_y, low_y, high_y, part_y = corners(ys, rows)
    out_x, low_x, high_x, part_x = corners(xs, columns)
    weights = []
    for row, wy in ((low_y, 1 - part_y), (high_y, part_y)):
        for column, wx in ((low_x, 1 - part_x), (high_x, part_x)):
            index = (row.unsqueeze(2) * columns + column.unsqueeze(1)).flatten(1)
            values = taken.gather(2, index.unsqueeze(1).expand(-1, taken.shape[1], -1))
            weights.append(values * (wy.unsqueeze(2) * wx.unsqueeze(1)).flatten(1).unsqueeze(1))
    inside = (~(out_y.unsqueeze(2) | out_x.unsqueeze(1))).flatten(1).unsqueeze(1)
    maxima = node.get("mode", "avg") == "max"
    if maxima:  # of the four weighted corners, as runtimes compute it
        samples = torch.where(inside, torch.stack(weights).amax(0), torch.zeros_like(weights[0]))
    else:
        samples = torch.where(inside, weights[0] + weights[1] + weights[2] + weights[3], torch.zeros_like(weights[0]))
    cells = samples.reshape(samples.shape[0], samples.shape[1], high, ratio, wide, ratio)
    return cells.amax((3, 5)) if maxima else cells.mean((3, 5))


OPERATORS: dict[str, Callable[..., Any]] = {
    "AffineGrid": _affine_grid,
    "GridSample": _grid_sample,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "Upsample": _upsample,
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {"AffineGrid": (1,), "Resize": (1, 2, 3), "Upsample": (1,)}

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
