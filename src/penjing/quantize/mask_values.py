"""Mask values: numbers such as −10,000, the lowest finite float or −infinity that hide an element.

A later selection discards them (a maximum, top-k, max pooling, softmax). In integers they would dominate the range and
leave no resolution for the other values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from penjing.network.graph import arguments, compute, kind, tensor_inputs
from penjing.quantize.histogram import Histogram
from penjing.quantize.masking import MOVING, SELECTING

REASON = "a mask value among its inputs would dominate their range"
LEAST = 1e3  # a filled-in number of at least this magnitude is a mask value
APART = 100.0  # a mask value is at least this many times larger than all other values
NUMBERS = 256  # magnitude classes that half of a histogram is divided into

_FILL = frozenset(
    "masked_fill where scatter index_fill fill full full_like new_full scalar_tensor fill_diagonal pad".split()
)
_KEEP = (
    MOVING
    | SELECTING
    | frozenset(
        "cat stack split split_with_sizes chunk unbind getitem flip roll scatter_add scatter_reduce index_put "
        "index_copy slice_scatter select_scatter copy tril triu sort unfold masked_scatter leaky_relu prelu cumsum "
        "sum mean avg_pool take take_along_dim movedim repeat_interleave tile diagonal max_unpool2d as_strided "
        "pixel_shuffle pixel_unshuffle im2col channel_shuffle resize".split()
    )
)
_LARGEST = frozenset(
    "amax max max_pool topk maximum logsumexp cummax relu clamp_min gelu silu hardswish elu selu celu softplus mish "
    "exp max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split()
)
_SMALLEST = frozenset({"amin", "min", "minimum", "clamp_max"})
Signs = frozenset[int]
_BOTH: Signs = frozenset({-1, 1})
_NONE: Signs = frozenset()


def holders(network: fx.GraphModule, seen: Mapping[str, Signs] | None = None) -> frozenset[str]:
    """Return the names of the nodes whose values contain mask values.

    They are followed from where they are filled in, added, or stored, through operators that move values or add to
    them, to the one that discards them: a maximum discards large negative values, but not large positive ones.

    Args:
        network: The captured network.
        seen: Name of a node → signs of the mask values that calibration has detected in it.
    """
    signs: dict[fx.Node, Signs] = {}
    marks: set[fx.Node] = set()  # indicators of what is masked: 0 or 1
    for node in network.graph.nodes:
        if _is_mark(network, node, marks):
            marks.add(node)
        if hidden := _held(network, node, signs, marks) | (seen or {}).get(node.name, _NONE):
            signs[node] = hidden
    return frozenset(node.name for node in signs)


def standing_out(histogram: Histogram) -> Signs:
    """Return the signs of values that are very large and alike while all others are far smaller; empty if none are."""
    extreme = max(-histogram.low, histogram.high)
    if extreme < LEAST:
        return _NONE
    size = (histogram.centers.abs() * (NUMBERS / histogram.limit)).long()  # of every bin
    used = torch.zeros(NUMBERS, dtype=torch.bool).index_fill(0, size[histogram.counts > 0].clamp(max=NUMBERS - 1), True)
    large, small = (max(1, int(extreme / histogram.limit * NUMBERS / part)) for part in (2, APART))
    if not used[:small].any() or used[small:large].any():
        return _NONE
    ends = {-1: -histogram.low, 1: histogram.high}
    return frozenset(sign for sign, end in ends.items() if end > extreme / 2)


def _held(network: fx.GraphModule, node: fx.Node, signs: dict[fx.Node, Signs], marks: set[fx.Node]) -> Signs:
    """The signs of the mask values in a node's value."""
    if node.op == "get_attr":
        return _stored(compute(network, node, (), {}))
    if node.op not in ("call_function", "call_module") or not node.meta.get("floating", True):
        return _NONE
    what, inputs = kind(network, node), tensor_inputs(node)
    read = frozenset[int]().union(*(signs.get(t, _NONE) for t in inputs))
    filled = frozenset(sign for n in _numbers(network, node) if (sign := _sign(n))) if what in _FILL else _NONE
    if what in ("add", "sub", "rsub", "mul", "div"):
        return _arithmetic(network, node, what, signs, marks)
    if what == "neg":
        return frozenset(-sign for sign in read)
    if what == "abs":
        return frozenset({1}) if read else _NONE
    if what == "clip":
        return _clipped(node, read)
    carried = _NONE
    if what in _KEEP | _FILL:
        carried = read | filled
    elif what in _LARGEST | _SMALLEST:
        carried = read
    if what in _LARGEST:
        carried -= {-1}
    if what in _SMALLEST:
        carried -= {1}
    return carried


