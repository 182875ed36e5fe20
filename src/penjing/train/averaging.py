"""A running average of a network's weights and statistics.

Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; with a decay that grows at the start,
so that the first weights are soon forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

STATISTICS = ("running_mean", "running_var")
HALF = (torch.bfloat16, torch.float16)


def statistics(network: nn.Module) -> Iterator[torch.Tensor]:
    """The running statistics of a network's norms; nothing is looked for until they are asked for."""
    return (buffer for name, buffer in network.named_buffers() if name.endswith(STATISTICS))


class Average(nn.Module):
    """The average's values stand in buffers: they are saved and moved like any module's.

    Args:
        network: Whose parameters and running statistics are averaged; they start as they are. All other buffers
            (constants, what hooks note) are those of the last step.
        decay: Of the old average at every update, at most.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.names = tuple(network.state_dict())
        parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        self.averaged = tuple(name in parameters or name.endswith(STATISTICS) for name in self.names)
        for position, value in enumerate(network.state_dict().values()):
            value = value.detach().clone()
            # A thousandth of a difference is nothing in 16 bits: the average would stand still.
            self.register_buffer(str(position), value.float() if value.dtype in HALF else value)

    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after update number `step`, which counts from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = network.state_dict()
        with torch.no_grad():
            for position, name in enumerate(self.names):
                mean, value = self.get_buffer(str(position)), now[name]
                if self.averaged[position] and mean.is_floating_point():
                    mean.lerp_(value.to(mean.dtype), 1 - decay)
                else:
                    mean.copy_(value)

    def into(self, network: nn.Module, sparse: Iterable[str] = ()) -> None:
        """Give the average's values to the network.

        Args:
            network: The one that was averaged.
            sparse: Parameters whose zeros of the last step stay: before they were pruned they were something else.
        """
        zeros = {name: network.get_parameter(name).detach() == 0 for name in sparse}
        with torch.no_grad():
            for position, name in enumerate(self.names):
                network.state_dict()[name].copy_(self.get_buffer(str(position)))
            for name, gone in zeros.items():
                network.get_parameter(name).masked_fill_(gone, 0.0)
