"""What the operators of a Core ML package compute, in torch: by the text of coremltools' definitions (MIL, iOS 18).

Values come in float32 where they are float16 in the package, and `penjing.runtimes.coreml_reading` rounds the results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penjing.errors import ArtifactError

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
_AVERAGE = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_LARGEST = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_TYPES = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.int32,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


def _list(value: Any) -> list[Any]:
    return value.tolist() if isinstance(value, Tensor) else list(value)


def _around(x: Tensor, pad: Any, value: float = 0.0) -> Tensor:
    """Padding of the last axes, given from the first of them to the last, as F.pad does not take it."""
    sizes = _list(pad)
    pairs = [sizes[i : i + 2] for i in range(0, len(sizes), 2)]
    return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=value)


def _padding(x: Tensor, pad_type: str, pad: Any, kernel: list[int], strides: list[int], dilations: list[int]) -> Any:
    """Sizes of the padding, from the first spatial axis to the last."""
    if pad_type == "valid":
        return [0] * (2 * len(kernel))
    if pad_type == "custom":
        return _list(pad)
    sizes: list[int] = []
    for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        less, more = total // 2, total - total // 2
        sizes += [less, more] if pad_type == "same" else [more, less]
    return sizes


def conv(x: Tensor, weight: Tensor, strides: Any, pad_type: str, dilations: Any, groups: int, **rest: Any) -> Tensor:
    """x (n, c, …), weight (out, c / groups, …)."""
    steps, spread = _list(strides), _list(dilations)
    padded = _around(x, _padding(x, pad_type, rest.get("pad"), list(weight.shape[2:]), steps, spread))
    y: Tensor = _CONV[x.dim()](padded, weight, rest.get("bias"), steps, 0, spread, groups)
    return y


def conv_transpose(
    x: Tensor, weight: Tensor, strides: Any, pad_type: str, dilations: Any, groups: int, **rest: Any
) -> Tensor:
    """x (n, c, …), weight (c, out / groups, …); what is padded is cut off, up to `output_shape`."""
    y: Tensor = _TRANSPOSED[x.dim()](x, weight, rest.get("bias"), _list(strides), 0, 0, groups, _list(dilations))
    pad = _list(rest["pad"]) if pad_type == "custom" else [0] * (2 * (x.dim() - 2))
    given = rest.get("output_shape")
    for i in range(x.dim() - 2):
        size = _list(given)[i + 2] if given is not None else y.shape[i + 2] - pad[2 * i] - pad[2 * i + 1]
        y = y.narrow(i + 2, pad[2 * i], min(size, y.shape[i + 2] - pad[2 * i]))
        if y.shape[i + 2] < size:
            y = F.pad(y, [0, 0] * (x.dim() - 3 - i) + [0, size - y.shape[i + 2]])
    return y


def avg_pool(x: Tensor, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any = None, **rest: Any) -> Tensor:
    """The mean of every window, with or without what is padded."""
    kernel, steps = _list(kernel_sizes), _list(strides)
    sizes = _padding(x, pad_type, pad, kernel, steps, [1] * len(kernel))
    pool: Any = _AVERAGE[x.dim()]
    ceil, outside = bool(rest.get("ceil_mode")), bool(rest.get("exclude_padding_from_average"))
    if sizes[::2] == sizes[1::2]:
        y: Tensor = pool(x, kernel, steps, sizes[::2], ceil, not outside)
        return y
    mean: Tensor = pool(_around(x, sizes), kernel, steps, 0, ceil)
    return mean / pool(_around(torch.ones_like(x), sizes), kernel, steps, 0, ceil) if outside else mean


def max_pool(x: Tensor, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any = None, **rest: Any) -> Tensor:
    """The largest of every window."""
    kernel, steps = _list(kernel_sizes), _list(strides)
    sizes = _padding(x, pad_type, pad, kernel, steps, [1] * len(kernel))
    padded = _around(x, sizes, -torch.inf)
    y: Tensor = _LARGEST[x.dim()](padded, kernel, steps, 0, 1, bool(rest.get("ceil_mode")))
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in), weight (out, in)."""
    y: Tensor = F.linear(x, weight, bias)
    return y


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Products of matrices."""
    z: Tensor = (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)
    return z


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(query · keyᵀ / √width + mask) · value."""
    y: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask)
    return y


def layer_norm(x: Tensor, axes: Any, epsilon: float, gamma: Any = None, beta: Any = None) -> Tensor:
    """Normalized over the axes."""
    over = tuple(_list(axes))
    y = (x - x.mean(over, keepdim=True)) / (x.var(over, keepdim=True, correction=0) + epsilon).sqrt()
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, epsilon: float, gamma: Any = None, beta: Any = None
) -> Tensor:
    """By stored statistics of every channel."""
    y = (x - _by_channel(mean, x)) / (_by_channel(variance, x) + epsilon).sqrt()
    y = y if gamma is None else y * _by_channel(gamma, x)
    return y if beta is None else y + _by_channel(beta, x)


