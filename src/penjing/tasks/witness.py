"""Records which samples a metric gives to a network, independent of order and batching."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from penjing.tasks.call import leaves
from penjing.tasks.outputs import to_numpy


class Witness:
    """`predict` with a record of its inputs.

    Attributes:
        calls: Number of calls.
        samples: Number of samples in all calls.
    """

    def __init__(self, predict: Callable[..., Any]) -> None:
        """Start with an empty record."""
        self.calls = self.samples = 0
        self._predict = predict
        self._sum = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's outputs."""
        self.calls += 1
        for sample in _samples(args, kwargs):
            self.samples += 1
            self._sum += int.from_bytes(sample, "little")
        return self._predict(*args, **kwargs)

    @property
    def shown(self) -> str:
        """Return the number of samples and the sum of their hashes.

        It does not depend on the order or batching of the samples, and changes if samples are omitted, repeated, or
        have other values.
        """
        return f"{self.samples}:{self._sum % 2**128:032x}"


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[bytes]:
    """A hash per sample of a call: per row if all inputs have the same number of rows, otherwise of the whole call."""
    values = [(where, _plain(leaf)) for _, where, leaf in leaves((args, dict(sorted(kwargs.items()))))]
    arrays = [value for _, value in values if isinstance(value, np.ndarray)]
    rows = {value.shape[0] if value.ndim else None for value in arrays}
    together = rows.pop() if len(rows) == 1 else None
    for row in [None] if together is None else range(together):
        digest = hashlib.blake2b(digest_size=16)
        for where, value in values:
            if isinstance(value, np.ndarray):
                part = value if row is None else value[row]
                digest.update(f"|{where}:{part.dtype}{part.shape}".encode())
                digest.update(part.tobytes())
            else:
                digest.update(f"|{where}={value!r}".encode())
        yield digest.digest()


def _plain(leaf: Any) -> Any:
    return to_numpy(leaf) if hasattr(leaf, "detach") else leaf
