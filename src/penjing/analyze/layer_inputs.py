"""What layers read while data runs through a network: one pass for all layers asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from penjing.modes import in_eval_mode
from penjing.tasks.call import Call


def observe(
    network: fx.GraphModule,
    layers: Mapping[str, Any],
    calls: Iterable[Call],
    observer: Callable[[str, torch.Tensor], None],
) -> None:
    """Call `observer(name, input)` whenever one of the layers is run.

    Args:
        network: A captured network; it runs in eval mode and without gradients, and stays as it is.
        layers: Modules of it by their names.
        calls: The data.
        observer: Is given the layer's first input.
    """

    def hook_of(name: str) -> Callable[..., None]:
        return lambda _, inputs: observer(name, inputs[0].detach())

    hooks = [module.register_forward_pre_hook(hook_of(name)) for name, module in layers.items()]
    try:
        with in_eval_mode(network), torch.no_grad():
            for args, kwargs in calls:
                network(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def channel_axis(module: Any) -> int:
    """The axis of a layer's input that its channels are on, counted from the end.

    Args:
        module: A linear layer, or a convolution, transposed or not. A convolution's input has its channels first in
            one sample without a batch axis, and second in a batch.
    """
    return -1 if isinstance(module, nn.Linear) else 1 - module.weight.dim()


__all__ = ["channel_axis", "observe"]