def instance_norm(x: Tensor, epsilon: float, gamma: Any = None, beta: Any = None) -> Tensor:
    """Every channel of every sample."""
    return F.instance_norm(x, None, None, gamma, beta, True, 0.0, epsilon)


def quantize(input: Tensor, scale: Any, output_dtype: str, zero_point: Any = 0, axis: int = 0) -> Tensor:
    """To integers, rounding half to even."""
    info = torch.iinfo(_TYPES[output_dtype])
    q = torch.round(input / _along(scale, input, axis)) + _along(zero_point, input, axis)
    limited: Tensor = q.clamp(info.min, info.max)
    return limited


def dequantize(input: Tensor, scale: Any, zero_point: Any = 0, axis: int = 0) -> Tensor:
    """From integers."""
    y: Tensor = (input.float() - _along(zero_point, input, axis)) * _along(scale, input, axis)
    return y


def _along(values: Any, x: Tensor, axis: int) -> Any:
    if not isinstance(values, Tensor) or values.dim() == 0:
        return values
    return values.float().reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def reshape(x: Tensor, shape: Any) -> Tensor:
    """To a shape, of which 0 keeps an axis and −1 takes the rest."""
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(_list(shape))])


def slice_by_index(x: Tensor, begin: Any, end: Any, **rest: Any) -> Tensor:
    """Slices as of NumPy; a mask leaves a bound out, or takes one element and drops the axis."""
    rank = x.dim()
    steps = _list(rest["stride"]) if rest.get("stride") is not None else [1] * rank

    def mask(name: str) -> list[bool]:
        return _list(rest[name]) if rest.get(name) is not None else [False] * rank

    where: list[Any] = []
    for first, last, step, no_first, no_last, one in zip(
        _list(begin), _list(end), steps, mask("begin_mask"), mask("end_mask"), mask("squeeze_mask"), strict=True
    ):
        where.append(first if one else slice(None if no_first else first, None if no_last else last, step))
    return torch.from_numpy(np.array(x.numpy()[tuple(where)]))


def gather(x: Tensor, indices: Any, axis: int = 0, batch_dims: int = 0, **rest: Any) -> Tensor:
    """Slices of an axis."""
    if batch_dims:
        raise ArtifactError(
            "the package can't be computed here", code="operator", got="gather with batch_dims", expected="0 of them"
        )
    return torch.from_numpy(np.asarray(np.take(x.numpy(), torch.as_tensor(indices).long().numpy(), axis=axis)))


