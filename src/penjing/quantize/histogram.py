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
        self.batch: tuple[float, float] | None = None  # extremes of the batch that came last
        self.past: tuple[float, float] | None = None  # the moving extremes before it

    def update(self, x: torch.Tensor, momentum: float = 0.9, *, share: float = 1.0, more: bool = False) -> None:
        """Count the values of x (any shape).

        Args:
            x: Values of a batch, or of some of its samples.
            momentum: Weighs the past in the moving extremes.
            share: What part of a batch this is.
            more: It belongs to the batch of the call before.

        Raises:
            CalibrationError: A value is infinite or not a number.
        """
        x = x.detach()
        if x.numel() == 0:
            return
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)  # in the order in which they lie
        sample, x = x.shape[1:].numel(), x.reshape(-1)
        low, high = (float(v) for v in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            raise CalibrationError(
                "a value inside the network is not finite on the calibration data",
                got=f"values from {low} to {high}",
                expected="finite values wherever a quantizer stands",
                remedy="leave its operator in floating point with exclude=(...), or check the calibration data",
            )
        if not more and self.batch is not None:
            self.past = self.moving_low, self.moving_high
        self.batch = (min(low, self.batch[0]), max(high, self.batch[1])) if more and self.batch else (low, high)
        past = self.past or self.batch
        self.moving_low, self.moving_high = (
            then + (1 - momentum) * (now - then) for then, now in zip(past, self.batch, strict=True)
        )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(max(abs(low), abs(high)))
        stride = max(1, x.numel() // max(1, int(SAMPLES_A_BATCH * share)))
        while math.gcd(stride, sample) > 1:  # or it would fall in step with rows and channels
            stride += 1
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
    def power(self) -> float:
        """Mean square of the values, to within the width of a bin."""
        return float((self.counts * self.centers.square()).sum() / self.counts.sum().clamp(min=1))

    @property
    def centers(self) -> torch.Tensor:
        """Middle of every bin, (bins,), float64; within the extremes that were seen."""
        n = len(self.counts)
        middles = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * self.limit / n) - self.limit
        return middles.clamp(self.low, self.high)
