"""Convolutions with a dynamic number of groups, expressed as matrix products.

A network whose kernels depend on the sample (dynamic and conditional convolutions, StyleGAN's modulated ones, the
cross-correlation of trackers) moves the batch into the channels and calls a convolution with as many groups as there
are samples. No runtime supports that: in ONNX and OpenVINO the number of groups is a constant. So for each position of
the kernel the padded input is sliced, and a product per group sums them: the same sums in another order.

Yang et al., "CondConv: Conditionally Parameterized Convolutions for Efficient Inference", NeurIPS 2019, introduced
computing such a call as one grouped convolution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from penjing.errors import ExportError
from penjing.network.graph import line
from penjing.network.rewriting import END, Builder

aten = torch.ops.aten


def conv(build: Builder, a: dict[str, Any]) -> Any:
    """Rewrite a convolution with a dynamic number of groups; None if the number is constant.

    Raises:
        ExportError: The kernel's size varies too.
    """
    if isinstance(a["groups"], int):
        return None
    kernel = _kernel(build, a)
    n = len(kernel)
    stride, dilation = _each(a["stride"], n), _each(a["dilation"], n)
    if isinstance(a["padding"], str):
        total = [d * (k - 1) if a["padding"] == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        padding = [(both // 2, both - both // 2) for both in total]
    else:
        padding = [(p, p) for p in _each(a["padding"], n)]
    x = _padded(build, a["input"], padding)
    if _depthwise(build, a):  # the number of groups is left open: it follows the channels, even when some are pruned
        a = {**a, "groups": -1}
        weight = build(aten.flatten.using_ints, build(aten.unsqueeze.default, a["weight"], 1), 2)
        return _products(build, x, weight, kernel, stride, dilation, a)
    weight = build(aten.flatten.using_ints, a["weight"], 1)  # (groups · out, in · positions)
    weight = build(aten.reshape.default, weight, [a["groups"], -1, build.size(weight, 1)])
    return _products(build, x, weight, kernel, stride, dilation, a)


def _depthwise(build: Builder, a: dict[str, Any]) -> bool:
    """Whether every group has one channel in and one out."""
    weight = build.value(a["weight"])
    return bool(weight.shape[1] == 1) and bool(statically_known_true(weight.shape[0] == build.value(a["groups"])))


def conv_transpose(build: Builder, a: dict[str, Any]) -> Any:
    """Rewrite a transposed convolution with a dynamic number of groups, as a plain one of the zero-stuffed input.

    Raises:
        ExportError: The kernel's size varies too.
    """
    if isinstance(a["groups"], int):
        return None
    kernel = _kernel(build, a)
    n = len(kernel)
    dilation = _each(a["dilation"], n)
    x = a["input"]
    for dim, step in enumerate(_each(a["stride"], n), start=2):
        x = _spread(build, x, dim, step) if step > 1 else x
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    sides = zip(reach, _each(a["padding"], n), _each(a["output_padding"], n), strict=True)
    x = _padded(build, x, [(r - p, r - p + more) for r, p, more in sides])
    weight = build(aten.flatten.using_ints, a["weight"], 2)  # (groups · in, out, positions)
    weight = build(aten.flip.default, weight, [2])
    sizes = [a["groups"], -1, build.size(weight, 1), math.prod(kernel)]
    weight = build(aten.transpose.int, build(aten.reshape.default, weight, sizes), 1, 2)
    weight = build(aten.flatten.using_ints, weight, 2)  # (groups, out, in · positions)
    return _products(build, x, weight, kernel, [1] * n, dilation, a)


def _kernel(build: Builder, a: dict[str, Any]) -> list[int]:
    kernel = list(build.value(a["weight"]).shape[2:])
    if all(isinstance(size, int) for size in kernel):
        return kernel
    raise ExportError(
        f"a convolution has a kernel whose size varies{line(build.node)}",
        code="kernel-size",
        got=f"a weight of shape {list(build.value(a['weight']).shape)} and {a['groups']} groups",
        expected="a kernel of fixed height and width; the number of groups may vary with the batch",
        remedy="fix the size of the input that the kernel is computed from to the example's: "
        "Task(dynamic={...}) without its axes",
    )


def _products(
    build: Builder,
    x: fx.Node,
    weight: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    a: dict[str, Any],
) -> Any:
    """x (batch, groups · in, sizes …), weight (groups, out, in · positions) → (batch, groups · out, sizes …)."""
    places = []
    for place in itertools.product(*map(range, kernel)):
        part = x
        for dim, (at, size, step, apart) in enumerate(zip(place, kernel, stride, dilation, strict=True), start=2):
            behind = (size - 1 - at) * apart  # counted from the end, it is right for every size
            part = build(aten.slice.Tensor, part, dim, at * apart, -behind if behind else END, step)
        places.append(part)
    sizes = [build.size(places[0], dim) for dim in range(2, 2 + len(kernel))]
    columns = build(aten.flatten.using_ints, build(aten.stack.default, places, 2), 3)
    each = build.size(weight, 2) if a["groups"] == -1 else -1
    shape = [build.size(x, 0), a["groups"], each, build.size(columns, 3)]
    columns = build(aten.reshape.default, columns, shape)
    y = build(aten.flatten.using_ints, build(aten.matmul.default, weight, columns), 1, 2)
    y = build(aten.unflatten.int, y, -1, sizes) if len(sizes) > 1 else y
    if a["bias"] is None:
        return y
    bias = a["bias"]
    for _ in kernel:
        bias = build(aten.unsqueeze.default, bias, -1)
    return build(aten.add.Tensor, y, bias)


def _padded(build: Builder, x: fx.Node, padding: Sequence[tuple[int, int]]) -> Any:
    flat = [side for pair in reversed(padding) for side in pair]
    return build(aten.constant_pad_nd.default, x, flat, 0.0) if any(flat) else x


def _spread(build: Builder, x: fx.Node, dim: int, step: int) -> Any:
    """Insert `step` - 1 zeros between the values of an axis."""
    behind = build.value(x).dim() - 1 - dim
    wide = build(aten.unsqueeze.default, x, dim + 1)
    wide = build(aten.constant_pad_nd.default, wide, [0, 0] * behind + [0, step - 1], 0.0)
    return build(aten.slice.Tensor, build(aten.flatten.using_ints, wide, dim, dim + 1), dim, 0, 1 - step)


def _each(setting: Any, n: int) -> list[int]:
    sizes = [setting] if isinstance(setting, int) else list(setting)
    return sizes * n if len(sizes) == 1 else sizes
