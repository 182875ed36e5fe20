"""A repair judged on every output: where one of several loses, it is taken back in the layers that cost most.

Layer by layer a repair preserves what each layer computes, whatever the outputs make of it. What helps a recurrent
state can cost the score beside it, which a sum over both outputs does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from penjing.analyze.noise import decibels, energy
from penjing.analyze.samples import batches, part, size_of
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.outputs import flatten_outputs

LOSS_DB = 0.5  # that an output may lose on these samples; on others it is about twice as much at most
READ = 300  # calibration samples
EACH = 8  # of every batch: neighbours are alike, such as pieces of one recording
SAMPLES = 160  # that the outputs are compared on, about
GROUPS = 8  # of layers, in which a repair is taken back


def without_losses(before: Draft, after: Draft, context: Context, layers: Sequence[str]) -> Draft:
    """Take a repair back in as many layers as it needs for no output to lose more than `LOSS_DB`.

    Args:
        before: A network in floating point and its plan.
        after: The same with other weights and biases of layers.
        context: Its task has the calibration data, over which the samples that decide are spread.
        layers: Names of the layers, in execution order.
    """
    judge = _Judge(before, context)
    if judge.outputs < 2 or judge.loss(after) <= LOSS_DB:
        return after
    size = -(-len(layers) // GROUPS)
    groups = [layers[first : first + size] for first in range(0, len(layers), size)]
    groups.sort(key=lambda group: judge.loss(_taken_back(before, after, group)))
    back: list[str] = []
    for group in groups[:-1]:
        back += group
        draft = _taken_back(before, after, back)
        if judge.loss(draft) <= LOSS_DB:
            return draft
    return before


class _Judge:
    """Compares drafts with the one before the repair, output by output."""

    def __init__(self, before: Draft, context: Context) -> None:
        calls = [part(call, 0, EACH) for call in batches(context, READ)]
        self.calls = calls[:: max(1, sum(map(size_of, calls)) // SAMPLES)]
        self.references = [_outputs(before.network, call) for call in self.calls]
        self.outputs = len(self.references[0])
        self.before = self._ratios(before) if self.outputs > 1 else []

    def loss(self, draft: Draft) -> float:
        """The most that an output's signal-to-noise ratio has fallen by, in dB."""
        return max(b - a for b, a in zip(self.before, self._ratios(draft), strict=True))

    def _ratios(self, draft: Draft) -> list[float]:
        network = insert(draft.network, draft.plan)
        signals, noises = [0.0] * self.outputs, [0.0] * self.outputs
        for call, references in zip(self.calls, self.references, strict=True):
            for i, (value, reference) in enumerate(zip(_outputs(network, call), references, strict=True)):
                signals[i] += energy(reference)
                noises[i] += energy(value - reference)
        # An output without signal or noise neither gains nor loses.
        return [decibels(max(n, 1e-12 * s) / s) if s else 0.0 for s, n in zip(signals, noises, strict=True)]


def _outputs(network: fx.GraphModule, call: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t for t in flatten_outputs(network(*call[0], **call[1]))[0] if t.is_floating_point()]


def _taken_back(before: Draft, after: Draft, layers: Sequence[str]) -> Draft:
    draft = after.copy()
    with torch.no_grad():
        for name in layers:
            layer, old = (d.network.get_submodule(name) for d in (draft, before))
            for tensor, stored in zip(layer.parameters(recurse=False), old.parameters(recurse=False), strict=True):
                tensor.copy_(stored)
    return draft


__all__ = ["LOSS_DB", "without_losses"]
