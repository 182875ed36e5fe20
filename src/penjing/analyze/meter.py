"""Cost of a network in the unit of a pruning target, the fraction of it that is left, and the cost of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import torch
from torch import fx

from penjing.analyze.cost import Call, cost, resized_macs, totals
from penjing.analyze.coupling import Coupling
from penjing.errors import PruningError
from penjing.steps.draft import Draft
from penjing.steps.step import Context

T = TypeVar("T")
Sizes = Mapping[str, tuple[int, ...]]


def amount(unit: str, network: fx.GraphModule, call: Call) -> float:
    """Multiply-accumulates of one sample ("macs"), parameters ("params"), or bytes of parameters and buffers ("size").

    Args:
        unit: "macs", "params" or "size" (bytes).
        network: A captured network.
        call: Example inputs.
    """
    return float(totals(cost(network, call)).macs) if unit == "macs" else _stored(unit, network, {})


def resized_amount(unit: str, network: fx.GraphModule, values: Sizes, stored: Sizes) -> float:
    """The cost of the network with other shapes, without building it; multiply-accumulates count the whole batch.

    Args:
        unit: As in `amount`.
        network: A captured network.
        values: Node name → shape of its value.
        stored: Name of a parameter or buffer → its shape, where it differs from the network's.
    """
    return float(resized_macs(network, values, stored)) if unit == "macs" else _stored(unit, network, stored)


def _stored(unit: str, network: fx.GraphModule, shapes: Sizes) -> float:
    tensors: dict[str, torch.Tensor] = dict(network.named_parameters())
    if unit == "size":
        tensors.update(network.named_buffers())
    weights = {name: tensor.element_size() if unit == "size" else 1 for name, tensor in tensors.items()}
    return float(sum(each * math.prod(shapes.get(name, tensors[name].shape)) for name, each in weights.items()))


def fraction_left(measure: Callable[[T], float], whole: T) -> Callable[[T], float]:
    """A function that gives the cost of something as a fraction of the cost of `whole`."""
    all_of_it = max(measure(whole), 1.0)
    return lambda part: measure(part) / all_of_it


def latency_left(context: Context, precision: str) -> Callable[[Draft, Draft], float]:
    """A function that measures two drafts side by side: the latency of the second as a fraction of the first's.

    Raises:
        PruningError: Latency can't be measured: no runtime was named, or the artifact is for another machine.
    """
    if context.latency is None:
        raise PruningError(
            "a latency target needs a runtime, and the machine that it is measured on",
            code="no-runtime",
            got="no runtime, or a target that is another device",
            expected="pj.run(..., runtime=...) or penjing compress, for this machine",
            remedy="for another device, name macs= or params=",
        )
    measure = context.latency

    def left(before: Draft, after: Draft) -> float:
        whole, part = measure([before, after], precision)
        return part / whole

    return left


def group_prices(unit: str, network: fx.GraphModule, coupling: Coupling, call: Call) -> dict[str, float]:
    """Group of coupled channels → the cost of one of its units, at least 1.

    Args:
        unit: "macs", also the proxy for "latency"; "channels", where each unit costs 1; otherwise a unit's share of
            the elements of parameters and buffers.
        network: A captured network.
        coupling: Its groups.
        call: Example inputs.
    """
    if unit == "channels":
        return dict.fromkeys(coupling.groups, 1.0)
    macs = _macs_by_layer(network, call) if unit in ("macs", "latency") else {}
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    prices: dict[str, float] = {}
    for name, group in coupling.groups.items():
        price = 0.0
        for member in group.members:
            tensor = tensors[member.tensor]
            layer, _, role = member.tensor.rpartition(".")
            of_tensor = tensor.numel() if not macs else macs.get(layer, 0) if role == "weight" else 0
            price += len(member.positions) / group.units / tensor.shape[member.axis] * of_tensor
        prices[name] = max(price, 1.0)
    return prices


def part_prices(unit: str, network: fx.GraphModule, parts: Mapping[T, Collection[str]], call: Call) -> dict[T, float]:
    """Part of a network → the cost of its layers together, at least 1.

    Args:
        unit: "macs", also the proxy for "latency"; "blocks", where each part costs 1; otherwise the parameters.
        network: A captured network.
        parts: Part → its layers.
        call: Example inputs.
    """
    if unit == "blocks":
        return dict.fromkeys(parts, 1.0)
    if unit in ("macs", "latency"):
        by_layer: Mapping[str, float] = _macs_by_layer(network, call)
    else:
        layers = {name for of_part in parts.values() for name in of_part}
        by_layer = {name: sum(p.numel() for p in network.get_submodule(name).parameters()) for name in layers}
    return {part: max(1.0, float(sum(by_layer.get(name, 0) for name in layers))) for part, layers in parts.items()}


def _macs_by_layer(network: fx.GraphModule, call: Call) -> dict[str, int]:
    return {row.name: row.macs for row in cost(network, call)}


__all__ = ["amount", "fraction_left", "group_prices", "latency_left", "part_prices", "resized_amount"]
