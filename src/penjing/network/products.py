"""Products with a stored weight become linear layers, whichever operator expresses them.

``x @ w``, ``x @ w.T``, ``w @ x``, ``torch.addmm``, ``mm``, ``mv``, ``inner``, ``tensordot``, ``einsum`` and
``bilinear`` with a stored operand are equivalent to ``F.linear``. The graph is rewritten before it is captured; its
function is unchanged, and weights that are transposed on the way are folded by `penjing.network.stored_weights`.

An `einsum` of more than two tensors, one of them stored, is split into products of two. An einsum of two activations
becomes a matrix product if it is equivalent to one.

A stored operand with more than two axes, such as one matrix per head or expert, stays a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from penjing.network.graph import arguments, operator_name
from penjing.network.stored_weights import constants

aten = torch.ops.aten


def as_linear(graph: fx.Graph, stored: Any) -> None:
    """Rewrite, in place, every product of a value and a stored tensor.

    Args:
        graph: Graph of an exported program whose nodes have example values in ``meta["val"]``.
        stored: Every stored tensor by its name.
    """
    constant = constants(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in constant or not isinstance(node.target, torch._ops.OpOverload):
            continue
        rewrite = _REWRITES.get(operator_name(node))
        if rewrite is None:
            continue
        with graph.inserting_before(node):
            replacement = rewrite(_Writer(graph, node, constant, stored), arguments(node))
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)


class _Writer:
    """Writes the operators that replace a node."""

    def __init__(self, graph: fx.Graph, node: fx.Node, constant: set[fx.Node], stored: Any) -> None:
        self.graph, self.node, self.constant, self.stored = graph, node, constant, stored

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A new node, marked constant if it is computed from constants alone."""
        new: fx.Node = self.graph.call_function(target, args)
        new.meta = {key: self.node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in self.node.meta}
        if all(n in self.constant for n in new.all_input_nodes):
            self.constant.add(new)
        new.meta["val"] = self._example(target, args)
        return new

    def _example(self, target: Any, args: Any) -> Any:
        mode = self.node.meta["val"].fake_mode

        def value(n: fx.Node) -> Any:
            known = n.meta.get("val")
            if known is None and n.op == "get_attr":
                known = n.meta["val"] = mode.from_tensor(self.stored[str(n.target)].detach(), static_shapes=True)
            return known

        values = fx.node.map_arg(args, value)
        with mode, torch.no_grad():
            return target(*values)

    def is_stored(self, x: Any) -> bool:
        return isinstance(x, fx.Node) and x in self.constant

    def rank(self, x: fx.Node) -> int:
        return len(self.shape(x))

    def shape(self, x: fx.Node) -> Any:
        known = x.meta.get("val")
        return self.stored[str(x.target)].shape if known is None else known.shape

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        return self.call(aten.linear.default, x, weight, bias)

    def turned(self, x: fx.Node) -> fx.Node:
        return self.call(aten.transpose.int, x, -1, -2)

    def matmul(self, a: fx.Node, b: fx.Node, bias: fx.Node | None = None) -> fx.Node | None:
        """a @ b + bias; None if neither is a stored matrix or vector."""
        if self.is_stored(b):
            b = self._unexpanded(b, self.rank(a))
            if self.rank(b) == 1:
                product = self.linear(a, self.call(aten.unsqueeze.default, b, 0))
                return self.plus(self.call(aten.squeeze.dim, product, -1), bias)
            if self.rank(b) == 2:
                # A per-column bias becomes the layer's own.
                own = self._as_bias(bias, int(self.shape(b)[1]))
                product = self.linear(a, self.turned(b), own)
                return self.plus(product, bias if own is None else None)
            return None
        a = self._unexpanded(a, self.rank(b))
        if self.rank(a) == 1:
            x = b if self.rank(b) == 1 else self.turned(b)
            return self.plus(
                self.call(aten.squeeze.dim, self.linear(x, self.call(aten.unsqueeze.default, a, 0)), -1), bias
            )
        if self.rank(a) == 2:
            product = self.linear(b, a) if self.rank(b) == 1 else self.turned(self.linear(self.turned(b), a))
            return self.plus(product, bias)
        return None

    def plus(self, x: fx.Node, bias: fx.Node | None) -> fx.Node:
        return x if bias is None else self.call(aten.add.Tensor, x, bias)

    def times(self, x: fx.Node, number: Any) -> fx.Node:
        return x if number == 1 else self.call(aten.mul.Tensor, x, number)

    def _as_bias(self, bias: fx.Node | None, width: int) -> fx.Node | None:
        """An addend per column, in the form of a layer's bias; None if it has another shape."""
        if bias is None or not self.is_stored(bias) or tuple(self.shape(bias)) not in ((width,), (1, width)):
            return None
        return bias if self.rank(bias) == 1 else self.call(aten.reshape.default, bias, [width])

    def repeated(self, x: Any) -> Any:
        """The stored tensor that `x` merely expands over a batch; otherwise `x` itself."""
        if isinstance(x, fx.Node) and x not in self.constant and x.target is aten.expand.default:
            before: Any = x.args[0]
            if self.is_stored(before) and tuple(self.shape(x)[-self.rank(before) :]) == tuple(self.shape(before)):
                return before
        return x

    def _unexpanded(self, weight: fx.Node, rank: int) -> fx.Node:
        """The matrix of a weight that is constant over the batch, for a value with `rank` axes."""
        shape = self.shape(weight)
        if 2 < len(shape) <= rank and all(n == 1 for n in shape[:-2]):
            return self.call(aten.reshape.default, weight, list(shape[-2:]))
        return weight


