"""Measurement: latency, memory, size, parity, and the machine. Only NumPy and psutil are imported, never torch."""

from penjing.measure import limits
from penjing.measure.child import TargetError
from penjing.measure.columns import Columns, Difference, differences, split, worst
from penjing.measure.decibels import IDENTICAL_DB, decibels
from penjing.measure.latency import Target, Timing, compare, ratio
from penjing.measure.machine import check_threads, machine, versions
from penjing.measure.memory import peak_memory_bytes, reset_peak, rss_bytes
from penjing.measure.parity import parity
from penjing.measure.size import sha256, size_bytes

__all__ = [
    "IDENTICAL_DB",
    "Columns",
    "Difference",
    "Target",
    "TargetError",
    "Timing",
    "check_threads",
    "compare",
    "decibels",
    "differences",
    "limits",
    "machine",
    "parity",
    "peak_memory_bytes",
    "ratio",
    "reset_peak",
    "rss_bytes",
    "sha256",
    "size_bytes",
    "split",
    "versions",
    "worst",
]
