"""Tensors whose zeros stay zeros: the entry in the log of edits, and the hook that holds training to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from penjing.steps.draft import Edit
from penjing.steps.hooks import TrainingEvent


def mark_sparse(network: fx.GraphModule, tensors: Iterable[str]) -> Edit:
    """The edit that says so; the network stays as it is.

    Raises:
        AttributeError: The network has no such parameter.
    """
    names = list(tensors)
    for name in names:
        network.get_parameter(name)
    return {"edit": "sparse", "tensors": names}


@dataclass(frozen=True)
class KeepZeros:
    """A hook of `Finetune`: what is exactly 0 in these tensors gets no gradient.

    Nothing but a gradient and what optimizers make of earlier ones moves a zero: neither momentum from the start of
    the training nor weight decay does. The mask is read from the weights at every step, so a resumed training has it
    too. A weight that was 0 without having been pruned stays 0 with the others.
    """

    tensors: tuple[str, ...]

    def __call__(self, moment: TrainingEvent) -> None:
        """Act on this moment."""
        if moment.name != "gradients":
            return
        for name in self.tensors:
            parameter = moment.network.get_parameter(name)
            if parameter.grad is not None:
                parameter.grad.masked_fill_(parameter.detach() == 0, 0.0)
