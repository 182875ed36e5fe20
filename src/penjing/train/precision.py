"""Faster training on a device: channels-last, and bfloat16 layers with weights and optimizer state in 32 bits.

Micikevicius et al., "Mixed Precision Training", ICLR 2018; Kalamkar et al., "A Study of BFLOAT16 for Deep Learning
Training", 2019: bfloat16 has the range of 32 bits, so no loss has to be scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATEN = tuple(getattr(torch.ops.aten, f"conv{axes}d") for axes in (1, 2, 3))
_OPERATORS = {
    torch.conv1d, torch.conv2d, torch.conv3d, *(o.default for o in _ATEN), *(o.padding for o in _ATEN),
}  # fmt: skip
_GROUPS = 6  # the place of this argument in all of them
_SHORT = (torch.bfloat16, torch.float16)


def bf16_pays(device: str) -> bool:
    """Whether training in bfloat16 is native on this device."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def channels_last_pays(device: str) -> bool:
    """Whether 2-D convolutions train faster in channels-last and stay deterministic.

    With AVX2 alone, oneDNN's gradients of channels-last convolutions differ from run to run in their last bits.
    """
    return torch.device(device).type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2"


def caster(
    choice: Literal["auto", "bf16", "off"], network: nn.Module, device: str
) -> Callable[[], AbstractContextManager[Any]]:
    """A function that gives the context of a training's forward pass.

    Args:
        choice: "auto" is bfloat16 where the device computes it natively.
        network: What is trained.
        device: Where it is.

    Returns:
        On a CPU, depthwise convolutions compute in 32 bits in that context, and give what autocast would have given,
        bfloat16. They do one multiplication per value read, so bfloat16 saves nothing, and oneDNN's gradients of them
        take longer in it.
    """
    if choice == "off" or (choice == "auto" and not bf16_pays(device)):
        return nullcontext
    kind = torch.device(device).type
    if kind == "cpu" and any(isinstance(m, _LAYERS) and m.groups > 1 for m in network.modules()):
        return _with_depthwise_in_fp32
    return lambda: torch.autocast(kind, torch.bfloat16)


@contextmanager
def _with_depthwise_in_fp32() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), _DepthwiseInFp32():
        yield


class _DepthwiseInFp32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _OPERATORS or not _depthwise(*args, **kwargs):
            return func(*args, **kwargs)
        args = [_long(value) for value in args]
        with torch.autocast("cpu", enabled=False):
            result = func(*args, **{key: _long(value) for key, value in kwargs.items()})
        return result.to(torch.bfloat16) if result.dtype == torch.float32 else result


def _depthwise(*args: Any, **kwargs: Any) -> bool:
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    groups = args[_GROUPS] if len(args) > _GROUPS else kwargs.get("groups", 1)
    return bool(groups > 1 and weight.shape[1] == 1)


def _long(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _SHORT else value
