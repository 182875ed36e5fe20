"""Least squares: a layer refitted to given outputs on the inputs that it reads, by ridge regression.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017; Luo et al., "ThiNet", ICCV 2017. The
ridge penalty of every layer is chosen on held-out samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze import lockstep
from penjing.analyze.gram import Gram, patches
from penjing.analyze.samples import batches, part
from penjing.network.graph import shapes
from penjing.steps.step import Context
from penjing.tasks.sample_axes import size_of
from penjing.tasks.task import Call

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # candidates for the ridge penalty, relative to an input's mean square
HELD_OUT = 3  # every third sample is held out to choose the penalty
POSITIONS = 1024  # output positions of an image, evenly spaced, that a convolution is fitted on
MAX_INPUTS = 5000  # layers with more inputs are not fitted: the normal equations grow with the square of them
SAMPLES, MIN_SAMPLES = 512, 16  # to fit on
BYTES = 1 << 28  # upper bound of the network's largest activation over all samples; a few such are held at a time
UNFOLDED = 1 << 26  # bytes of a convolution's unfolded inputs that are held at a time


def samples(context: Context, network: fx.GraphModule) -> list[Call]:
    """Calibration samples to fit on: as many as fit into memory with the network's activations, at most `SAMPLES`.

    Raises:
        CalibrationError: There are none, or a one-shot iterator has been read before.
    """
    calls = batches(context, SAMPLES)
    first = next(calls)
    largest = max((t.numel() * t.element_size() for t in shapes(network, first).values()), default=1)
    room = max(MIN_SAMPLES, BYTES * size_of(first) // max(1, largest))
    chosen: list[Call] = []
    for call in itertools.chain([first], calls):
        chosen.append(part(call, 0, room, None) if size_of(call) > room and context.task.dynamic is None else call)
        room -= size_of(call)
        if room <= 0:
            break
    return chosen


def correction(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weight update that minimizes the squared output error, by ridge regression.

    Args:
        gram: Σ x·xᵀ over all rows of inputs, (inputs, inputs), float64.
        cross: Σ error·xᵀ, (outputs, inputs), float64.
        ridge: The penalty on the update, as a fraction of the mean of gram's diagonal.

    Returns:
        (outputs, inputs), float64; zeros where the system is not positive definite.
    """
    penalised = gram.clone()
    penalised.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-30))
    factor, failed = torch.linalg.cholesky_ex(penalised)
    return torch.zeros_like(cross) if failed else torch.cholesky_solve(cross.T, factor).T


def gain(change: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor) -> float:
    """By how much a weight update lowers the squared error on the rows that gram and cross were summed over.

    Args:
        change: (outputs, inputs).
        gram: As in `correction`.
        cross: As in `correction`.
    """
    return float(2 * (change * cross).sum() - ((change @ gram) * change).sum())


def plain(module: Any) -> bool:
    """Whether the layer is a single matrix product with the rows that `_rows` takes from its inputs."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and not isinstance(module.padding, str) and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def fitted(
    layer: lockstep.Layer,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: Collection[int] = (),
    columns: Collection[int] = (),
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias refitted to the layer's outputs on the replica's inputs.

    Args:
        layer: A layer for which `plain` holds.
        weight: Of the replica, (out, in, *kernel).
        bias: Of the replica, (out,).
        rows: Outputs that keep their weights.
        columns: Input channels that keep their weights.

    Returns:
        The same two where no penalty lowers the error on held-out samples, or the layer has more than `MAX_INPUTS`.
    """
    in_channels = torch.tensor([i for i in range(weight.shape[1]) if i not in columns])
    out_channels = torch.tensor([i for i in range(weight.shape[0]) if i not in rows])
    size = len(in_channels) * weight[0, 0].numel()
    if size > MAX_INPUTS or any(x.dim() != weight.dim() and weight.dim() == 4 for x in layer.replica_inputs):
        return weight, bias
    fitting, judging = (Gram(size + (bias is not None), others=len(out_channels)) for _ in range(2))
    sample = 0
    for inputs, outputs, replica_outputs in zip(
        layer.replica_inputs, layer.outputs, layer.replica_outputs(weight, bias), strict=True
    ):
        if inputs.dim() < 2:
            return weight, bias  # one row that is the same for every sample
        unfolded = 4 * size * outputs[0, 0].numel() if weight.dim() == 4 else 0  # bytes a sample
        many = max(1, UNFOLDED // unfolded) if unfolded else len(inputs)
        for some, error in zip(torch.split(inputs, many), torch.split(outputs - replica_outputs, many), strict=True):
            judges = (torch.arange(sample, sample + len(some)) % HELD_OUT) == HELD_OUT - 1
            for gram, chosen in ((fitting, ~judges), (judging, judges)):
                if not chosen.any():  # of a batch of few samples
                    continue
                x, e = _rows(layer.module, some[chosen], error[chosen], in_channels, out_channels)
                gram.add(x if bias is None else torch.cat([x, torch.ones_like(x[:, :1])], dim=1), e)
            sample += len(some)
    change = _change(fitting, judging)
    if change is None:
        return weight, bias
    refitted = weight.clone()
    refitted[out_channels[:, None], in_channels[None, :]] += (
        change[:, :size].to(weight.dtype).reshape(len(out_channels), len(in_channels), *weight.shape[2:])
    )
    if bias is not None:
        bias = bias.clone()
        bias[out_channels] += change[:, size].to(bias.dtype)
    return refitted, bias


def _change(fitting: Gram, judging: Gram) -> torch.Tensor | None:
    """The update fitted to all samples, with the penalty that is best on the held-out ones; None where none helps.

    Args:
        fitting: Inputs, and errors beside them, of the samples that are fitted to.
        judging: The same of the held-out samples.
    """
    gains = {ridge: gain(correction(fitting.own, fitting.cross, ridge), judging.own, judging.cross) for ridge in RIDGES}
    best = max(gains, key=lambda ridge: gains[ridge])
    if gains[best] <= 0:
        return None
    return correction(fitting.own + judging.own, fitting.cross + judging.cross, best)


def _rows(
    module: Any, inputs: torch.Tensor, error: torch.Tensor, in_channels: torch.Tensor, out_channels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of the remaining weights, (rows, inputs), and the output errors there, (rows, outputs)."""
    if isinstance(module, nn.Linear):
        x, e = inputs[..., in_channels], error[..., out_channels]
        return x.reshape(-1, len(in_channels)), e.reshape(-1, len(out_channels))
    errors = error.flatten(2)[:, out_channels]
    # All positions of the first sample, then those of the second one, …
    rows = patches(module, inputs[:, in_channels])[0]
    columns = rows.reshape(len(inputs), errors.shape[2], rows.shape[1]).transpose(1, 2)
    places = torch.linspace(0, errors.shape[2] - 1, min(POSITIONS, errors.shape[2])).round().long()
    x, e = (each.index_select(2, places) for each in (columns, errors))  # (samples, …, positions)
    return x.transpose(1, 2).reshape(-1, x.shape[1]), e.transpose(1, 2).reshape(-1, e.shape[1])


__all__ = ["RIDGES", "correction", "fitted", "gain", "plain", "samples"]
