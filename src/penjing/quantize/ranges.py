"""Range estimation: from a streaming histogram to the values between which the integers are spread.

Min-max and moving average: Jacob et al., CVPR 2018. Percentile: McKinstry et al., "Discovering Low-Precision
Networks Close to Full-Precision Networks", 2018. MSE: Nagel et al., "A White Paper on Neural Network
Quantization", 2021, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from penjing.errors import RecipeError
from penjing.plan import QuantSpec
from penjing.quantize.affine import fake_quantize, scale_and_zero_point
from penjing.quantize.histogram import Histogram

PERCENTILE = 99.99


def minmax(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The extremes over all samples."""
    return histogram.low, histogram.high


def moving_average(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The extremes of every batch, averaged with exponentially falling weight."""
    return histogram.moving_low, histogram.moving_high


def percentile(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The values that `PERCENTILE` percent of the samples do not exceed, cut on both sides."""
    counts = histogram.counts
    tail = counts.sum() * (1 - PERCENTILE / 100) / 2
    below, above = counts.cumsum(0), counts.flip(0).cumsum(0)
    first = int(torch.searchsorted(below, tail))
    last = len(counts) - 1 - int(torch.searchsorted(above, tail))
    centers = histogram.centers
    return float(centers[min(first, len(counts) - 1)]), float(centers[max(last, 0)])


def mse(histogram: Histogram, spec: QuantSpec, steps: int = 64) -> tuple[float, float]:
    """The shrunk range with the smallest squared error of the rounded values, both ends searched."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    centers, weights = histogram.centers, histogram.counts
    used = weights > 0
    centers, weights = centers[used], weights[used]

    def errors(lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
        scale, zero = scale_and_zero_point(lows, highs, spec)
        rounded = fake_quantize(centers, scale.double()[:, None], zero[:, None], *spec.limits)
        return ((rounded - centers).square() * weights).sum(1)

    ratios = torch.linspace(1, 0.1, steps, dtype=torch.float64)
    if spec.symmetric or low == 0 or high == 0:
        best = int(errors(low * ratios, high * ratios).argmin())
        return float(low * ratios[best]), float(high * ratios[best])
    for _ in range(2):  # one end at a time, twice: the two hardly depend on each other
        best = int(errors(torch.full_like(ratios, low), high * ratios).argmin())
        high = float(high * ratios[best])
        best = int(errors(low * ratios, torch.full_like(ratios, high)).argmin())
        low = float(low * ratios[best])
    return low, high


ESTIMATORS: dict[str, Callable[[Histogram, QuantSpec], tuple[float, float]]] = {
    "minmax": minmax,
    "moving_average": moving_average,
    "percentile": percentile,
    "mse": mse,
}


def estimate(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The range that `spec.range` names; 0..1 of a value that is zero everywhere, where every range is right.

    Raises:
        RecipeError: There is no such estimator.
    """
    if spec.range not in ESTIMATORS:
        raise RecipeError("there is no such range estimator", got=spec.range, expected=f"one of {sorted(ESTIMATORS)}")
    low, high = ESTIMATORS[spec.range](histogram, spec)
    return (0.0, 1.0) if low == high == 0 else (low, high)  # runtimes refuse scales that are next to nothing
