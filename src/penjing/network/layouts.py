"""Channels-last networks in the order of axes that layers have: permutations move behind what does not mind them.

Networks of Keras keep channels on the last axis, and permute before and after each convolution. Here a permutation
moves down through operators that compute element by element, reduce, pad, slice or concatenate, until it meets its
inverse and both vanish. What is left are the permutations at the network's inputs and outputs, and where an operator
really needs the last axis. Copies that change neither type nor device are removed on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from penjing.network.graph import arguments, operator_name
from penjing.network.stored_weights import constants

aten = torch.ops.aten

_COPIES = ("to", "_to_copy", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "dtype_layout")
# Other names of operators.
_SAME = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "concat": "cat",
    "concatenate": "cat",
}
# Element by element, without torch's tag for it.
_POINTWISE = frozenset("dropout hardswish log_sigmoid to type_as".split())
_REDUCTIONS = frozenset(("mean", "sum", "amax", "amin", "prod", "logsumexp", "var", "std"))

Order = tuple[int, ...]
"""Axis i of the result is axis order[i] of the value."""


def channels_first(graph: fx.Graph, stored: Mapping[str, Any]) -> None:
    """Move permutations down, in place, until they meet their inverses. The function is unchanged.

    Args:
        graph: Functional graph of an exported program whose nodes have example values in ``meta["val"]``.
        stored: Every stored tensor by its name.
    """
    _Mover(graph, stored).run()


class _Mover:
    def __init__(self, graph: fx.Graph, stored: Mapping[str, Any]) -> None:
        self.graph, self.stored = graph, stored
        self.permuted: dict[fx.Node, tuple[fx.Node, Order]] = {}
        self.here: Any = None  # the operator that is rewritten

    def run(self) -> None:
        self._tidy()
        self.constant = constants(self.graph)
        for node in list(self.graph.nodes):
            if (
                node.op != "call_function"
                or node in self.constant
                or not isinstance(node.target, torch._ops.OpOverload)
            ):
                continue
            if not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            self.here = node
            with self.graph.inserting_before(node):
                replacement = self._moved(node)
            if replacement is not None:
                node.replace_all_uses_with(replacement)
                self.graph.erase_node(node)

    def _tidy(self) -> None:
        """Remove copies that change nothing, and give operators with two names the usual one."""
        for node in list(self.graph.nodes):
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            name = operator_name(node)
            if name in _SAME:
                packet = getattr(aten, _SAME[name])
                node.target = getattr(packet, node.target._overloadname)
            source = node.args[0] if node.args else None
            if name in _COPIES and isinstance(source, fx.Node):
                before, after = self._value(source), node.meta.get("val")
                alike = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
                if alike and (before.dtype, before.device) == (after.dtype, after.device):
                    node.replace_all_uses_with(source)
                    self.graph.erase_node(node)

    def _value(self, node: fx.Node) -> Any:
        known = node.meta.get("val")
        return self.stored.get(str(node.target)) if known is None and node.op == "get_attr" else known

    def _moved(self, node: fx.Node) -> fx.Node | None:
        """What replaces an operator; None where it stays."""
        a, name = arguments(node), operator_name(node)
        order = self._order(node, a, name)
        if order is not None:
            return self._permutation(node.args[0], order)
        if name == "cat":
            return self._joined(node, a)
        rule = next((rule for names, rule in _RULES if name in names), None)
        first = next(iter(a.values()), None)
        if rule is not None and isinstance(first, fx.Node) and first in self.permuted:
            return rule(self, node, a, *self.permuted[first])
        if name in _POINTWISE or torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
            return self._element_by_element(node)
        return None

    def _order(self, node: fx.Node, a: dict[str, Any], name: str) -> Order | None:
        rank = node.meta["val"].dim()
        if name == "permute":
            return tuple(d % rank for d in a["dims"])
        if name == "transpose" and rank:
            axes = list(range(rank))
            one, two = a["dim0"] % rank, a["dim1"] % rank
            axes[one], axes[two] = axes[two], axes[one]
            return tuple(axes)
        return None

    def _permutation(self, x: Any, order: Order) -> fx.Node | None:
        base, known = self.permuted.get(x, (x, tuple(range(len(order)))))
        order = tuple(known[axis] for axis in order)
        return self.permute(base, order)

    def permute(self, base: fx.Node, order: Order) -> fx.Node:
        """A permutation, noted so that it can move on; the value itself if it changes nothing."""
        if order == tuple(range(len(order))):
            return base
        sizes = base.meta["val"].shape
        real = [axis for axis in order if not (isinstance(sizes[axis], int) and sizes[axis] == 1)]
        shape = [sizes[axis] for axis in order]
        if real == sorted(real) and sum(not isinstance(size, int) for size in shape) <= 1:
            # Only axes of size 1 move.
            source: Any = base.args[0] if base.target is aten.reshape.default else base
            result = self.write(aten.reshape.default, source, [n if isinstance(n, int) else -1 for n in shape])
        else:
            result = self.write(aten.permute.default, base, list(order))
        if order == (0, *range(2, len(order)), 1):  # the channels go to the last axis
            self.permuted[result] = (base, order)
        return result

    def write(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new operator, with an example value."""
        new: fx.Node = self.graph.call_function(target, args, kwargs)
        new.meta = {key: value for key, value in self.here.meta.items() if key != "val"}
        mode = self.here.meta["val"].fake_mode

        def value(n: fx.Node) -> Any:
            if n.meta.get("val") is None and n.op == "get_attr":
                n.meta["val"] = mode.from_tensor(self.stored[str(n.target)].detach(), static_shapes=True)
            return n.meta.get("val")

        values = fx.node.map_arg((args, kwargs), value)
        with mode, torch.no_grad():
            new.meta["val"] = target(*values[0], **values[1])
        if new.all_input_nodes and all(n in self.constant for n in new.all_input_nodes):
            self.constant.add(new)
        return new

    def again(self, node: fx.Node, args: Any, kwargs: Any = None) -> fx.Node:
        """The same operator on other arguments."""
        return self.write(node.target, *args, **(dict(node.kwargs) if kwargs is None else kwargs))

    def _element_by_element(self, node: fx.Node) -> fx.Node | None:
        rank = node.meta["val"].dim()
        inputs = [n for n in node.all_input_nodes if isinstance(self._value(n), torch.Tensor)]
        orders = {self.permuted[n][1] for n in inputs if n in self.permuted and len(self.permuted[n][1]) == rank}
        if len(orders) != 1:
            return None
        (order,) = orders
        moved = {n: self._turned_back(n, order) for n in inputs}
        if any(value is None for value in moved.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: moved.get(n, n))
        return self.permute(self.again(node, args, kwargs), order)

    def _turned_back(self, x: fx.Node, order: Order) -> fx.Node | None:
        """The value whose permutation is `x`, for a broadcast with values of as many axes; None if it costs a move."""
        if x in self.permuted and self.permuted[x][1] == order:
            return self.permuted[x][0]
        sizes, rank = self._value(x).shape, len(order)
        if not sizes:
            return x
        inverse = [order.index(axis) for axis in range(rank)]
        shape = [*[1] * (rank - len(sizes)), *sizes]
        turned = [shape[axis] for axis in inverse]
        varies = [n for n in shape if not isinstance(n, int)]
        real = [axis for axis in inverse if not (isinstance(shape[axis], int) and shape[axis] == 1)]
        if real == sorted(real) and len(varies) <= 1:
            return self.write(aten.reshape.default, x, [n if isinstance(n, int) else -1 for n in turned])
        if x in self.constant:
            return self.write(aten.permute.default, self.write(aten.reshape.default, x, shape), inverse)
        return None

    def _joined(self, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
        parts = a["tensors"]
        if not all(part in self.permuted for part in parts):
            return None
        orders = {self.permuted[part][1] for part in parts}
        if len(orders) != 1:
            return None
        (order,) = orders
        joined = self.again(node, ([self.permuted[part][0] for part in parts], order[a["dim"] % len(order)]))
        return self.permute(joined, order)


def _reduced(move: _Mover, node: fx.Node, a: dict[str, Any], base: fx.Node, order: Order) -> fx.Node | None:
    rank = len(order)
    dims = a.get("dim")
    if dims is None or "keepdim" not in a:
        return None
    dims = [d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])] or list(range(rank))
    place = [argument.name for argument in node.target._schema.arguments].index("dim")  # type: ignore[union-attr]
    if len(node.args) <= place:
        return None
    args = list(node.args)
    args[0], args[place] = base, sorted(order[d] for d in dims)
    result = move.again(node, args)
    if a["keepdim"]:
        return move.permute(result, order)
    left = [order[i] for i in range(rank) if i not in dims]
    return move.permute(result, tuple(sorted(left).index(axis) for axis in left))


