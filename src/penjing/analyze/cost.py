"""The cost of every operator of a captured network: parameters, multiply-accumulates, bytes.

A multiply-accumulate (MAC) is one multiplication whose product is added to a sum: two FLOPs. Convolutions, linear
layers, matrix products, attention and recurrent layers are counted; elementwise operators, norms and poolings count 0,
as in published figures (ResNet-18: 1.814 billion at 224×224). Everything is counted for one sample, from shapes alone:
no data is computed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from penjing.network.graph import arguments, is_tensor, kind, operator_name, shapes, site, tensor_inputs
from penjing.records import LayerRow
from penjing.tasks.sample_axes import along_samples

Call = tuple[tuple[Any, ...], dict[str, Any]]
Shapes = dict[str, torch.Tensor]

FREE = frozenset(
    {
        *("reshape", "transpose", "identity", "dropout", "getitem", "select", "slice", "split", "split_with_sizes"),
        *("chunk", "unbind", "narrow", "expand", "expand_as", "view_as", "movedim", "swapaxes", "diagonal", "detach"),
        *("to", "_to_copy", "type_as", "lift_fresh_copy", "unfold", "numpy_T", "broadcast_to"),
    }
)
"""Kinds of views and copies: no row of their own."""


@dataclass(frozen=True, kw_only=True)
class Total:
    """Sums over the rows of a network."""

    parameters: int
    macs: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The peak of live activations: their bytes, and the operator that runs at that moment."""

    size_bytes: int
    site: str


def cost(network: fx.GraphModule, call: Call) -> tuple[LayerRow, ...]:
    """One row for every operator with a cost, in execution order.

    Views, dropout, and arithmetic on sizes and masks have no row.

    Args:
        network: A captured network.
        call: Example inputs (args, kwargs), batch first. One sample of them is counted, or the whole example where
            the network was exported with a fixed batch.

    Returns:
        Rows with parameters (a shared tensor counts once, for the first layer that has it), MACs, bytes of the output
        and bytes of the parameters.
    """
    values = sample_shapes(network, call)
    counted: set[int] = set()
    rows: list[LayerRow] = []
    for node in network.graph.nodes:
        if not _is_operator(node) or kind(network, node) in FREE or not tensor_inputs(node):
            continue
        parameters = [p for p in _parameters(network, node) if id(p) not in counted]
        outputs = _outputs(node, values)
        if not parameters and not any(t.is_floating_point() or t.is_complex() for t in outputs):
            continue
        counted.update(map(id, parameters))
        rows.append(
            LayerRow(
                name=site(node),
                kind=kind(network, node),
                parameters=sum(p.numel() for p in parameters),
                macs=_macs(network, node, values),
                activation_bytes=sum(t.numel() * t.element_size() for t in outputs),
                weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
            )
        )
    return tuple(rows)


