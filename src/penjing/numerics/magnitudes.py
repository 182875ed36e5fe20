"""Distributions of integers around zero by their mean magnitude, as tables of whole numbers, alike on every machine.

Only operations that IEEE 754 rounds exactly are used, and `decimal`; the tables are a part of the packed format.
"""

from __future__ import annotations

import math
from decimal import Decimal
from functools import cache

import numpy as np
import numpy.typing as npt

CLASSES = 40
"""Mean magnitudes that are told apart: class `k` stands for 2^((k - ZERO_CLASS) / 3)."""
ZERO_CLASS = 12
LARGEST = 255
"""The largest magnitude that has a place in a table."""
UNIT_BITS = 20
"""Of the tables' probabilities."""
_THIRDS = (1.0, 1.2599210498948732, 1.5874010519681994)  # powers of 2^(1/3)


def mean_of(index: int) -> float:
    """The mean magnitude that a class stands for."""
    octave, third = divmod(index - ZERO_CLASS, 3)
    return math.ldexp(_THIRDS[third], octave)


def class_of(means: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The class nearest to each mean magnitude."""
    nearest = np.round(3 * np.log2(np.maximum(means, 1e-9))).astype(np.int64) + ZERO_CLASS
    return np.clip(nearest, 0, CLASSES - 1)


@cache
def shapes() -> npt.NDArray[np.int64]:
    """Four shapes of distributions, from heavy to light tails: (4, CLASSES, LARGEST + 1), in units of 2^-UNIT_BITS.

    Two Laplace distributions of half and of three halves of the mean magnitude; one Laplace distribution; half of one
    and half of a normal distribution; a normal distribution. A value other than 0 stands for one sign of two.
    """
    table = np.zeros((4, CLASSES, LARGEST + 1), np.int64)
    for index in range(CLASSES):
        mean = max(mean_of(index) - 0.25, 0.2 * mean_of(index))
        laplace, normal = _laplace(mean), _normal(mean)
        heavy = 0.5 * _laplace(0.5 * mean) + 0.5 * _laplace(1.5 * mean)
        for shape, density in enumerate((heavy, laplace, 0.5 * laplace + 0.5 * normal, normal)):
            table[shape, index] = np.floor(density * (1 << UNIT_BITS)).astype(np.int64) + 1
    return table


@cache
def thresholds() -> npt.NDArray[np.int64]:
    """(CLASSES, 3): magnitudes of neighbours that are told apart: the mean, and 2 and 3.5 times of it."""
    return np.array([[math.floor(part * mean_of(k)) for part in (1.0, 2.0, 3.5)] for k in range(CLASSES)], np.int64)


def _laplace(mean: float) -> npt.NDArray[np.float64]:
    """Two-sided geometric distribution of this mean magnitude."""
    return _normalized(np.full(LARGEST, (math.sqrt(1 + mean * mean) - 1) / mean))


def _normal(mean: float) -> npt.NDArray[np.float64]:
    """Sampled normal distribution of about this mean magnitude."""
    deviation = max(1.25 * mean, 0.25)
    ratio = float((-1 / (2 * Decimal(deviation) ** 2)).exp())
    steps = np.full(LARGEST, ratio * ratio)
    steps[0] = ratio
    return _normalized(np.cumprod(steps))


def _normalized(ratios: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A distribution from the ratios of neighbouring probabilities."""
    density = np.concatenate([[1.0], np.cumprod(ratios)])
    return density / (math.fsum(density) * 2 - 1)


__all__ = ["CLASSES", "LARGEST", "UNIT_BITS", "ZERO_CLASS", "class_of", "mean_of", "shapes", "thresholds"]
