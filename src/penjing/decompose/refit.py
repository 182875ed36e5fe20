"""Factors, and the whole layers behind them, refitted to what the layers gave, on what is before them now.

All layers are fitted in one pass over unlabelled samples, in execution order, by ridge regression. Zhang et al.,
"Accelerating Very Deep Convolutional Networks for Classification and Detection", TPAMI 2016, section 3.3, whose
"asymmetric reconstruction" this is. Whole layers are fitted as `penjing.prune.reconstruction` fits those that read
removed channels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from penjing.analyze import lockstep
from penjing.analyze.least_squares import fitted, plain
from penjing.decompose.candidates import Candidate
from penjing.steps.plan import Plan
from penjing.surgery.factorize import layers_of
from penjing.tasks.task import Call


@dataclass(frozen=True)
class Factored:
    """A layer's replacement: the weights of its factors in the order of execution, and the bias of the last."""

    candidate: Candidate
    weights: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None


Whole = dict[str, torch.Tensor]  # parameter of a layer that stays → its new value


def refitted(
    network: fx.GraphModule,
    factored: Mapping[str, Factored],
    calls: Iterable[Call],
    *,
    factors: bool = True,
    behind: Collection[str] = (),
) -> tuple[dict[str, Factored], Whole]:
    """The factors refitted: the last one to the layer's outputs, and a Tucker core to their part in its own space.

    Args:
        network: A captured network in eval mode, with its layers as they were.
        factored: Layer → its replacement.
        calls: Chunks of samples; all their activations that are still needed are held in memory.
        factors: Whether the factors are fitted.
        behind: Layers that stay whole and are fitted where they read other values than before: each of them is called
            once and shares no weights (`penjing.analyze.lockstep.countable`).

    Returns:
        All of `factored`, and the parameters of whole layers that changed.
    """
    results: dict[str, Factored] = {}
    whole: Whole = {}

    def watch(layer: lockstep.Layer) -> list[torch.Tensor] | None:
        if layer.site in factored:
            results[layer.site], outputs = _fitted(layer, factored[layer.site], factors)
            return outputs
        if layer.site in behind and plain(layer.module) and _changed(layer):
            bias = None if layer.module.bias is None else layer.module.bias.detach()
            weight, bias = fitted(layer, layer.module.weight.detach(), bias)
            whole[f"{layer.site}.weight"] = weight
            if bias is not None:
                whole[f"{layer.site}.bias"] = bias
            return layer.replica_outputs(weight, bias)
        return None

    with torch.no_grad():
        lockstep.run(network, Plan(), calls, watch)
    return {**factored, **results}, whole


def _changed(layer: lockstep.Layer) -> bool:
    """Whether it reads other values than in the network as it was."""
    return not all(torch.equal(x, y) for x, y in zip(layer.inputs, layer.replica_inputs, strict=True))


def _fitted(layer: lockstep.Layer, factored: Factored, fit: bool) -> tuple[Factored, list[torch.Tensor]]:
    """The replacement, refitted where that is wanted, and its outputs."""
    roles = layers_of(layer.module, factored.candidate.form, factored.candidate.ranks)
    parts = {role: part.to(layer.module.weight).eval() for role, part in roles}
    for part, weight in zip(parts.values(), factored.weights, strict=True):
        part.weight.copy_(weight)
    last: Any = parts["out"]
    if factored.bias is not None:
        last.bias.copy_(factored.bias)
    values = layer.replica_inputs
    fit = fit and (layer.kind == "linear" or layer.outputs[0].dim() == layer.module.weight.dim())
    for role, part in parts.items():
        if not fit:
            pass
        elif role == "core":
            _fit(layer, part, values, _projected(layer, last))
        elif role == "out":
            _fit(layer, part, values, layer.outputs)
        values = [part(x) for x in values]
    weights = tuple(part.weight.detach().clone() for part in parts.values())
    return Factored(factored.candidate, weights, None if last.bias is None else last.bias.detach().clone()), values


def _fit(layer: lockstep.Layer, part: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    if not plain(part):
        return
    own = replace(layer, module=part, weight=part.weight, inputs=[], replica_inputs=inputs, outputs=outputs)
    weight, bias = fitted(own, part.weight.detach(), None if part.bias is None else part.bias.detach())
    part.weight.copy_(weight)
    if bias is not None:
        part.bias.copy_(bias)


def _projected(layer: lockstep.Layer, last: Any) -> list[torch.Tensor]:
    """The layer's outputs in the space that its last factor, whose columns are orthonormal, reads."""
    directions = last.weight.flatten(1)  # (out, r)
    shape = (-1, *[1] * (layer.outputs[0].dim() - 2))
    shift = 0 if last.bias is None else last.bias.reshape(shape)
    return [torch.einsum("no...,or->nr...", y - shift, directions) for y in layer.outputs]


__all__ = ["Factored", "refitted"]
