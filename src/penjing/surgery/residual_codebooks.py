"""Tensors that are sums of entries of several codebooks: their entries, and keeping them so in training.

The entries are a buffer of the network, which nothing reads but this; which of them a vector is the sum of follows from
its bits. Training: the gradient is projected level by level, as in `penjing.surgery.codebooks`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from penjing.errors import SharingError
from penjing.network.naming import free_name
from penjing.numerics.codebooks import LookedUp, Table
from penjing.steps.draft import Edit
from penjing.surgery.patterns import as_vectors, pattern

LEVELS, ENTRIES = 2, 1 << 8
"""At most: all sums of entries are compared with the weights, and an index is stored in a byte."""


def store_residual(network: fx.GraphModule, tensor: str, entries: torch.Tensor, path: str | None = None) -> Edit:
    """Store the entries of a parameter's codebooks as a buffer, in place; the edit says where.

    Args:
        network: Has the parameter, whose vectors are sums of one entry of each level.
        tensor: Its name.
        entries: (levels, entries, dimension), float32.
        path: Of the buffer; None takes a free one.

    Raises:
        AttributeError: The network has no such parameter.
        ValueError: The parameter can't be cut into vectors of this dimension, or there are more levels or entries than
            `LEVELS` and `ENTRIES`.
    """
    _check(network, tensor, entries.shape)
    path = path or free_name(network, f"codebooks_{tensor.replace('.', '_')}")
    network.register_buffer(path, entries.clone())
    return {"edit": "residual_codebook", "tensor": tensor, "entries": path, "shape": list(entries.shape)}


def make_room(network: fx.GraphModule, edit: Edit) -> Edit:
    """Do what an edit of `store_residual` says, with entries of 0 that are loaded later.

    Raises:
        AttributeError, TypeError, ValueError: It does not fit the network; no memory is taken for what it claims.
    """
    _check(network, edit["tensor"], edit["shape"])
    return store_residual(network, edit["tensor"], torch.zeros(edit["shape"]), edit["entries"])


def _check(network: fx.GraphModule, tensor: str, shape: Sequence[int]) -> None:
    levels, entries, dimension = shape
    size = network.get_parameter(tensor).numel()
    if not (0 < levels <= LEVELS and 0 < entries <= ENTRIES and 0 < dimension <= size) or size % dimension:
        raise ValueError(f"{tensor} can't be sums of {levels} of {entries} vectors of {dimension} values")


def read_residual(network: nn.Module, mark: Edit) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries (levels, entries, dimension) of a mark, and the indices (levels, vectors), int64.

    Raises:
        SharingError: The weights are no longer sums of entries.
    """
    entries: torch.Tensor = network.get_buffer(mark["entries"])
    vectors = as_vectors(network.get_parameter(mark["tensor"]).detach(), entries.shape[2])
    sums = entries[0]
    for level in entries[1:]:
        sums = (sums[:, None] + level).reshape(-1, entries.shape[2])
    known, order = pattern(sums + 0.0).sort()
    key = pattern(vectors)
    place = torch.searchsorted(known, key).clamp(max=len(known) - 1)
    if not torch.equal(known[place], key):
        raise SharingError(
            f"the weights of {mark['tensor']} have changed since its codebooks were fitted",
            code="changed",
            got=f"{int((known[place] != key).sum())} vectors that are none of {len(known)} sums",
            expected="the weights that share.ProductCodebook left",
        )
    combined, indices = order[place], []
    for _ in entries:
        indices.append(combined % entries.shape[1])
        combined = combined // entries.shape[1]
    return entries, torch.stack(indices[::-1])


def looked_up_sum(network: nn.Module, mark: Edit) -> LookedUp:
    """The entries and indices of every level."""
    entries, indices = read_residual(network, mark)
    tables = []
    for book, index in zip(entries, indices, strict=True):
        used, inside = torch.unique(index, return_inverse=True)
        tables.append(Table(book[used].cpu().numpy(), inside[None].cpu().numpy()))
    return LookedUp(tuple(tables), tuple(network.get_parameter(mark["tensor"]).shape))


class ResidualShared:
    """The weights of one mark in training."""

    def __init__(self, network: nn.Module, mark: Edit) -> None:
        self.mark = mark
        entries, self.indices = read_residual(network, mark)
        self.zero = entries == 0
        self.counts = [torch.bincount(i, minlength=entries.shape[1]).clamp(min=1)[:, None] for i in self.indices]

    def gradients(self, network: nn.Module) -> None:
        """Project the gradient on sums of entries, in place."""
        parameter = network.get_parameter(self.mark["tensor"])
        if parameter.grad is not None:
            parts = self._parts(as_vectors(parameter.grad, self.zero.shape[2]))
            parameter.grad.copy_(self._sum(parts).reshape(parameter.shape))

    def weights(self, network: nn.Module) -> None:
        """Move the entries as the weights have moved, and make the weights their sums, in place."""
        parameter = network.get_parameter(self.mark["tensor"])
        entries = network.get_buffer(self.mark["entries"])
        with torch.no_grad():
            moved = as_vectors(parameter.detach(), entries.shape[2]) - self._sum(entries)
            entries += self._parts(moved)
            parameter.copy_(self._sum(entries).reshape(parameter.shape))

    def _sum(self, parts: torch.Tensor) -> torch.Tensor:
        total = parts[0][self.indices[0]]
        for part, index in zip(parts[1:], self.indices[1:], strict=True):
            total = total + part[index]
        return total

    def _parts(self, values: torch.Tensor) -> torch.Tensor:
        """Level by level the mean, over the vectors of an entry, of what the levels before leave over."""
        parts = []
        for index, count, zero in zip(self.indices, self.counts, self.zero, strict=True):
            sums = values.new_zeros(zero.shape, dtype=torch.float64).index_add_(0, index, values.double())
            part = (sums / count).masked_fill_(zero, 0.0).to(values.dtype)
            parts.append(part)
            values = values - part[index]
        return torch.stack(parts)


__all__ = ["ResidualShared", "looked_up_sum", "make_room", "read_residual", "store_residual"]
