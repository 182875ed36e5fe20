"""A chunk of an update: tensors, or bytes, given those before, in the coding that takes the fewest bytes."""

from __future__ import annotations

import lzma
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penjing.numerics import copies, delta
from penjing.storage import chunks
from penjing.storage.regions import BITS, Bytes

FLOATS = {"f32": (8, 23), "f16": (5, 10), "bf16": (8, 7)}
"""Number type → bits of the exponent and of the mantissa."""
CHANGES, COPIES = "changes", "copies"


class Part(NamedTuple):
    """A part of a tensor: its bytes now (none where they are asked for) and before, and how the values lie."""

    new: Bytes
    old: Bytes
    shape: tuple[int, int, int]  # values of a row; width and values of a kernel; each at least 1


def encode(parts: Sequence[Part], dtype: str) -> bytes:
    """Code parts of tensors of one number type, given those before."""
    old, ends, widths, kernels, center = _arranged(parts, dtype)
    new = np.concatenate([values(p.new, dtype) for p in parts])
    if dtype in FLOATS:
        return delta.encode_floats(old, new, ends, widths, *FLOATS[dtype])
    return delta.encode_integers(old - center, new - center, ends, widths, kernels)


def decode(coded: bytes, parts: Sequence[Part], dtype: str) -> list[bytes]:
    """The parts that `encode` coded, from those before.

    Raises:
        ValueError: The bytes are damaged.
    """
    old, ends, widths, kernels, center = _arranged(parts, dtype)
    if dtype in FLOATS:
        new = delta.decode_floats(coded, old, ends, widths, *FLOATS[dtype])
    else:
        new = delta.decode_integers(coded, old - center, ends, widths, kernels) + center
    return [written(part, dtype) for part in np.split(new, ends[:-1])]


def encode_bytes(new: Bytes, copier: copies.Copier) -> tuple[str, bytes]:
    """The coding's name and the coded bytes of bytes, given all those before."""
    rows = copier.rows(new)
    ops = copies.written(rows)
    literal_bytes, at = [], 0
    for literal, _, length in rows.tolist():
        literal_bytes.append(new[at : at + literal])
        at += literal + length
    literals = np.concatenate([*literal_bytes, new[at:]]).tobytes()
    coded = struct.pack("<I", len(ops)) + lzma.compress(ops + literals, lzma.FORMAT_RAW, filters=chunks.XZ)
    return min((COPIES, coded), chunks.encode(new, "bytes", 1, 1), key=lambda c: len(c[1]))


def decode_bytes(coding: str, coded: bytes, old: Bytes, size: int) -> bytes:
    """The bytes that `encode_bytes` coded.

    Raises:
        ValueError: The bytes are damaged.
    """
    if coding != COPIES:
        return chunks.decode(coding, coded, "bytes", 1, size)
    (length,) = struct.unpack_from("<I", coded)
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=chunks.XZ)
    plain = unpacker.decompress(coded[4:], 8 * size + 64)
    return copies.restored(plain[:length], plain[length:], old, size)


def values(content: Bytes, dtype: str) -> npt.NDArray[np.int64]:
    """Integers, or the bit patterns of floats; of 4 bits, an unused last half is a value too."""
    if dtype in FLOATS:
        return content.view(f"<u{BITS[dtype] // 8}").astype(np.int64)
    if BITS[dtype] == 8:
        return content.view(np.uint8 if dtype == "u8" else np.int8).astype(np.int64)
    halves = np.stack([content & 15, content >> 4], -1).reshape(-1).astype(np.int64)
    return halves if dtype == "u4" else halves - 16 * (halves > 7)


def written(numbers: npt.NDArray[np.int64], dtype: str) -> bytes:
    """The bytes of `values`.

    Raises:
        ValueError: One is none of the type.
    """
    low = -(1 << BITS[dtype] - 1) if dtype[0] == "i" else 0
    if len(numbers) and not low <= numbers.min() <= numbers.max() < low + (1 << BITS[dtype]):
        raise ValueError(f"a value outside {dtype}")
    if BITS[dtype] == 4:
        halves = (numbers & 15).astype(np.uint8)
        return bytes(halves[::2] | halves[1::2] << 4)
    return bytes((numbers & ((1 << BITS[dtype]) - 1)).astype(f"<u{BITS[dtype] // 8}").tobytes())


def _arranged(
    parts: Sequence[Part], dtype: str
) -> tuple[delta.Integers, delta.Integers, delta.Integers, delta.Integers, int]:
    """Values before; end, row and kernel of every part; and the middle of the values."""
    listed = [values(part.old, dtype) for part in parts]
    ends = np.cumsum([len(part) for part in listed])
    widths = np.array([min(p.shape[0], len(old)) for p, old in zip(parts, listed, strict=True)], np.int64)
    kernels = np.array(
        [(min(max(1, w), 255), min(max(1, n), 65_025)) for _, w, n in (p.shape for p in parts)], np.int64
    )
    old = np.concatenate(listed)
    return old, ends, widths, kernels, int(np.median(old)) if dtype in ("u8", "u4") else 0


__all__ = ["CHANGES", "COPIES", "Part", "decode", "decode_bytes", "encode", "encode_bytes"]
