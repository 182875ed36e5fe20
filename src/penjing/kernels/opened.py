"""A library of `penjing.kernels.library` that is open. Torch is not imported."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penjing.errors import TaskError
from penjing.kernels.threads import aligned


class Opened:
    """A library that is open: its code runs in this process, with memory of its own; not for several threads at once.

    Attributes:
        memory: What it works in.
    """

    def __init__(self, path: Path, shapes: Sequence[Sequence[int]]) -> None:
        """Load a library; `shapes` are those of one sample of the input and of the output."""
        library = ctypes.CDLL(str(path))
        library.penjing_bytes.restype = ctypes.c_int64
        self.memory = aligned((library.penjing_bytes(),), np.uint8)
        library.penjing_prepare(ctypes.c_void_p(self.memory.ctypes.data))
        self.function, (self.input, self.output) = library.penjing_network, map(tuple, shapes)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(samples, …) float32 to (samples, …) float32.

        Raises:
            TaskError: A sample has another shape.
        """
        if x.shape[1:] != self.input:
            raise TaskError(
                "a sample has another shape than the network takes",
                code="shape",
                got=list(x.shape),
                expected=["samples", *self.input],
            )
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty((len(x), *self.output), np.float32)
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in (x, out, self.memory))
        self.function(*pointers, ctypes.c_int32(len(x)))
        return out


__all__ = ["Opened"]
