"""Cross-layer equalization: scales are moved between the weights of consecutive layers to even out channel ranges.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1. An
operator with f(s·x) = s·f(x) for s > 0 lets the scale of a channel move from a layer to the layers that follow: the
network's function is unchanged, and no channel of a weight is much smaller than another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from penjing.quantize.channels import LAYERS, Couple, by_input, couples, divide, layers, over_channels
from penjing.steps.draft import Draft
from penjing.steps.settings import check, number, whole
from penjing.steps.step import Context
from penjing.surgery import fold_batch_norms

CLOSE = 1e-4  # largest relative change of a factor in a sweep at which the factors have converged


@dataclass(frozen=True, kw_only=True)
class CrossLayerEqualization:
    """Give every channel the same range in the layer that produces it and in the layers that read it.

    Batch norms are folded first. Channels whose weights are all zero on either side are left unchanged.

    Attributes:
        sweeps: Maximum number of sweeps over all layer pairs; a chain of layers converges after a few dozen.
        limit: Largest factor by which a channel is scaled up or down. Without it, a channel with tiny weights and an
            ordinary bias would become an activation far larger than all others.
    """

    stage: ClassVar[str] = "prepare"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    sweeps: int = 200
    limit: float = 100.0

    def __post_init__(self) -> None:
        check(self, sweeps=whole(), limit=number(least=1, infinite=True))

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with batch norms folded and weights rescaled; its function is unchanged."""
        draft = draft.copy()
        edits = fold_batch_norms(draft.network)
        pairs = couples(draft.network.eval(), context.task.call(), LAYERS, LAYERS)
        for couple, factor in zip(pairs, self._factors(draft.network, pairs), strict=True):
            divide(draft.network, couple, factor)
        covered = {name for couple in pairs for name in (couple.source, *couple.readers)}
        total = len(layers(draft.network))
        context.events("covered", step="CrossLayerEqualization", layers=len(covered), total=total)
        return replace(draft, edits=draft.edits + edits)

    def pairs(self, draft: Draft, context: Context) -> tuple[Couple, ...]:
        """Return the layers that are equalized with each other, in execution order; the draft is not modified."""
        draft = draft.copy()
        fold_batch_norms(draft.network)
        return tuple(couples(draft.network.eval(), context.task.call(), LAYERS, LAYERS))

    def _factors(self, network: fx.GraphModule, pairs: list[Couple]) -> list[torch.Tensor]:
        """Compute, for every pair, the factors that the producer's channels are divided by, (channels,), float64.

        s = √(r₁/r₂), where r₁ is the channel's largest absolute weight in the producer and r₂ that in its readers,
        one pair after the other until the factors converge (the paper's equation 11).
        """
        sizes: dict[str, torch.Tensor] = {}  # (groups, out/groups, in/groups): a kernel's taps scale together
        for couple in pairs:
            for name in (couple.source, *couple.readers):
                sizes[name] = by_input(network.get_submodule(name)).abs().amax(3).double()
        factors = [torch.ones_like(sizes[couple.source][:, :, 0]).flatten() for couple in pairs]
        for _ in range(self.sweeps):
            moved = 0.0
            for i, couple in enumerate(pairs):
                source = sizes[couple.source]
                own = source.amax(2).flatten()
                read = over_channels([sizes[r].amax(1).flatten() for r in couple.readers], couple, len(own))
                balanced = torch.where((own > 0) & (read > 0), factors[i] * torch.sqrt(own / read), factors[i])
                balanced = balanced.clamp(1 / self.limit, self.limit)
                change, factors[i] = balanced / factors[i], balanced
                source /= change.reshape(*source.shape[:2], 1)
                for name, columns in zip(couple.readers, couple.columns, strict=True):
                    sizes[name] *= change[columns].reshape(len(sizes[name]), 1, -1)
                moved = max(moved, float((change - 1).abs().max()))
            if moved < CLOSE:
                break
        return factors