def _along(move: _Mover, node: fx.Node, a: dict[str, Any], base: fx.Node, order: Order) -> fx.Node | None:
    """Operators with one axis, such as softmax and slice."""
    axis = a["dim"] % len(order)
    place = [argument.name for argument in node.target._schema.arguments].index("dim")  # type: ignore[union-attr]
    args = list(node.args) + [0] * (place + 1 - len(node.args))
    args[0], args[place] = base, order[axis]
    return move.permute(move.again(node, args), order)


def _padded(move: _Mover, node: fx.Node, a: dict[str, Any], base: fx.Node, order: Order) -> fx.Node | None:
    rank, pad = len(order), a["pad"]
    if a.get("mode", "constant") not in ("constant", "reflect", "replicate"):
        return None
    by_axis = {order[rank - 1 - i]: pad[2 * i : 2 * i + 2] for i in range(len(pad) // 2)}
    flat: list[Any] = []
    for axis in reversed(range(rank)):
        flat += by_axis.get(axis, [0, 0])
    while len(flat) > 2 and _is_zero(flat[-2:]):
        flat = flat[:-2]
    if a.get("mode", "constant") != "constant" and len(flat) > 2 * (rank - 2):
        return None  # torch pads only the last axes so
    return move.permute(move.again(node, (base, flat, *node.args[2:])), order)


def _is_zero(pair: Sequence[Any]) -> bool:
    return all(isinstance(n, int) and n == 0 for n in pair)


_Rule = Callable[[_Mover, fx.Node, dict[str, Any], fx.Node, Order], fx.Node | None]
_RULES: tuple[tuple[frozenset[str], _Rule], ...] = (
    (_REDUCTIONS, _reduced),
    (frozenset(("softmax", "log_softmax", "slice", "cumsum")), _along),
    (frozenset(("pad", "constant_pad_nd")), _padded),
)
