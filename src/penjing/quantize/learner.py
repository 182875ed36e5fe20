"""A network with trainable quantizers: scales are parameters, and batch norms are reinserted behind layers.

Learned step size (LSQ): Esser et al., ICLR 2020. Learned clipping (PACT): Choi et al., 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze import lockstep
from penjing.analyze.samples import chunks
from penjing.network.graph import site, sites
from penjing.quantize.affine import representable
from penjing.steps.draft import Draft
from penjing.steps.plan import LISTED, Entry
from penjing.steps.step import Context
from penjing.surgery import FakeQuantize, Grid, Listed, insert, listed, quantizer_calls


class Learner(nn.Module):
    """A fake quantizer with a trainable scale; of a codebook the integers are trained too, and 0 stays 0."""

    zero_point: torch.Tensor
    nonzero: torch.Tensor

    def __init__(self, entry: Entry, method: str) -> None:
        super().__init__()
        self.spec, self.method = entry.spec, method
        self.scale = nn.Parameter(torch.tensor(entry.scale), requires_grad=method != "ste")
        self.register_buffer("zero_point", torch.tensor(entry.zero_point, dtype=torch.int32))
        self.entries: nn.Parameter | None = None
        if entry.spec.grid == LISTED:
            values = torch.tensor(entry.spec.values, dtype=torch.float32)
            self.entries = nn.Parameter(values / entry.spec.limits[1])
            self.register_buffer("nonzero", values != 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantize x: any shape to the same shape, float32."""
        scale = self.scale.abs() + 1e-12
        if self.entries is not None:
            entries = self.entries * self.nonzero
            few: torch.Tensor = Listed.apply(x, scale, entries, self.zero_point, self.spec, self.method)  # type: ignore[no-untyped-call]
            return few
        result: torch.Tensor = Grid.apply(x, scale, self.zero_point, self.spec, self.method)  # type: ignore[no-untyped-call]
        return result

    def learned(self, entry: Entry) -> Entry:
        """The entry with what was trained."""
        if self.entries is not None:
            integers = torch.unique(listed(self.entries.detach() * self.nonzero, self.spec)).int()
            entry = replace(entry, spec=replace(entry.spec, values=tuple(integers.tolist())))
        scale = representable((self.scale.detach().abs() + 1e-12).float(), entry.spec)
        return replace(entry, scale=tuple(scale.tolist()))


def learner(draft: Draft, context: Context, method: str) -> fx.GraphModule:
    """Build the network with trainable fake quantizers, and reinsert its folded batch norms."""
    network = insert(draft.network, draft.plan, trains=True)
    weights = {f"{name}:weight" for name in sites(draft.network)}
    scales: dict[str, Learner] = {}
    for edge, node in quantizer_calls(network, draft.plan).items():
        entry = draft.plan.entries[edge]
        fixed = entry.spec.scale == "power_of_two" or (method == "pact" and edge in weights)
        quantizer = Learner(entry, "ste" if fixed else method)
        _replace(network, str(node.target), quantizer)
        if edge in weights:
            scales[edge.removesuffix(":weight")] = quantizer
    for name, module in list(network.named_modules()):
        if isinstance(module, FakeQuantize):  # of a bias: its grid follows from scales that are still trained
            _replace(network, name, nn.Identity())
    _revive_norms(network, draft, context, scales)
    network.recompile()
    return network


def _replace(network: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


_NORMS: dict[int, type[nn.Module]] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _revive_norms(network: fx.GraphModule, draft: Draft, context: Context, scales: Mapping[str, Learner]) -> None:
    """Insert a batch norm, initially an identity, behind every layer that one was folded into.

    Folding leaves channels of very different magnitude, and in front of a batch norm the effective learning rate of a
    channel is inversely proportional to its squared magnitude. So every channel is normalized to the magnitude of He et
    al.'s initialization (ICCV 2015), √2, and its scale with it: the integers stay the same, the batch norm undoes the
    factor, and learning rates have their usual meaning.
    """
    folded = {str(edit["layer"]) for edit in draft.edits if edit.get("edit") == "fold"}
    revived = {
        name
        for name in folded
        if (entry := draft.plan.entries.get(f"{name}:weight")) is not None
        and entry.spec.axis == 0
        and entry.spec.group is None
        and entry.spec.scale == "free"
        and _rank(draft, name) in _NORMS
    }
    statistics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(layer: lockstep.Layer) -> None:
        if layer.site in revived:
            every = torch.cat([y.movedim(1, 0).flatten(1) for y in layer.replica_outputs()], 1)
            statistics[layer.site] = (every.mean(1), every.var(1, correction=0))

    lockstep.run(draft.network, draft.plan, chunks(context, draft.network, 64), watch)
    network.add_module("norms", nn.Module())
    holder = network.get_submodule("norms")
    for node in list(network.graph.nodes):
        if node.op != "call_function" or site(node) not in statistics:
            continue
        mean, variance = statistics[site(node)]
        norm: Any = _NORMS[_rank(draft, site(node))](len(mean))
        layer: Any = network.get_submodule(site(node))
        with torch.no_grad():
            sizes = layer.weight.flatten(1).norm(dim=1)
            factor = torch.where(sizes > 1e-6, math.sqrt(2) / sizes.clamp(min=1e-6), 1.0)
            layer.weight *= factor.reshape(-1, *[1] * (layer.weight.dim() - 1))
            layer.bias *= factor
            scales[site(node)].scale.mul_(factor)
            norm.running_mean.copy_(mean * factor)
            norm.running_var.copy_(variance * factor**2)
            norm.weight.copy_(torch.sqrt(norm.running_var + norm.eps) / factor)
            norm.bias.copy_(mean)
        name = site(node).replace(".", "_")
        holder.add_module(name, norm)
        with network.graph.inserting_after(node):
            call = network.graph.call_module(f"norms.{name}", (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)


def _rank(draft: Draft, layer: str) -> int:
    module: Any = draft.network.get_submodule(layer)
    return int(module.weight.dim())


def learned(draft: Draft, network: fx.GraphModule) -> Draft:
    """Return the draft with the weights and scales trained in `network`, which `learner` built."""
    draft = draft.copy()
    entries = dict(draft.plan.entries)
    state = network.state_dict()
    with torch.no_grad():
        for name, parameter in draft.network.named_parameters():
            if name in state:
                parameter.copy_(state[name])
        for edge, node in quantizer_calls(network, draft.plan).items():
            module: Any = network.get_submodule(str(node.target))
            entry = module.learned(entries[edge])
            layer = edge.removesuffix(":weight")
            norm: Any = getattr(network.get_submodule("norms"), layer.replace(".", "_"), None)
            if edge.endswith(":weight") and norm is not None:
                # (Ŵ·x + b − μ)·γ/σ + β: a channel's factor is folded into its scale, so the integers stay the same.
                factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                mine: Any = draft.network.get_submodule(layer)
                mine.weight *= factor.reshape(-1, *[1] * (mine.weight.dim() - 1))
                mine.bias.copy_((mine.bias - norm.running_mean) * factor + norm.bias)
                scale = torch.tensor(entry.scale) * factor.abs().clamp(min=1e-12)
                entry = replace(entry, scale=tuple(scale.tolist()))
            entries[edge] = entry
    return replace(draft, plan=replace(draft.plan, entries=entries))