def _matmul(write: _Writer, a: dict[str, Any]) -> fx.Node | None:
    left, right = map(write.repeated, a.values())
    if write.is_stored(left) == write.is_stored(right):
        return None
    return write.matmul(left, right)


def _added(write: _Writer, a: dict[str, Any]) -> fx.Node | None:
    """beta·bias + alpha·left @ right."""
    bias, left, right, beta, alpha = a.values()
    bias, left, right = map(write.repeated, (bias, left, right))
    if write.is_stored(left) == write.is_stored(right):
        return None
    if write.is_stored(right):
        right = write.times(right, alpha)
    else:
        left = write.times(left, alpha)
    bias = write.times(bias, beta) if beta else None
    product = write.matmul(left, right, bias)
    if product is None:
        return write.plus(write.call(aten.matmul.default, left, right), bias)
    return product


def _linear(write: _Writer, a: dict[str, Any]) -> fx.Node | None:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if write.is_stored(weight):
        if write.rank(weight) == 2:
            return None
        return write.matmul(x, weight, bias)
    if not write.is_stored(x) or write.rank(x) != 2 or write.rank(weight) != 2:
        return None
    return write.plus(write.turned(write.linear(weight, x)), bias)


def _inner(write: _Writer, a: dict[str, Any]) -> fx.Node | None:
    left, right = a["self"], a["other"]
    if write.rank(left) == 0 or write.rank(right) == 0:
        return None
    letters = iter("abcdefghijklmnopqrstuvwxy")
    one, two = (["z" if i == write.rank(x) - 1 else next(letters) for i in range(write.rank(x))] for x in (left, right))
    return _contract(write, left, right, one, two, [*one[:-1], *two[:-1]])


def _tensordot(write: _Writer, a: dict[str, Any]) -> fx.Node | None:
    left, right = a["self"], a["other"]
    one = [f"l{i}" for i in range(write.rank(left))]
    two = [f"r{i}" for i in range(write.rank(right))]
    for i, j in zip(a["dims_self"], a["dims_other"], strict=True):
        two[j] = one[i]
    summed = {one[i] for i in a["dims_self"]}
    return _contract(write, left, right, one, two, [x for x in (*one, *two) if x not in summed])


def _einsum(write: _Writer, a: dict[str, Any]) -> fx.Node | None:
    tensors = a["tensors"]
    inputs, arrow, result = a["equation"].replace(" ", "").partition("->")
    terms = inputs.split(",")
    spread = [_axes(term, write.rank(x)) for term, x in zip(terms, tensors, strict=True)]
    if not arrow:  # letters that appear once, in alphabetical order, after the ellipsis
        once = [x for x in sorted({*inputs} - {".", ","}) if inputs.count(x) == 1]
        result = "..." * ("..." in inputs) + "".join(once)
    dots = max((len(axes) - len(t.replace("...", "")) for t, axes in zip(terms, spread, strict=True)), default=0)
    out = _axes(result, len(result.replace("...", "")) + dots)
    if len(tensors) == 2:
        return _contract(write, tensors[0], tensors[1], spread[0], spread[1], out)
    return _in_pairs(write, list(zip(tensors, spread, strict=True)), out)


