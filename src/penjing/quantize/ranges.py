"""Range estimation from a streaming histogram.

Min-max and moving average: Jacob et al., CVPR 2018. Percentile: McKinstry et al., "Discovering Low-Precision
Networks Close to Full-Precision Networks", 2018. MSE: Nagel et al., "A White Paper on Neural Network
Quantization", 2021, section 3.1. Entropy: Migacz, "8-bit Inference with TensorRT", GTC 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from penjing.errors import RecipeError
from penjing.numerics.grid import on_grid
from penjing.quantize.affine import scale_and_zero_point
from penjing.quantize.histogram import Histogram
from penjing.steps.plan import QuantSpec

PERCENTILE = 99.99
UNSEEN = 1e-4  # counts assumed for an empty bin in a Kullback-Leibler divergence


def minmax(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """Return the minimum and maximum over all samples."""
    return histogram.low, histogram.high


def moving_average(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """Return the exponential moving averages of every batch's minimum and maximum."""
    return histogram.moving_low, histogram.moving_high


def percentile(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """Return the range of the central `PERCENTILE` percent of the values."""
    counts = histogram.counts
    tail = counts.sum() * (1 - PERCENTILE / 100) / 2
    below, above = counts.cumsum(0), counts.flip(0).cumsum(0)
    first = int(torch.searchsorted(below, tail))
    last = len(counts) - 1 - int(torch.searchsorted(above, tail))
    centers = histogram.centers
    return float(centers[min(first, len(counts) - 1)]), float(centers[max(last, 0)])


def mse(histogram: Histogram, spec: QuantSpec, steps: int = 64) -> tuple[float, float]:
    """Return the shrunk range with the smallest squared error of the quantized values, both ends searched."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    centers, weights = histogram.centers, histogram.counts
    used = weights > 0
    centers, weights = centers[used], weights[used]

    def errors(lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
        scale, zero = scale_and_zero_point(lows, highs, spec)
        tried = centers.expand(len(scale), -1)
        rounded = on_grid(tried, scale.double(), zero, replace(spec, axis=0, group=None))
        return ((rounded - centers).square() * weights).sum(1)

    ratios = torch.linspace(1, 0.1, steps, dtype=torch.float64)
    if spec.symmetric or low == 0 or high == 0:
        best = int(errors(low * ratios, high * ratios).argmin())
        return float(low * ratios[best]), float(high * ratios[best])
    for _ in range(2):  # one end at a time, twice: the two are nearly independent
        best = int(errors(torch.full_like(ratios, low), high * ratios).argmin())
        high = float(high * ratios[best])
        best = int(errors(low * ratios, torch.full_like(ratios, high)).argmin())
        low = float(low * ratios[best])
    return low, high


def entropy(histogram: Histogram, spec: QuantSpec, candidates: int = 128) -> tuple[float, float]:
    """Return the clipping threshold with the smallest Kullback-Leibler divergence after quantization.

    For every threshold T, the values beyond it are clipped to it (P), then merged into as many equal steps as there are
    integers on one side, each step spread over its non-empty bins (Q); the T with the smallest Σ P·log(P/Q) wins. Both
    ends are clipped at the same magnitude.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    half = len(histogram.counts) // 2
    magnitudes = histogram.counts[half:] + histogram.counts[:half].flip(0)
    used = magnitudes.nonzero()
    if len(used) == 0 or low == high == 0:
        return low, high
    # The zeros of a ReLU carry no information about the range, and would outweigh everything else.
    magnitudes[0] = magnitudes[1] if magnitudes[0] > magnitudes[1:].sum() else magnitudes[0]
    top = int(used[-1]) + 1
    smallest, largest = spec.limits
    levels = largest if spec.signed else (largest - smallest) // (1 if low == 0 or high == 0 else 2)
    limit = max(-low, high)
    if top <= levels:
        return low, high  # fewer bins than integers: clipping gains nothing
    best, threshold = math.inf, limit
    for end in sorted({int(e) for e in torch.linspace(max(levels, top // 8), top, candidates).tolist()}):
        if (divergence := _divergence(magnitudes, end, levels)) < best:
            best, threshold = divergence, min(limit, end * histogram.limit / half)
    return max(low, -threshold), min(high, threshold)


def _divergence(counts: torch.Tensor, end: int, levels: int) -> float:
    """Σ P·log(P/Q) of the counts clipped at bin `end` and quantized to `levels` steps."""
    p = counts[:end].clone()
    used = p > 0
    steps = torch.arange(end) * levels // end
    mass = torch.zeros(levels, dtype=p.dtype).index_add_(0, steps, p)
    bins = torch.zeros(levels, dtype=p.dtype).index_add_(0, steps, used.to(p.dtype))
    q = torch.where(used, (mass / bins.clamp(min=1))[steps], 0.0)
    p[-1] += counts[end:].sum()
    if p[-1] > 0 and q[-1] == 0:
        q[-1] = UNSEEN  # clipped counts may land in an empty bin: that has a finite cost instead of an infinite one
    used = p > 0
    p, q = p[used] / p.sum(), q[used] / q.sum()
    return float((p * (p / q).log()).sum())


ESTIMATORS: dict[str, Callable[[Histogram, QuantSpec], tuple[float, float]]] = {
    "minmax": minmax,
    "moving_average": moving_average,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def estimate(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """Estimate the range by the method `spec.range`; 0..1 for a value that is zero everywhere (any range is right).

    Raises:
        RecipeError: `spec.range` is not an estimator.
    """
    if spec.range not in ESTIMATORS:
        raise RecipeError(
            "this is not a range estimator",
            code="estimator",
            got=spec.range,
            expected=f"one of {sorted(ESTIMATORS)}",
        )
    low, high = ESTIMATORS[spec.range](histogram, spec)
    return (0.0, 1.0) if low == high == 0 else (low, high)  # runtimes refuse scales close to 0
