"""Outlier channels in floating point: the few input channels of a linear layer that are far larger than the others.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022. There the channels
are determined for every input; here once, on calibration data, so that the file has two products of fixed shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from penjing.network.graph import site
from penjing.quantize.channels import linears_by_input, maxima
from penjing.steps.draft import Draft
from penjing.steps.settings import above, check, number, whole
from penjing.steps.step import Context
from penjing.surgery import split_outliers


@dataclass(frozen=True, kw_only=True)
class SplitOutliers:
    """Split outlier channels off the inputs of linear layers, before `Static`, and multiply them in floating point.

    An outlier channel has a largest magnitude of more than `factor` times the median channel's. The other channels then
    have their own range, and the two products are summed in floating point.

    Attributes:
        factor: Above 1. LLM.int8() uses magnitudes above 6 where the others are about 1.
        most: Largest share of a layer's input channels that is split off, in order of magnitude.
        samples: Number of calibration samples that the magnitudes are taken over, in one pass.
    """

    stage: ClassVar[str] = "prepare"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    factor: float = 6.0
    most: float = 0.02
    samples: int = 64

    def __post_init__(self) -> None:
        check(self, factor=above(1), most=number(above=0, below=1), samples=whole())

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with additional layers; its function is unchanged."""
        draft = draft.copy()
        groups = linears_by_input(draft.network.eval())
        largest = maxima(draft.network, {site(nodes[0]) for nodes in groups}, context, self.samples)
        edits = []
        split = 0
        for nodes in groups:
            channels = self.channels(largest[site(nodes[0])])
            if channels:
                edits.append(split_outliers(draft.network, [site(n) for n in nodes], channels))
                split += len(nodes)
        context.events("covered", step="SplitOutliers", layers=split, total=sum(map(len, groups)))
        return replace(draft, edits=(*draft.edits, *edits))

    def channels(self, largest: torch.Tensor) -> list[int]:
        """Return the outlier channels, given the largest magnitude of each channel, (in,)."""
        order = largest.argsort(descending=True)[: int(self.most * len(largest))]
        return sorted(int(i) for i in order if largest[i] > self.factor * largest.median())
