"""Signal power over noise power as decibels."""

from __future__ import annotations

import math

IDENTICAL_DB = 200.0
"""Stands for an infinite signal-to-noise ratio, which JSON can't hold; no ratio is reported beyond ±200 dB."""


def decibels(signal: float, noise: float) -> float:
    """Signal power over noise power in decibels, held within ±IDENTICAL_DB.

    >>> decibels(100.0, 1.0), decibels(1.0, 0.0)
    (20.0, 200.0)
    """
    if noise == 0.0:
        return IDENTICAL_DB
    if signal == 0.0:
        return -IDENTICAL_DB
    ratio = 10.0 * (math.log10(signal) - math.log10(noise))
    return max(-IDENTICAL_DB, min(IDENTICAL_DB, ratio))
