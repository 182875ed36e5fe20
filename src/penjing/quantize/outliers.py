"""Outliers in floating point: a linear layer's few input channels that are far larger than the others.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022. There the channels
are found anew in every input; here once, on calibration data, so that the file holds two products with fixed shapes.
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
    """Take input channels with outliers out of linear layers, before `Static`: they are multiplied in floating point.

    A channel has outliers where its largest magnitude is more than `factor` times the median channel's. The other
    channels have a range of their own then, and both products are summed in floating point.

    Attributes:
        factor: Above 1. LLM.int8() takes magnitudes above 6 where the others are about 1.
        most: Largest share of a layer's input channels that is split off; the largest ones first.
        samples: Calibration samples that the magnitudes are taken over, in one pass.
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
        """Return a draft that computes the same with more layers."""
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
        """The channels with outliers, of the largest magnitude of each, (in,)."""
        order = largest.argsort(descending=True)[: int(self.most * len(largest))]
        return sorted(int(i) for i in order if largest[i] > self.factor * largest.median())
