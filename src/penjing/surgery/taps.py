"""Reading intermediate values of a network: a second view of the same layers, with taps on some edges."""

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
        """Keep `x`, with what its gradient needs."""
        self.value = x


class Scores(nn.Module):
    """Keeps what an attention computes before its softmax: Q·Kᵀ·scale, and 0 where something is hidden.

    Args:
        scale: Of the products; None is 1/√width.
        causal: Tokens do not see later ones.
    """

    value: torch.Tensor | None = None

    def __init__(self, scale: float | None, causal: bool) -> None:
        super().__init__()
        self.scale, self.causal = scale, causal

    def forward(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Keep (samples, heads, queries, keys)."""
        scale = self.scale if self.scale is not None else 1 / math.sqrt(query.shape[-1])
        scores = query @ key.transpose(-2, -1) * scale
        if self.causal:
            scores = scores.tril()
        if mask is not None:
            scores = scores.where(mask if mask.dtype == torch.bool else mask > -1e4, 0.0)
        self.value = scores


class Tapped:
    """A network with access to intermediate values, called like the network itself.

    Layers and their weights are those of the network: what trains the one trains the other.

    Args:
        network: A captured network.
        names: Sites, or parts of the network, whose last value is meant; with ``:scores`` behind it, the scores of
            the last attention.
        called: What errors call the network.

    Raises:
        RecipeError: A name does not exist; the nearest are suggested.
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
        """The network's output."""
        return self.view(*args, **kwargs)

    def values(self) -> Mapping[str, torch.Tensor]:
        """Every name's value in the last call."""
        result = {name: tap.value for name, tap in self.taps.items() if tap.value is not None}
        for tap in self.taps.values():
            tap.value = None  # and what its gradient holds
        return result


def _several(node: fx.Node) -> bool:
    """Whether an operator has several results, each of which has a name of its own."""
    return bool(node.users) and all(user.target is operator.getitem for user in node.users)


def _node(network: fx.GraphModule, name: str, attention: bool, called: str) -> fx.Node:
    """The operator of a site, or the last one of a part of the network, as it stands in the forward."""
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
