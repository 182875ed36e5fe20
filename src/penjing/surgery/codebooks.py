"""Tensors whose values come from codebooks: the entry in the edit log, and keeping them so in training.

The network is not changed by the entry: its weights are floating-point numbers of which only a few are different. Which
weights share an entry follows from the numbers themselves, so nothing else has to be stored or resumed.

Training through a codebook: Han et al., "Deep Compression", ICLR 2016. The gradient of an entry is the sum of its
weights' gradients, and which weights belong to it stays. Here the step is that sum divided by their number: it is the
gradient of the network projected on weights that move together, so that the learning rates of plain training fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from penjing.numerics.codebooks import LookedUp, Table
from penjing.steps.draft import Edit
from penjing.surgery.patterns import as_vectors, pattern
from penjing.surgery.residual_codebooks import ResidualShared, looked_up_sum
from penjing.surgery.sparse import freeze_zeros


def mark_codebooks(
    network: fx.GraphModule,
    tensors: Iterable[str],
    *,
    rows: int | None = None,
    dimension: int = 1,
    proportional: bool = False,
) -> Edit:
    """The edit that marks these parameters as values of one codebook; the network is not changed.

    Args:
        network: Has the parameters.
        tensors: Their names. Those of one edit have one codebook in common.
        rows: Each part of so many positions of the first axis has a codebook of its own; None: all have one.
        dimension: Neighbouring values that are one entry together.
        proportional: Training scales the entries of a codebook together: they are a grid.

    Raises:
        AttributeError: The network has no such parameter.
        ValueError: The parameters can't be cut so.
    """
    names = list(tensors)
    if dimension < 1 or (rows is not None and rows < 1):
        raise ValueError(f"vectors of {dimension} values, parts of {rows} rows")
    for name in names:
        if network.get_parameter(name).numel() % dimension or (rows is not None and len(names) > 1):
            raise ValueError(f"{name} can't be cut into {dimension} values, or has parts of {rows} rows")
    return {"edit": "codebook", "tensors": names, "rows": rows, "dimension": dimension, "proportional": proportional}


@dataclass
class Codebook:
    """The entries of one mark, and where they stand.

    Attributes:
        entries: (entries, dimension), float32, as they stand in the tensors; all different.
        indices: Tensor → the index of each of its vectors, (vectors,), int64.
        parts: (entries,), the number of the part of rows that an entry belongs to.
    """

    entries: torch.Tensor
    indices: dict[str, torch.Tensor]
    parts: torch.Tensor


def read_codebook(network: nn.Module, mark: Edit) -> Codebook:
    """The codebook of a mark, read from the network's weights; entries of one value ascend.

    With parts of rows it has the entries of all parts, part by part.
    """
    dimension = int(mark["dimension"])
    vectors = {name: as_vectors(network.get_parameter(name).detach(), dimension) for name in mark["tensors"]}
    every = torch.cat(list(vectors.values()))
    _, inverse = torch.unique(pattern(every), return_inverse=True)
    part = torch.zeros_like(inverse)
    if mark["rows"] is not None:
        (name,) = vectors
        rows = torch.arange(len(network.get_parameter(name)), device=inverse.device) // int(mark["rows"])
        part = rows.repeat_interleave(len(inverse) // len(rows))
        _, inverse = torch.unique(inverse + part * (int(inverse.max()) + 1), return_inverse=True)
    count = int(inverse.max()) + 1
    entries = every.new_empty(count, dimension).index_copy_(0, inverse, every)
    indices = inverse.split([len(v) for v in vectors.values()])
    parts = torch.zeros(count, dtype=torch.int64, device=inverse.device).index_copy_(0, inverse, part)
    return Codebook(entries, dict(zip(vectors, indices, strict=True)), parts)


def looked_up(network: nn.Module, marks: Iterable[Edit]) -> dict[str, LookedUp]:
    """Parameter → its entries and indices, for all parameters of these marks, by all of their names."""
    tensors: dict[str, LookedUp] = {}
    for mark in marks:
        if mark["edit"] == "residual_codebook":
            tensors[mark["tensor"]] = looked_up_sum(network, mark)
            continue
        book = read_codebook(network, mark)
        for name, indices in book.indices.items():
            shape = tuple(network.get_parameter(name).shape)
            each = indices.reshape(shape[0], -1) if mark["rows"] is not None else indices.reshape(1, -1)
            parts = torch.split(each, int(mark["rows"] or 1))
            starts = torch.cat([part.min().expand(len(part)) for part in parts])
            used, inside = torch.unique(each, return_inverse=True)
            first = torch.searchsorted(used, starts).cpu().numpy()
            tensors[name] = LookedUp((Table(book.entries[used].cpu().numpy(), inside.cpu().numpy(), first),), shape)
    same: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    return {other: table for name, table in tensors.items() for other in same[id(network.get_parameter(name))]}


class Constraints:
    """What a training leaves as it is: zeros that stay zeros, and weights that share an entry.

    Args:
        zeros: Parameters in which what is exactly 0 stays 0.
        codebooks: Edits of `mark_codebooks` and `store_residual`. A zero of these parameters stays 0, too.
    """

    def __init__(self, zeros: Sequence[str] = (), codebooks: Sequence[Edit] = ()) -> None:
        self.zeros, self.marks = tuple(zeros), tuple(codebooks)
        self._shared: list[_Shared | ResidualShared] = []

    def begin(self, network: nn.Module) -> None:
        """Read which weights share an entry, before the first step."""
        self._shared = [
            ResidualShared(network, mark) if mark["edit"] == "residual_codebook" else _Shared(network, mark)
            for mark in self.marks
        ]

    def gradients(self, network: nn.Module) -> None:
        """Change the gradients in place, between the backward pass and the update."""
        for shared in self._shared:
            shared.gradients(network)
        freeze_zeros(network, self.zeros)

    def weights(self, network: nn.Module) -> None:
        """Make weights that share an entry equal to the bit, after the update: they differ by its rounding alone."""
        for shared in self._shared:
            shared.weights(network)


class _Shared:
    """The weights of one codebook in training."""

    def __init__(self, network: nn.Module, mark: Edit) -> None:
        book = read_codebook(network, mark)
        self.dimension = int(mark["dimension"])
        self.indices = book.indices
        every = torch.cat(list(book.indices.values()))
        count = len(book.entries)
        self.counts = torch.bincount(every, minlength=count)
        self.zero = book.entries == 0
        self.parts = book.parts
        self.grid = book.entries.double() if mark["proportional"] else None
        # The first vector of every entry stands for all: tensor by tensor, its positions and the entries there.
        places = torch.arange(len(every), device=every.device)
        first = torch.full((count,), len(every), device=every.device).scatter_reduce_(0, every, places, "amin")
        self.first, start = {}, 0
        for name, indices in self.indices.items():
            here = ((first >= start) & (first < start + len(indices))).nonzero().reshape(-1)
            self.first[name] = (here, first[here] - start)
            start += len(indices)

    def gradients(self, network: nn.Module) -> None:
        sums = torch.zeros(len(self.counts), self.dimension, dtype=torch.float64, device=self.counts.device)
        for name, indices in self.indices.items():
            gradient = network.get_parameter(name).grad
            if gradient is None:
                continue
            for column, values in enumerate(as_vectors(gradient, self.dimension).unbind(1)):
                sums[:, column] += torch.bincount(indices, values.double(), minlength=len(sums))
        means = (sums / self.counts[:, None]).masked_fill_(self.zero, 0.0)
        for name, indices in self.indices.items():
            parameter = network.get_parameter(name)
            if parameter.grad is not None:
                parameter.grad.copy_(means.to(parameter.dtype)[indices].reshape(parameter.shape))

    def weights(self, network: nn.Module) -> None:
        parameters = {name: network.get_parameter(name) for name in self.indices}
        entries = next(iter(parameters.values())).new_zeros(len(self.counts), self.dimension)
        with torch.no_grad():
            for name, (here, positions) in self.first.items():
                entries[here] = as_vectors(parameters[name], self.dimension)[positions]
            if self.grid is not None:
                entries = self._on_grid(self.grid, entries)
            for name, indices in self.indices.items():
                parameters[name].copy_(entries[indices].reshape(parameters[name].shape))

    def _on_grid(self, grid: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """The nearest multiple of each part's grid, with the weights of an entry counted."""
        both = torch.stack([(grid * entries.double()).sum(1), grid.square().sum(1)], 1) * self.counts[:, None]
        sums = both.new_zeros(int(self.parts.max()) + 1, 2).index_add_(0, self.parts, both)
        scale = sums[:, 0] / sums[:, 1].clamp(min=1e-300)
        return (grid * scale[self.parts][:, None]).to(entries.dtype)


__all__ = ["Codebook", "Constraints", "looked_up", "mark_codebooks", "read_codebook"]
