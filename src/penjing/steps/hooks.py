"""What is called while a training goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class TrainingEvent:
    """What a hook sees.

    `name` is "start" (once in every process: after a resume `step` is above 0), "pass" (the network was put into
    training mode: before every pass over the data, and after a resume), "gradients" (after backward; the rate of this
    step is there, and a hook may set another), "step" (after the update), "epoch" (after a whole pass), "end".
    """

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    steps: int


class Hook(Protocol):
    """Called at every `TrainingEvent`; may change weights or gradients in place.

    What a hook remembers is not saved: for a resume to the bit it keeps it in buffers of the network.
    """

    def __call__(self, moment: TrainingEvent) -> None:
        """Act on this moment."""
        ...
