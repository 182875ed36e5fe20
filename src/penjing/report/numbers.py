"""Formatting of numbers, the same in the terminal and in the report."""

from __future__ import annotations

import math
import re

ABSENT = "not measured"

# Smallest value, divisor, and suffix.
_TIMES_MS = ((1e3, 1e3, "s"), (1e-2, 1.0, "ms"), (1e-5, 1e-3, "µs"), (0.0, 1e-6, "ns"))
_TIMES_MJ = ((1e3, 1e3, "J"), (1e-2, 1.0, "mJ"), (0.0, 1e-3, "µJ"))
_THOUSANDS = tuple((f, f, p) for f, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))) + ((0.0, 1.0, ""),)
_SHARES = re.compile(
    r"accuracy|agreement|precision|recall|top.?\d|\b(acc|f1|m?ap|m?iou|auc|auroc|dice)\b", re.IGNORECASE
)


def figure(value: float | None, unit: str) -> str:
    """A number with its unit, to three significant digits, with a suitable prefix.

    Args:
        value: The number; None if it was not measured.
        unit: "ms", "s", "bytes", "count", "MACs", "/s", "dB", "mJ", "%" (of a fraction: 0.934 is 93.40 %),
            "×" or "" (a bare number).

    >>> figure(0.2814, "ms"), figure(1_117_000, "bytes"), figure(40_813_184, "MACs"), figure(0.934, "%")
    ('0.281 ms', '1.12 MB', '40.8 M MACs', '93.40 %')
    >>> figure(None, "ms"), figure(0.0042, "mJ")
    ('not measured', '4.20 µJ')
    """
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return _endless(value)
    if unit == "ms":
        return _scaled(value, _TIMES_MS)
    if unit == "mJ":
        return _scaled(value, _TIMES_MJ)
    if unit == "s":
        return duration(value)
    if unit == "%":
        return f"{_minus(f'{100 * value:.2f}')} %"
    if unit == "bytes":
        return _scaled(value, _THOUSANDS, "B")
    if unit == "count":
        return _scaled(value, _THOUSANDS)
    if unit == "MACs":
        return f"{_scaled(value, _THOUSANDS)} MACs"
    if unit == "/s":
        return f"{significant(value)}/s" if abs(value) < 9995 else f"{_scaled(value, _THOUSANDS)}/s"
    if unit == "×":
        return f"{significant(value, 2)}×"
    if unit == "dB":
        return f"{_minus(f'{value:.1f}')} dB"
    return f"{significant(value)} {unit}".rstrip()


def significant(value: float, digits: int = 3) -> str:
    """`value` rounded to so many significant digits, without an exponent.

    >>> significant(0.99961), significant(1234.5), significant(0.00012345)
    ('1.00', '1234', '0.000123')
    """
    if not math.isfinite(value):
        return _endless(value)
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded == 0:
        return "0"
    if abs(rounded) >= 1e15 or abs(rounded) < 1e-9:
        return _minus(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return _minus(f"{rounded:.{decimals}f}" if decimals else f"{value:.0f}")


def duration(seconds: float) -> str:
    """A duration in suitable units.

    >>> duration(0.0312), duration(8.24), duration(75), duration(3720)
    ('31.2 ms', '8.24 s', '1 min 15 s', '1 h 2 min')
    """
    whole = round(seconds)
    if seconds < 1:
        return _scaled(1e3 * seconds, _TIMES_MS)
    if whole < 60:
        return f"{significant(seconds)} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def share(fraction: float | None) -> str:
    """A fraction as a percentage with one decimal.

    >>> share(0.0412)
    '4.1 %'
    """
    return ABSENT if fraction is None else f"{_minus(f'{100 * fraction:.1f}')} %"


def is_share(name: str, *values: float | None) -> bool:
    """Whether a metric of this name with these values is a fraction, to be shown as a percentage."""
    return bool(_SHARES.search(name)) and all(v is None or 0 <= v <= 1 for v in values)


def metric(value: float | None, name: str) -> str:
    """The task's metric: a percentage if `is_share`, otherwise with four significant digits.

    >>> metric(0.9341, "accuracy"), metric(31.6024, "perplexity")
    ('93.41 %', '31.60')
    """
    if value is None:
        return ABSENT
    return figure(value, "%") if is_share(name, value) else significant(value, 4)


def drop(value: float | None, name: str) -> str:
    """A drop of the metric in the unit of goals: 0.005 of an accuracy is 0.50 %.

    >>> drop(0.001, "accuracy"), drop(-0.0004, "accuracy"), drop(0.25, "perplexity")
    ('0.10 %', '-0.04 %', '0.250')
    """
    if value is None:
        return ABSENT
    return figure(value, "%") if is_share(name) and abs(value) <= 1 else significant(value)


def metric_pair(source: float, artifact: float, name: str) -> tuple[str, str]:
    """Both metrics for a headline, with one decimal, or two if one would hide the difference.

    >>> metric_pair(0.9341, 0.9329, "accuracy"), metric_pair(0.9341, 0.9339, "accuracy")
    (('93.4 %', '93.3 %'), ('93.41 %', '93.39 %'))
    """
    if is_share(name, source, artifact):
        short = share(source), share(artifact)
        if short[0] != short[1] or source == artifact:
            return short
    return metric(source, name), metric(artifact, name)


def _scaled(value: float, steps: tuple[tuple[float, float, str], ...], unit: str = "") -> str:
    # Rounded before it is scaled, so that 999 960 is 1.00 M and not 1000 k.
    rounded = float(f"{value:.2e}")
    _, factor, prefix = next(s for s in steps if abs(rounded) >= s[0])
    if rounded == 0 and steps is _TIMES_MS:
        prefix = "ms"
    whole = factor == 1 and steps is _THOUSANDS and float(value).is_integer()
    number = f"{value:.0f}" if whole else significant(value / factor)
    return f"{number} {prefix}{unit}".rstrip()


def _minus(number: str) -> str:
    return number[1:] if number.startswith("-") and not number.strip("-0.") else number


def _endless(value: float) -> str:
    return "not a number" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