def pad(x: Tensor, pad: Any, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Of the last axes."""
    sizes = _list(pad)
    pairs = [(0, 0)] * (x.dim() - len(sizes) // 2) + [(sizes[i], sizes[i + 1]) for i in range(0, len(sizes), 2)]
    if mode == "constant":
        return torch.from_numpy(np.pad(x.numpy(), pairs, constant_values=constant_val))
    return torch.from_numpy(np.pad(x.numpy(), pairs, mode="edge" if mode == "replicate" else "reflect"))


def upsample_bilinear(
    x: Tensor, scale_factor_height: float, scale_factor_width: float, align_corners: bool, **rest: Any
) -> Tensor:
    """By factors."""
    size = [int(x.shape[2] * scale_factor_height), int(x.shape[3] * scale_factor_width)]
    return F.interpolate(x, size, mode="bilinear", align_corners=bool(align_corners))


def upsample_nearest(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    """By factors."""
    return F.interpolate(x, [int(x.shape[2] * scale_factor_height), int(x.shape[3] * scale_factor_width)])


def split(x: Tensor, axis: int, num_splits: int = 0, split_sizes: Any = None) -> tuple[Tensor, ...]:
    """Parts of an axis."""
    sizes = _list(split_sizes) if split_sizes is not None else x.shape[axis] // num_splits
    return torch.split(x, sizes, axis)


def topk(x: Tensor, k: int, axis: int = -1, ascending: bool = False, **rest: Any) -> tuple[Tensor, ...]:
    """The largest or the smallest, and where they are."""
    return tuple(torch.topk(x, k, axis, largest=not ascending))


def _arguments(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(x: Tensor, axis: int, keep_dims: bool = False, **rest: Any) -> Tensor:
        return function(x, axis, bool(keep_dims))

    return apply


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(x: Tensor, axes: Any = None, keep_dims: bool = False) -> Tensor:
        over = tuple(_list(axes)) if axes is not None else tuple(range(x.dim()))
        return function(x, over, bool(keep_dims))

    return apply


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _integer(x: Tensor, y: Any) -> bool:
    return not x.is_floating_point() and not (isinstance(y, Tensor) and y.is_floating_point())


def _at_least_1d(value: Any) -> Tensor:
    """A number among what is concatenated, such as a size, is a vector of one."""
    tensor = torch.as_tensor(value)
    return tensor if tensor.dim() else tensor.reshape(1)


def _floor_div(x: Tensor, y: Any) -> Tensor:
    return torch.div(torch.as_tensor(x), y, rounding_mode="floor")


_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    **{n: getattr(torch, n) for n in ("relu", "sigmoid", "tanh", "exp", "exp2", "sqrt", "square", "abs", "erf", "sin")},
    **{n: getattr(torch, n) for n in ("cos", "tan", "atan", "floor", "ceil", "round", "sign", "logical_not", "sinh")},
    "relu6": F.relu6,
    "silu": F.silu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "identity": lambda x: x,
}
_TWO: dict[str, Callable[[Any, Any], Tensor]] = {
    **{
        n: getattr(torch, n) for n in ("add", "sub", "mul", "pow", "maximum", "minimum", "not_equal", "less", "greater")
    },
    **{n: getattr(torch, n) for n in ("less_equal", "greater_equal", "logical_and", "logical_or", "logical_xor")},
    "equal": torch.eq,
    "floor_div": _floor_div,
    "mod": torch.remainder,
    "real_div": lambda x, y: _floor_div(x, y) if _integer(x, y) else x / y,
}


def _of_one(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: function(x)


def _of_two(function: Callable[[Any, Any], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: function(torch.as_tensor(x), torch.as_tensor(y))


OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: _of_one(f) for name, f in _ONE.items()},
    **{name: _of_two(f) for name, f in _TWO.items()},
    "conv": conv,
    "conv_transpose": conv_transpose,
    "avg_pool": avg_pool,
    "max_pool": max_pool,
    "linear": linear,
    "matmul": matmul,
    "scaled_dot_product_attention": attention,
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "quantize": quantize,
    "dequantize": dequantize,
    "reshape": reshape,
    "pad": pad,
    "slice_by_index": slice_by_index,
    "gather": gather,
    "upsample_bilinear": upsample_bilinear,
    "split": split,
    "upsample_nearest_neighbor": upsample_nearest,
    "topk": topk,
    "gelu": _gelu,
    **{f"reduce_{n}": _reduced(getattr(torch, f)) for n, f in (("mean", "mean"), ("sum", "sum"), ("max", "amax"))},
    "reduce_min": _reduced(torch.amin),
    "reduce_argmax": _arguments(torch.argmax),
    "reduce_argmin": _arguments(torch.argmin),
    "reduce_log_sum_exp": _reduced(torch.logsumexp),
    "reduce_l2_norm": _reduced(lambda x, over, keep: x.square().sum(over, keep).sqrt()),
    "log": lambda x, epsilon=0.0: torch.log(x + epsilon),
    "rsqrt": lambda x, epsilon=0.0: torch.rsqrt(x + epsilon),
    "inverse": lambda x, epsilon=0.0: 1 / (x + epsilon),
    "elu": lambda x, alpha=1.0: F.elu(x, alpha),
    "leaky_relu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "prelu": lambda x, alpha: F.prelu(x, torch.as_tensor(alpha).reshape(-1)),
    "thresholded_relu": lambda x, alpha=1.0: torch.where(x >= alpha, x, torch.zeros_like(x)),
    "reverse": lambda x, axes=None: x.flip(tuple(_list(axes)) if axes is not None else tuple(range(x.dim()))),
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "sigmoid_hard": lambda x, alpha=0.2, beta=0.5: (x * alpha + beta).clamp(0, 1),
    "softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "transpose": lambda x, perm: x.permute(_list(perm)),
    "expand_dims": lambda x, axes: torch.from_numpy(np.expand_dims(x.numpy(), tuple(_list(axes)))),
    "squeeze": lambda x, axes=None: x.squeeze() if axes is None else x.squeeze(tuple(_list(axes))),
    "concat": lambda values, axis, interleave=False: torch.cat([_at_least_1d(v) for v in values], axis),
    "stack": lambda values, axis: torch.stack([torch.as_tensor(v) for v in values], axis),
    "cast": lambda x, dtype: torch.as_tensor(x).to(_TYPES[dtype]),
    "shape": lambda x: torch.tensor(x.shape, dtype=torch.int32),
    "select": lambda cond, a, b: torch.where(torch.as_tensor(cond).bool(), torch.as_tensor(a), torch.as_tensor(b)),
    "tile": lambda x, reps: x.repeat(_list(reps)),
    "fill": lambda shape, value=0.0: torch.full(_list(shape), value),
    "fill_like": lambda ref_tensor, value=0.0: torch.full(ref_tensor.shape, value),
    "range_1d": lambda start, end, step: torch.arange(start, end, step),
    "cumsum": lambda x, axis=0, exclusive=False, reverse=False: x.cumsum(axis),
    "pixel_shuffle": lambda x, upscale_factor: F.pixel_shuffle(x, upscale_factor),
    "einsum": lambda values, equation: torch.einsum(equation, *values),
    "gather_along_axis": lambda x, indices, axis=0, **rest: torch.gather(x, axis, torch.as_tensor(indices).long()),
}
"""By the operator's name: a function of its arguments, which gives one tensor, or a tuple."""


def rounded(value: Tensor, dtype: str) -> Tensor:
    """A result in the type that the package says, and float16 as float32 with what float16 holds of it."""
    kind = _TYPES[dtype]
    return value.to(kind).float() if kind == torch.float16 else value.to(kind)
