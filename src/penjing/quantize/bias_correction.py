"""Bias correction: give every layer back the mean that rounding its weights and inputs took from it.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, in
its empirical form. Layers are corrected in the order of execution, each behind its corrected predecessors, in one
pass over the samples instead of one pass a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from penjing.analyze import lockstep
from penjing.draft import Draft
from penjing.quantize.samples import chunks
from penjing.step import Context


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """Shift the biases of all layers, those left in floating point too, so that their outputs keep their means.

    Attributes:
        samples: Calibration samples that the means are taken over, held in memory together.
    """

    per_runtime: ClassVar[bool] = True

    samples: int = 64

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with corrected biases; where nothing is quantized, there is nothing to correct."""
        if not draft.plan:
            return draft
        source = draft.network
        draft = draft.copy()
        layers = lockstep.countable(source)
        done: list[str] = []

        def watch(layer: lockstep.Layer) -> list[torch.Tensor] | None:
            module: Any = draft.network.get_submodule(layer.site) if layer.site in layers else None
            if module is None or module.bias is None:
                return None
            outputs = layer.twin_outputs()
            shift = layer.shift(outputs)
            module.bias += shift.to(module.bias.dtype)
            done.append(layer.site)
            context.events("progress", label="bias correction", done=len(done), total=len(layers))
            return lockstep.shifted(outputs, shift, layer.axis)

        lockstep.run(source, draft.plan, chunks(context, source, self.samples), watch)
        return replace(draft)
