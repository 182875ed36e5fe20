"""Bias correction: restore the mean of every layer's output, which quantizing its weights and inputs has shifted.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, in
its empirical form. Layers are corrected in execution order, each on the outputs of its corrected predecessors, in one
pass over the samples instead of one pass per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from penjing.quantize.repair import repaired
from penjing.steps.draft import Draft
from penjing.steps.settings import check, whole
from penjing.steps.step import Context


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """Correct the biases of all layers, including those in floating point, so that their outputs keep their means.

    Attributes:
        samples: Number of calibration samples that the means are taken over; all are in memory at once.
    """

    stage: ClassVar[str] = "repair"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    samples: int = 64

    def __post_init__(self) -> None:
        check(self, samples=whole())

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with corrected biases; unchanged if nothing is quantized."""
        return repaired(
            draft, context, self.samples, "BiasCorrection",
            lambda layer: None if layer.module.bias is None else layer.weight,
        )  # fmt: skip
