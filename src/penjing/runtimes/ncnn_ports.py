"""Names, types and sizes of what an artifact of ncnn takes and gives."""

from __future__ import annotations

from typing import Any

import torch

from penjing.records.manifest import Port
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.sample_axes import along_samples

BATCH = "batch"


def resized(call: Any, dynamic: Any, samples: int) -> Any:
    """A call with so many samples: the first ones, repeated where there are fewer."""

    def resize(value: torch.Tensor, axis: int) -> torch.Tensor:
        return value.index_select(axis, torch.arange(samples) % value.shape[axis])

    return along_samples(call, dynamic, resize)


def ports(
    network: Any, call: Any, dynamic: Any, inputs: list[str], outputs: list[str]
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The ports of a network: axes that differ between calls of two and three samples are called as the batch."""
    answers = []
    with torch.no_grad():
        for samples in (2, 3):
            args, kwargs = resized(call, dynamic, samples)
            answers.append(([*args, *kwargs.values()], flatten_outputs(network(*args, **kwargs))[0]))
    (few, given), (more, again) = answers
    batch = _batch_name(dynamic)
    declared = [_declared(dynamic, name, i) for i, name in enumerate(inputs)]
    taken = tuple(_port(n, a, b, batch, axes) for n, a, b, axes in zip(inputs, few, more, declared, strict=True))
    return taken, tuple(_port(n, a, b, batch, {}) for n, a, b in zip(outputs, given, again, strict=True))


def _batch_name(dynamic: Any) -> str:
    for axes in (dynamic or {}).values():
        if 0 in axes:
            return str(axes[0])
    return BATCH


def _declared(dynamic: Any, name: str, position: int) -> Any:
    return {} if dynamic is None else dynamic.get(name, dynamic.get(position, {}))


def _port(name: str, one: torch.Tensor, other: torch.Tensor, batch: str, axes: Any) -> Port:
    sizes = zip(one.shape, other.shape, strict=True)
    shape = tuple(axes.get(i, batch if a != b else a) for i, (a, b) in enumerate(sizes))
    return Port(name=name, dtype=str(one.dtype).removeprefix("torch."), shape=shape)
