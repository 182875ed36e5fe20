"""What is left makes up for what went: layers that read removed channels are fitted again to what they computed.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017; Luo et al., "ThiNet", ICCV 2017. All
layers are fitted in one pass over unlabelled samples, each behind the layers before it as they already are.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze import lockstep
from penjing.analyze.coupling import Coupling
from penjing.analyze.samples import batches, size_of
from penjing.graph import shapes
from penjing.plan import Plan
from penjing.step import Context
from penjing.task import Call, calibration_calls

RIDGE = 1e-3  # of the mean square of an input: how dear it is to leave the weights that are there
POSITIONS = 256  # of a picture, evenly spread, that a convolution is fitted on
CHUNK = 16  # samples that are unfolded at a time
SAMPLES, FEWEST = 512, 16  # that are fitted on
BYTES = 1 << 28  # of the network's largest value for all samples: some such values are held at a time


def samples(network: fx.GraphModule, context: Context) -> list[Call]:
    """Calibration samples to fit on: as many as the network's values leave room for, at most `SAMPLES`."""
    first = next(calibration_calls(context.task))
    largest = max((t.numel() * t.element_size() for t in shapes(network, first).values()), default=1)
    count = BYTES * size_of(first) // max(1, largest)
    return list(batches(context, max(FEWEST, min(SAMPLES, count))))


def correction(gram: torch.Tensor, cross: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """The change of weights that takes most of an error away, by least squares with a penalty on the change.

    Args:
        gram: Σ x·xᵀ over all rows of inputs, (inputs, inputs).
        cross: Σ error·xᵀ, (outputs, inputs).
        ridge: Weight of the penalty, as a part of the mean of gram's diagonal.

    Returns:
        (outputs, inputs), float64.
    """
    gram, cross = gram.double(), cross.double()
    penalty = ridge * gram.diagonal().mean().clamp(min=1e-30)
    factor, failed = torch.linalg.cholesky_ex(gram + penalty * torch.eye(len(gram), dtype=torch.float64))
    return torch.zeros_like(cross) if failed else torch.cholesky_solve(cross.T, factor).T


def reconstructed(
    network: fx.GraphModule,
    coupling: Coupling,
    removed: Mapping[str, Sequence[int]],
    calls: Iterable[Call],
    keep: Collection[str] = (),
) -> fx.GraphModule:
    """A copy of the network, of the same shapes, that computes without the removed units what it computed with them.

    The weights that read removed units are 0 in it; the others of those layers are fitted. Layers that are called
    several times, share their weights, or convolve in groups or in other than two dimensions keep theirs.

    Args:
        network: A raised network in eval mode; it stays as it is.
        coupling: `penjing.analyze.coupling.couple` of it.
        removed: Group → units.
        calls: Chunks of samples; all their intermediate values that are still to be read are held in memory.
        keep: Tensors that are not fitted.
    """
    copied = copy.deepcopy(network).eval()
    gone = _positions(coupling, removed)
    alone = set(lockstep.countable(copied))
    weights: dict[str, torch.Tensor] = {}

    def watch(layer: lockstep.Layer) -> list[torch.Tensor] | None:
        module = layer.site.partition("@")[0]
        rows, columns = (sorted(gone.get((f"{module}.weight", axis), ())) for axis in (0, 1))
        if not columns:
            return None
        weight = layer.module.weight.detach().clone()
        weight[:, columns] = 0
        if module in alone and _plain(layer.module) and f"{module}.weight" not in keep:
            weight = _fitted(layer, weight, rows, columns)
        weights[f"{module}.weight"] = weight
        return layer.twin_outputs(weight)

    lockstep.run(copied, Plan(), calls, watch)
    with torch.no_grad():
        for name, weight in weights.items():
            copied.get_parameter(name).copy_(weight)
    return copied


def _positions(coupling: Coupling, removed: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], set[int]]:
    """(tensor, axis) → positions that go."""
    found: dict[tuple[str, int], set[int]] = {}
    for name, units in removed.items():
        for member in coupling.groups[name].members:
            found.setdefault((member.tensor, member.axis), set()).update(member.of(list(units)).tolist())
    return found


def _plain(module: Any) -> bool:
    """Whether the layer is one product of a matrix with what `_rows` takes out of its inputs."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and not isinstance(module.padding, str) and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def _fitted(layer: lockstep.Layer, weight: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
    """`weight`, in which columns are 0, with the others fitted to the layer's outputs, but for rows that go too."""
    read = torch.tensor([i for i in range(weight.shape[1]) if i not in set(columns)])
    made = torch.tensor([i for i in range(weight.shape[0]) if i not in set(rows)])
    size = len(read) * weight[0, 0].numel()
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(len(made), size, dtype=torch.float64)
    for inputs, wanted, found in zip(layer.twin_inputs, layer.outputs, layer.twin_outputs(weight), strict=True):
        for some, error in zip(torch.split(inputs, CHUNK), torch.split(wanted - found, CHUNK), strict=True):
            x, e = _rows(layer.module, some, error, read, made)
            gram += (x.T @ x).double()
            cross += (e.T @ x).double()
    fitted = weight.clone()
    change = correction(gram, cross).to(weight.dtype).reshape(len(made), len(read), *weight.shape[2:])
    fitted[made[:, None], read[None, :]] += change
    return fitted


def _rows(
    module: Any, inputs: torch.Tensor, error: torch.Tensor, read: torch.Tensor, made: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kept weights multiply, (rows, inputs), and what lacks at the outputs there, (rows, outputs)."""
    if isinstance(module, nn.Linear):
        return inputs[..., read].reshape(-1, len(read)), error[..., made].reshape(-1, len(made))
    columns = nn.functional.unfold(
        inputs[:, read], module.kernel_size, module.dilation, module.padding, module.stride
    )  # (samples, inputs, positions)
    places = torch.linspace(0, columns.shape[2] - 1, min(POSITIONS, columns.shape[2])).round().long()
    x, e = columns[..., places], error.flatten(2)[:, made][..., places]
    return x.transpose(1, 2).reshape(-1, x.shape[1]), e.transpose(1, 2).reshape(-1, e.shape[1])


__all__ = ["correction", "reconstructed", "samples"]
