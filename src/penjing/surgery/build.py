"""Replacing the network by a built-in architecture, as an edit from which it can be rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from penjing import architectures
from penjing.network.capture import capture_network
from penjing.steps.draft import Edit

Call = tuple[tuple[Any, ...], dict[str, Any]]
Dynamic = Mapping[str | int, Mapping[int, str]] | None


def building(architecture: str, settings: Mapping[str, Any], call: Call, dynamic: Dynamic) -> Edit:
    """The edit that builds an architecture for given inputs.

    Args:
        architecture: One of `penjing.architectures.names()`.
        settings: Keyword arguments of its factory; values that JSON can represent.
        call: Example inputs (args, kwargs); all of them tensors.
        dynamic: See `penjing.Task.dynamic`.

    Raises:
        TypeError: An input is not a tensor.
    """
    args, kwargs = call
    axes = (
        None if dynamic is None else [[key, [[axis, word] for axis, word in of.items()]] for key, of in dynamic.items()]
    )
    return {
        "edit": "build",
        "architecture": architecture,
        "settings": dict(settings),
        "args": [_form(x) for x in args],
        "kwargs": {name: _form(x) for name, x in kwargs.items()},
        "dynamic": axes,
    }


def build(edit: Edit) -> fx.GraphModule:
    """Build and capture the network of an edit; its weights are drawn from torch's global generator.

    Raises:
        SourceError: The architecture is unknown, or its factory does not accept the settings.
        ExportError: It does not accept such inputs.
    """
    module = architectures.build(edit["architecture"], **edit["settings"])
    axes = edit["dynamic"]
    dynamic = None if axes is None else {key: {int(axis): word for axis, word in of} for key, of in axes}
    kwargs = {name: _example(form) for name, form in edit["kwargs"].items()}
    return capture_network(module, tuple(map(_example, edit["args"])), kwargs, dynamic)


def _form(x: Any) -> list[Any]:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"an input of type {type(x).__name__}")
    return [list(x.shape), str(x.dtype).removeprefix("torch.")]


def _example(form: list[Any]) -> torch.Tensor:
    shape, dtype = form
    return torch.zeros(shape, dtype=getattr(torch, dtype))


__all__ = ["build", "building"]
