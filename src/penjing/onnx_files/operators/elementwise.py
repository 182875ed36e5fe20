"""ONNX operators that compute every element by itself.

Where torch or a runtime has no kernel for a small integer type, the arithmetic is done in int64 and wrapped back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from penjing.onnx_files.node import Node, Value, is_known, number, tensor

_PLAIN = frozenset((torch.int32, torch.int64, torch.bool))


def operand(value: Value, rank: int = 0) -> Any:
    """A value for arithmetic: a known number as a number, so that it stays one in the captured network.

    Args:
        value: Of any shape.
        rank: How many axes the other operand has, to which a single number may be spread.
    """
    if is_known(value) and value.size == 1 and value.ndim <= rank:
        return value.item() if isinstance(value.item(), bool | int | float | torch.SymInt) else tensor(value)
    return tensor(value)


def _each(function: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    return lambda node, x: function(tensor(x))


def _whole(function: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    """Of any type: integers that torch computes nothing with are widened."""

    def apply(_: Node, x: Value) -> torch.Tensor:
        value = tensor(x)
        result: torch.Tensor = function(value if _narrow(value) is None else value.long())
        return result if _narrow(value) is None else result.to(value.dtype)

    return apply


def _narrow(value: Any) -> torch.dtype | None:
    """The type of integers that are computed in int64; None for all others."""
    if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype in _PLAIN:
        return None
    return None if value.dtype.is_complex else value.dtype


def _two(function: Callable[[Any, Any], Any], commutes: bool = False) -> Callable[..., Any]:
    def apply(_: Node, a: Value, b: Value) -> torch.Tensor:
        if commutes and is_known(a) and not is_known(b):
            a, b = b, a
        # A number stands on the right alone, where exporters take it.
        one = tensor(a)
        other = operand(b, one.dim()) if _any_tensor(a, b) else tensor(b)
        narrow = _narrow(one) or _narrow(other)
        if narrow is None:
            result: torch.Tensor = function(one, other)
            return result
        one, other = (value.long() if isinstance(value, torch.Tensor) else value for value in (one, other))
        wide: torch.Tensor = function(one, other)
        return wide.to(narrow)

    return apply


def _compare(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(_: Node, a: Value, b: Value) -> Any:
        one = tensor(a)
        other = operand(b, one.dim()) if _any_tensor(a, b) else tensor(b)
        if _narrow(one) is not None or _narrow(other) is not None:
            one, other = (value.long() if isinstance(value, torch.Tensor) else value for value in (one, other))
        return function(one, other)

    return apply


def _any_tensor(a: Value, b: Value) -> bool:
    return isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor)


def _many(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    pair = _two(function)

    def apply(node: Node, *values: Value) -> torch.Tensor:
        result = tensor(values[0])
        for value in values[1:]:
            result = pair(node, result, value)
        return result

    return apply


def _mean(node: Node, *values: Value) -> Any:
    return _many(torch.add)(node, *values) / len(values)


def _divide(a: Any, b: Any) -> torch.Tensor:
    floating = [
        value.is_floating_point() if isinstance(value, torch.Tensor) else isinstance(value, float) for value in (a, b)
    ]
    return torch.div(a, b) if any(floating) else torch.div(a, b, rounding_mode="trunc")


def _largest(a: Any, b: Any) -> torch.Tensor:
    return torch.maximum(*_tensors_like(a, b))


def _smallest(a: Any, b: Any) -> torch.Tensor:
    return torch.minimum(*_tensors_like(a, b))


def _tensors_like(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    like = a if isinstance(a, torch.Tensor) else b
    return tuple(v if isinstance(v, torch.Tensor) else torch.full_like(like, v) for v in (a, b))  # type: ignore[return-value]


def _mod(node: Node, a: Value, b: Value) -> Any:
    return _two(torch.fmod if node.get("fmod", 0) else torch.remainder)(node, a, b)


def _power(_: Node, a: Value, b: Value) -> torch.Tensor:
    base = tensor(a)
    exponent = operand(b, base.dim())
    result = torch.pow(base.double() if not base.is_floating_point() else base, exponent)
    return result.to(base.dtype)


def _shift(node: Node, a: Value, b: Value) -> torch.Tensor:
    value = tensor(a)
    amount = tensor(b).long()
    if value.dtype == torch.uint64 and node.get("direction") == "RIGHT":
        # The sign is a bit like the others: the first step of the shift clears it.
        signed = value.view(torch.int64)
        half = torch.bitwise_right_shift(signed, 1) & 0x7FFFFFFFFFFFFFFF
        shifted = torch.where(amount > 0, torch.bitwise_right_shift(half, (amount - 1).clamp(min=0)), signed)
        return shifted.view(torch.uint64)
    shift = torch.bitwise_left_shift if node.get("direction") == "LEFT" else torch.bitwise_right_shift
    return shift(value.long(), amount).to(value.dtype)


def _not_bits(_: Node, x: Value) -> torch.Tensor:
    value = tensor(x)
    return value.long().bitwise_not().to(value.dtype)


def _clip(node: Node, x: Value, low: Value = None, high: Value = None) -> torch.Tensor:
    value = tensor(x)
    limits = [
        node.get(name) if given is None else operand(given, value.dim())
        for name, given in (("min", low), ("max", high))
    ]
    if all(limit is None for limit in limits):
        return value
    narrow = _narrow(value)
    wide = value if narrow is None else value.long()
    if any(isinstance(limit, torch.Tensor) for limit in limits):
        for limit, choose in zip(limits, (torch.maximum, torch.minimum), strict=True):
            if limit is not None:
                wide = choose(wide, torch.as_tensor(limit).to(wide.dtype))
    else:
        wide = torch.clamp(wide, *limits)  # one operator, as networks of torch have it
    return wide if narrow is None else wide.to(narrow)


def _gelu(node: Node, x: Value) -> torch.Tensor:
    return F.gelu(tensor(x), approximate=node.get("approximate", "none"))


def _celu(node: Node, x: Value) -> torch.Tensor:
    return F.celu(tensor(x), node.get("alpha", 1.0))


def _elu(node: Node, x: Value) -> torch.Tensor:
    return F.elu(tensor(x), node.get("alpha", 1.0))


def _leaky(node: Node, x: Value) -> torch.Tensor:
    return F.leaky_relu(tensor(x), node.get("alpha", 0.01))


def _selu(node: Node, x: Value) -> torch.Tensor:
    value = tensor(x)
    alpha, gamma = node.get("alpha", 1.6732631921768188), node.get("gamma", 1.0507010221481323)
    if abs(alpha - 1.6732632423543772) < 1e-6 and abs(gamma - 1.0507009873554805) < 1e-6:
        return F.selu(value)
    scaled: torch.Tensor = gamma * torch.where(value > 0, value, alpha * (value.exp() - 1))
    return scaled


def _hard_sigmoid(node: Node, x: Value) -> torch.Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    value = tensor(x)
    scaled: torch.Tensor = value * alpha + beta
    return F.hardsigmoid(value) if _near(alpha, 1 / 6) and _near(beta, 0.5) else scaled.clamp(0, 1)


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)


def _swish(node: Node, x: Value) -> torch.Tensor:
    value, alpha = tensor(x), node.get("alpha", 1.0)
    return F.silu(value) if alpha == 1 else value * torch.sigmoid(value * alpha)


def _shrink(node: Node, x: Value) -> torch.Tensor:
    value, limit, bias = tensor(x), node.get("lambd", 0.5), node.get("bias", 0.0)
    wide = value.double() if not value.is_floating_point() else value
    zero = torch.zeros_like(wide)
    return torch.where(wide < -limit, wide + bias, torch.where(wide > limit, wide - bias, zero)).to(value.dtype)


def _thresholded(node: Node, x: Value) -> torch.Tensor:
    value = tensor(x)
    return torch.where(value > node.get("alpha", 1.0), value, torch.zeros_like(value))


def _is_infinite(node: Node, x: Value) -> torch.Tensor:
    value = tensor(x)
    none = torch.zeros_like(value, dtype=torch.bool)
    positive = value == math.inf if node.get("detect_positive", 1) else none
    negative = value == -math.inf if node.get("detect_negative", 1) else none
    return positive | negative


def _prelu(_: Node, x: Value, slope: Value) -> torch.Tensor:
    value, weight = tensor(x), tensor(slope)
    per_channel = weight.dim() == value.dim() - 1 and weight.numel() == weight.shape[0] == value.shape[1:2].numel()
    if value.dim() > 1 and (per_channel or weight.numel() == 1) and weight.dim() < value.dim():
        return F.prelu(value, weight.reshape(-1))
    return torch.where(value > 0, value, value * weight)


def _where(_: Node, condition: Value, a: Value, b: Value) -> torch.Tensor:
    one, other = operand(a), operand(b)
    if not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor):
        one, other = tensor(a), tensor(b)
    like = one if isinstance(one, torch.Tensor) else other
    one, other = (
        v if isinstance(v, torch.Tensor) else torch.scalar_tensor(v, dtype=like.dtype, device=like.device)
        for v in (one, other)
    )
    narrow = _narrow(one)
    if narrow is not None:
        return torch.where(tensor(condition), one.long(), other.long()).to(narrow)
    return torch.where(tensor(condition), one, other)


TYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
}  # fmt: skip
"""Numbers of types in ONNX files → torch's types."""


