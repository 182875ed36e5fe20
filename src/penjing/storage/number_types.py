"""Bytes of tensors as whole numbers, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from penjing.storage.regions import ALL_BITS, Bytes

FLOATS = {"f32": (8, 23), "f16": (5, 10), "bf16": (8, 7), "f8e4m3": (4, 3), "f8e5m2": (5, 2), "f64": (11, 52)}
"""Number type → bits of the exponent and of the mantissa."""
INTEGERS = ("i8", "u8", "i4", "u4")
"""Number types that are coded by value; all others are taken as bit patterns."""


def numbers(content: Bytes, dtype: str) -> npt.NDArray[np.int64]:
    """Values of `INTEGERS`, bit patterns of other types, (n,); of 4 bits, an unused last half is a value too."""
    if dtype not in INTEGERS:
        return content.view(f"<u{ALL_BITS[dtype] // 8}").astype(np.int64)
    if ALL_BITS[dtype] == 8:
        return content.view(np.uint8 if dtype == "u8" else np.int8).astype(np.int64)
    halves = np.stack([content & 15, content >> 4], -1).reshape(-1).astype(np.int64)
    return halves if dtype == "u4" else halves - 16 * (halves > 7)


def written(listed: npt.NDArray[Any], dtype: str) -> bytes:
    """The bytes of `numbers`, (n,).

    Raises:
        ValueError: One is none of the type.
    """
    bits = ALL_BITS[dtype]
    low = -(1 << bits - 1) if dtype in ("i8", "i4") else 0
    if len(listed) and bits < 64 and not low <= listed.min() <= listed.max() < low + (1 << bits):
        raise ValueError(f"a value outside {dtype}")
    if bits == 4:
        halves = (listed & 15).astype(np.uint8)
        return bytes(halves[::2] | halves[1::2] << 4)
    return bytes(listed.astype(f"<{'i' if low else 'u'}{bits // 8}").tobytes())


__all__ = ["FLOATS", "INTEGERS", "numbers", "written"]
