"""Calling an artifact of fixed sizes with any number of samples: one after the other. Torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from penjing.records.manifest import Port, Program

Axes = Sequence[int | None]


def axes(program: Program) -> tuple[Axes, Axes]:
    """The axis of each input and of each output that holds its samples, None where it holds none."""
    inputs, outputs = ([_sample_axis(port) for port in ports] for ports in (program.inputs, program.outputs))
    return inputs, outputs


def _sample_axis(port: Port) -> int | None:
    return next((axis for axis, size in enumerate(port.shape) if isinstance(size, str)), None)


def each(
    inputs: list[np.ndarray], axes: tuple[Axes, Axes], one: Callable[[list[np.ndarray]], list[np.ndarray]]
) -> list[np.ndarray]:
    """The outputs for all samples of `inputs`; `one` gives those of a single one."""
    counts = [x.shape[axis] for x, axis in zip(inputs, axes[0], strict=True) if axis is not None]
    if not counts or counts[0] == 1:
        return one(inputs)
    samples = [one([_take(x, i, axis) for x, axis in zip(inputs, axes[0], strict=True)]) for i in range(counts[0])]
    return [
        sample[0] if axis is None else np.concatenate(sample, axis)
        for sample, axis in zip(zip(*samples, strict=True), axes[1], strict=True)
    ]


def _take(x: np.ndarray, sample: int, axis: int | None) -> np.ndarray:
    return x if axis is None else np.take(x, [sample], axis)
