"""Values of options: texts of the command line as numbers, with what is wrong in words."""

from __future__ import annotations

import argparse
import math


def shape(text: str) -> tuple[int, ...]:
    """The shape of one sample: "3,224,224"."""
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape of one sample, such as 3,224,224")
    return sizes


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def share(text: str) -> float:
    """A fraction, or a number of percent: "0.5%" or "0.005"."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    value = _number(number) / (100 if percent else 1)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0.5% or 0.005")
    return value


def decibels(text: str) -> float:
    """A number of decibels above 0: "25dB" or "25"."""
    value = _number(text.lower().removesuffix("db"))
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of decibels above 0, such as 25dB")
    return value


def minutes(text: str) -> float:
    """Minutes above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value


def duration(text: str) -> float:
    """Seconds, at least 0 and less than an hour."""
    seconds = _number(text)
    if not 0 <= seconds < 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of at least 0")
    return seconds


def _number(text: str) -> float:
    """The text as a number; NaN, which fails every comparison, where it is not one."""
    try:
        return float(text)
    except ValueError:
        return math.nan
