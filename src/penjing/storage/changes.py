"""A chunk of an update: tensors, or bytes, given those before, in the coding that takes the fewest bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from penjing.numerics import copies, delta
from penjing.storage import chunks
from penjing.storage.lzma2 import compressed, decompressed
from penjing.storage.number_types import FLOATS, numbers, written
from penjing.storage.regions import Bytes

CHANGES, COPIES = "changes", "copies"


class Part(NamedTuple):
    """A part of a tensor: its bytes now (none where they are asked for) and before, and how the values lie."""

    new: Bytes
    old: Bytes
    shape: tuple[int, int, int]  # values of a row; width and values of a kernel; each at least 1


def encode(parts: Sequence[Part], dtype: str) -> bytes:
    """Code parts of tensors of one number type, given those before."""
    old, ends, widths, kernels, center = _arranged(parts, dtype)
    new = np.concatenate([numbers(p.new, dtype) for p in parts])
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
    coded = struct.pack("<I", len(ops)) + compressed(ops + literals)
    return min((COPIES, coded), chunks.encode(new, "bytes", 1, 1), key=lambda c: len(c[1]))


def decode_bytes(coding: str, coded: bytes, old: Bytes, size: int) -> bytes:
    """The bytes that `encode_bytes` coded.

    Raises:
        ValueError: The bytes are damaged.
    """
    if coding != COPIES:
        return chunks.decode(coding, coded, "bytes", 1, size)
    (length,) = struct.unpack_from("<I", coded)
    plain = decompressed(coded[4:], 8 * size + 64)
    return copies.restored(plain[:length], plain[length:], old, size)


def _arranged(
    parts: Sequence[Part], dtype: str
) -> tuple[delta.Integers, delta.Integers, delta.Integers, delta.Integers, int]:
    """Values before; end, row and kernel of every part; and the middle of the values."""
    listed = [numbers(part.old, dtype) for part in parts]
    ends = np.cumsum([len(part) for part in listed])
    widths = np.array([min(p.shape[0], len(old)) for p, old in zip(parts, listed, strict=True)], np.int64)
    kernels = np.array(
        [(min(max(1, w), 255), min(max(1, n), 65_025)) for _, w, n in (p.shape for p in parts)], np.int64
    )
    old = np.concatenate(listed)
    return old, ends, widths, kernels, int(np.median(old)) if dtype in ("u8", "u4") else 0


__all__ = ["CHANGES", "COPIES", "Part", "decode", "decode_bytes", "encode", "encode_bytes"]
