"""Tensors whose zeros are preserved: the entry in the edit log, and masking of gradients in training."""

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
    """Set the gradient of every weight that is exactly 0 in these parameters to 0, between backward pass and update.

    With gradients that were 0 from the start of the training, neither momentum nor weight decay changes a zero. The
    mask is computed from the weights at every step, so it needs no state to resume. Weights that are 0 without having
    been pruned stay 0, too.
    """
    for name in tensors:
        parameter = network.get_parameter(name)
        if parameter.grad is not None:
            parameter.grad.masked_fill_(parameter.detach() == 0, 0.0)
