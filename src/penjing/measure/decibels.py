"""Signal-to-noise ratio in decibels."""

from __future__ import annotations

import math

IDENTICAL_DB = 200.0
"""Reported for an infinite signal-to-noise ratio, which JSON can't represent; ratios are clamped to ±200 dB."""


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise) of two powers, clamped to ±`IDENTICAL_DB`.

    >>> decibels(100.0, 1.0), decibels(1.0, 0.0)
    (20.0, 200.0)
    """
    if noise == 0.0:
        return IDENTICAL_DB
    if signal == 0.0:
        return -IDENTICAL_DB
    ratio = 10.0 * (math.log10(signal) - math.log10(noise))
    return max(-IDENTICAL_DB, min(IDENTICAL_DB, ratio))
