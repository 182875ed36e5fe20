"""Reading values inside a network while it computes: a second view of the same layers, with taps on some edges."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from penjing.errors import RecipeError
from penjing.graph import is_tensor


class Tap(nn.Module):
    """Keeps the last value that went through it."""

    value: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> None:
        """Keep `x`, with what its gradient needs."""
        self.value = x


class Tapped:
    """A network that tells values inside it, and is called as the network is called.

    Layers and their weights are those of the network: what trains the one trains the other.

    Args:
        network: A raised network.
        names: Sites, or parts of the network, whose last value is meant.

    Raises:
        RecipeError: A name does not exist; the nearest are suggested.
    """

    def __init__(self, network: fx.GraphModule, names: Sequence[str]) -> None:
        self.view = fx.GraphModule(network, copy.deepcopy(network.graph))
        found = {name: _node(self.view, name) for name in dict.fromkeys(names)}
        self.taps = {name: Tap() for name in found}
        for position, (name, node) in enumerate(found.items()):
            self.view.add_submodule(f"tap_{position}", self.taps[name])
            with self.view.graph.inserting_after(node):
                self.view.graph.call_module(f"tap_{position}", (node,))
        self.view.recompile()

    def __call__(self, *args: object, **kwargs: object) -> object:
        """The network's output."""
        return self.view(*args, **kwargs)

    def values(self) -> Mapping[str, torch.Tensor]:
        """Every name's value in the last call."""
        found = {name: tap.value for name, tap in self.taps.items() if tap.value is not None}
        for tap in self.taps.values():
            tap.value = None  # and what its gradient holds
        return found


def _node(network: fx.GraphModule, name: str) -> fx.Node:
    """The operator of a site, or the last one of a part of the network, as it stands in the forward."""
    sites: dict[str, fx.Node] = {
        str(n.meta["site"]): n for n in network.graph.nodes if n.meta.get("site") and is_tensor(n)
    }
    if name in sites:
        return sites[name]
    parts = {site: node for site, node in sites.items() if site.startswith((f"{name}.", f"{name}/"))}
    if parts and name:
        return list(parts.values())[-1]
    known = [*sites, *{site.rpartition("/")[0].rpartition(".")[0] for site in sites}]
    near = difflib.get_close_matches(name, [k for k in known if k], n=3, cutoff=0.4)
    raise RecipeError(
        "a feature of the network does not exist",
        got=name,
        expected="the name of a layer, of an operator, or of a part of the network",
        remedy=f"the nearest are {', '.join(near)}" if near else "`penjing inspect` lists the layers",
    )
