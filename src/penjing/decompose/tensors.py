"""The tensor decompositions of tensorly, on NumPy arrays whatever backend is set elsewhere in the program."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

from penjing.errors import MissingDependency


@contextlib.contextmanager
def tensorly() -> Iterator[Any]:
    """The module `tensorly.decomposition`, computing with NumPy.

    Raises:
        MissingDependency: tensorly is not installed.
    """
    try:
        backend = importlib.import_module("tensorly.backend")
        decomposition = importlib.import_module("tensorly.decomposition")
    except ImportError as error:
        raise MissingDependency(
            "Tucker and CP decompositions need tensorly",
            code="not-installed",
            got=str(error),
            expected="the package tensorly",
            remedy="pip install 'penjing[decompose]', or methods=('svd',)",
        ) from None
    with backend.BackendManager.backend_context("numpy", local_threadsafe=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of starting points and of steps that are not taken
        yield decomposition
