"""Hooks: callbacks during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class TrainingEvent:
    """The event that a hook receives.

    `name` is "start" (once per process; after a resume `step` is above 0), "pass" (the network was put into training
    mode: before every pass over the data, and after a resume), "gradients" (after backward; the learning rate of this
    step is set, and a hook may change it), "step" (after the update), "epoch" (after a whole pass), "end".
    """

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    steps: int


class Hook(Protocol):
    """Called for every `TrainingEvent`; may change weights or gradients in place.

    A hook's own state is not saved: to resume to the bit, keep it in buffers of the network.
    """

    def __call__(self, moment: TrainingEvent) -> None:
        """Handle the event."""
        ...
