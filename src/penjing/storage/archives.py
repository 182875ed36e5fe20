"""What the members of a zip archive hold that are stored as they are: weights of ``.pth``, ``.pt2`` and ``.npz`` files.

Which numbers a member holds stands in pickles and other files that nobody should have to open. It is guessed from the
numbers instead: exponents of weights are alike, so of all types the right one takes the fewest bits.
"""

from __future__ import annotations

import lzma
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_FLOATS = {"f32": (23, "<u4"), "bf16": (7, "<u2"), "f16": (10, "<u2"), "f64": (52, "<u8")}
"""Number type → bits of the mantissa, and the whole number of as many bits as all."""
_SYMBOLS = 14  # of exponents; a rarer one is stored as it is
_SMALLEST = 1 << 12  # bytes of a member that is looked at
_SAMPLE = 1 << 16  # bytes
_LOCAL = 30  # bytes of a member's own header, without name and more


class Member(NamedTuple):
    """Bytes of one member that seem to be numbers of one type."""

    name: str
    place: int
    size: int
    dtype: str


def members(path: Path, content: npt.NDArray[np.uint8]) -> Iterator[Member]:
    """The members of an archive that seem to be weights.

    Args:
        path: The archive.
        content: Its bytes.

    Raises:
        zipfile.BadZipFile: It is none.
    """
    with zipfile.ZipFile(path) as archive:
        listed = archive.infolist()
    for info in listed:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < _SMALLEST or info.flag_bits & 1:
            continue
        header = content[info.header_offset : info.header_offset + _LOCAL].tobytes()
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        place = info.header_offset + _LOCAL + lengths
        skipped = _numpy_header(content[place : place + 12].tobytes())
        place, size = place + skipped, info.file_size - skipped
        start = place + (size - min(size, _SAMPLE)) // 2 // 64 * 64
        dtype = _guessed(content[start : start + min(size, _SAMPLE)])
        if dtype:
            yield Member(info.filename, place, size - size % 8, dtype)


def _numpy_header(begins: bytes) -> int:
    """Bytes before the values of an ``.npy`` file; 0 of another one."""
    if begins[:6] != b"\x93NUMPY":
        return 0
    return (
        10 + int.from_bytes(begins[8:10], "little") if begins[6] == 1 else 12 + int.from_bytes(begins[8:12], "little")
    )


def _guessed(sample: npt.NDArray[np.uint8]) -> str:
    """The number type in which bytes take clearly fewer bits than with a general compressor; empty: none."""
    sample = sample[: len(sample) // 8 * 8]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "lc": 2, "lp": 2, "pb": 2}]
    general = 8 * len(lzma.compress(sample.tobytes(), lzma.FORMAT_RAW, filters=filters))
    costs = {name: _bits(sample, name) for name in (*_FLOATS, "i8")}
    best = min(costs, key=costs.__getitem__)
    return best if costs[best] < 0.99 * general else ""


def _bits(sample: npt.NDArray[np.uint8], dtype: str) -> float:
    """What values take: the entropy of integers, or that of exponents, and signs and mantissas as they are."""
    if dtype == "i8":
        return _entropy(sample)
    mantissa, pattern = _FLOATS[dtype]
    patterns = sample.view(pattern)
    used = int(np.bitwise_or.reduce(patterns))
    unused = min((used & -used).bit_length() - 1, mantissa) if used else 0
    exponents = ((patterns >> mantissa) & ((1 << 8 * patterns.itemsize - mantissa - 1) - 1)).astype(np.int64)
    rare = len(exponents) - int(np.sort(np.bincount(exponents))[-_SYMBOLS:].sum())
    plain = np.count_nonzero(patterns) * (1 + mantissa - unused) + rare * (8 * patterns.itemsize - mantissa)
    return _entropy(exponents) + int(plain)


def _entropy(symbols: npt.NDArray[Any]) -> float:
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) + 4 * len(counts)


__all__ = ["Member", "members"]