def torch_type(node: Node, code: int) -> torch.dtype:
    """The type of a number in an ONNX file."""
    if code not in TYPES:
        import onnx

        name = onnx.TensorProto.DataType.Name(code) if code in onnx.TensorProto.DataType.values() else str(code)
        raise node.refuse("torch computes nothing in its type", name)
    return TYPES[code]


def _cast(node: Node, x: Value) -> torch.Tensor:
    return tensor(x).to(torch_type(node, node.get("to")))


def _cast_like(_: Node, x: Value, like: Value) -> Value:
    dtype = tensor(like).dtype
    if is_known(x) and x.dtype != object and dtype != torch.bfloat16:
        return x.astype(str(dtype).removeprefix("torch."))  # what was known stays known
    return tensor(x).to(dtype)


def _dropout(node: Node, x: Value, ratio: Value = None, training: Value = None) -> Any:
    if training is not None and bool(number(node, training, "mode")):
        chance = 0.5 if ratio is None else float(number(node, ratio, "ratio"))
        if chance > 0:
            raise node.refuse("it is in training mode", f"ratio {chance}", "export the network in eval mode")
    value = tensor(x)
    return (value, torch.ones_like(value, dtype=torch.bool)) if len(node.outputs) > 1 else value


def _sign(x: torch.Tensor) -> torch.Tensor:
    return torch.sign(x)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": _whole(torch.abs),
    "Acos": _each(torch.acos),
    "Acosh": _each(torch.acosh),
    "Add": _two(torch.add, commutes=True),
    "And": _compare(torch.logical_and),
    "Asin": _each(torch.asin),
    "Asinh": _each(torch.asinh),
    "Atan": _each(torch.atan),
    "Atanh": _each(torch.atanh),
    "BitShift": _shift,
    "BitwiseAnd": _two(torch.bitwise_and),
    "BitwiseNot": _not_bits,
    "BitwiseOr": _two(torch.bitwise_or),
    "BitwiseXor": _two(torch.bitwise_xor),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _each(torch.ceil),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": _each(torch.cos),
    "Cosh": _each(torch.cosh),
    "Div": _two(_divide),
    "Dropout": _dropout,
    "Elu": _elu,
    "Equal": _compare(torch.eq),
    "Erf": _each(torch.erf),
    "Exp": _each(torch.exp),
    "Floor": _each(torch.floor),
    "Gelu": _gelu,
    "Greater": _compare(torch.gt),
    "GreaterOrEqual": _compare(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _each(F.hardswish),
    "Identity": _each(lambda x: x),
    "IsInf": _is_infinite,
    "IsNaN": _each(torch.isnan),
    "LeakyRelu": _leaky,
    "Less": _compare(torch.lt),
    "LessOrEqual": _compare(torch.le),
    "Log": _each(torch.log),
    "Max": _many(_largest),
    "Mean": _mean,
    "Min": _many(_smallest),
    "Mish": _each(F.mish),
    "Mod": _mod,
    "Mul": _two(torch.mul, commutes=True),
    "Neg": _whole(torch.neg),
    "Not": _each(torch.logical_not),
    "Or": _compare(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _power,
    "Reciprocal": _each(torch.reciprocal),
    "Relu": _whole(torch.relu),
    "Round": _each(torch.round),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _each(torch.sigmoid),
    "Sign": _whole(_sign),
    "Sin": _each(torch.sin),
    "Sinh": _each(torch.sinh),
    "Softplus": _each(F.softplus),
    "Softsign": _each(F.softsign),
    "Sqrt": _each(torch.sqrt),
    "Sub": _two(torch.sub),
    "Sum": _many(torch.add),
    "Swish": _swish,
    "Tan": _each(torch.tan),
    "Tanh": _each(torch.tanh),
    "ThresholdedRelu": _thresholded,
    "Where": _where,
    "Xor": _compare(torch.logical_xor),
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {"Clip": (1, 2), "Dropout": (1, 2)}

__all__ = ["KNOWN_INPUTS", "OPERATORS", "operand", "torch_type"]
