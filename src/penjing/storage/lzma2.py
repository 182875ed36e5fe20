"""LZMA2 without a container: bytes that are compressed by a general compressor."""

from __future__ import annotations

import lzma
from collections.abc import Sequence

Filters = Sequence[dict[str, int]]
XZ: Filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
"""The usual settings."""


def compressed(content: bytes, filters: Filters = XZ) -> bytes:
    """These bytes in LZMA2."""
    return lzma.compress(content, lzma.FORMAT_RAW, filters=filters)


def decompressed(coded: bytes, size: int, filters: Filters = XZ) -> bytes:
    """What was `compressed`, at most `size` bytes of it.

    Raises:
        ValueError: The bytes are damaged.
    """
    try:
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(coded, size)
    except lzma.LZMAError as error:
        raise ValueError(f"damaged bytes: {error}") from None


__all__ = ["XZ", "Filters", "compressed", "decompressed"]
