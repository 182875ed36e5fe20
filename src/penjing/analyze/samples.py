"""Calibration samples, cut into chunks whose activations stay small."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

from penjing.errors import CalibrationError
from penjing.network.graph import shapes
from penjing.network.weights import fingerprint_with_graph
from penjing.steps.cache import Identity, Key
from penjing.steps.step import Context
from penjing.tasks.calibration import Dynamic
from penjing.tasks.sample_axes import along_samples, size_of
from penjing.tasks.task import Call, calibration_calls

T = TypeVar("T")

CHUNK_BYTES = 1 << 25  # of the largest activation: the allocator maps larger blocks anew every time


def part(call: Call, first: int, last: int, dynamic: Dynamic) -> Call:
    """The samples first to last − 1 of a call, whose axes vary as in `Task.dynamic`.

    States of recurrent layers, (layers, batch, hidden), have them in their second axis: torch would read past the end
    of one that is not cut with the other inputs.
    """
    return along_samples(
        call, dynamic, lambda value, axis: value.narrow(axis, first, min(last, value.shape[axis]) - first)
    )


def cache_key(
    kind: type[T], network: fx.GraphModule, context: Context, samples: int, settings: Hashable = ()
) -> Key[T]:
    """The key of what is computed with a network over the first calibration samples.

    Args:
        kind: The class of the result.
        network: A captured network.
        context: Its task has the samples.
        samples: So many of them.
        settings: What else the result depends on.
    """
    dynamic = context.task.dynamic  # whether a batch may be cut
    axes = None if dynamic is None else frozenset((name, frozenset(axes)) for name, axes in dynamic.items())
    return Key(
        kind=kind,
        network=fingerprint_with_graph(network),
        data=Identity(context.task.calibration),
        samples=samples,
        settings=(axes, settings),
    )


def batches(context: Context, samples: int) -> Iterator[Call]:
    """The first calibration samples in the task's own batches; only complete batches where their size is fixed."""
    dynamic, left = context.task.dynamic, samples
    varies = dynamic is None or any(0 in axes for axes in dynamic.values())
    for call in calibration_calls(context.task):
        size = size_of(call)
        yield call if size <= left or not varies else part(call, 0, left, dynamic)
        left -= size
        if left <= 0:
            return


def in_chunks(context: Context, network: fx.GraphModule, samples: int, pieces: int = 1) -> Iterator[list[Call]]:
    """The first calibration samples, batch by batch, in chunks in which no activation exceeds `CHUNK_BYTES`.

    Images are in the channels-last format where the network has convolutions, which are faster on it.

    Args:
        context: Its task has the samples.
        network: The network that they will be run through.
        samples: How many samples.
        pieces: The minimal number of chunks, if there are as many samples.
    """
    most = 0
    images = any(isinstance(m, nn.Conv2d) for m in network.modules())
    for call in batches(context, samples):
        size = size_of(call)
        if not most:
            largest = max((t.numel() * t.element_size() for t in shapes(network, call).values()), default=1)
            most = max(1, min(CHUNK_BYTES * size // largest, samples // pieces))
        dynamic = context.task.dynamic
        parts = [part(call, first, min(first + most, size), dynamic) for first in range(0, size, most)]
        yield [_channels_last(piece) for piece in parts] if images else parts


def chunks(context: Context, network: fx.GraphModule, samples: int, pieces: int = 1) -> list[Call]:
    """The chunks of `in_chunks` in one list."""
    return [call for batch in in_chunks(context, network, samples, pieces) for call in batch]


def _channels_last(call: Call) -> Call:
    def laid(value: Any) -> Any:
        image = isinstance(value, torch.Tensor) and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if image else value

    return tuple(map(laid, call[0])), {name: laid(value) for name, value in call[1].items()}


def split(context: Context, samples: int = 600) -> tuple[Context, list[Call]]:
    """Calibration data to fit on, and every third batch (or sample, with fewer than three batches) held out.

    Raises:
        CalibrationError: There are fewer than two samples.
    """
    calls = list(batches(context, samples))
    if len(calls) < 3:
        calls = [part(call, i, i + 1, context.task.dynamic) for call in calls for i in range(size_of(call))]
    held_out = calls[2::3] or calls[1:]
    if not held_out:
        raise CalibrationError(
            "a single calibration sample can't be split into a fitting and a held-out part",
            code="too-little",
            got="1 sample",
            expected="two samples or more; a few hundred are usual",
            remedy="give more calibration data, or use quantize.Static alone",
        )
    fitting = [call for i, call in enumerate(calls) if i % 3 != 2] if len(calls) > 2 else calls[:1]
    task = replace(context.task, calibration=[call[1] or call[0] for call in fitting])
    return replace(context, task=task), held_out
