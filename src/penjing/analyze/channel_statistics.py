"""What the input channels of layers look like over data: one statistic of all layers asked for, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from penjing.modes import in_eval_mode
from penjing.tasks.task import Call


@dataclass(frozen=True)
class Statistic:
    """A number for every channel, of any amount of data.

    Attributes:
        of: (channels, values) of one call → (channels,).
        joined: Those of two calls → those of both.
    """

    of: Callable[[torch.Tensor], torch.Tensor]
    joined: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


SQUARES = Statistic(lambda x: x.square().sum(1, dtype=torch.float64), torch.add)
"""The sum of the squares, float64."""

MEAN_SIZES = Statistic(lambda x: x.abs().double().mean(1), torch.add)
"""The mean size in a call, summed over the calls, float64."""

LARGEST = Statistic(lambda x: x.abs().amax(1), torch.maximum)
"""The largest size."""


def collect(
    network: fx.GraphModule, layers: Mapping[str, Any], calls: Iterable[Call], statistic: Statistic
) -> dict[str, torch.Tensor]:
    """Layer → the statistic of its input channels, (in_channels,); layers that nothing reaches are left out.

    Args:
        network: A captured network.
        layers: Linear layers and convolutions, also transposed ones, by their names.
        calls: The data.
        statistic: For example `SQUARES`.
    """
    results: dict[str, torch.Tensor] = {}

    def note(name: str, axis: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any) -> None:
            now = statistic.of(inputs[0].detach().movedim(axis, 0).flatten(1))
            results[name] = statistic.joined(results[name], now) if name in results else now

        return hook

    hooks = []
    for name, module in layers.items():
        # The channels of one sample without a batch axis stand first, those of a batch second.
        axis = -1 if isinstance(module, nn.Linear) else 1 - module.weight.dim()
        hooks.append(module.register_forward_pre_hook(note(name, axis)))
    try:
        with in_eval_mode(network), torch.no_grad():
            for args, kwargs in calls:
                network(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return results


__all__ = ["LARGEST", "MEAN_SIZES", "SQUARES", "Statistic", "collect"]
