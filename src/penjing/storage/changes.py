"""A chunk of an update: tensors, or bytes, given those before, in the coding that takes the fewest bytes."""

from __future__ import annotations

import lzma
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penjing.numerics import copies, delta
from penjing.numerics.entropy import Coded
from penjing.storage import chunks
from penjing.storage.regions import BITS, Bytes

FLOATS = {"f32": (8, 23), "f16": (5, 10), "bf16": (8, 7)}
"""Number type → bits of the exponent and of the mantissa."""
CHANGES, COPIES = "changes", "copies"
_HEAD = struct.Struct("<III")  # state, number of words, number of bytes of plain bits


class Part(NamedTuple):
    """A part of a tensor: its bytes now and before, and the values of one row."""

    new: Bytes
    old: Bytes
    width: int


def encode(parts: Sequence[Part], dtype: str) -> bytes:
    """Code parts of tensors of one number type, given those before."""
    old, ends, widths, center = _arranged([p.old for p in parts], [p.width for p in parts], dtype)
    new = np.concatenate([values(p.new, dtype) for p in parts])
    if dtype in FLOATS:
        return _joined(delta.encode_floats(old, new, ends, widths, *FLOATS[dtype]))
    return _joined(delta.encode_integers(old - center, new - center, ends, widths))


def decode(coded: bytes, before: Sequence[Bytes], widths: Sequence[int], dtype: str) -> list[bytes]:
    """The parts that `encode` coded, from those before.

    Raises:
        ValueError: The bytes are damaged.
    """
    old, ends, rows, center = _arranged(before, widths, dtype)
    if dtype in FLOATS:
        new = delta.decode_floats(_split(coded), old, ends, rows, *FLOATS[dtype])
    else:
        new = delta.decode_integers(_split(coded), old - center, ends, rows) + center
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
    before: Sequence[Bytes], widths: Sequence[int], dtype: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Values before, end and row of every part, and the middle of the values."""
    listed = [values(part, dtype) for part in before]
    ends = np.cumsum([len(part) for part in listed])
    rows = np.array([max(1, min(width, len(part))) for width, part in zip(widths, listed, strict=True)], np.int64)
    old = np.concatenate(listed)
    return old, ends, rows, int(np.median(old)) if dtype[0] == "u" and dtype not in FLOATS else 0


def _joined(coded: Coded) -> bytes:
    state, words, plain = coded
    return _HEAD.pack(state, len(words), len(plain)) + words.astype("<u2").tobytes() + plain.tobytes()


def _split(coded: bytes) -> Coded:
    state, words, plain = _HEAD.unpack_from(coded)
    if len(coded) != _HEAD.size + 2 * words + plain:
        raise ValueError("a chunk that ends too early or too late")
    listed = np.frombuffer(coded, "<u2", words, _HEAD.size).astype(np.uint16)
    return state, listed, np.frombuffer(coded, np.uint8, plain, _HEAD.size + 2 * words)


__all__ = ["CHANGES", "COPIES", "Part", "decode", "decode_bytes", "encode", "encode_bytes"]
