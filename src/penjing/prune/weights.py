"""Which weights may be pruned, the layout in which they are compared, and drafts with pruned weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from penjing.errors import PruningError
from penjing.network.graph import kind
from penjing.network.selection import named
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import mark_sparse

LAYERS = ("conv", "linear", "conv_transpose")

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def prunable(network: fx.GraphModule, layers: Iterable[str] = (), keep: Iterable[str] = ()) -> dict[str, Any]:
    """Layer → module of every convolution and linear layer whose weight may be pruned, in execution order.

    A weight that an embedding or a functional operator reads too is left out: the rows of a table are values, not
    connections. A weight that several layers share is listed once.

    Args:
        network: A captured network.
        layers: Layers, or parts of the network; empty selects all.
        keep: Layers, or parts of the network, that are not pruned.

    Raises:
        RecipeError: A named layer does not exist.
        PruningError: No layer is left to prune.
    """
    owners: dict[int, set[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    called = {str(n.target): kind(network, n) for n in network.graph.nodes if n.op == "call_module"}
    read = {str(n.target) for n in network.graph.nodes if n.op == "get_attr"}
    fitting = {f"{name}.weight" for name, what in called.items() if what in LAYERS} - read
    candidates: dict[str, Any] = {}
    seen: set[int] = set()
    for name, what in called.items():
        module: Any = network.get_submodule(name)
        if what in LAYERS and owners[id(module.weight)] <= fitting and id(module.weight) not in seen:
            seen.add(id(module.weight))
            candidates[name] = module
    chosen_names, left_out = named(candidates, network, layers), named(candidates, network, keep)
    chosen = {n: m for n, m in candidates.items() if n not in left_out and (n in chosen_names or not tuple(layers))}
    if not chosen:
        raise PruningError(
            "no layer is left whose weights can be pruned",
            code="nothing-to-prune",
            got=f"{len(candidates)} convolution and linear layers, all of them left out by layers= and keep=",
            expected="at least one",
        )
    return chosen


def by_output(module: nn.Module, stored: torch.Tensor) -> torch.Tensor:
    """A tensor in the shape of a layer's weight as (out, in, *kernel), `in` being the input channels of one group."""
    if not isinstance(module, _TRANSPOSED):
        return stored
    grouped = stored.reshape(module.groups, -1, *stored.shape[1:]).transpose(1, 2)  # (groups, out, in, *kernel)
    return grouped.reshape(module.out_channels, -1, *stored.shape[2:])


def as_stored(module: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """The inverse of `by_output`."""
    if not isinstance(module, _TRANSPOSED):
        return values
    grouped = values.reshape(module.groups, -1, *values.shape[1:]).transpose(1, 2)  # (groups, in, out, *kernel)
    return grouped.reshape(module.in_channels, -1, *values.shape[2:])


def with_zeros(draft: Draft, context: Context, step: str, weights: Mapping[str, torch.Tensor]) -> Draft:
    """A draft with these weights, whose zeros are logged as permanent.

    Args:
        draft: It is left unchanged.
        context: Is told the sparsity.
        step: The name of the pruning step.
        weights: Layer → its weight, in the layer's own layout.
    """
    draft = draft.copy()
    with torch.no_grad():
        for name, weight in weights.items():
            draft.network.get_parameter(f"{name}.weight").copy_(weight)
    tell(draft, context, step, weights)
    return marked(draft, weights)


def tell(draft: Draft, context: Context, step: str, layers: Iterable[str]) -> None:
    """Report the sparsity of these layers."""
    weights = [draft.network.get_parameter(f"{name}.weight") for name in layers]
    zeros, count = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    context.events("sparse", step=step, layers=len(weights), zeros=zeros, weights=count)


def marked(draft: Draft, layers: Iterable[str]) -> Draft:
    """The draft, with the weights of these layers logged as tensors whose zeros stay."""
    known = set(draft.sparse)
    names = [name for layer in layers if (name := f"{layer}.weight") not in known]
    return replace(draft, edits=(*draft.edits, mark_sparse(draft.network, names))) if names else draft


__all__ = ["LAYERS", "as_stored", "by_output", "marked", "prunable", "tell", "with_zeros"]
