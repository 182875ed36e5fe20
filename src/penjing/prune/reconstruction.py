"""Least-squares reconstruction: layers that read removed channels are refitted to the outputs they had before pruning.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017; Luo et al., "ThiNet", ICCV 2017. All
layers are fitted in one pass over unlabelled samples, in execution order, each on the inputs that the layers fitted
before it produce. The ridge penalty of every layer is chosen on held-out samples.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze import lockstep
from penjing.analyze.coupling import Coupling
from penjing.analyze.gram import Gram, patches
from penjing.analyze.samples import batches, part
from penjing.network.graph import shapes
from penjing.steps.plan import Plan
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


def reconstructed(
    network: fx.GraphModule,
    coupling: Coupling,
    removed: Mapping[str, Sequence[int]],
    calls: Iterable[Call],
    keep: Collection[str] = (),
) -> fx.GraphModule:
    """A copy of the network, of the same shapes, in which the remaining weights compensate for the removed units.

    Weights that read removed units are 0 in it; the other weights of those layers, and their biases, are refitted.
    Only linear layers and ungrouped two-dimensional convolutions are fitted; layers that are called several times,
    share their weights, or have more than `MAX_INPUTS` inputs keep their weights.

    Args:
        network: A captured network in eval mode; it stays as it is.
        coupling: `penjing.analyze.coupling.couple` of it.
        removed: Group → units.
        calls: Chunks of samples; all their activations that are still needed are held in memory.
        keep: Names of parameters that are not refitted.
    """
    copied = copy.deepcopy(network).eval()
    gone = _positions(coupling, removed)
    _zero(copied, gone)
    alone = set(lockstep.countable(network))
    parameters: dict[str, torch.Tensor] = {}

    def watch(layer: lockstep.Layer) -> list[torch.Tensor] | None:
        name = layer.site.partition("@")[0]
        rows, columns = (gone.get((f"{name}.weight", axis), set()) for axis in (0, 1))
        own: Any = copied.get_submodule(name)
        weight, bias = own.weight.detach(), None if own.bias is None else own.bias.detach()
        if columns and name in alone and _plain(layer.module) and f"{name}.weight" not in keep:
            weight, bias = _fitted(layer, weight, bias, rows, columns)
            parameters[f"{name}.weight"] = weight
            if bias is not None:
                parameters[f"{name}.bias"] = bias
        return layer.replica_outputs(weight, bias)

    with torch.no_grad():
        lockstep.run(network, Plan(), calls, watch, replica=copied)
        for name, value in parameters.items():
            copied.get_parameter(name).copy_(value)
    return copied


def _positions(coupling: Coupling, removed: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], set[int]]:
    """(tensor, axis) → positions that are removed."""
    positions: dict[tuple[str, int], set[int]] = {}
    for name, units in removed.items():
        for member in coupling.groups[name].members:
            positions.setdefault((member.tensor, member.axis), set()).update(member.of(list(units)).tolist())
    return positions


def _zero(network: nn.Module, gone: Mapping[tuple[str, int], Collection[int]]) -> None:
    """Set everything that computes or reads removed units to 0, in place."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    with torch.no_grad():
        for (name, axis), positions in gone.items():
            tensors[name].index_fill_(axis, torch.tensor(sorted(positions), dtype=torch.int64), 0)


def _plain(module: Any) -> bool:
    """Whether the layer is a single matrix product with the rows that `_rows` takes from its inputs."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and not isinstance(module.padding, str) and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def _fitted(
    layer: lockstep.Layer, weight: torch.Tensor, bias: torch.Tensor | None, rows: set[int], columns: set[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias refitted to the layer's outputs, except for the rows and columns that are removed."""
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
    fitted = weight.clone()
    fitted[out_channels[:, None], in_channels[None, :]] += (
        change[:, :size].to(weight.dtype).reshape(len(out_channels), len(in_channels), *weight.shape[2:])
    )
    if bias is not None:
        bias = bias.clone()
        bias[out_channels] += change[:, size].to(bias.dtype)
    return fitted, bias


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
        return inputs[..., in_channels].reshape(-1, len(in_channels)), error[..., out_channels].reshape(
            -1, len(out_channels)
        )
    errors = error.flatten(2)[:, out_channels]
    rows = patches(module, inputs[:, in_channels])[
        0
    ]  # all positions of the first sample, then those of the second one, …
    columns = rows.reshape(len(inputs), errors.shape[2], rows.shape[1]).transpose(1, 2)
    places = torch.linspace(0, errors.shape[2] - 1, min(POSITIONS, errors.shape[2])).round().long()
    x, e = (each.index_select(2, places) for each in (columns, errors))  # (samples, …, positions)
    return x.transpose(1, 2).reshape(-1, x.shape[1]), e.transpose(1, 2).reshape(-1, e.shape[1])


__all__ = ["correction", "gain", "reconstructed", "samples"]
