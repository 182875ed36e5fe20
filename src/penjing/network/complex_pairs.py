"""Complex tensors expressed as pairs of real ones, which runtimes support.

Rotary embeddings are often written with complex numbers: `torch.polar`, `torch.complex`, `torch.view_as_complex`, a
stored table of them (``freqs_cis``), and spectral layers use Fourier transforms (`penjing.network.fourier`). No step
and no runtime supports those. At capture, each complex tensor becomes two, its real and its imaginary part; a stored
one keeps its name, with a last axis of 2. If a network has a complex operator that is not in `RULES` or `BY_PART`, or a
transform of varying length, it is left unchanged for the runtime's exporter to translate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from penjing.errors import ExportError
from penjing.network import fourier
from penjing.network.graph import arguments, line, operator_name
from penjing.network.rewriting import Builder, editable

aten = torch.ops.aten
Pair = tuple[Any, Any]  # real and imaginary part; the latter is None for a real number or tensor


def complex_as_pairs(program: ExportedProgram) -> ExportedProgram:
    """Replace every complex tensor of a program by two real ones; unchanged without any, or with an unknown operator.

    Raises:
        ExportError: An input or an output of the network is complex.
    """
    touched = [node for node in program.graph.nodes if _touches(node)]
    if not touched:
        return program
    inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in touched:
        is_input = node.op == "placeholder" and inputs[node.name].kind is InputKind.USER_INPUT
        if is_input or node.op == "output":
            _refuse(node)
        if node.op == "call_function" and operator_name(node) not in (*RULES, *BY_PART):
            return program
        if not fourier.expressible(node):
            return program
    program = editable(program)
    pairs: dict[fx.Node, Pair] = {}
    rewritten = []
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and _is_complex(node):
            pairs[node] = _stored(program, node)
        elif node.op == "call_function" and (_is_complex(node) or any(n in pairs for n in node.all_input_nodes)):
            rewritten.append(node)
            result = _rewritten(Builder(program, node), node, pairs)
            if isinstance(result, fx.Node):
                node.replace_all_uses_with(result)
                _rename(program, node, result)
            else:
                pairs[node] = result
    for node in reversed(rewritten):
        program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _is_complex(node: fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)


def _touches(node: fx.Node) -> bool:
    return _is_complex(node) or any(_is_complex(n) for n in node.all_input_nodes)


def _refuse(node: fx.Node) -> None:
    side = "an input" if node.op == "placeholder" else "an output"
    makers = [n for n in node.all_input_nodes if _is_complex(n)]
    raise ExportError(
        f"{side} of the network is complex{line(makers[0]) if makers else ''}",
        code="complex-input" if node.op == "placeholder" else "complex-output",
        got=f"{node.name}: {node.meta['val'].dtype}" if not makers else str(makers[0].meta["val"].dtype),
        expected="real tensors: runtimes accept pairs of real and imaginary part",
        remedy="use torch.view_as_complex(x) within forward"
        if node.op == "placeholder"
        else "return torch.view_as_real(y)",
    )


def _rename(program: ExportedProgram, old: fx.Node, new: fx.Node) -> None:
    for spec in program._graph_signature.output_specs:
        if getattr(spec.arg, "name", None) == old.name:
            object.__setattr__(spec.arg, "name", new.name)


def _stored(program: ExportedProgram, node: fx.Node) -> Pair:
    """A stored complex tensor becomes a real one of the same name, with a last axis of 2."""
    spec = next(spec for spec in program._graph_signature.input_specs if spec.arg.name == node.name)
    home = program._state_dict if spec.target in program._state_dict else program._constants
    old: Any = home[str(spec.target)]
    new = torch.view_as_real(old.detach().to(torch.complex64).resolve_conj()).clone()
    home[str(spec.target)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    node.meta["val"] = node.meta["val"].fake_mode.from_tensor(new, static_shapes=True)
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    build = Builder(program, first)
    return build(aten.select.int, node, -1, 0), build(aten.select.int, node, -1, 1)


def _rewritten(build: Builder, node: fx.Node, pairs: dict[fx.Node, Pair]) -> Any:
    """A pair if the operator's result is complex, otherwise a node."""

    def pair(x: Any) -> Pair:
        if isinstance(x, complex):
            return x.real, x.imag
        return pairs[x] if isinstance(x, fx.Node) and x in pairs else (x, None)

    name, target = operator_name(node), cast(Callable[..., Any], node.target)
    if name in RULES:
        return RULES[name](build, arguments(node), pair)
    whole = name in _JOIN  # a real tensor combined with complex ones has an imaginary part of zeros
    parts = []
    for part in (0, 1):

        def replaced(x: Any, part: int = part) -> Any:
            if isinstance(x, torch.dtype):
                return torch.float32 if x.is_complex else x
            if not isinstance(x, fx.Node):
                return x
            if x in pairs:
                return _part(build, pairs[x], part)
            value = x.meta.get("val")
            real = isinstance(value, torch.Tensor) and value.is_floating_point()
            return _part(build, (x, None), part) if whole and real else x

        args, kwargs = pytree.tree_map(replaced, (node.args, node.kwargs))
        parts.append(build(target, *args, **kwargs))
    return tuple(parts)


