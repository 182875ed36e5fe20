"""Removing channels from a network: tensors are sliced, and literals that depend on their sizes are updated.

Four edits: ``slice`` removes positions from a stored tensor, ``literal`` writes a number, ``partition`` gives a split
explicit lengths, ``reorder`` replaces operators that permute an axis by one selection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from penjing.network.graph import operator_name, sites
from penjing.steps.draft import Edit
from penjing.steps.positions import from_text

RESIZING = ("slice", "literal", "partition", "reorder")
"""The four edits."""


def resize(network: fx.GraphModule, edits: tuple[Edit, ...]) -> None:
    """Apply these edits in place, in order."""
    operators = sites(network)
    for edit in edits:
        _APPLY[edit["edit"]](network, operators, edit)
    network.graph.lint()
    network.recompile()


def _slice(network: fx.GraphModule, operators: dict[str, fx.Node], edit: Edit) -> None:
    tensor = _tensor(network, edit["tensor"])
    axis = int(edit["axis"])
    keep = torch.ones(tensor.shape[axis], dtype=torch.bool)
    removed = from_text(edit["removed"])
    if removed and max(removed) >= len(keep):
        raise IndexError(f"{edit['tensor']} has {len(keep)} positions along axis {axis}, not {max(removed) + 1}")
    keep[removed] = False
    smaller = tensor.detach().index_select(axis, keep.nonzero().reshape(-1).to(tensor.device)).clone()
    new: torch.Tensor = smaller
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    for module in network.modules():
        for store in (module._parameters, module._buffers):
            for role, value in store.items():
                if value is tensor:
                    store[role] = new  # type: ignore[assignment]
                    _sizes(module)


def _literal(network: fx.GraphModule, operators: dict[str, fx.Node], edit: Edit) -> None:
    (word, *index), value = edit["argument"], edit["value"]
    node = operators.get(edit["site"])
    if node is None or node.op == "call_module":
        layer = network.get_submodule(edit["site"])
        if not isinstance(getattr(layer, word), int):
            raise TypeError(f"{edit['site']} has no number {word}")
        setattr(layer, word, int(value))
        _sizes(layer)
        return
    set_argument(node, word, value, index[0] if index else None)


def set_argument(node: fx.Node, word: str, value: Any, index: int | None = None) -> None:
    """Set an argument of a functional operator, by its name in the schema, or one number of a list argument.

    Raises:
        TypeError: The operator has no such argument.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise TypeError(f"{node.target} is not an operator with named arguments")
    arguments = target._schema.arguments
    position = next((i for i, a in enumerate(arguments) if a.name == word), None)
    if position is None:
        raise TypeError(f"{target} has no argument {word}")
    before = node.args[position] if position < len(node.args) else arguments[position].default_value
    given = node.kwargs.get(word, before)
    if index is not None:
        numbers: list[Any] = list(given)  # type: ignore[arg-type]
        numbers[index] = value
        value = numbers
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(word, value)


def _partition(network: fx.GraphModule, operators: dict[str, fx.Node], edit: Edit) -> None:
    node = operators[edit["site"]]
    if operator_name(node) not in ("chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk"):
        raise TypeError(f"{edit['site']} is not a split")
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], list(edit["sizes"]), int(edit["axis"])), {}


def _reorder(network: fx.GraphModule, operators: dict[str, fx.Node], edit: Edit) -> None:
    first, last = operators[edit["first"]], operators[edit["last"]]
    name, axis, order = _buffer(edit["last"]), int(edit["axis"]), from_text(edit["order"])
    # One position more than the order has, and cut off again: OpenVINO 2026.4 moves a whole permutation of channels
    # into the weights of the next convolution, and there it takes the inverse one.
    network.register_buffer(name, torch.tensor([*order, order[0]]))
    call = network.graph.call_function
    with network.graph.inserting_after(last):
        positions = network.graph.get_attr(name)
    with network.graph.inserting_after(positions):
        chosen = call(torch.ops.aten.index_select.default, (first.args[0], axis, positions))
    with network.graph.inserting_after(chosen):
        reordered = call(torch.ops.aten.slice.Tensor, (chosen, axis, 0, len(order)))
    positions.meta = {"site": f"{edit['last']}.order", "floating": False, "rank": 1}
    chosen.meta = {**last.meta, "site": f"{edit['last']}.chosen"}
    reordered.meta = dict(last.meta)
    last.replace_all_uses_with(reordered)
    numbers = first.all_input_nodes[1:]  # the index tensor of an earlier reordering
    node: Any = last
    while node is not first:
        before = node.args[0]
        network.graph.erase_node(node)
        node = before
    network.graph.erase_node(first)
    for old in numbers:
        if not old.users:
            network.graph.erase_node(old)


def _buffer(where: str) -> str:
    return "order_" + "".join(c if c.isalnum() else "_" for c in where)


_APPLY = {"slice": _slice, "literal": _literal, "partition": _partition, "reorder": _reorder}


def _tensor(network: fx.GraphModule, name: str) -> torch.Tensor:
    path, _, role = name.rpartition(".")
    value = getattr(network.get_submodule(path), role)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is not a tensor")
    return value


def _sizes(layer: nn.Module) -> None:
    """Update a layer's size attributes from its tensors."""
    known: Any = layer
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        known.in_channels, known.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        known.out_channels, known.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        known.out_features, known.in_features = layer.weight.shape
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        known.num_features = len(layer.running_mean)  # type: ignore[arg-type]
    elif isinstance(layer, nn.LayerNorm):
        known.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.GroupNorm):
        known.num_channels = len(layer.weight)
    elif isinstance(layer, nn.Embedding):
        known.num_embeddings, known.embedding_dim = layer.weight.shape
