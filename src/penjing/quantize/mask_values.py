"""Mask values: numbers such as −10,000, the lowest finite float or −infinity that hide an element.

A later selection discards them (a maximum, top-k, max pooling, softmax). In integers they would dominate the range and
leave no resolution for the other values.

A large number alone is not a mask: it may be one of a network's ordinary values. It hides something where it takes the
place of a value, or is added to some elements and not to others, and where the values that it stands among are far
smaller. Whether they are is seen in calibration.
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
DISTANT = "the largest values among its inputs are far beyond all others and would dominate their range"
LEAST = 1e3  # a filled-in number of at least this magnitude is a mask value
APART = 100.0  # a mask value is at least this many times larger than all other values
BEYOND = 16.0  # a number this many times larger than all others leaves them less than half of 8 bits
HALF_PRECISION = 65504.0  # beyond float16, in which networks compute, a literal is not an ordinary value
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
_NUMBERS = frozenset("full full_like new_full fill scalar_tensor zeros zeros_like ones ones_like".split())
Signs = frozenset[int]
_NO_SIGN: Signs = frozenset()
Levels = frozenset[float]
"""The mask values in a value: −10,000, …; ±infinity for those that calibration has shown."""
_NONE: Levels = frozenset()


def holders(
    network: fx.GraphModule, seen: Mapping[str, Signs] | None = None, reach: Mapping[str, float] | None = None
) -> frozenset[str]:
    """Return the names of the nodes whose values contain mask values.

    They are followed from where they are filled in, added, or stored, through operators that move values or add to
    them, to the one that discards them: a maximum discards large negative values, but not large positive ones.

    Args:
        network: The captured network.
        seen: Name of a node → signs of the mask values that calibration has detected in it.
        reach: Name of a node in `beside` → its largest magnitude in calibration. A number that is not far beyond the
            values that it is filled into is one of them; if theirs is unknown, it is a mask value.
    """
    followed = _Followed(network, seen or {}, reach or {})
    return frozenset(node.name for node in followed.levels)


def beside(network: fx.GraphModule) -> frozenset[str]:
    """Return the names of the nodes whose magnitude decides whether a number beside them is a mask value."""
    return frozenset(_Followed(network, {}, {}).beside)


def standing_out(histogram: Histogram) -> Signs:
    """Return the signs of values that are very large and alike while all others are far smaller; empty if none are."""
    extreme = max(-histogram.low, histogram.high)
    if extreme < LEAST:
        return _NO_SIGN
    size = (histogram.centers.abs() * (NUMBERS / histogram.limit)).long()  # of every bin
    used = torch.zeros(NUMBERS, dtype=torch.bool).index_fill(0, size[histogram.counts > 0].clamp(max=NUMBERS - 1), True)
    large, small = (max(1, int(extreme / histogram.limit * NUMBERS / part)) for part in (2, APART))
    if not used[:small].any() or used[small:large].any():
        return _NO_SIGN
    ends = {-1: -histogram.low, 1: histogram.high}
    return frozenset(sign for sign, end in ends.items() if end > extreme / 2)


def alike(histogram: Histogram) -> bool:
    """Return whether the values that stand out are one number, or two, such as a mask that is added twice.

    A mask takes the place of a value or is added to it: around each number, these values spread no more than the others
    do. Ordinary large values, such as a year or a pressure, spread as they like.
    """
    extreme = max(-histogram.low, histogram.high)
    places = (histogram.counts > 0).nonzero().flatten()
    centers = histogram.centers[places]
    others = places[centers.abs() < extreme / APART]
    spread = int(others.max() - others.min()) + 1 if len(others) else 1
    for sign in (-1, 1):
        large = places[centers * sign > extreme / APART]
        ends = (large.diff() > spread).nonzero().flatten() + 1
        groups = torch.tensor_split(large, ends.tolist())
        if len(groups) > 2 or any(len(group) and int(group.max() - group.min()) > spread for group in groups):
            return False
    return True


class _Followed:
    """Follows mask values through a network.

    Attributes:
        levels: Node → the mask values in its value.
        beside: Names of the nodes among whose values a number may be ordinary.
    """

    def __init__(self, network: fx.GraphModule, seen: Mapping[str, Signs], reach: Mapping[str, float]) -> None:
        self.network, self.reach = network, reach
        self.levels: dict[fx.Node, Levels] = {}
        self.beside: set[str] = set()
        self.marks: set[fx.Node] = set()  # indicators of what is masked: 0 or 1
        self.fixed: set[fx.Node] = set()  # values made of numbers and marks alone
        for node in network.graph.nodes:
            if _is_mark(network, node, self.marks):
                self.marks.add(node)
            if self._is_fixed(node):
                self.fixed.add(node)
            levels = self._far(node, self._held(node))
            if node not in self.fixed:  # of which the numbers are known
                levels |= {sign * math.inf for sign in seen.get(node.name, ())}
            if levels:
                self.levels[node] = levels

    def _is_fixed(self, node: fx.Node) -> bool:
        if node.op != "call_function":
            return node.op == "get_attr"
        inputs = tensor_inputs(node)
        return kind(self.network, node) in _NUMBERS or all(t in self.fixed or t in self.marks for t in inputs)

    def _far(self, node: fx.Node, levels: Levels) -> Levels:
        """Those of the mask values that are far beyond the values that this node puts them among."""
        inputs = [t for t in tensor_inputs(node) if t.meta.get("floating", True)]
        values = [t for t in inputs if t not in self.fixed and t not in self.marks]
        if not levels or not values or node in self.fixed or any(t in self.levels for t in values):
            return levels
        if any(abs(level) <= HALF_PRECISION for level in levels):
            self.beside |= {t.name for t in values}
        if any(t.name not in self.reach for t in values):
            return levels
        nearest = min(HALF_PRECISION, BEYOND * max(self.reach[t.name] for t in values))
        distant = frozenset(level for level in levels if abs(level) > nearest)
        if not distant:
            self._drop(node)
        return distant

    def _drop(self, node: fx.Node) -> None:
        """Forget the numbers that only this node reads: they are ordinary values."""
        for number in tensor_inputs(node):
            if number in self.fixed and len(number.users) == 1 and self.levels.pop(number, _NONE):
                self._drop(number)

    def _held(self, node: fx.Node) -> Levels:
        """The mask values in a node's value, whatever they stand among."""
        network = self.network
        if node.op == "get_attr":
            return _stored(compute(network, node, (), {}))
        if node.op not in ("call_function", "call_module") or not node.meta.get("floating", True):
            return _NONE
        what, inputs = kind(network, node), tensor_inputs(node)
        read = _NONE.union(*(self.levels.get(t, _NONE) for t in inputs))
        if what in ("add", "sub", "rsub", "mul", "div"):
            return self._arithmetic(node, what)
        if what == "neg":
            return frozenset(-level for level in read)
        if what == "abs":
            return frozenset(abs(level) for level in read)
        if what == "clip":
            return _clipped(node, read)
        carried = _NONE
        if what in _FILL:
            carried = read | {number for number in _numbers(network, node) if _is_large(number)}
        elif what in _KEEP | _LARGEST | _SMALLEST:
            carried = read
        if what in _LARGEST:
            carried = frozenset(level for level in carried if level > 0)
        if what in _SMALLEST:
            carried = frozenset(level for level in carried if level < 0)
        return carried

    def _arithmetic(self, node: fx.Node, what: str) -> Levels:
        numbers = [_number(self.network, value) for value in node.args[:2]]
        carried = [self.levels.get(value, _NONE) if isinstance(value, fx.Node) else _NONE for value in node.args[:2]]
        if what in ("add", "sub", "rsub"):
            alpha = node.kwargs.get("alpha", 1)
            numbers[1] *= float(alpha) if isinstance(alpha, int | float) else 1.0
            for i, other in ((0, 1), (1, 0)):
                if carried[other] and _is_large(numbers[i]):  # of all elements alike it would hide none: mask · c − c
                    carried[i] = frozenset({numbers[i]})
            if what != "add":
                carried[what == "sub"] = frozenset(-level for level in carried[what == "sub"])
            return carried[0] | carried[1]
        for i, other in ((0, 1), (1, 0)):
            if node.args[i] in self.marks and what == "mul":
                return frozenset({numbers[other]}) if _is_large(numbers[other]) else carried[other]
            if number := numbers[other]:
                factor = 1 / number if what == "div" else number
                return frozenset(level * factor if i == 0 or what == "mul" else level for level in carried[i])
        both = carried[0] | (carried[1] if what == "mul" else _NONE)
        return both | {-level for level in both}


