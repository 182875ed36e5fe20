"""The latency of a network before it is built: the sum of its layers' times, corrected by networks that were measured.

A runtime hides, overlaps and adds work between layers; a factor and a constant, learned from whole networks by Bayesian
linear regression (Bishop, "Pattern Recognition and Machine Learning", 2006, section 3.3), stand for that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from penjing.search.gaussian_process import LayerTimes
from penjing.search.layer_probes import EMPTY, KINDS
from penjing.search.layer_shapes import LayerShape

Layers = Sequence[LayerShape]
FACTOR_SD = 0.25  # of the factor around 1, before a network was measured
CONSTANT_SD = 0.5  # of the constant around a call without layers, as a multiple of it
MODEL_SD = 0.05  # of a network's latency around factor and constant, as a share of it
UNKNOWN_SD = 1.0  # of the logarithm of the time of a layer of which there is no probe
LEAST = 2  # layers in a table from which anything is learned


@dataclass(frozen=True)
class Predicted:
    """A latency in milliseconds: its mean and standard deviation."""

    ms: float
    sd: float


class Predictor:
    """Latencies of networks in one runtime and precision, on one machine.

    Args:
        times: Layer → milliseconds, and those of a call without layers (see `penjing.search.layer_table`).
        measured: Networks as their layers, with the milliseconds that were measured.

    Raises:
        ValueError: There are fewer than two layers.
    """

    def __init__(self, times: Mapping[LayerShape, float], measured: Sequence[tuple[Layers, float]] = ()) -> None:
        layers = {shape: ms for shape, ms in times.items() if shape != EMPTY}
        if len(layers) < LEAST:
            raise ValueError(f"{len(layers)} layers are too few to learn from")
        self.call_ms = times.get(EMPTY, 0.0)
        self._layers = LayerTimes(layers)
        self.measured = tuple(measured)
        self._sums = [(*self._sum(network), ms) for network, ms in self.measured]
        self.coefficients, self._covariance = self._corrected(self._sums)

    def predict(self, network: Layers) -> Predicted:
        """The latency of a network."""
        return self._of(*self._sum(network), self.coefficients, self._covariance)

    @property
    def error(self) -> float | None:
        """Mean of |predicted / measured - 1| of the measured networks, each predicted from the others alone."""
        if not self._sums:
            return None
        errors = []
        for left_out, (total, variance, ms) in enumerate(self._sums):
            others = [s for i, s in enumerate(self._sums) if i != left_out]
            errors.append(abs(self._of(total, variance, *self._corrected(others)).ms / ms - 1))
        return float(np.mean(errors))

    def _sum(self, network: Layers) -> tuple[float, float]:
        """Milliseconds of all layers together, and the variance of that."""
        counts = Counter(network)
        if not counts:
            return 0.0, 0.0
        shapes = list(counts)
        means, covariance = self._layers.predict(shapes)
        covariance = covariance + np.diag([UNKNOWN_SD**2 * (s.kind not in KINDS) for s in shapes])
        ms = np.exp(means) * np.array([counts[s] for s in shapes])
        return float(ms.sum()), max(0.0, float(ms @ covariance @ ms))

    def _corrected(self, sums: Sequence[tuple[float, float, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of (factor, constant)."""
        constant_sd = CONSTANT_SD * self.call_ms + 1e-3
        prior, precision = np.array([1.0, self.call_ms]), np.diag([FACTOR_SD**-2, constant_sd**-2])
        if not sums:
            return prior, np.linalg.inv(precision)
        rows = np.array([[total, 1.0] for total, _, _ in sums])
        values = np.array([ms for _, _, ms in sums])
        weights = 1 / np.array([variance + (MODEL_SD * ms) ** 2 for _, variance, ms in sums])
        covariance = np.linalg.inv(precision + (rows.T * weights) @ rows)
        return covariance @ (precision @ prior + rows.T @ (weights * values)), covariance

    @staticmethod
    def _of(total: float, variance: float, coefficients: np.ndarray, covariance: np.ndarray) -> Predicted:
        row = np.array([total, 1.0])
        ms = max(1e-6, float(row @ coefficients))
        spread = float(row @ covariance @ row) + coefficients[0] ** 2 * variance + (MODEL_SD * ms) ** 2
        return Predicted(ms, math.sqrt(spread))
