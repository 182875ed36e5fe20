"""A Gaussian process over layers: the logarithm of a layer's time from those that were measured.

Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006, algorithm 2.1. The mean is linear in logarithms
of arithmetic and bytes, with a level of its own for every kind of layer. The kernel adds what depends on channels,
positions and window, and what a layer has alone: runtimes change the way they compute from one size to the next, so
that a layer that was measured is known better than its neighbours. Scales are those of the largest marginal likelihood
on a small grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist

from penjing.search.layer_shapes import LayerShape

GROUPS = ("window", "point", "depthwise", "linear", "sum", "pool", "other")
_SUMS, _POOLS = ("add", "mul"), ("avg_pool", "max_pool")
SAME = 1e-9  # squared distance between equal layers
APART = 3.0  # distance between layers of different groups
VECTOR = 16  # channels that a processor computes at once
LENGTHS, AMPLITUDES, OWN = (0.7, 1.4, 2.8), (0.15, 0.3, 0.6), (0.05, 0.1, 0.2)
NOISE = 0.03  # of a measurement, as a logarithm
LEVEL_SD, SLOPE_SD = 3.0, 0.5
SLOPE = 0.5  # of the time in arithmetic, and in bytes, as logarithms


class LayerTimes:
    """Predicts times of layers.

    Args:
        times: Layer → milliseconds, two or more.
    """

    def __init__(self, times: Mapping[LayerShape, float]) -> None:
        shapes = list(times)
        self._logs = np.log([times[s] for s in shapes])
        self._linear, self._places = _linear(shapes), _places(shapes)
        self._center = float(np.median(self._logs - _trend(shapes)))
        residuals = self._logs - _trend(shapes) - self._center
        best = -math.inf
        for scales in itertools.product(LENGTHS, AMPLITUDES, OWN):
            covariance = _kernel(self._linear, self._places, self._linear, self._places, scales)
            factor = cho_factor(covariance + NOISE**2 * np.eye(len(shapes)), lower=True)
            weights = cho_solve(factor, residuals)
            likelihood = -0.5 * float(residuals @ weights) - float(np.log(np.diag(factor[0])).sum())
            if likelihood > best:
                best = likelihood
                self._factor, self._weights, self._scales = factor, weights, scales

    def predict(self, shapes: Sequence[LayerShape]) -> tuple[np.ndarray, np.ndarray]:
        """Means and covariance of the logarithms of milliseconds: (layers,) and (layers, layers)."""
        linear, places = _linear(shapes), _places(shapes)
        across = _kernel(linear, places, self._linear, self._places, self._scales)
        mean = _trend(shapes) + self._center + across @ self._weights
        own = _kernel(linear, places, linear, places, self._scales)
        covariance = own - across @ cho_solve(self._factor, across.T)
        return mean, covariance


def _kernel(
    linear: np.ndarray, places: np.ndarray, others: np.ndarray, their: np.ndarray, scales: tuple[float, float, float]
) -> np.ndarray:
    """Covariance of layers, (layers, others): what is linear, what neighbours share, and what a layer has alone."""
    length, amplitude, own = scales
    squares = cdist(places, their, "sqeuclidean")
    near = amplitude**2 * np.exp(-0.5 * squares / length**2) + own**2 * (squares < SAME)
    return np.asarray(linear @ others.T + near)


def group(shape: LayerShape) -> str:
    """Of the layers that behave alike."""
    if shape.kind == "conv":
        return "depthwise" if shape.depthwise else "point" if shape.kernel == 1 else "window"
    if shape.kind == "linear":
        return "linear"
    return "sum" if shape.kind in _SUMS else "pool" if shape.kind in _POOLS else "other"


def _trend(shapes: Sequence[LayerShape]) -> np.ndarray:
    """What time grows with, as a logarithm: (layers,)."""
    return np.array([SLOPE * (_arithmetic(s) + math.log(s.values + s.weights)) for s in shapes])


def _arithmetic(shape: LayerShape) -> float:
    return math.log(shape.macs or shape.values)


def _linear(shapes: Sequence[LayerShape]) -> np.ndarray:
    """Features with a linear effect, times the standard deviation of their coefficients: (layers, features)."""
    rows = []
    for s in shapes:
        levels = [LEVEL_SD * (group(s) == name) for name in GROUPS]
        rows.append([*levels, SLOPE_SD * (_arithmetic(s) - 12), SLOPE_SD * (math.log(s.values + s.weights) - 9)])
    return np.array(rows)


def _places(shapes: Sequence[LayerShape]) -> np.ndarray:
    """Coordinates in which layers that lie near each other take alike: (layers, axes)."""
    rows = []
    for s in shapes:
        kinds = [APART / math.sqrt(2) * (group(s) == name) for name in GROUPS]
        kinds.append(0.5 * APART * (s.kind in ("mul", "max_pool")))
        sizes = [math.log(s.inputs), math.log(s.outputs), 0.7 * math.log(s.out_pixels)]
        rows.append(
            [*sizes, 1.5 * math.log(s.kernel), math.log(s.stride), _padding(s.inputs), _padding(s.outputs), *kinds]
        )
    return np.array(rows)


def _padding(channels: int) -> float:
    """How many channels that are none a processor computes: 0 for whole vectors."""
    return 3 * math.log(math.ceil(channels / VECTOR) * VECTOR / channels)