def _clipped(node: fx.Node, carried: Levels) -> Levels:
    """The mask values that remain after clipping."""
    named = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    names = ((-1, "min", "min_val"), (1, "max", "max_val"))
    bounds = {sign: next((named[n] for n in both if n in named), None) for sign, *both in names}
    return frozenset(level for level in carried if not _near(bounds[1 if level > 0 else -1]))


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
    """A number, or the only one in a stored tensor, also through copies; 0 for anything else."""
    while isinstance(value, fx.Node) and value.op == "call_function" and len(value.all_input_nodes) == 1:
        if kind(network, value) not in MOVING | {"_to_copy", "lift_fresh_copy", "detach"}:
            return 0.0
        value = value.all_input_nodes[0]
    if isinstance(value, fx.Node) and value.op == "get_attr":
        tensor = compute(network, value, (), {})
        one = isinstance(tensor, torch.Tensor) and tensor.numel() and bool((tensor == tensor.reshape(-1)[0]).all())
        return float(tensor.reshape(-1)[0]) if one else 0.0
    return float(value) if isinstance(value, int | float) else 0.0


def _is_large(number: float) -> bool:
    return abs(number) >= LEAST


def _stored(tensor: object) -> Levels:
    """The mask value of a stored tensor of two levels: one very large number, and others that are far smaller.

    Where the number stands once, all others have to be zero: a single large number among others is a statistic or an
    offset of one column.
    """
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
        return _NONE
    tensor = tensor.detach()
    large = tensor.abs() >= LEAST
    if not large.any() or large.all():
        return _NONE
    extremes, rest = tensor[large], tensor[~large].abs()
    most = extremes.abs()
    if not bool((most == most[0]).all()) or float(rest.max()) * APART > float(most[0]):
        return _NONE
    if len(extremes) == 1 and bool(rest.any()):
        return _NONE
    return frozenset(float(level) for level in extremes)
