"""A chunk of a packed file: some values of one number type, or bytes, in the coding that takes the fewest bytes."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from penjing.numerics import entropy, scaled_integers
from penjing.storage import grids, row_steps
from penjing.storage.lzma2 import XZ, decompressed
from penjing.storage.number_types import FLOATS, INTEGERS, numbers, written
from penjing.storage.regions import ALL_BITS as BITS
from penjing.storage.regions import Bytes

VALUES = 1 << 20  # of a chunk, at most
_PALETTE = 256  # different values, at most
_FEW = 64  # different integers, at most, with which it is tried whether their places take less
_MANTISSA = 24  # bits, at most, that floats are coded with
_LOOKED_AT = 1 << 12  # values that tell the middle of all
_SAMPLE = 1 << 16  # bytes in which it is looked whether words return


def encode(content: Bytes, dtype: str, columns: int, width: int) -> tuple[str, bytes]:
    """Return the coding's name and the coded bytes of a part of a tensor.

    Args:
        content: Its bytes, of whole values but for the last half byte.
        dtype: A key of `ALL_BITS`, or "bytes".
        columns: Values of one row, as the tensor lies.
        width: Of a convolution's kernel, otherwise 1.
    """
    candidates = [("raw", content.tobytes())]
    if dtype in INTEGERS:
        candidates.append(("integers", _integers(content, dtype, columns, width)))
        values = numbers(content, dtype)
        if _gaps(values[: _FEW * 64]) and _gaps(values):
            candidates.append(("palette", _palette(values, np.unique(values), dtype, columns, width)))
    elif dtype in BITS:
        patterns = numbers(content, dtype)
        palette = np.unique(patterns[: _PALETTE * 16])
        if len(palette) <= _PALETTE and len(palette := np.unique(patterns)) <= min(_PALETTE, len(patterns) // 4):
            candidates.append(("palette", _palette(patterns, palette, dtype, columns, width)))
        if dtype in FLOATS and (len(candidates) == 1 or BITS[dtype] == 8):
            candidates += _floats(patterns, dtype, columns)
        if dtype in row_steps.MANTISSA and candidates[-1][0] != "palette":
            steps = row_steps.encode(patterns, dtype, min(columns, len(patterns)), width)
            candidates += [("steps", steps)] if steps else []
        on_grids = grids.encode(content.view("<f4"), min(columns, len(patterns)), width) if dtype == "f32" else None
        if on_grids is not None:
            candidates.append(("grids", on_grids))
    else:
        candidates.append(("xz", lzma.compress(content.tobytes(), lzma.FORMAT_RAW, filters=XZ)))
    best = min(candidates, key=lambda c: len(c[1]))
    if dtype in BITS and _return(content, dtype, len(best[1])):
        words = lzma.compress(content.tobytes(), lzma.FORMAT_RAW, filters=_words(dtype))
        if len(words) < 0.99 * len(best[1]):  # they are slower to unpack
            return "words", words
    return best


def decode(coding: str, coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    """Return what `encode` coded, `size` bytes.

    Raises:
        ValueError: The bytes are damaged.
    """
    back = _CODINGS.get(coding)
    if back is None:
        raise ValueError(f"the coding {coding[:20]!r}, which this version does not know")
    content = back(coded, dtype, columns, size)
    if len(content) != size:
        raise ValueError(f"a chunk of {len(content):,} bytes in the place of {size:,}")
    return content


def _gaps(values: npt.NDArray[np.int64]) -> bool:
    """Whether few of the integers between the smallest and the largest are there, as of a codebook."""
    different = np.unique(values)
    return 1 < len(different) <= min(_FEW, len(values) // 4) and 2 * len(different) <= different[-1] - different[0]


def _integers(content: Bytes, dtype: str, columns: int, width: int) -> bytes:
    values = numbers(content, dtype)
    bits = BITS[dtype]
    usual, middle = 0 if dtype[0] == "i" else 1 << (bits - 1), int(np.median(values[:: 1 + len(values) // _LOOKED_AT]))
    center = usual if abs(middle - usual) <= 1 << (bits - 4) else middle
    coded = scaled_integers.encode(values - center, min(columns, len(values)), width)
    return struct.pack("<h", center) + coded


def _integers_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    count = size * 8 // BITS[dtype]
    (center,) = struct.unpack_from("<h", coded)
    values = scaled_integers.decode(coded[2:], count, min(columns, count)) + np.int16(center)
    return written(values, dtype)


def _floats(patterns: npt.NDArray[np.int64], dtype: str, columns: int) -> list[tuple[str, bytes]]:
    """The number of lowest bits that no value uses, as in floats that were of a shorter type, then the values.

    Nothing where they use more bits than are coded, as those of 64 bits may.
    """
    exponent, mantissa = FLOATS[dtype]
    used = int(np.bitwise_or.reduce(patterns))
    unused = min((used & -used).bit_length() - 1, mantissa) if used else mantissa
    if mantissa - unused > _MANTISSA:
        return []
    short = (patterns.view(np.uint64) >> np.uint64(unused)).view(np.int64)
    coded = entropy.encode_floats(short, min(columns, len(patterns)), exponent, mantissa - unused)
    return [("floats", bytes([unused]) + entropy.to_bytes(coded))]


def _floats_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    exponent, mantissa = FLOATS[dtype]
    count, unused = size * 8 // BITS[dtype], int.from_bytes(coded[:1])
    if not mantissa - _MANTISSA <= unused <= mantissa:
        raise ValueError("other bits than there are")
    patterns = entropy.decode_floats(
        entropy.from_bytes(coded, 1), count, min(columns, count), exponent, mantissa - unused
    )
    return written(patterns << unused, dtype)


def _steps_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    count = size * 8 // BITS[dtype]
    return written(row_steps.decode(coded, dtype, count, min(columns, count)), dtype)


def _return(content: Bytes, dtype: str, best: int) -> bool:
    """Whether words seem to return so often that LZMA2 takes less than `best` bytes.

    Such are weights that were of 4 bits, or have been rounded in every row, tables of sines, and repeated rows.
    """
    if not content.size or best * 32 < content.size:
        return content.size > 0
    if content.size <= _SAMPLE // 4 and BITS[dtype] != 8:
        return True
    start = max(0, (content.size - _SAMPLE) // 2) // 8 * 8
    sample = content[start : start + _SAMPLE].tobytes()
    # Two tests that take a fraction of the time of LZMA2's: sequences must return, and bytes be near the best.
    returning = len(zlib.compress(sample, 1))
    if BITS[dtype] == 8 and returning * content.size > 1.1 * best * len(sample):
        return False
    alone = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    if returning > 0.98 * len(alone.compress(sample) + alone.flush()):
        return False
    quick = lzma.compress(sample, lzma.FORMAT_RAW, filters=_words(dtype, preset=0))
    return bool(len(quick) * content.size < 1.01 * best * len(sample))


def _words(dtype: str, preset: int = 6) -> list[dict[str, int]]:
    """LZMA2's settings for words of this size."""
    bits = max(0, BITS[dtype].bit_length() - 4)
    return [{"id": lzma.FILTER_LZMA2, "preset": preset, "lc": min(2, 4 - bits), "lp": bits, "pb": bits}]


