"""A network whose quantizers learn: gradients through rounding, scales as parameters, batch norms alive behind layers.

Straight-through gradients: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
Learned step size (LSQ): Esser et al., ICLR 2020. Clipping that is learned (PACT): Choi et al., 2018.
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
from penjing.draft import Draft
from penjing.graph import site, sites, tensor_inputs
from penjing.grid import broadcast, on_grid, rows
from penjing.plan import Entry, Plan, QuantSpec
from penjing.step import Context
from penjing.surgery import FakeQuantize, insert


class Grid(torch.autograd.Function):
    """`on_grid` with straight-through gradients, and the gradient of its scale (LSQ, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec, method: str
    ) -> torch.Tensor:
        """x any shape, scale and zero_point (scales,); see `grid.integers`."""
        y = on_grid(x.float(), scale.detach(), zero_point, spec)
        ctx.save_for_backward(x, scale, zero_point, y)
        ctx.spec, ctx.method = spec, method
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and scale."""
        (gradient,) = gradients
        x, scale, zero_point, y = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        low, high = spec.limits
        if scale.numel() == 1:
            step, zero = float(scale), int(zero_point)
            # What rounds to an integer of the grid passes; one kernel for the comparison and the product.
            of_x = torch.ops.aten.hardtanh_backward(
                gradient, x.float(), (low - zero - 0.5) * step, (high - zero + 0.5) * step
            )
        else:
            steps, zeros = broadcast(scale, x, spec), broadcast(zero_point, x, spec)
            inside = (x >= (low - zeros - 0.5) * steps) & (x <= (high - zeros + 0.5) * steps)
            of_x = torch.where(inside, gradient, 0.0)
        if not ctx.needs_input_grad[1]:
            return of_x.to(x.dtype), None, None, None, None
        if ctx.method == "pact":  # only what is cut at the upper end moves that end
            top = (high - broadcast(zero_point, x, spec)) * broadcast(scale, x, spec)
            of_scale = rows(torch.where(x > top, gradient, 0.0), spec).sum(1) * (high - zero_point)
        else:
            # Inside, the gradient is (x̂ − x) / s, outside x̂ / s: two inner products.
            of_scale = (_inner(gradient, y, spec) - _inner(of_x, x.float(), spec)) / scale
        count = x.numel() / scale.numel() / (x.shape[0] if spec.axis is None else 1)
        return of_x.to(x.dtype), of_scale.reshape(scale.shape) / math.sqrt(max(1.0, count * high)), None, None, None


def _inner(a: torch.Tensor, b: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Σ a·b of the values of every scale: (scales,)."""
    if spec.axis is not None:
        return rows(a * b, spec).sum(1)
    by_memory = sorted(range(a.dim()), key=a.stride, reverse=True)  # channels-last too is then one row
    return torch.dot(a.permute(by_memory).reshape(-1), b.permute(by_memory).reshape(-1)).reshape(1)


class Learner(nn.Module):
    """A quantizer whose scale can learn."""

    zero_point: torch.Tensor

    def __init__(self, entry: Entry, method: str) -> None:
        super().__init__()
        self.spec, self.method = entry.spec, method
        self.scale = nn.Parameter(torch.tensor(entry.scale), requires_grad=method != "ste")
        self.register_buffer("zero_point", torch.tensor(entry.zero_point, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape in, the same shape out, float32."""
        scale = self.scale.abs() + 1e-12
        result: torch.Tensor = Grid.apply(x, scale, self.zero_point, self.spec, self.method)  # type: ignore[no-untyped-call]
        return result


def learner(draft: Draft, context: Context, method: str) -> fx.GraphModule:
    """The network with quantizers that learn, and with the batch norms that were folded alive behind its layers."""
    network = insert(draft.network, draft.plan)
    weights = {f"{name}:weight" for name in sites(draft.network)}
    scales: dict[str, Learner] = {}
    for edge, node in _quantizers(network, draft.plan).items():
        entry = draft.plan.entries[edge]
        fixed = entry.spec.scale == "power_of_two" or (method == "pact" and edge in weights)
        made = Learner(entry, "ste" if fixed else method)
        _replace(network, str(node.target), made)
        if edge in weights:
            scales[edge.removesuffix(":weight")] = made
    for name, module in list(network.named_modules()):
        if isinstance(module, FakeQuantize):  # of a bias: its grid follows from scales that still move
            _replace(network, name, nn.Identity())
    _revive_norms(network, draft, context, scales)
    network.recompile()
    return network


def _quantizers(network: fx.GraphModule, plan: Plan) -> dict[str, fx.Node]:
    """Edge of the plan → the call of its quantizer in an inserted network."""
    found = {**sites(network), "output": next(n for n in network.graph.nodes if n.op == "output")}
    edges: dict[str, fx.Node] = {}
    for edge in plan.entries:
        name, _, port = edge.rpartition(":")
        node = found[name]
        edges[edge] = node.args[1] if port == "weight" else tensor_inputs(node)[int(port.removeprefix("in"))]
    return edges


def _replace(network: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


_NORMS: dict[int, type[nn.Module]] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _revive_norms(network: fx.GraphModule, draft: Draft, context: Context, scales: Mapping[str, Learner]) -> None:
    """Put a batch norm, at first an identity, behind every layer that one was folded into.

    Folding left channels of very different sizes, and behind a batch norm a step changes a channel by the inverse of
    its size squared. So every channel takes the size that He et al. (ICCV 2015) begin with, √2, and its scale with it:
    the integers stay, the batch norm divides it out again, and learning rates mean what they mean elsewhere.
    """
    folded = {str(edit["layer"]) for edit in draft.edits if edit.get("edit") == "fold"}
    wanted = {
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
        if layer.site in wanted:
            every = torch.cat([y.movedim(1, 0).flatten(1) for y in layer.twin_outputs()], 1)
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
    """The draft with what `network`, made by `learner`, has learned."""
    draft = draft.copy()
    entries = dict(draft.plan.entries)
    state = network.state_dict()
    with torch.no_grad():
        for name, parameter in draft.network.named_parameters():
            if name in state:
                parameter.copy_(state[name])
        for edge, node in _quantizers(network, draft.plan).items():
            module: Any = network.get_submodule(str(node.target))
            scale = (module.scale.detach().abs() + 1e-12).float()
            layer = edge.removesuffix(":weight")
            norm: Any = getattr(network.get_submodule("norms"), layer.replace(".", "_"), None)
            if edge.endswith(":weight") and norm is not None:
                # (Ŵ·x + b − μ)·γ/σ + β: the factor of a channel goes into its scale, and the integers stay.
                factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                mine: Any = draft.network.get_submodule(layer)
                mine.weight *= factor.reshape(-1, *[1] * (mine.weight.dim() - 1))
                mine.bias.copy_((mine.bias - norm.running_mean) * factor + norm.bias)
                scale = scale * factor.abs().clamp(min=1e-12)
            entries[edge] = replace(entries[edge], scale=tuple(scale.tolist()))
    return replace(draft, plan=replace(draft.plan, entries=entries))
