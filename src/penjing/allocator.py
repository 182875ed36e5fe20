"""Memory that is used again: the C library keeps what large tensors gave back instead of returning it to the system.

By default glibc asks the system for every block above 32 MiB, and returns it when it is freed. The activations of one
batch are such blocks: each is cleared by the system, page by page, for every operator of every batch, which takes up
to a third of a network's time in torch. See mallopt(3).
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_KEPT = 1 << 30  # bytes; larger blocks come from the system and return to it
_USUAL = {_MMAP_THRESHOLD: 1 << 25, _TRIM_THRESHOLD: 1 << 26}  # where glibc's own, which grow, end

_lock = threading.Lock()
_depth = 0  # of blocks within blocks, over all threads


@contextmanager
def reused_memory() -> Iterator[None]:
    """Keep freed memory inside the block, for the next tensors; it returns to the system at the end.

    Other C libraries than glibc are left as they are.
    """
    global _depth
    library = _glibc()
    if library is None:
        yield
        return
    with _lock:
        _depth += 1
        if _depth == 1:
            library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
            library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for option, value in _USUAL.items():
                    library.mallopt(option, value)
                library.malloc_trim(0)


def _glibc() -> Any:
    """The C library of this process, if it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
