"""Streaming histograms: what a value looked like over any number of samples, in a fixed amount of memory."""

from __future__ import annotations

import math

import torch

from penjing.errors import CalibrationError

BINS = 8192
SAMPLES_A_BATCH = 1 << 16  # values of one batch that are counted; the extremes are taken over all of them


class Histogram:
    """Counts of one tensor's values over equal bins from −limit to limit.

    `limit` is a power of two. When a value falls outside, it doubles, and two bins become one: exactly, with no
    interpolation, so the order of the samples never changes the counts.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.limit = 0.0
        self.low, self.high = math.inf, -math.inf
        self.moving_low, self.moving_high = math.nan, math.nan
        self.batches = 0

    def update(self, x: torch.Tensor, momentum: float = 0.9) -> None:
        """Count the values of x (any shape); `momentum` weighs the past in the moving extremes.

        Raises:
            CalibrationError: A value is infinite or not a number.
        """
        x = x.detach().reshape(-1)
        if x.numel() == 0:
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            raise CalibrationError(
                "a value inside the network is not finite on the calibration data",
                got=f"values from {low} to {high}",
                expected="finite values wherever a quantizer stands",
                remedy="leave its operator in floating point with exclude=(...), or check the calibration data",
            )
        if self.batches == 0:
            self.moving_low, self.moving_high = low, high
        else:
            self.moving_low += (1 - momentum) * (low - self.moving_low)
            self.moving_high += (1 - momentum) * (high - self.moving_high)
        self.batches += 1
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(max(abs(low), abs(high)))
        # An odd stride, so that it does not fall in step with rows and channels.
        stride = max(1, x.numel() // SAMPLES_A_BATCH) | 1
        values = x[::stride].double()
        # Scaling by a power of two and rounding down are exact, so a value's bin never depends on when it came.
        half = len(self.counts) // 2
        places = torch.floor(values * (half / self.limit)).long() + half
        counts = torch.bincount(places, minlength=len(self.counts))
        self.counts += counts.double() * (x.numel() / values.numel())

    def _grow(self, largest: float) -> None:
        if self.limit == 0:
            self.limit = 2.0 ** max(-126, math.frexp(largest)[1]) if largest > 0 else 2.0**-126
        while largest >= self.limit:  # the last bin ends before the limit
            half = len(self.counts) // 2
            merged = self.counts.reshape(half, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[half // 2 : half // 2 + half] = merged
            self.limit *= 2

    @property
    def centers(self) -> torch.Tensor:
        """Middle of every bin, (bins,), float64; within the extremes that were seen."""
        n = len(self.counts)
        middles = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * self.limit / n) - self.limit
        return middles.clamp(self.low, self.high)
