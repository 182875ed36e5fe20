"""A library of `penjing.kernels.library` that is open. Torch is not imported."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from penjing.errors import TaskError
from penjing.kernels.threads import aligned

LEAST_S = 2e-4
"""Work that a thread has to get: waking one takes a good part of this."""


class Opened:
    """A library that is open: its code runs in this process; it is called by one thread at a time.

    If the library shares the rows of its layers between threads, it does so for every sample. Else threads share the
    samples, each with memory of its own; how many a call gets depends on how long earlier calls took for a sample.
    Neither changes a bit: a row is computed by one thread alone.

    Attributes:
        rows: Whether the library shares rows.
        memories: What each thread works in.
        threads: At most so many are used.
        sample_s: The shortest time seen for a sample on one thread, in seconds; 0 before the first call.
    """

    def __init__(self, path: Path, shapes: Sequence[Sequence[int]], threads: int = 1) -> None:
        """Load a library; `shapes` are those of one sample of the input and of the output."""
        self.library = ctypes.CDLL(str(path))
        self.library.penjing_bytes.restype = ctypes.c_int64
        self.memories = [self._memory()]
        self.rows = hasattr(self.library, "penjing_threads")
        self.threads, self.sample_s = threads, 0.0
        self.function, (self.input, self.output) = self.library.penjing_network, map(tuple, shapes)
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # a forked process has a pool without its threads

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
        parts = self._parts(len(x))
        if parts == 1:
            start = time.perf_counter()
            self._run(x, out, self.memories[0])
            took = (time.perf_counter() - start) / max(1, len(x))
            self.sample_s = min(took, self.sample_s or took)
            return out
        while len(self.memories) < parts:
            self.memories.append(self._memory())
        ends = [len(x) * i // parts for i in range(parts + 1)]
        slices = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
        others = [
            self._threads().submit(self._run, x[part], out[part], memory)
            for part, memory in zip(slices[1:], self.memories[1:], strict=False)
        ]
        self._run(x[slices[0]], out[slices[0]], self.memories[0])
        for other in others:
            other.result()
        return out

    def _parts(self, samples: int) -> int:
        """How many threads share so many samples."""
        return 1 if self.rows else max(1, min(self.threads, samples, int(samples * self.sample_s / LEAST_S)))

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(self.threads - 1)
        return self._pool[1]

    def _memory(self) -> np.ndarray:
        memory = aligned((self.library.penjing_bytes(),), np.uint8)
        self.library.penjing_prepare(ctypes.c_void_p(memory.ctypes.data))
        return memory

    def _run(self, x: np.ndarray, out: np.ndarray, memory: np.ndarray) -> None:
        if self.rows:  # the number is that of all that this process has opened of the library
            self.library.penjing_threads(ctypes.c_int32(self.threads))
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in (x, out, memory))
        self.function(*pointers, ctypes.c_int32(len(x)))


__all__ = ["LEAST_S", "Opened"]
