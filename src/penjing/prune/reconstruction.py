"""Least-squares reconstruction: layers that read removed channels are refitted to the outputs they had before pruning.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017; Luo et al., "ThiNet", ICCV 2017. All
layers are fitted in one pass over unlabelled samples, in execution order, each on the inputs that the layers fitted
before it produce. The ridge penalty of every layer is chosen on held-out samples.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze import lockstep
from penjing.analyze.coupling import Coupling
from penjing.analyze.least_squares import fitted, plain
from penjing.steps.plan import Plan
from penjing.tasks.task import Call


def reconstructed(
    network: fx.GraphModule,
    coupling: Coupling,
    removed: Mapping[str, Sequence[int]],
    calls: Iterable[Call],
    keep: Collection[str] = (),
) -> fx.GraphModule:
    """A copy of the network, of the same shapes, in which the remaining weights compensate for the removed units.

    Weights that read removed units are 0 in it; the other weights of those layers, and their biases, are refitted.
    Only linear layers and ungrouped two-dimensional convolutions are fitted; layers that are called several times,
    share their weights, or have more than `MAX_INPUTS` inputs keep their weights.

    Args:
        network: A captured network in eval mode; it stays as it is.
        coupling: `penjing.analyze.coupling.couple` of it.
        removed: Group → units.
        calls: Chunks of samples; all their activations that are still needed are held in memory.
        keep: Names of parameters that are not refitted.
    """
    copied = copy.deepcopy(network).eval()
    gone = _positions(coupling, removed)
    _zero(copied, gone)
    alone = set(lockstep.countable(network))
    parameters: dict[str, torch.Tensor] = {}

    def watch(layer: lockstep.Layer) -> list[torch.Tensor] | None:
        name = layer.site.partition("@")[0]
        rows, columns = (gone.get((f"{name}.weight", axis), set()) for axis in (0, 1))
        own: Any = copied.get_submodule(name)
        weight, bias = own.weight.detach(), None if own.bias is None else own.bias.detach()
        if columns and name in alone and plain(layer.module) and f"{name}.weight" not in keep:
            weight, bias = fitted(layer, weight, bias, rows, columns)
            parameters[f"{name}.weight"] = weight
            if bias is not None:
                parameters[f"{name}.bias"] = bias
        return layer.replica_outputs(weight, bias)

    with torch.no_grad():
        lockstep.run(network, Plan(), calls, watch, replica=copied)
        for name, value in parameters.items():
            copied.get_parameter(name).copy_(value)
    return copied


def _positions(coupling: Coupling, removed: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], set[int]]:
    """(tensor, axis) → positions that are removed."""
    positions: dict[tuple[str, int], set[int]] = {}
    for name, units in removed.items():
        for member in coupling.groups[name].members:
            positions.setdefault((member.tensor, member.axis), set()).update(member.of(list(units)).tolist())
    return positions


def _zero(network: nn.Module, gone: Mapping[tuple[str, int], Collection[int]]) -> None:
    """Set everything that computes or reads removed units to 0, in place."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    with torch.no_grad():
        for (name, axis), positions in gone.items():
            tensors[name].index_fill_(axis, torch.tensor(sorted(positions), dtype=torch.int64), 0)


__all__ = ["reconstructed"]
