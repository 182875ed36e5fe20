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
from penjing.analyze.samples import batches, part
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.calibration import Dynamic
from penjing.tasks.call import Call, leaves
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.sample_axes import size_of

LOSS_DB = 0.1  # less is nothing: what an output gains or loses on other samples differs by far more
FEWEST, MOST = 48, 300  # samples that decide
ELEMENTS = 20_000_000  # of the inputs of all of them
HELD = 1 << 26  # numbers of the outputs in floating point that are held, a quarter of a gigabyte
PIECE = 1 << 24  # numbers of the outputs that are computed at once, if a sample has no more
PARTS = 2  # of the samples: a few large errors make most of an output's noise
PART_DB = 2.0  # that an output may lose in one part, if it loses nothing in all
GROUPS = 8  # of layers, in which a repair is taken back


def without_losses(before: Draft, after: Draft, context: Context, layers: Sequence[str]) -> Draft:
    """Take a repair back in some layers if an output loses by it, one after the other, those first that cost most.

    Args:
        before: A network in floating point and its plan.
        after: The same with other weights and biases of layers.
        context: Its task has the calibration data, over which the samples that decide are spread.
        layers: Names of the layers, in execution order.

    Returns:
        `after`, if no output loses more than `LOSS_DB`; otherwise it with the weights and biases that some layers have
        in `before`, or `before` itself.
    """
    example = next(batches(context, 1), None)
    if example is None or len(_outputs(before.network, example)) < 2:
        return after
    judge = _Judge(before, context)
    if judge.gain(after) >= -LOSS_DB:
        return after
    size = -(-len(layers) // GROUPS)
    groups = [layers[first : first + size] for first in range(0, len(layers), size)]
    back: list[str] = []
    while len(groups) > 1:
        tried = [(judge.gain(_taken_back(before, after, [*back, *group])), i) for i, group in enumerate(groups)]
        gain, chosen = max(tried)
        back += groups.pop(chosen)
        if gain >= -LOSS_DB:
            return _taken_back(before, after, back)
    return before


class _Judge:
    """Compares drafts with the one before the repair, output by output."""

    def __init__(self, before: Draft, context: Context) -> None:
        calls = list(batches(context, MOST))
        elements = sum(leaf.numel() for call in calls for _, _, leaf in leaves(call) if isinstance(leaf, torch.Tensor))
        share = min(1.0, max(ELEMENTS / max(1, elements), FEWEST / sum(map(size_of, calls))))
        dynamic = context.task.dynamic
        calls = [part(call, 0, max(1, round(share * size_of(call))), dynamic) for call in calls]
        calls = calls[:: max(1, sum(map(size_of, calls)) // MOST)]
        self.parts = [calls[n * len(calls) // PARTS : (n + 1) * len(calls) // PARTS] for n in range(PARTS)]
        one = _outputs(before.network, part(calls[0], 0, 1, dynamic))
        self.outputs = len(one)
        most = max(1, PIECE // max(1, sum(output.numel() for output in one)))
        self.parts = [
            [piece for call in calls for piece in _pieces(call, most, dynamic)] for calls in self.parts if calls
        ]
        self.network = before.network
        self.references: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.room = HELD  # numbers that may still be held in them
        self.before = self._ratios(before)

    def gain(self, draft: Draft) -> float:
        """The least that an output's signal-to-noise ratio has risen by, in dB; below 0 where one has fallen.

        Of all samples; of a part of them, if one falls by more than `PART_DB` there.
        """
        gains = [a - b for b, a in zip(self.before, self._ratios(draft), strict=True)]
        whole, parts = min(gains[: self.outputs]), min(gains[self.outputs :])
        return whole if parts >= -PART_DB else min(whole, parts)

    def _ratios(self, draft: Draft) -> list[float]:
        """Signal-to-noise ratios of the outputs in dB: in all samples, then in each part of them."""
        network = insert(draft.network, draft.plan)
        powers = torch.zeros(len(self.parts), self.outputs, 2, dtype=torch.float64)
        for number, (row, calls) in enumerate(zip(powers, self.parts, strict=True)):
            for position, call in enumerate(calls):
                references = self._references(number, position, call)
                for output, value, reference in zip(row, _outputs(network, call), references, strict=True):
                    output += torch.tensor([energy(reference), energy(value - reference)])
        # An output without signal or noise neither gains nor loses.
        every = [pair for row in (powers.sum(0), *powers) for pair in row.tolist()]
        return [decibels(max(noise, 1e-12 * signal) / signal) if signal else 0.0 for signal, noise in every]

    def _references(self, number: int, position: int, call: Call) -> list[torch.Tensor]:
        """The outputs in floating point, computed once where there is room for them and anew every time elsewhere."""
        if (number, position) in self.references:
            return self.references[number, position]
        outputs = _outputs(self.network, call)
        elements = sum(output.numel() for output in outputs)
        if elements <= self.room:
            self.references[number, position] = outputs
            self.room -= elements
        return outputs


def _pieces(call: Call, most: int, dynamic: Dynamic) -> list[Call]:
    """The call in pieces of so many samples; whole where its batch is fixed."""
    size = size_of(call)
    if size <= most or (dynamic is not None and not any(0 in axes for axes in dynamic.values())):
        return [call]
    return [part(call, first, min(first + most, size), dynamic) for first in range(0, size, most)]


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
