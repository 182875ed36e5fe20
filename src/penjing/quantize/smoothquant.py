"""SmoothQuant: channels of activations that are far larger than the others hand their size to the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023.
One scale has to serve all channels of an activation, and one for every output channel serves a weight: dividing the
input channel j by s_j in the norm before, and multiplying the weights' column j by it, moves the difficulty to where
it costs less. The network computes what it did.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from penjing.network.graph import site
from penjing.quantize.channels import (
    Couple,
    couples,
    divide,
    layers,
    linears_by_input,
    maxima,
    over_channels,
    range_of_inputs,
)
from penjing.steps.draft import Draft
from penjing.steps.settings import FLAG, between, check, whole
from penjing.steps.step import Context
from penjing.surgery import divide_inputs

SOURCES = ("layer_norm", "rms_norm", "mul", "linear")  # a multiplication by a stored vector ends a norm written out


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Balance the inputs of linear layers with their weights: s_j = max|X_j|^α / max|W_j|^(1−α).

    It covers norms whose readers are all linear layers, and linear layers that feed linear layers through nothing
    that a scale does not pass (values and output of an attention). With `multiply` it covers the others too: norms
    that a residual reads as well (BERT's), and activation functions.

    Attributes:
        alpha: 0 to 1: how much of the activations' differences moves into the weights.
        samples: Calibration samples that the maxima of the activations are taken over, in one pass.
        multiply: Whether inputs that nothing before them can divide are multiplied by a vector in front of the layers:
            one more operator, unless the runtime fuses it into its neighbours.
    """

    stage: ClassVar[str] = "prepare"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    alpha: float = 0.5
    samples: int = 64
    multiply: bool = False

    def __post_init__(self) -> None:
        check(self, alpha=between(0, 1), samples=whole(), multiply=FLAG)

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft that computes the same with other weights."""
        draft = draft.copy()
        found = couples(draft.network.eval(), context.task.call(), SOURCES, ("linear",))
        covered = {name for couple in found for name in couple.readers}
        groups = [[site(n) for n in nodes] for nodes in linears_by_input(draft.network)] if self.multiply else []
        groups = [names for names in groups if not covered & set(names)]
        largest = maxima(draft.network, covered.union(*groups), context, self.samples)
        # All scales come from the given weights; a layer that is both read and reads has one on each side.
        factors = [self._factor(draft.network, couple, largest) for couple in found]
        vectors = [self._factor_of_inputs(draft.network, names, largest) for names in groups]
        for couple, factor in zip(found, factors, strict=True):
            divide(draft.network, couple, factor)
        edits = [divide_inputs(draft.network, *group) for group in zip(groups, vectors, strict=True)]
        covered = covered.union(*groups)
        context.events("covered", step="SmoothQuant", layers=len(covered), total=len(layers(draft.network)))
        return replace(draft, edits=(*draft.edits, *edits))

    def pairs(self, draft: Draft, context: Context) -> tuple[Couple, ...]:
        """The norms and layers that are divided, each with the layers that read it; the draft stays as it is."""
        return tuple(couples(draft.copy().network.eval(), context.task.call(), SOURCES, ("linear",)))

    def _factor(self, network: fx.GraphModule, couple: Couple, largest: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the source's channels are divided by: (channels,), float64; 1 where all inputs or weights are 0."""
        channels = len(network.get_parameter(couple.tensors[0]))
        inputs = over_channels([largest[name] for name in couple.readers], couple, channels)
        weights = over_channels(
            [range_of_inputs(network.get_submodule(name)) for name in couple.readers], couple, channels
        )
        return self._balanced(inputs, weights)

    def _factor_of_inputs(
        self, network: fx.GraphModule, names: list[str], largest: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """What the inputs of linear layers that read one value are divided by: (in_features,), float64."""
        weights = torch.stack([range_of_inputs(network.get_submodule(name)).cpu() for name in names]).amax(0)
        return self._balanced(largest[names[0]].double().cpu(), weights)

    def _balanced(self, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        factor = inputs**self.alpha / weights ** (1 - self.alpha)
        return torch.where((inputs > 0) & (weights > 0), factor, torch.ones_like(factor))
