"""Streaming histograms: the distribution of a value over any number of samples, in constant memory."""

from __future__ import annotations

import math

import torch

from penjing.errors import CalibrationError

BINS = 8192
SAMPLES_A_BATCH = 1 << 16  # values counted per batch; minimum and maximum are taken over all of them
_LOWEST = -100  # exponent of the smallest limit, which a float32 can be divided by


class Histogram:
    """Counts of a tensor's values in equal bins from −limit to limit.

    `limit` is a power of two. When a value falls outside, it doubles, and pairs of bins are merged exactly, without
    interpolation, so the counts do not depend on the order of the samples.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.limit = 0.0
        self.low, self.high = math.inf, -math.inf
        self.moving_low, self.moving_high = math.nan, math.nan
        self.batch: tuple[float, float] | None = None  # minimum and maximum of the latest batch
        self.past: tuple[float, float] | None = None  # the moving averages before it

    def update(self, x: torch.Tensor, momentum: float = 0.9, *, share: float = 1.0, more: bool = False) -> None:
        """Add the values of x (any shape).

        Args:
            x: Values of a batch, or of some of its samples.
            momentum: Weight of the past in the moving averages of minimum and maximum.
            share: Fraction of a batch that x is.
            more: Whether x belongs to the same batch as the previous call.

        Raises:
            CalibrationError: A value is infinite or NaN.
        """
        x = x.detach().float()
        if x.numel() == 0:
            return
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)  # in the order in which they lie
        sample, x = x.shape[1:].numel(), x.reshape(-1)
        low, high = (float(v) for v in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            raise CalibrationError(
                "a value inside the network is not finite on the calibration data",
                code="not-finite",
                got=f"values from {low} to {high}",
                expected="finite values at every quantizer",
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
        while math.gcd(stride, sample) > 1:  # otherwise it would always sample the same rows or channels
            stride += 1
        values = x[::stride]
        # Scaling by a power of two and rounding down are exact, so a value's bin does not depend on when it was added.
        # Except below float32's range, where a negative value becomes zero: it belongs into the bin left of zero.
        half = len(self.counts) // 2
        places = (values * (half / self.limit)).floor_().int()
        places -= ((values < 0) & (places == 0)).int()
        counts = torch.bincount(places.add_(half), minlength=len(self.counts))
        self.counts += counts.double() * (x.numel() / values.numel())

    def _grow(self, largest: float) -> None:
        if self.limit == 0:
            self.limit = 2.0 ** max(_LOWEST, math.frexp(largest)[1]) if largest > 0 else 2.0**_LOWEST
        while largest >= self.limit:  # the last bin ends before the limit
            half = len(self.counts) // 2
            merged = self.counts.reshape(half, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[half // 2 : half // 2 + half] = merged
            self.limit *= 2

    @property
    def power(self) -> float:
        """Return the mean square of the values, to within the width of a bin."""
        return float((self.counts * self.centers.square()).sum() / self.counts.sum().clamp(min=1))

    @property
    def centers(self) -> torch.Tensor:
        """Return the centre of every bin, (bins,), float64, clamped to the observed minimum and maximum."""
        n = len(self.counts)
        middles = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * self.limit / n) - self.limit
        return middles.clamp(self.low, self.high)
