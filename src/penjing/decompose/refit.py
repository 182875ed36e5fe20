"""Factors refitted to what the layer gave, on what the decomposed network before it really gives.

All layers are fitted in one pass over unlabelled samples, in execution order, by ridge regression. Zhang et al.,
"Accelerating Very Deep Convolutional Networks for Classification and Detection", TPAMI 2016, section 3.3, whose
"asymmetric reconstruction" this is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def refitted(network: fx.GraphModule, factored: Mapping[str, Factored], calls: Iterable[Call]) -> dict[str, Factored]:
    """The factors refitted: the last one to the layer's outputs, and a Tucker core to their part in its own space.

    Args:
        network: A captured network in eval mode, with its layers as they were.
        factored: Layer → its replacement.
        calls: Chunks of samples; all their activations that are still needed are held in memory.
    """
    results: dict[str, Factored] = {}

    def watch(layer: lockstep.Layer) -> list[torch.Tensor] | None:
        if layer.site not in factored:
            return None
        results[layer.site], outputs = _fitted(layer, factored[layer.site])
        return outputs

    with torch.no_grad():
        lockstep.run(network, Plan(), calls, watch)
    return {**factored, **results}


def _fitted(layer: lockstep.Layer, factored: Factored) -> tuple[Factored, list[torch.Tensor]]:
    """The refitted replacement, and its outputs."""
    roles = layers_of(layer.module, factored.candidate.form, factored.candidate.ranks)
    parts = {role: part.to(layer.module.weight).eval() for role, part in roles}
    for part, weight in zip(parts.values(), factored.weights, strict=True):
        part.weight.copy_(weight)
    last: Any = parts["out"]
    if factored.bias is not None:
        last.bias.copy_(factored.bias)
    values = layer.replica_inputs
    batched = layer.kind == "linear" or layer.outputs[0].dim() == layer.module.weight.dim()
    for role, part in parts.items():
        if not batched:
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
