"""A SOURCE as a module, for what wraps it."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from penjing.sources.source import open_source


def as_module(network: nn.Module | str | Path) -> nn.Module:
    """Return a network, or what a SOURCE names, as a module.

    Raises:
        SourceError: The source can't be opened.
    """
    module = open_source(network).module
    return module.module() if isinstance(module, ExportedProgram) else module


__all__ = ["as_module"]