def _in_pairs(write: _Writer, operands: list[tuple[fx.Node, list[str]]], out: list[str]) -> fx.Node | None:
    """A product of several tensors, contracted pairwise: a stored one with the value it shares a summed axis with.

    None if no operand is stored, or all are, and for diagonals and broadcast axes.
    """
    sizes: dict[str, Any] = {}
    for x, axes in operands:
        for axis, size in zip(axes, write.shape(x), strict=True):
            if sizes.setdefault(axis, size) != size:
                return None
    stored = [write.is_stored(x) for x, _ in operands]
    if len(operands) < 3 or any(len(set(axes)) < len(axes) for _, axes in operands) or all(stored) or not any(stored):
        return None
    letters = dict(zip(sizes, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False))
    if len(letters) < len(sizes):
        return None
    while len(operands) > 1:
        i, j = _next_pair(write, operands, out)
        (left, one), (right, two) = operands[i], operands[j]
        rest = [x for n, x in enumerate(operands) if n not in (i, j)]
        needed = {*out, *(axis for _, axes in rest for axis in axes)}
        remaining = [axis for axis in dict.fromkeys([*one, *two]) if axis in needed] if rest else out
        product = _contract(write, left, right, one, two, remaining)
        if product is None:
            equation = "{},{}->{}".format(*("".join(letters[axis] for axis in axes) for axes in (one, two, remaining)))
            product = write.call(aten.einsum.default, equation, [left, right])
        operands = [(product, remaining), *rest]
    return operands[0][0]


def _next_pair(write: _Writer, operands: list[tuple[fx.Node, list[str]]], out: list[str]) -> tuple[int, int]:
    """Positions of the first stored tensor and value that are summed over an axis no other operand has.

    If there are none, the first two values, and finally the remaining operands.
    """
    values = [i for i, (x, _) in enumerate(operands) if not write.is_stored(x)]
    for i in values:
        for j, (w, axes) in enumerate(operands):
            others = {*out, *(axis for n, (_, more) in enumerate(operands) if n not in (i, j) for axis in more)}
            if write.is_stored(w) and ({*operands[i][1]} & {*axes}) - others:
                return i, j
    first, second = values[:2] if len(values) > 1 else (0, 1)
    return first, second


def _axes(term: str, rank: int) -> list[str]:
    """Names of the axes of an einsum term; those of the ellipsis are numbered from the right."""
    before, dots, after = term.partition("...")
    hidden = [f"...{n}" for n in range(rank - len(before) - len(after), 0, -1)] if dots else []
    return [*before, *hidden, *after]


def _contract(
    write: _Writer, left: fx.Node, right: fx.Node, one: list[str], two: list[str], out: list[str]
) -> fx.Node | None:
    """A contraction over the axes that both have and the result lacks; None if it is not such a product."""
    if write.is_stored(left) and write.is_stored(right):
        return None
    if not write.is_stored(left) and not write.is_stored(right):
        return _product_of_values(write, left, right, one, two, out)
    x, w, xs, ws = (left, right, one, two) if write.is_stored(right) else (right, left, two, one)
    gone = {*xs, *ws} - set(out)
    if len(set(xs)) < len(xs) or len(set(ws)) < len(ws) or gone != (set(xs) & set(ws)) - set(out):
        return None  # a diagonal, or an axis summed in only one of them
    if any(write.shape(x)[xs.index(a)] != write.shape(w)[ws.index(a)] for a in set(xs) & set(ws)):
        return None  # broadcast
    summed = [a for a in ws if a in xs and a not in out]
    shared = [a for a in ws if a in xs and a in out]
    new = [a for a in ws if a not in xs]
    free = [a for a in xs if a not in ws]
    if not summed:
        return None
    size = dict(zip(ws, write.shape(w), strict=True))
    rows = _flat(write, _permuted(write, x, xs, [*shared, *free, *summed]), len(summed))
    width = [size[a] for a in new]
    if not shared:
        weight = _permuted(write, w, ws, [*new, *summed])
        many = [math.prod(width), math.prod(size[a] for a in summed)]
        weight = write.call(aten.reshape.default, weight, many) if len(ws) != 2 else weight
        result = write.linear(rows, weight)
    else:
        # A matrix per shared index, such as heads: (shared, free, summed) · (shared, summed, new).
        if len(free) > 1:
            front = free[:-1]
            order = [*front, *shared, free[-1], *summed]
            rows = _flat(write, _permuted(write, x, xs, order), len(summed))
        else:
            order = [*shared, *free, *summed]
        if not free:
            rows = write.call(aten.unsqueeze.default, rows, -2)
        weight = _permuted(write, w, ws, [*shared, *summed, *new])
        many = [*(size[a] for a in shared), math.prod(size[a] for a in summed), math.prod(width)]
        weight = write.call(aten.reshape.default, weight, many)
        result = write.call(aten.matmul.default, rows, weight)
        if not free:
            result = write.call(aten.squeeze.dim, result, -2)
        axes = [a for a in order if a not in summed]
        return _spread(write, result, axes, new, width, out)
    return _spread(write, result, [*shared, *free], new, width, out)


