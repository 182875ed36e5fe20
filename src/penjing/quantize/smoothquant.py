"""SmoothQuant: the magnitude of activation outlier channels is migrated into the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023.
An activation has one scale for all channels, a weight one per output channel: dividing input channel j by s_j in the
preceding norm, and multiplying column j of the weights by it, moves the difficulty to where it costs less. The
network's function is unchanged.
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

SOURCES = ("layer_norm", "rms_norm", "mul", "linear")  # "mul": by a stored vector, ends a decomposed norm


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Migrate activation magnitude of linear layers into their weights by s_j = max|X_j|^α / max|W_j|^(1−α).

    It covers norms whose readers are all linear layers, and linear layers that feed linear layers through operators
    that commute with a scale (value and output projection of an attention). With `multiply` it covers the others too:
    norms that a residual branch also reads (BERT's), and activation functions.

    Attributes:
        alpha: Migration strength from 0 to 1: how much of the activations' channel differences moves into the weights.
        samples: Number of calibration samples that the activations' maxima are taken over, in one pass.
        multiply: Whether inputs that no preceding operator can absorb the division for are multiplied by a vector in
            front of the layers: one more operator, unless the runtime fuses it.
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
        """Return a draft with rescaled weights; its function is unchanged."""
        draft = draft.copy()
        pairs = couples(draft.network.eval(), context.task.call(), SOURCES, ("linear",))
        covered = {name for couple in pairs for name in couple.readers}
        groups = [[site(n) for n in nodes] for nodes in linears_by_input(draft.network)] if self.multiply else []
        groups = [names for names in groups if not covered & set(names)]
        largest = maxima(draft.network, covered.union(*groups), context, self.samples)
        # All factors come from the original weights; a layer that is both producer and reader has one on each side.
        factors = [self._factor(draft.network, couple, largest) for couple in pairs]
        vectors = [self._factor_of_inputs(draft.network, names, largest) for names in groups]
        for couple, factor in zip(pairs, factors, strict=True):
            divide(draft.network, couple, factor)
        edits = [divide_inputs(draft.network, *group) for group in zip(groups, vectors, strict=True)]
        covered = covered.union(*groups)
        context.events("covered", step="SmoothQuant", layers=len(covered), total=len(layers(draft.network)))
        return replace(draft, edits=(*draft.edits, *edits))

    def pairs(self, draft: Draft, context: Context) -> tuple[Couple, ...]:
        """Return the norms and layers that are divided, each with its readers; the draft is not modified."""
        return tuple(couples(draft.copy().network.eval(), context.task.call(), SOURCES, ("linear",)))

    def _factor(self, network: fx.GraphModule, couple: Couple, largest: dict[str, torch.Tensor]) -> torch.Tensor:
        """The factors of a producer's channels: (channels,), float64; 1 where all values or all weights are 0."""
        channels = len(network.get_parameter(couple.tensors[0]))
        inputs = over_channels([largest[name] for name in couple.readers], couple, channels)
        weights = over_channels(
            [range_of_inputs(network.get_submodule(name)) for name in couple.readers], couple, channels
        )
        return self._balanced(inputs, weights)

    def _factor_of_inputs(
        self, network: fx.GraphModule, names: list[str], largest: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The factors that the common input of linear layers is divided by: (in_features,), float64."""
        weights = torch.stack([range_of_inputs(network.get_submodule(name)).cpu() for name in names]).amax(0)
        return self._balanced(largest[names[0]].double().cpu(), weights)

    def _balanced(self, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        factor = inputs**self.alpha / weights ** (1 - self.alpha)
        return torch.where((inputs > 0) & (weights > 0), factor, torch.ones_like(factor))
