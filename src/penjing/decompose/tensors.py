"""The tensor decompositions of tensorly, on NumPy arrays whatever backend is set elsewhere in the program."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

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
    algebra = importlib.import_module("tensorly.tenalg").TenalgBackendManager
    with (
        backend.BackendManager.backend_context("numpy", local_threadsafe=True),
        algebra.backend_context(_algebra(), local_threadsafe=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of starting points and of steps that are not taken
        yield decomposition


def contracted(tensor: np.ndarray, cp_tensor: tuple[Any, Any], mode: int) -> np.ndarray:
    """The unfolding of a tensor along a mode times the Khatri-Rao product of the other factors, (n_mode, r).

    Its longest axis is contracted first, as one matrix product. tensorly's own function computes the Khatri-Rao
    product: for the short modes of a kernel that is a matrix with a row for every weight, gigabytes in a wide layer.

    Args:
        tensor: (n_0, n_1, …).
        cp_tensor: Weights (r,) or None, and one factor (n, r) an axis.
        mode: The axis that stays.
    """
    weights, factors = cp_tensor
    axes = [axis for axis in range(tensor.ndim) if axis != mode]
    longest = max(axes, key=lambda axis: tensor.shape[axis])
    product = np.moveaxis(np.tensordot(tensor, factors[longest], (longest, 0)), -1, 0)  # (r, other axes)
    left = [axis for axis in range(tensor.ndim) if axis != longest]
    for axis in (axis for axis in axes if axis != longest):
        product = np.einsum("rx...,rx->r...", np.moveaxis(product, 1 + left.index(axis), 1), factors[axis].T)
        left.remove(axis)
    return product.T if weights is None else product.T * weights


@functools.cache
def _algebra() -> Any:
    """tensorly's tensor algebra with products that stay small."""
    core = importlib.import_module("tensorly.tenalg.core_tenalg").CoreTenalgBackend
    every: Any = type("Contracted", (core,), {}, backend_name="contracted")
    every.register_method("unfolding_dot_khatri_rao", contracted)
    return every()


__all__ = ["contracted", "tensorly"]
