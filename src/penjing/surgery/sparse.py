"""Tensors whose zeros stay zeros: the entry in the edit log, and what training does to respect it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from penjing.steps.draft import Edit


def mark_sparse(network: fx.GraphModule, tensors: Iterable[str]) -> Edit:
    """The edit that marks these parameters as sparse; the network is not changed.

    Raises:
        AttributeError: The network has no such parameter.
    """
    names = list(tensors)
    for name in names:
        network.get_parameter(name)
    return {"edit": "sparse", "tensors": names}


def freeze_zeros(network: nn.Module, tensors: Iterable[str]) -> None:
    """Clear the gradient of every weight of these parameters that is exactly 0, between backward pass and update.

    Nothing but a gradient and what optimizers make of earlier ones moves a zero: neither momentum from the start of
    the training nor weight decay does. The mask is read from the weights at every step, so a resumed training has it
    too. A weight that was 0 without having been pruned stays 0 with the others.
    """
    for name in tensors:
        parameter = network.get_parameter(name)
        if parameter.grad is not None:
            parameter.grad.masked_fill_(parameter.detach() == 0, 0.0)