def resized_macs(
    network: fx.GraphModule, sizes: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> int:
    """MACs of the network with other shapes, without building it.

    Args:
        network: A captured network.
        sizes: Node name → shape of its value.
        stored: Name of a parameter → its shape, where it differs from the network's.
    """
    values = {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}
    total = 0
    for node in network.graph.nodes:
        if _is_operator(node) and kind(network, node) not in FREE:
            weight = stored.get(f"{node.target}.weight") if node.op == "call_module" else None
            total += _macs(network, node, values, None if weight is None else torch.empty(weight, device="meta"))
    return total


MULTIPLIED = frozenset({"conv", "conv_transpose", "linear"})


def multiplies(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operator has multiply-accumulates: what stays in floating point with it is worth a word."""
    what = kind(network, node)
    if node.op == "call_module":
        return what in MULTIPLIED
    return node.op == "call_function" and (what in MULTIPLIED or what in _COUNTS or operator_name(node) in _COUNTS)


def totals(rows: Iterable[LayerRow]) -> Total:
    """Parameters, MACs and weight bytes of all rows together."""
    rows = tuple(rows)
    return Total(
        parameters=sum(r.parameters for r in rows),
        macs=sum(r.macs for r in rows),
        weight_bytes=sum(r.weight_bytes for r in rows),
    )


def peak_activation_bytes(network: fx.GraphModule, call: Call) -> int:
    """Bytes of `peak_activation`."""
    return peak_activation(network, call).size_bytes


def peak_activation(network: fx.GraphModule, call: Call) -> Peak:
    """The most bytes of inputs and activations that are alive at once for one sample, in the graph's order.

    A tensor is alive from the operator that computes it to the last one that reads it or a view of it; the network's
    outputs are alive to the end. Weights are not counted. A runtime that fuses operators needs less.
    """
    values = sample_shapes(network, call)
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    sizes: dict[int, int] = {}
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    for node, position in order.items():
        if node.name not in values or fixed_value(network, node) or node.op == "output":
            continue
        storage = values[node.name].untyped_storage()
        key = storage._cdata  # views share it; `values` keeps every storage alive, so none is used twice
        made_at = order[node.args[0]] if node.target is operator.getitem else position
        sizes[key] = storage.nbytes()
        born[key] = min(born.get(key, made_at), made_at)
        dies[key] = max([dies.get(key, made_at), made_at, *(order[user] for user in node.users)])
    change = [0] * (len(order) + 1)
    for key, size in sizes.items():
        change[born[key]] += size
        change[dies[key] + 1] -= size
    peak, alive = Peak(size_bytes=0, site=""), 0
    for node, position in order.items():
        alive += change[position]
        if alive > peak.size_bytes:
            peak = Peak(size_bytes=alive, site=site(node))
    return peak


def sample_shapes(network: fx.GraphModule, call: Call) -> Shapes:
    """Node name → fake tensor of a call with one sample, or with the whole example where the batch is fixed."""
    for one in (_one_sample(call), _one_sample(call, states=True)):
        try:
            return shapes(network, one)
        except (RuntimeError, IndexError):  # a fixed batch size is a constant in the graph's reshapes
            continue
    return shapes(network, call)


def _one_sample(call: Call, *, states: bool = False) -> Call:
    """The call with one of its samples.

    Args:
        call: Its first tensor has its samples in axis 0.
        states: Whether (n, n, width) behind it is the state of n recurrent layers, with n samples in axis 1.
    """
    first = next((x for x in pytree.tree_leaves(call) if isinstance(x, torch.Tensor) and x.dim()), None)

    def cut(value: torch.Tensor, axis: int) -> torch.Tensor:
        square = states and value is not first and value.dim() == 3 and value.shape[0] == value.shape[1]
        # A clone, because a slice would keep the storage of the whole batch.
        return value.narrow(1 if square else axis, 0, 1).clone()

    return along_samples(call, None, cut)


def _is_operator(node: fx.Node) -> bool:
    return node.op in ("call_module", "call_function") and is_tensor(node)


def fixed_value(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a stored tensor, or a view of one."""
    if node.op == "get_attr":
        return True
    inputs = tensor_inputs(node) if _is_operator(node) and kind(network, node) in FREE else []
    return len(inputs) > 0 and fixed_value(network, inputs[0])


def _stored(network: fx.GraphModule, node: fx.Node) -> list[Any]:
    if node.op == "get_attr":
        return [_attribute(network, str(node.target))]
    return _stored(network, tensor_inputs(node)[0]) if fixed_value(network, node) else []


def _attribute(network: fx.GraphModule, path: str) -> Any:
    value: Any = network
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _parameters(network: fx.GraphModule, node: fx.Node) -> list[nn.Parameter]:
    """The parameters of a layer, or those that a functional operator reads directly or through views; each once."""
    if node.op == "call_module":
        owned: list[Any] = list(network.get_submodule(str(node.target)).parameters())
    else:
        owned = [tensor for n in tensor_inputs(node) for tensor in _stored(network, n)]
    return [p for p in dict.fromkeys(owned) if isinstance(p, nn.Parameter)]


def _outputs(node: fx.Node, tensors: Shapes) -> list[torch.Tensor]:
    if node.name in tensors:
        return [tensors[node.name]]
    return [tensors[user.name] for user in node.users if user.name in tensors]  # one of several results each


# --- multiply-accumulates ---------------------------------------------------------------------------------------


def _macs(network: fx.GraphModule, node: fx.Node, tensors: Shapes, weight: torch.Tensor | None = None) -> int:
    """MACs of one operator; `weight` stands for that of a layer."""
    what = kind(network, node)
    if node.op == "call_module":
        if weight is None:
            weight = getattr(network.get_submodule(str(node.target)), "weight", None)
        x = tensors[tensor_inputs(node)[0].name]
        return _weighted(what, x, weight, tensors[node.name]) if weight is not None else 0
    values = {name: fx.node.map_arg(value, lambda n: tensors.get(n.name, n)) for name, value in arguments(node).items()}
    if what in ("conv", "conv_transpose", "linear"):
        return _weighted(what, values["input"], values["weight"], tensors[node.name])
    count = _COUNTS.get(what) or _COUNTS.get(operator_name(node))
    return count(values, _outputs(node, tensors)) if count else 0


def _weighted(what: str, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> int:
    """MACs of a layer with weight (out, in/groups, …), or (in, out/groups, …) where it is transposed."""
    if what in ("conv", "linear"):
        return y.numel() * math.prod(weight.shape[1:])
    return x.numel() * math.prod(weight.shape[1:]) if what == "conv_transpose" else 0


def _product(first: str) -> Callable[[dict[str, Any], list[torch.Tensor]], int]:
    """(…, n, k)·(…, k, m): k for every element of the result; `first` is the name of the left argument."""
    return lambda values, outputs: outputs[0].numel() * int(values[first].shape[-1])


def _attention(values: dict[str, Any], outputs: list[torch.Tensor]) -> int:
    # Query (…, heads, L, E), key (…, S, E), value (…, S, Ev): all L·S products, also where a mask hides some, for
    # every head of the query, also where several share a key.
    out, key = outputs[0], values["key"]
    rows = out.numel() // max(1, out.shape[-1])
    return rows * int(key.shape[-2]) * int(key.shape[-1] + out.shape[-1])


def _recurrent(values: dict[str, Any], outputs: list[torch.Tensor]) -> int:
    # Every matrix of every layer and direction (gates × inputs, gates × state, projection) once per sample and step.
    x = values["input"] if "input" in values else values["data"]
    return int(x.numel() // x.shape[-1] * sum(p.numel() for p in values["params"] if p.dim() == 2))


def _einsum(values: dict[str, Any], outputs: list[torch.Tensor]) -> int:
    """Two operands: the product of all axes. More are multiplied from left to right, each counted so."""
    terms = values["equation"].replace(" ", "").split("->")[0].split(",")
    axes: dict[str, int] = {}
    total = 0
    for i, (term, tensor) in enumerate(zip(terms, values["tensors"], strict=True)):
        before, dots, after = term.partition("...")
        hidden = [f"...{n}" for n in range(tensor.dim() - len(before) - len(after), 0, -1)] if dots else []
        for axis, size in zip([*before, *hidden, *after], tensor.shape, strict=True):
            axes[axis] = max(axes.get(axis, 1), int(size))  # an axis of size 1 is broadcast
        total += math.prod(axes.values()) if i else 0
    return total


_COUNTS: dict[str, Callable[[dict[str, Any], list[torch.Tensor]], int]] = {
    "matmul": _product("self"),
    "addmm": _product("mat1"),
    "baddbmm": _product("batch1"),
    "mv": _product("self"),
    "dot": _product("self"),
    "attention": _attention,
    "einsum": _einsum,
    "lstm": _recurrent,
    "gru": _recurrent,
}
