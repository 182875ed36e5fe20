"""Loops that numba compiles; compiling them takes seconds, once for a machine."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from penjing.errors import MissingDependency


def available() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def loops(module: str) -> Any:
    """The module of this room with the loops.

    Raises:
        MissingDependency: numba is not installed.
    """
    try:
        return importlib.import_module(f"penjing.numerics.{module}")
    except ImportError as error:
        raise MissingDependency(
            "packing needs compiled loops",
            code="not-installed",
            got=str(error),
            expected="numba",
            remedy="pip install 'penjing[pack]'",
        ) from None


__all__ = ["available", "loops"]