def _product_of_values(
    write: _Writer, left: fx.Node, right: fx.Node, one: list[str], two: list[str], out: list[str]
) -> fx.Node | None:
    """A product of two values as a batched matrix product over the axes that both and the result share, or None.

    Axes that only one of them has are the rows of the left and the columns of the right matrix.
    """
    gone = {*one, *two} - set(out)
    if len(set(one)) < len(one) or len(set(two)) < len(two) or gone != (set(one) & set(two)) - set(out) or not gone:
        return None  # a diagonal, an axis summed in only one of them, or no summed axis
    sizes = dict(zip(two, write.shape(right), strict=True))
    if any(write.shape(left)[one.index(a)] != sizes[a] for a in set(one) & set(two)):
        return None  # broadcast
    shared, summed = ([a for a in one if a in two and (a in out) == in_result] for in_result in (True, False))
    rows, columns = [a for a in one if a not in two], [a for a in two if a not in one]
    sizes |= dict(zip(one, write.shape(left), strict=True))
    varies = [a for group in (rows, columns) if len(group) > 1 for a in group if not isinstance(sizes[a], int)]
    if not (rows or columns) or varies:
        return None

    def matrix(x: fx.Node, axes: list[str], first: list[str], last: list[str]) -> fx.Node:
        x = _permuted(write, x, axes, [*shared, *first, *last])
        for end, group in ((-1, last), (-2, first)):
            if not group:
                x = write.call(aten.unsqueeze.default, x, end)
            elif len(group) > 1:
                x = write.call(aten.flatten.using_ints, x, end + 1 - len(group), end)
        return x

    product = write.call(aten.matmul.default, matrix(left, one, rows, summed), matrix(right, two, summed, columns))
    for end, group in ((-1, columns), (-1 - len(columns), rows)):
        if not group:
            product = write.call(aten.squeeze.dim, product, end)
        elif len(group) > 1:
            product = write.call(aten.unflatten.int, product, end, [sizes[a] for a in group])
    return _permuted(write, product, [*shared, *rows, *columns], out)


def _spread(write: _Writer, x: fx.Node, axes: list[str], new: list[str], width: list[int], out: list[str]) -> fx.Node:
    """Split the last axis of `x` into the new ones, and permute all to the order of the result."""
    if not new:
        x = write.call(aten.squeeze.dim, x, -1)
    elif len(new) > 1:
        x = write.call(aten.unflatten.int, x, -1, width)
    return _permuted(write, x, [*axes, *new], out)


def _flat(write: _Writer, x: fx.Node, last: int) -> fx.Node:
    return x if last == 1 else write.call(aten.flatten.using_ints, x, -last, -1)


def _permuted(write: _Writer, x: fx.Node, axes: list[str], order: list[str]) -> fx.Node:
    return x if axes == order else write.call(aten.permute.default, x, [axes.index(a) for a in order])


def _bilinear(write: _Writer, a: dict[str, Any]) -> fx.Node | None:
    """x1·W·x2 for every output: x1 is multiplied by all of W, and the result by x2."""
    one, two, weight, bias = a["input1"], a["input2"], a["weight"], a["bias"]
    if not write.is_stored(weight):
        return None
    out, first, second = write.shape(weight)
    turned = write.call(aten.reshape.default, write.call(aten.transpose.int, weight, 1, 2), [out * second, first])
    rows = write.call(aten.unflatten.int, write.linear(one, turned), -1, [out, second])
    product = write.call(aten.mul.Tensor, rows, write.call(aten.unsqueeze.default, two, -2))
    return write.plus(write.call(aten.sum.dim_IntList, product, [-1]), bias)


_REWRITES: dict[str, Callable[[_Writer, dict[str, Any]], fx.Node | None]] = {
    "matmul": _matmul,
    "linalg_matmul": _matmul,
    "mm": lambda write, a: _matmul(write, {k: a[k] for k in ("self", "mat2")}),
    "bmm": lambda write, a: _matmul(write, {k: a[k] for k in ("self", "mat2")}),
    "mv": _matmul,
    "dot": _matmul,
    "vdot": _matmul,
    "addmm": _added,
    "addmv": _added,
    "baddbmm": _added,
    "linear": _linear,
    "inner": _inner,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "bilinear": _bilinear,
}
