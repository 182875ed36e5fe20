"""Removing wrappers for training or compilation from a network, on a copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from penjing.errors import SourceError

_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def unwrapped(module: nn.Module) -> nn.Module:
    """Unwrap `torch.nn.DataParallel`, `DistributedDataParallel` and `torch.compile` at any depth.

    Returns:
        The module itself if nothing is wrapped. Otherwise layers are shared, and modules that contain a wrapped one are
        shallow copies.

    Raises:
        SourceError: It is, or contains, a TorchScript module, which torch.export can't trace.

    >>> unwrapped(nn.DataParallel(nn.Linear(2, 2)))
    Linear(in_features=2, out_features=2, bias=True)
    """
    return _unwrapped(module, "", {})


def _unwrapped(module: nn.Module, path: str, known: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in known:
        return known[module]
    inner = _inside(module)
    if inner is not None:
        known[module] = _unwrapped(inner, path, known)
        return known[module]
    if isinstance(module, torch.jit.ScriptModule):
        raise SourceError(
            f"{path or 'the source'} is a TorchScript module",
            code="torchscript",
            got=f"{type(module).__name__} {module.original_name}",
            expected="an nn.Module with a forward in Python",
            remedy="give the module that torch.jit.script or torch.jit.trace was called on, with the same weights: "
            "module.load_state_dict(scripted.state_dict())",
        )
    known[module] = module  # a module may contain itself indirectly
    children = {
        name: None if child is None else _unwrapped(child, f"{path}.{name}" if path else name, known)
        for name, child in module._modules.items()
    }
    compiled = getattr(module, "_compiled_call_impl", None) is not None  # module.compile() was called
    if not compiled and all(child is module._modules[name] for name, child in children.items()):
        return module
    plain = copy.copy(module)
    plain.__dict__["_modules"] = children
    plain.__dict__["_compiled_call_impl"] = None
    known[module] = plain
    return plain


def _inside(module: nn.Module) -> nn.Module | None:
    inner: Any = None
    if type(module).__name__ == "OptimizedModule":
        inner = getattr(module, "_orig_mod", None)
    elif type(module).__name__ in _PARALLEL or isinstance(module, nn.DataParallel):
        inner = getattr(module, "module", None)
    return inner if isinstance(inner, nn.Module) else None
