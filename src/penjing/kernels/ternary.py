"""Layers of ternary weights: −α, 0 or α for every filter, two bits each, multiplied by inputs in floating point.

Li et al., "Ternary Weight Networks", 2016. A lane is a filter, and a word of 32 bits holds the weights of 16
neighbouring channels of one tap, in two's complement: two shifts and a conversion make a number of one, which serves a
tile of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penjing.kernels import building, c_source
from penjing.kernels.binary import Convolution
from penjing.kernels.instruction_sets import InstructionSet

PER_WORD = 16  # weights
_PIXELS, _VECTORS = 4, 4  # of a tile of sums, at most


@dataclass(frozen=True)
class Layout:
    """How a convolution lies in the memory of an instruction set.

    Attributes:
        words: Of a filter and tap: one for every 16 channels.
        pixels: Pixels of a tile.
        vectors: Vectors of filters of a tile.
        lanes: Filters of a vector.
        tiles: Tiles of filters.
    """

    words: int
    pixels: int
    vectors: int
    lanes: int
    tiles: int

    @property
    def channels(self) -> int:
        """Channels of an input pixel, with zeros up to a whole word."""
        return self.words * PER_WORD

    @property
    def filters(self) -> int:
        """Filters with those that pad the last tile."""
        return self.tiles * self.vectors * self.lanes


def layout(shape: Convolution, instructions: InstructionSet) -> Layout:
    """Return the layout of a convolution."""
    words = -(-shape.channels // PER_WORD)
    if not instructions.triple:
        return Layout(words, 1, 1, 1, shape.filters)
    lanes = instructions.register_bits // 32
    groups = -(-shape.filters // lanes)
    most = _VECTORS if instructions.registers >= 32 else _VECTORS // 2
    vectors = next(n for n in range(min(most, groups), 0, -1) if groups % n == 0)
    return Layout(words, min(_PIXELS, shape.outputs[1]), vectors, lanes, groups // vectors)


def packed(weights: np.ndarray, lay: Layout) -> np.ndarray:
    """Lay out weights, (filters, kernel height, kernel width, channels) of −1, 0 and 1.

    Returns:
        (tiles, kernel height, kernel width, words, vectors, lanes) int32.
    """
    filters, *taps, channels = weights.shape
    every = np.zeros((lay.filters, *taps, lay.channels), np.uint32)
    every[:filters, ..., :channels] = weights.astype(np.int32) & 3
    shifts = 2 * np.arange(PER_WORD, dtype=np.uint32)
    words = (every.reshape(*every.shape[:-1], lay.words, PER_WORD) << shifts).sum(-1, dtype=np.uint32).view(np.int32)
    tiles = words.reshape(lay.tiles, lay.vectors, lay.lanes, *taps, lay.words).transpose(0, 3, 4, 5, 1, 2)
    return np.ascontiguousarray(tiles)


def function(shape: Convolution, instructions: InstructionSet, name: str = "ternary_conv") -> building.Function:
    """Return the kernel: inputs with their padding and zeros up to whole words, weights, scale, shift, outputs.

    Its rows are those of the output.
    """
    lay = layout(shape, instructions)
    pointers = ("const float *", "const int32_t *", *("const float *",) * 2, "float *")
    if not instructions.triple:
        return building.Function(name, pointers, lambda: c_source.ternary(shape, lay, name))
    from penjing.kernels import ternary_programs as programs

    return building.Function(name, pointers, lambda: programs.convolution(shape, lay))


__all__ = ["PER_WORD", "Layout", "function", "layout", "packed"]