def _arithmetic(
    network: fx.GraphModule, node: fx.Node, what: str, signs: dict[fx.Node, Signs], marks: set[fx.Node]
) -> Signs:
    numbers = [_number(network, value) for value in node.args[:2]]
    carried = [signs.get(value, _NONE) if isinstance(value, fx.Node) else _NONE for value in node.args[:2]]
    if what in ("add", "sub", "rsub"):
        alpha = node.kwargs.get("alpha", 1)
        numbers[1] *= float(alpha) if isinstance(alpha, int | float) else 1.0
        carried = [
            frozenset({sign}) if (sign := _sign(number)) else h for number, h in zip(numbers, carried, strict=True)
        ]
        if what != "add":
            carried[what == "sub"] = frozenset(-sign for sign in carried[what == "sub"])
        return carried[0] | carried[1]
    for i, other in ((0, 1), (1, 0)):
        if node.args[i] in marks and what == "mul":
            return frozenset({sign}) if (sign := _sign(numbers[other])) else carried[other]
        if numbers[other]:
            return frozenset(int(math.copysign(sign, numbers[other] * sign)) for sign in carried[i])
    return _BOTH if carried[0] or (carried[1] and what == "mul") else _NONE


def _clipped(node: fx.Node, carried: Signs) -> Signs:
    """The signs of the mask values that remain after clipping."""
    named = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    names = ((-1, "min", "min_val"), (1, "max", "max_val"))
    bounds = {sign: next((named[n] for n in both if n in named), None) for sign, *both in names}
    return frozenset(sign for sign in carried if not _near(bounds[sign]))


def _near(bound: object) -> bool:
    return isinstance(bound, int | float) and abs(bound) < LEAST


def _is_mark(network: fx.GraphModule, node: fx.Node, marks: set[fx.Node]) -> bool:
    """Whether a node's value is a numeric mask: converted from booleans or integers, or 1 minus an input."""
    if not node.meta.get("floating", True):
        return True
    if node.op != "call_function":
        return False
    what, inputs = kind(network, node), tensor_inputs(node)
    if inputs and what in ("rsub", "sub") and any(_number(network, value) == 1 for value in node.args[:2]):
        before = inputs[0]
        while before.op == "call_function" and kind(network, before) in MOVING | {"slice", "select"}:
            before = tensor_inputs(before)[0]
        if before.op == "placeholder":
            return True
    moves = what in MOVING | SELECTING or what in ("rsub", "sub", "add", "neg", "mul", "_to_copy")
    return moves and bool(inputs) and all(t in marks or abs(_number(network, t)) == 1 for t in inputs)


def _numbers(network: fx.GraphModule, node: fx.Node) -> Iterator[float]:
    """The numeric arguments of an operator, including stored one-element tensors."""
    if isinstance(node.target, torch._ops.OpOverload):
        for name, value in arguments(node).items():
            if name not in ("dim", "size", "index"):
                yield _number(network, value)


def _number(network: fx.GraphModule, value: object) -> float:
    """A number, or a stored one-element tensor, also through copies; 0 for anything else."""
    while isinstance(value, fx.Node) and value.op == "call_function" and len(value.all_input_nodes) == 1:
        if kind(network, value) not in MOVING | {"_to_copy", "lift_fresh_copy", "detach"}:
            return 0.0
        value = value.all_input_nodes[0]
    if isinstance(value, fx.Node) and value.op == "get_attr":
        tensor = compute(network, value, (), {})
        return float(tensor) if isinstance(tensor, torch.Tensor) and tensor.numel() == 1 else 0.0
    return float(value) if isinstance(value, int | float) else 0.0


def _sign(number: float) -> int:
    return 0 if abs(number) < LEAST or math.isnan(number) else 1 if number > 0 else -1


def _stored(tensor: object) -> Signs:
    """The signs of a stored tensor's mask values: one very large magnitude, all other values being far smaller."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
        return _NONE
    size = tensor.detach().abs()
    large = size >= LEAST
    if not large.any():
        return _NONE
    most, rest = float(size.max()), size[~large]
    alike = bool((size[large] == most).all()) and (rest.numel() == 0 or float(rest.max()) * APART <= most)
    extremes = tensor.detach()[large]
    return frozenset(sign for sign in (-1, 1) if (extremes * sign > 0).any()) if alike else _NONE