def _part(build: Builder, pair: Pair, part: int) -> Any:
    if part and pair[1] is None:
        return build(aten.zeros_like.default, pair[0]) if isinstance(pair[0], fx.Node) else 0.0
    return pair[part]


def _product(build: Builder, of: Callable[[Any, Any], Any], x: Pair, y: Pair) -> Pair:
    """(a + ib)(c + id) for a bilinear operator."""
    (a, b), (c, d) = x, y
    if b is None and d is None:
        return of(a, c), None
    if d is None:
        return of(a, c), of(b, c)
    if b is None:
        return of(a, c), of(a, d)
    real = build(aten.sub.Tensor, of(a, c), of(b, d))
    return real, build(aten.add.Tensor, of(a, d), of(b, c))


def _times(build: Builder) -> Callable[[Any, Any], Any]:
    def times(x: Any, y: Any) -> Any:
        if not isinstance(x, fx.Node):
            x, y = y, x
        return build(aten.mul.Tensor if isinstance(y, fx.Node) else aten.mul.Scalar, x, y)

    return times


def _mul(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    return _product(build, _times(build), pair(a["self"]), pair(a["other"]))


def _div(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    x, (c, d) = pair(a["self"]), pair(a["other"])
    if d is not None and isinstance(c, fx.Node):
        return _product(build, _times(build), x, _inverse(build, c, d))
    if d is not None:
        inverse = 1 / complex(c, d)
        return _product(build, _times(build), x, (inverse.real, inverse.imag))
    way = aten.div.Tensor if isinstance(c, fx.Node) else aten.div.Scalar
    return tuple(build(way, part, c) for part in x)


def _inverse(build: Builder, c: Any, d: Any) -> Pair:
    square = _square(build, c, d)
    return build(aten.div.Tensor, c, square), build(aten.neg.default, build(aten.div.Tensor, d, square))


def _square(build: Builder, real: Any, imaginary: Any) -> Any:
    both = [build(aten.mul.Tensor, part, part) for part in (real, imaginary)]
    return build(aten.add.Tensor, *both)


def _add(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    return _sum(build, a, pair, aten.add)


def _sub(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    return _sum(build, a, pair, aten.sub)


def _sum(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair], way: Any) -> Any:
    sides = pair(a["self"]), pair(a["other"])
    parts = []
    for part in (0, 1):
        x, y = (_part(build, side, part) for side in sides)
        parts.append(build(way.Tensor if isinstance(y, fx.Node) else way.Scalar, x, y, alpha=a.get("alpha", 1)))
    return tuple(parts)


def _matrices(name: str, left: str, right: str) -> Callable[..., Any]:
    def products(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
        way = getattr(aten, name).default
        return _product(build, lambda x, y: build(way, x, y), pair(a[left]), pair(a[right]))

    return products


def _einsum(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    result, *others = (pair(x) for x in a["tensors"])
    if not others:
        return tuple(build(aten.einsum.default, a["equation"], [part]) for part in result)
    (other,) = others  # torch itself contracts pairwise without opt_einsum
    return _product(build, lambda x, y: build(aten.einsum.default, a["equation"], [x, y]), result, other)


def _polar(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    return tuple(
        build(aten.mul.Tensor, a["abs"], build(wave, a["angle"])) for wave in (aten.cos.default, aten.sin.default)
    )


def _exp(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    real, imaginary = pair(a["self"])
    if imaginary is None:
        return build(aten.exp.default, real)
    size = build(aten.exp.default, real)
    return _polar(build, {"abs": size, "angle": imaginary}, pair)


def _power(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    return _product(build, _times(build), pair(a["self"]), pair(a["self"]))


def _view_as_complex(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    return tuple(build(aten.select.int, a["self"], -1, part) for part in (0, 1))


def _view_as_real(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    return build(aten.stack.default, list(pair(a["self"])), -1)


def _conj(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    real, imaginary = pair(a["self"])
    return real, build(aten.neg.default, imaginary)


def _abs(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    return build(aten.sqrt.default, _square(build, *pair(a["self"])))


def _angle(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    real, imaginary = pair(a["self"])
    return build(aten.atan2.default, imaginary, real)


def _reciprocal(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    return _inverse(build, *pair(a["self"]))


def _to(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    real, imaginary = pair(a["self"])
    value = build.node.meta["val"]
    if not value.is_complex():
        return build(aten.to.dtype, real, value.dtype)
    if imaginary is None:
        real = build(aten.to.dtype, real, torch.float32)
        imaginary = build(aten.zeros_like.default, real)
    return real, imaginary


RULES: dict[str, Callable[..., Any]] = {
    **fourier.RULES,
    "complex": lambda build, a, pair: (a["real"], a["imag"]),
    "polar": _polar,
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
    "real": lambda build, a, pair: pair(a["self"])[0],
    "imag": lambda build, a, pair: pair(a["self"])[1],
    "_conj": _conj,
    "conj": _conj,
    "conj_physical": _conj,
    "abs": _abs,
    "angle": _angle,
    "mul": _mul,
    "multiply": _mul,
    "div": _div,
    "add": _add,
    "sub": _sub,
    "reciprocal": _reciprocal,
    "exp": _exp,
    "square": _power,
    "to": _to,
    "_to_copy": _to,
    "type_as": _to,
    "matmul": _matrices("matmul", "self", "other"),
    "mm": _matrices("mm", "self", "mat2"),
    "bmm": _matrices("bmm", "self", "mat2"),
    "einsum": _einsum,
    "sym_size": lambda build, a, pair: build(aten.sym_size.int, pair(a["self"])[0], a["dim"]),
    "_assert_tensor_metadata": lambda build, a, pair: (None, None),  # unused
}
_JOIN = ("cat", "concat", "stack", "where", "slice_scatter", "copy")
BY_PART = {
    *_JOIN,
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as"),
    *("transpose", "permute", "movedim", "swapaxes", "t", "contiguous", "clone", "alias", "detach", "lift_fresh_copy"),
    *("slice", "select", "narrow", "index", "index_select", "gather", "getitem", "split", "split_with_sizes", "chunk"),
    *("unbind", "repeat", "repeat_interleave", "roll", "flip", "sum", "mean", "cumsum", "neg", "zeros", "zeros_like"),
    *("resolve_conj", "resolve_neg", "constant_pad_nd", "pad", "diagonal"),
}
"""Operators that act on the real and imaginary part separately."""
