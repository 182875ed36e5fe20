"""Layers that read the signs of their input: +1 where it reaches the threshold of its channel, else −1.

Thresholds of every channel: Liu et al., "ReActNet", ECCV 2020. Without them the output of a ReLU has one sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from penjing.network.graph import sites
from penjing.numerics.signs import Signs, signs
from penjing.steps.draft import Edit

NAME = "_sign"


class Sign(nn.Module):
    """Signs of an input around trainable thresholds.

    Attributes:
        threshold: (channels,), of axis 1 of an image and of the last axis else.
        reach: (channels,), how far from the threshold a gradient still passes.
    """

    reach: torch.Tensor

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(channels))
        self.register_buffer("reach", torch.ones(channels))
        self.shape = (channels, *[1] * axes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, …) to the same shape."""
        distance = x - self.threshold.reshape(self.shape)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out: torch.Tensor = Signs.apply(distance / self.reach.reshape(self.shape))  # type: ignore[no-untyped-call]
            return out
        return signs(distance)


def sign_inputs(network: fx.GraphModule, layers: Sequence[str]) -> Edit:
    """Let layers read the signs of their inputs, in place; the new operators are called ``NAME_sign``.

    Args:
        network: A captured network.
        layers: Names of linear layers and of convolutions without groups, each called once.

    Returns:
        The edit.

    Raises:
        TypeError: It is not such a layer.
    """
    for name in layers:
        node = sites(network)[name]
        module: Any = network.get_submodule(name)
        once = node.op == "call_module" and sum(n.target == node.target for n in network.graph.nodes) == 1
        linear = isinstance(module, nn.Linear)
        if not once or not (linear or (isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1)):
            raise TypeError(f"{name} is not a linear layer, or a convolution without groups, that is called once")
        sign = Sign(module.in_features if linear else module.in_channels, 0 if linear else module.weight.dim() - 2)
        network.add_submodule(name + NAME, sign.to(module.weight).train(network.training))
        sign.threshold.requires_grad_(module.weight.requires_grad)
        value: Any = node.args[0]
        with network.graph.inserting_before(node):
            call = network.graph.call_module(name + NAME, (value,))
        call.meta = {word: value.meta[word] for word in ("rank", "floating", "width") if word in value.meta}
        call.meta |= {"site": name + NAME}
        node.args = (call, *node.args[1:])
    network.graph.lint()
    network.recompile()
    return {"edit": "sign_inputs", "layers": list(layers)}


__all__ = ["NAME", "Sign", "sign_inputs"]
