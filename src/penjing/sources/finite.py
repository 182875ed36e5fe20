"""NaN among the weights of a source: told by name when it is opened, before anything is computed with it.

Infinity is not refused here: masks and initial values of maxima hold it. A buffer that is not stored is a constant of
the network's code, and is judged where the network is captured, if the network reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.export import ExportedProgram

from penjing.errors import PenjingError, SourceError

SHOWN = 5  # names of weights


def check_module(module: nn.Module | ExportedProgram, name: str) -> None:
    """Raise if a weight of a network is NaN.

    Args:
        module: The network.
        name: What it is called in the message.

    Raises:
        SourceError: With the names of the weights.
    """
    if isinstance(module, ExportedProgram):
        stored = dict(module.state_dict)
    else:
        constants = {
            f"{place}.{own}".lstrip(".")
            for place, child in module.named_modules()
            for own in child._non_persistent_buffers_set
        }
        stored = dict(module.named_parameters())
        stored |= {place: tensor for place, tensor in module.named_buffers() if place not in constants}
    check(stored, name, SourceError)


def check(tensors: Mapping[str, torch.Tensor], name: str, error: type[PenjingError]) -> None:
    """Raise if a tensor holds NaN.

    Args:
        tensors: By their names; integers and tensors without numbers are passed over.
        name: Of the network or the file, for the message.
        error: The kind of error.

    Raises:
        PenjingError: Of this kind, with the names.
    """
    counts = {name: count for name, tensor in tensors.items() if (count := _nans(tensor))}
    if not counts:
        return
    first = next(iter(counts))
    others = [*counts][1:SHOWN]
    beside = f"; NaN also in {', '.join(others)}" if others else ""
    beside += f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
    raise error(
        f"the weight {first} of {name} holds NaN",
        code="weight-not-finite",
        got=f"{counts[first]:,} of {tensors[first].numel():,} values are NaN{beside}",
        expected="numbers",
        remedy="the training diverged or the file is damaged: take an earlier checkpoint",
    )


def _nans(tensor: torch.Tensor) -> int:
    """How many values are NaN."""
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
    if not plain or tensor.is_meta or nn.parameter.is_lazy(tensor) or not tensor.numel():
        return 0
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    with torch.no_grad():
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensor = tensor.float()  # torch does not compute with 8 bits
        if not tensor.sum().isnan():  # needs no memory, as a mask would; NaN is also what opposite infinities give
            return 0
        return int(tensor.isnan().sum())


__all__ = ["check", "check_module"]
