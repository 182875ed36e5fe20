"""Loops that numba compiles; compiling them takes seconds, once for a machine."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import tempfile
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
    name = f"penjing.numerics.{module}"
    try:
        try:
            return importlib.import_module(name)
        except RuntimeError:  # numba may write neither beside the module nor in the home folder
            _keep_aside()
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            "packing needs compiled loops",
            code="not-installed",
            got=str(error),
            expected="numba",
            remedy="pip install 'penjing[pack]'",
        ) from None


@functools.cache
def _keep_aside() -> tempfile.TemporaryDirectory[str]:
    """Have compiled loops stored in a folder that lives as long as this process; others could alter a lasting one."""
    import numba

    folder = tempfile.TemporaryDirectory(prefix="penjing-")
    numba.config.CACHE_DIR = folder.name  # type: ignore[attr-defined]
    return folder


__all__ = ["available", "loops"]
