"""The lines that a search shows: what it will try, each trial as it begins and as it ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penjing.records.figures import FIGURES
from penjing.report import numbers

SHOWN = ("latency_ms", "size_bytes", "packed_bytes", "drop")


def lines(event: Mapping[str, Any]) -> Iterator[str]:
    """The lines of one event of a search."""
    if event["kind"] == "search":
        first = "; ".join(f"{row['words']} (about {_time(row['expected_s'])})" for row in event["plan"])
        yield f"search: first {first}" if first else "search: the first looks are over"
        if event["epoch_s"]:
            epoch = _time(event["epoch_s"])
            yield f"        then what promises most; a pass over the data that trains takes about {epoch}"
        yield f"        the study is {event['study']}"
        for note in event["notes"]:
            yield f"        {note}"
    elif event["kind"] == "trial":
        left = f", {_time(event['left_s'])} left" if event["left_s"] is not None else ""
        yield f"trial {event['number']}: {event['words']} (about {_time(event['expected_s'])}{left})"
    elif event["failure"]:
        yield f"          failed: {event['failure'][:200]}"
    else:
        yield f"          {figures(event['figures'], event['asked'])}{', meets the goal' if event['met'] else ''}"
        if expected := {n: v for n, v in event["predicted"].items() if n in event["figures"]}:
            yield f"          (expected: {figures(expected, event['asked'])})"


def figures(values: Mapping[str, float], asked: Sequence[str] = ()) -> str:
    """The figures that people look at, and those that the goal names, in words.

    >>> figures({"size_bytes": 5680.0, "drop": 0.006})
    'size_bytes 5.68 kB, drop 0.60 %'
    """
    shown = [f"{n} {numbers.figure(values[n], _unit(n))}" for n in dict.fromkeys([*SHOWN, *asked]) if n in values]
    return ", ".join(shown) or "nothing was measured"


def _unit(name: str) -> str:
    unit = FIGURES[name].unit
    return {"MACs": "count", "metric": ""}.get(unit, unit)  # the name says it


def _time(seconds: float) -> str:
    if seconds < 1:
        return "1 s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
