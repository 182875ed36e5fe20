"""Statistics of the input channels of layers over data, for all requested layers in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from penjing.analyze.layer_inputs import channel_axis, observe
from penjing.analyze.samples import cache_key, chunks
from penjing.steps.step import Context
from penjing.tasks.task import Call, calibration_calls


@dataclass(frozen=True)
class Statistic:
    """A statistic of every channel that can be accumulated over calls.

    Attributes:
        of: (channels, values) of one call → (channels,).
        joined: Combines the statistics of two calls.
    """

    of: Callable[[torch.Tensor], torch.Tensor]
    joined: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


SQUARES = Statistic(lambda x: x.square().sum(1, dtype=torch.float64), torch.add)
"""The sum of the squares, float64."""

MEAN_SIZES = Statistic(lambda x: x.abs().double().mean(1), torch.add)
"""The mean absolute value in a call, summed over calls, float64."""

LARGEST = Statistic(lambda x: x.abs().amax(1), torch.maximum)
"""The largest absolute value."""


def collect(
    network: fx.GraphModule, layers: Mapping[str, Any], calls: Iterable[Call], statistic: Statistic
) -> dict[str, torch.Tensor]:
    """Layer → the statistic of its input channels, (in_channels,); layers that no sample reaches are left out.

    Args:
        network: A captured network.
        layers: Linear layers and convolutions, also transposed ones, by their names.
        calls: The data.
        statistic: For example `SQUARES`.
    """
    results: dict[str, torch.Tensor] = {}

    def observer(name: str, x: torch.Tensor) -> None:
        now = statistic.of(x.movedim(channel_axis(layers[name]), 0).flatten(1))
        results[name] = statistic.joined(results[name], now) if name in results else now

    observe(network, layers, calls, observer)
    return results


class Shared(dict[str, torch.Tensor]):
    """A statistic by layer, as it is kept in a run's cache."""


def shared(
    network: fx.GraphModule,
    layers: Mapping[str, Any],
    context: Context,
    statistic: Statistic,
    *,
    batches: int | None = None,
    samples: int | None = None,
    label: str,
) -> dict[str, torch.Tensor]:
    """`collect` over calibration data, computed once for all steps of a run that ask for the same.

    The tensors belong to the run: copy one before changing it.

    Args:
        network: As in `collect`.
        layers: As in `collect`.
        context: Has the calibration data, and is told the progress.
        statistic: As in `collect`.
        batches: At most this many of the task's batches are read, one at a time.
        samples: Alternatively this many samples, in the chunks of `penjing.analyze.samples.chunks`, held together.
        label: The label of the progress events.

    Raises:
        CalibrationError: There is no calibration data.
    """
    assert (batches is None) != (samples is None), "either batches or samples"

    def told(calls: Iterable[Call], total: int | None) -> Iterator[Call]:
        for done, call in enumerate(calls, 1):
            yield call
            context.events("progress", label=label, done=done, total=total)

    def compute(names: list[str]) -> dict[str, torch.Tensor]:
        if samples is None:
            calls = told(calibration_calls(context.task, limit=batches), batches)
        else:  # cut before the layers are observed: the size of a chunk is tried out on the network
            parts = chunks(context, network, samples)
            calls = told(parts, len(parts))
        return collect(network, {name: layers[name] for name in names}, calls, statistic)

    unit, count = ("batches", batches) if samples is None else ("samples", samples)
    assert count is not None
    return context.cache.by_name(cache_key(Shared, network, context, count, (unit, statistic)), layers, compute)


__all__ = ["LARGEST", "MEAN_SIZES", "SQUARES", "Shared", "Statistic", "collect", "shared"]