def _palette(
    patterns: npt.NDArray[np.int64], palette: npt.NDArray[np.int64], dtype: str, columns: int, width: int
) -> bytes:
    """The different values, then the place of each value among them, around the most frequent one."""
    places = np.searchsorted(palette, patterns)
    center = int(np.bincount(places).argmax())
    return (
        struct.pack("<HH", len(palette), center)
        + palette.astype(_entry(dtype)).tobytes()
        + scaled_integers.encode(places - center, min(columns, len(places)), width)
    )


def _palette_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    count = size * 8 // BITS[dtype]
    length, center = struct.unpack_from("<HH", coded)
    palette = np.frombuffer(coded, _entry(dtype), length, 4)
    places = scaled_integers.decode(coded[4 + palette.nbytes :], count, min(columns, count)).astype(np.int64) + center
    if count and not 0 <= places.min() <= places.max() < length:
        raise ValueError("a place outside the palette")
    return written(palette.astype(np.int64)[places], dtype)


def _entry(dtype: str) -> str:
    return "<u8" if BITS[dtype] == 64 else "<i4" if dtype in INTEGERS else "<u4"


def _xz_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    return decompressed(coded, size)


def _words_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    return decompressed(coded, size, _words(dtype))


def _grids_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    if dtype != "f32":
        raise ValueError(f"a grid of {dtype}")
    return bytes(grids.decode(coded, size // 4, min(columns, size // 4)).astype("<f4").tobytes())


_CODINGS: dict[str, Callable[[bytes, str, int, int], bytes]] = {
    "raw": lambda coded, dtype, columns, size: coded,
    "integers": _integers_back,
    "floats": _floats_back,
    "palette": _palette_back,
    "grids": _grids_back,
    "steps": _steps_back,
    "xz": _xz_back,
    "words": _words_back,
}


def split(count: int, columns: int, values: int | None = None) -> Iterator[tuple[int, int]]:
    """First and number of the values of every chunk of a tensor: whole rows where these are short.

    Args:
        count: Values of the tensor.
        columns: Values of one row.
        values: Of a chunk, at most; None takes `VALUES`.
    """
    values = values or VALUES
    rows = values // columns // 2 * 2  # an even number of values, of which two may share a byte
    step = rows * columns or values
    for first in range(0, count, step):
        yield first, min(step, count - first)


__all__ = ["VALUES", "decode", "encode", "split"]
