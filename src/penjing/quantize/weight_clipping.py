"""Percentile clipping of weights: the few largest weights of a channel are clipped to refine the grid of the others.

Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation", 2020,
describe percentile calibration; here the weights themselves are clipped, before any range is taken.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from penjing.network.graph import kind
from penjing.steps.draft import Draft
from penjing.steps.settings import check, number
from penjing.steps.step import Context

LAYERS = ("conv", "conv_transpose", "linear")


def limits(magnitudes: torch.Tensor, percentile: float) -> torch.Tensor:
    """Compute the percentile of every row's non-zero magnitudes by nearest rank, which is one of its values, above 0.

    Args:
        magnitudes: (rows, values), non-negative.
        percentile: Above 0, at most 100.

    Returns:
        (rows, 1); 0 for a row of zeros.
    """
    ascending = magnitudes.sort(dim=1).values
    zeros = (ascending == 0).sum(1, keepdim=True)
    count = ascending.shape[1] - zeros
    rank = (count.double() * percentile / 100).ceil().long().clamp(min=1)
    return ascending.gather(1, (zeros + rank - 1).clamp(max=ascending.shape[1] - 1))


@dataclass(frozen=True, kw_only=True)
class WeightClipping:
    """Clip the weights of convolutions and linear layers per output channel, before `Static`.

    This changes the network's function slightly, so floating-point artifacts are built without it. Zeros stay zero and
    are not counted; the clipping threshold is above 0, so no channel becomes empty. Channels of fewer than
    1 / (1 − percentile / 100) weights and weights with other readers are left unchanged.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        percentile: Percentile of a channel's weight magnitudes to which larger ones are clipped; 100 changes nothing.
    """

    stage: ClassVar[str] = "prepare"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    percentile: float = 99.9

    def __post_init__(self) -> None:
        check(self, percentile=number(least=50, most=100))

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with clipped weights."""
        draft = draft.copy()
        network = draft.network
        nodes = [n for n in network.graph.nodes if n.op == "call_module" and kind(network, n) in LAYERS]
        names = tuple(dict.fromkeys(str(n.target) for n in nodes))
        readers = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
        read_elsewhere = {str(n.target) for n in network.graph.nodes if n.op == "get_attr"}
        clipped = 0
        for name in names:
            weight = network.get_parameter(f"{name}.weight")
            if readers[id(weight)] > 1 or f"{name}.weight" in read_elsewhere:
                continue
            before = weight.detach().clone()
            self._clip(network.get_submodule(name), weight)
            clipped += not torch.equal(before, weight)
        context.events("covered", step="WeightClipping", layers=clipped, total=len(names))
        return draft

    @torch.no_grad()
    def _clip(self, layer: Any, weight: torch.Tensor) -> None:
        shape = weight.shape
        transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        if transposed:  # (in, out/groups, …): an output channel has only the inputs of its group
            grouped = weight.reshape(layer.groups, shape[0] // layer.groups, *shape[1:]).transpose(1, 2)
            rows = grouped.reshape(layer.groups * shape[1], -1)
        else:
            rows = weight.reshape(shape[0], -1)
        limit = limits(rows.abs(), self.percentile)
        rows = torch.minimum(torch.maximum(rows, -limit), limit)
        if transposed:
            rows = rows.reshape(layer.groups, shape[1], -1, *shape[2:]).transpose(1, 2)
        weight.copy_(rows.reshape(shape))
