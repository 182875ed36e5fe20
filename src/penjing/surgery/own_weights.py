"""Untying weights: a layer that reads a tied weight transposed or sliced gets a separate copy.

The scales of an integer weight belong to output channels. If one layer reads a tensor as it is and another reads it
transposed, the output channels of one are the input channels of the other, so they can't share integers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from penjing.network.capture import layer_of
from penjing.network.graph import compute, operator_name, site, sites
from penjing.network.stored_weights import constants
from penjing.steps.draft import Edit

_LAYERS = ("linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
_PRODUCTS = ("matmul", "bmm")  # of one matrix per head or expert


def own_weights(network: fx.GraphModule, keep: Collection[str] = ()) -> tuple[Edit, ...]:
    """Give every product that computes its weight from stored tensors a separate weight, in place.

    Capture folds such computations unless the tensor has another reader. Afterwards the weights are no longer tied:
    gradients of one reader do not reach the others.

    Args:
        network: A captured network.
        keep: Sites that are left unchanged.

    Returns:
        The edit; empty if there is no such product.
    """
    constant = constants(network.graph)
    names = [name for name, node in sites(network).items() if name not in keep and _computed(node, constant)]
    if not names:
        return ()
    give_own_weights(network, names)
    return ({"edit": "own_weights", "sites": names},)


def give_own_weights(network: fx.GraphModule, names: Collection[str]) -> None:
    """Give these sites separate weights; a linear layer or convolution becomes a module ``NAME_copy``.

    Raises:
        TypeError: One of them is not such a product.
    """
    constant = constants(network.graph)
    copies: dict[str, tuple[str, nn.Parameter]] = {}  # expression → its copy, shared by readers that compute the same
    for name in names:
        node = sites(network)[name]
        arguments = _computed(node, constant)
        if not arguments:
            raise TypeError(f"{name} does not compute its weight from stored tensors")
        tensors: dict[str, torch.Tensor] = {}
        for argument in arguments:
            expression = _expression(network, argument)
            if expression not in copies:
                copies[expression] = (_free_path(network, argument, copies), _evaluated(network, argument))
            path, value = copies[expression]
            tensors[path] = value
            with network.graph.inserting_before(node):
                read = network.graph.create_node("get_attr", path)
            read.meta = dict(argument.meta)
            node.replace_input_with(argument, read)
        for read in node.all_input_nodes:
            if read.op == "get_attr" and str(read.target) not in tensors:
                tensors[str(read.target)] = compute(network, read, (), {})
        if operator_name(node) in _LAYERS:
            _as_layer(network, node, tensors)
        else:
            for path in tensors.keys() - {*dict(network.named_parameters()), *dict(network.named_buffers())}:
                network.register_parameter(path, tensors[path])  # type: ignore[arg-type]
    _remove_unread(network)
    network.graph.lint()
    network.recompile()


def _computed(node: fx.Node, constant: Collection[fx.Node]) -> list[fx.Node]:
    """The arguments of a product that are computed only from stored tensors; [] if the node is not such a product."""
    if node.op != "call_function" or node in constant or not isinstance(node.target, torch._ops.OpOverload):
        return []
    if operator_name(node) not in _LAYERS + _PRODUCTS:
        return []
    first = 1 if operator_name(node) in _LAYERS else 0
    return [a for a in node.args[first:] if isinstance(a, fx.Node) and a.op == "call_function" and a in constant]


def _as_layer(network: fx.GraphModule, node: fx.Node, tensors: Mapping[str, torch.Tensor]) -> None:
    built = layer_of(node, tensors)
    if built is None:
        raise TypeError(f"{site(node)} is not a layer")
    layer, x = built
    weight = next(str(a.target) for a in node.args[1:] if isinstance(a, fx.Node))
    name, n = weight, 1
    while name in dict(network.named_modules()) or name in dict(network.named_parameters()):
        name, n = f"{weight}_{n}", n + 1
    network.add_submodule(name, layer.train(network.training))
    with network.graph.inserting_before(node):
        call = network.graph.call_module(name, (x,))
    call.meta = node.meta | {"site": name}
    node.replace_all_uses_with(call)
    network.graph.erase_node(node)


def _evaluated(network: fx.GraphModule, node: fx.Node) -> nn.Parameter:
    with torch.no_grad():
        value = _value(network, node).detach().clone(memory_format=torch.contiguous_format)
    trains = any(t.requires_grad for t in (_value(network, leaf) for leaf in _leaves(node)))
    return nn.Parameter(value, requires_grad=trains)


def _value(network: fx.GraphModule, node: fx.Node) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _value(network, n))
    return compute(network, node, args, kwargs)


def _leaves(node: fx.Node) -> list[fx.Node]:
    if node.op == "get_attr":
        return [node]
    return list(dict.fromkeys(leaf for n in node.all_input_nodes for leaf in _leaves(n)))


def _expression(network: fx.GraphModule, node: fx.Node) -> str:
    """The expression of a constant; equal for two nodes that compute the same from the same tensors."""
    if node.op == "get_attr":
        return f"tensor {id(_value(network, node))}"
    return f"{node.target} {fx.node.map_arg((node.args, node.kwargs), lambda n: _expression(network, n))!r}"


def _free_path(network: fx.GraphModule, node: fx.Node, copies: Mapping[str, tuple[str, nn.Parameter]]) -> str:
    """An unused name, formed from that of the tensor it is computed from."""
    path = str(_leaves(node)[0].target) if _leaves(node) else "weight"
    base = path.removesuffix(".weight").removesuffix("_weight") + "_copy"
    taken = {*dict(network.named_modules()), *dict(network.named_parameters()), *dict(network.named_buffers())}
    taken |= {name for name, _ in copies.values()}
    name, n = base, 1
    while name in taken:
        name, n = f"{base}_{n}", n + 1
    return name


def _remove_unread(network: fx.GraphModule) -> None:
    """Remove constants without readers."""
    unread = constants(network.graph)
    for node in reversed(list(network.graph.nodes)):
        if node in unread and not node.users:
            network.graph.erase_node(node)
            if node.op == "get_attr":
                _forget(network, str(node.target))


def _forget(network: fx.GraphModule, path: str) -> None:
    owner, _, leaf = path.rpartition(".")
    layers = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    holder = network.get_submodule(owner)
    if owner not in layers and not any(n.target == path for n in network.graph.nodes) and hasattr(holder, leaf):
        delattr(holder, leaf)
