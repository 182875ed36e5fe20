"""Replacing the network by a built-in architecture: what an edit log needs to build it again."""

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
    """The edit that says which architecture is built, and for which inputs.

    Args:
        architecture: One of `penjing.architectures.names()`.
        settings: What its factory takes; values that JSON can hold.
        call: Example inputs (args, kwargs), tensors alone.
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
    """The captured network of an edit, with weights from torch's global generator.

    Raises:
        SourceError: The architecture is unknown, or the settings do not fit it.
        ExportError: It does not take such inputs.
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
