"""Reading intermediate values of a network, by a second graph over the same layers."""

from __future__ import annotations

import copy
import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from penjing.errors import RecipeError
from penjing.network.graph import arguments, is_tensor, kind

SCORES = ":scores"


class Tap(nn.Module):
    """Stores the last value that passed through it."""

    value: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> None:
        """Store `x` with its autograd graph."""
        self.value = x


class Scores(nn.Module):
    """Stores the scores of an attention before its softmax: Q·Kᵀ·scale, and 0 where they are masked.

    Args:
        scale: Factor of the products; None for 1/√width.
        causal: Whether later tokens are masked.
    """

    value: torch.Tensor | None = None

    def __init__(self, scale: float | None, causal: bool) -> None:
        super().__init__()
        self.scale, self.causal = scale, causal

    def forward(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Store the scores, (samples, heads, queries, keys)."""
        scale = self.scale if self.scale is not None else 1 / math.sqrt(query.shape[-1])
        scores = query @ key.transpose(-2, -1) * scale
        if self.causal:
            scores = scores.tril()
        if mask is not None:
            scores = scores.where(mask if mask.dtype == torch.bool else mask > -1e4, 0.0)
        self.value = scores


class Tapped:
    """A network with access to intermediate values, called like the network itself.

    It shares layers and weights with the network, so training either changes both.

    Args:
        network: A captured network.
        names: Sites, or parts of the network, whose last value is read; with the suffix ``:scores``, the scores of the
            last attention.
        called: Name of the network in error messages.

    Raises:
        RecipeError: A name does not exist; the error suggests the nearest ones.
    """

    def __init__(self, network: fx.GraphModule, names: Sequence[str], called: str = "network") -> None:
        self.view = fx.GraphModule(network, copy.deepcopy(network.graph))
        self.taps: dict[str, Tap | Scores] = {}
        for position, name in enumerate(dict.fromkeys(names)):
            of_scores = name.endswith(SCORES)
            node = _node(self.view, name.removesuffix(SCORES), of_scores, called)
            given: tuple[Any, ...] = (node,)
            self.taps[name] = Tap()
            if of_scores:
                call = arguments(node)
                self.taps[name] = Scores(call["scale"], bool(call["is_causal"]))
                given = (call["query"], call["key"], call["attn_mask"])
            self.view.add_submodule(f"tap_{position}", self.taps[name])
            with self.view.graph.inserting_after(node):
                self.view.graph.call_module(f"tap_{position}", given)
        self.view.recompile()

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Compute the network's output, and store the tapped values."""
        return self.view(*args, **kwargs)

    def values(self) -> Mapping[str, torch.Tensor]:
        """Return the values of the last call by name, and release them."""
        result = {name: tap.value for name, tap in self.taps.items() if tap.value is not None}
        for tap in self.taps.values():
            tap.value = None  # also releases its autograd graph
        return result


def _several(node: fx.Node) -> bool:
    """Whether an operator returns several results, which are read by getitem nodes."""
    return bool(node.users) and all(user.target is operator.getitem for user in node.users)


def _node(network: fx.GraphModule, name: str, attention: bool, called: str) -> fx.Node:
    """The operator of a site, or the last one, in execution order, of a part of the network."""
    sites: dict[str, fx.Node] = {
        str(n.meta["site"]): n
        for n in network.graph.nodes
        if n.meta.get("site") and is_tensor(n) and not _several(n)
        if not attention or kind(network, n) == "attention"
    }
    if name in sites:
        return sites[name]
    parts = {site: node for site, node in sites.items() if site.startswith((f"{name}.", f"{name}/"))}
    if parts and name:
        return list(parts.values())[-1]
    known = [*sites, *{site.rpartition("/")[0].rpartition(".")[0] for site in sites}]
    near = difflib.get_close_matches(name, [k for k in known if k], n=3, cutoff=0.0)
    what, whose = ("an attention", "an attention") if attention else ("a feature", "a layer, of an operator")
    raise RecipeError(
        f"{what} of the {called} does not exist",
        code="no-attention" if attention else "no-layer",
        got=name,
        expected=f"the name of {whose}, or of a part of the network",
        remedy=(f"the nearest are {', '.join(near)}; " if near else "")
        + "`penjing inspect` lists the layers; a pair names the student's and the teacher's",
    )
