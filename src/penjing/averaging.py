"""A running average of a network's weights and statistics.

Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; with a decay that grows at the start,
so that the first weights are soon forgotten.
"""

from __future__ import annotations

import torch
from torch import nn


class Average(nn.Module):
    """The average's values stand in buffers: they are saved and moved like any module's.

    Args:
        network: Whose floating-point parameters and buffers are averaged; they start as they are. Integers are those
            of the last step.
        decay: Of the old average at every update, at most.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.names = tuple(network.state_dict())
        for position, value in enumerate(network.state_dict().values()):
            self.register_buffer(str(position), value.detach().clone())

    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after update number `step`, which counts from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = network.state_dict()
        with torch.no_grad():
            for position, name in enumerate(self.names):
                mean, value = self.get_buffer(str(position)), now[name]
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - decay)
                else:
                    mean.copy_(value)

    def into(self, network: nn.Module) -> None:
        """Give the average's values to the network."""
        with torch.no_grad():
            for position, name in enumerate(self.names):
                network.state_dict()[name].copy_(self.get_buffer(str(position)))
