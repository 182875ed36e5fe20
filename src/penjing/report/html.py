"""A record as one self-contained HTML page, without scripts and without external fonts or images.

All text in the record (names, reasons, recipes) may come from an untrusted file, so the template escapes it, and a
content security policy forbids the page to load or run anything.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from penjing import records
from penjing.records import files
from penjing.report import arithmetic, between, comparison, curves, expected, numbers, scatter, skyline, verdict
from penjing.report import trials as trial_rows
from penjing.report.table import gains, legible

_NAMES = ("step", "name", "kind", "type", "technique")  # keys of a recipe's entry that may hold its name
_WORK = ("conv", "linear", "gemm", "matmul", "add")  # kinds whose float execution needs a reason
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:%|[kMGT]?B|[kMGT]|[mµn]?s|min|h|dB)(?!\w))")


@dataclass(frozen=True)
class RecipeStep:
    """A step of the recipe with its settings as text."""

    name: str
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FloatGroup:
    """Layers in floating point for the same reason, with their share of all multiply-accumulates."""

    reason: str
    rows: tuple[records.LayerRow, ...]
    share: float


def write(record: records.Record, path: Path | str) -> None:
    """Write the report of a record atomically.

    Raises:
        OutputError: The folder is missing, not writable or full.
    """
    files.write_text(path, render(record))


def render(record: records.Record) -> str:
    """The report of a record as HTML text; the same record gives the same text."""
    chosen = record.chosen
    rows = chosen.layers if chosen and chosen.layers else record.layers
    return _template().render(
        record=record,
        verdict=verdict.of(record),
        comparison=comparison.rows(record),
        between=between.line(record),
        trees=trees(record),
        plots=tuple(p for p in (scatter.plot(record), scatter.plot(record, 350, 400)) if p),
        rows=rows,
        rows_are_chosen=bool(chosen and chosen.layers),
        skylines=(skyline.skyline(rows), skyline.skyline(rows, 350, 90)) if len(rows) > skyline.READABLE else (),
        heaviest=skyline.heaviest(rows),
        shares=skyline.shares(rows),
        stayed_float=stayed_float(record),
        recipe=recipe(record.recipe),
        gains=gains(chosen.gains) if chosen else [],
        charts=curves.charts(record.trainings),
        trials=trial_rows.of(record),
        devices=comparison.devices(record) if record.devices else (),
    )


def _template() -> jinja2.Template:
    return environment().get_template("report.html.j2")


@functools.cache
def environment() -> jinja2.Environment:
    """What templates are rendered in: everything is escaped, and what is not defined is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("penjing.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_legible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(vocabulary())
    return environment


def _legible(value: Any) -> Any:
    """Text without control characters (a name may hold one that reverses the direction of writing).

    The space between a number and its unit does not break at the end of a line.
    """
    return _BEFORE_UNIT.sub("\N{NO-BREAK SPACE}", legible(value, "utf-8")) if type(value) is str else value


def vocabulary() -> Mapping[str, Any]:
    """Globals of the template: formatting functions and the names of the families of arithmetic."""
    return {
        "figure": numbers.figure,
        "share": numbers.share,
        "metric": numbers.metric,
        "drop": numbers.drop,
        "exact": _exact,
        "decibels": _decibels,
        "plural": comparison.plural,
        "faster": comparison.faster,
        "floor": comparison.floor,
        "floor_name": verdict.FLOOR,
        "busy": comparison.busy,
        "against": comparison.against,
        "by_select": comparison.by_select,
        "family": arithmetic.family,
        "families": arithmetic.TITLES,
        "counted": arithmetic.counted,
        "in_floats": arithmetic.in_floats,
        "no_smaller": arithmetic.no_smaller,
        "parity": scatter.parity,
        "ring": scatter.RING,
        "percent_of": percent_of,
        "setting": setting,
        "measures": skyline.MEASURES,
        "absent": numbers.ABSENT,
        "times": expected.times,
        "effort": expected.effort,
        "ordered": expected.ordered,
    }


def percent_of(value: float | None, most: float | None) -> str:
    """The length of a bar as a CSS percentage; positive values are at least 0.5 %.

    >>> percent_of(1, 4), percent_of(0, 4), percent_of(1, 1e9), percent_of(None, 4)
    ('25.00%', '0%', '0.50%', '0%')
    """
    if not value or not most or not math.isfinite(value) or not math.isfinite(most) or value < 0:
        return "0%"
    return f"{min(100.0, max(0.5, 100 * value / most)):.2f}%"


def trees(record: records.Record) -> tuple[float, float] | None:
    """Heights of the trees for source and artifact, the larger 1; their areas are proportional to the sizes on disk."""
    before, after = record.source.size_bytes, comparison.measured(record).size_bytes
    if not before or not after:
        return None
    # A tree of less than a fifth of the height would be a dot.
    return tuple(max(0.2, math.sqrt(v / max(before, after))) for v in (before, after))  # type: ignore[return-value]


def stayed_float(record: records.Record) -> tuple[tuple[records.Candidate, tuple[FloatGroup, ...]], ...]:
    """For every integer candidate, the chosen one first, its layers in floating point, grouped by reason."""
    by_candidate = []
    for c in sorted((*record.candidates, *record.rejected), key=lambda c: c.name != record.goal.chosen):
        if arithmetic.family(c.precision) != arithmetic.INTEGER or not c.layers:
            continue
        total = sum(r.macs for r in c.layers) or 1
        groups: dict[str, list[records.LayerRow]] = {}
        for row in filter(_is_float_work, c.layers):
            groups.setdefault(row.reason or "no reason was recorded", []).append(row)
        listed = (FloatGroup(text, tuple(rows), sum(r.macs for r in rows) / total) for text, rows in groups.items())
        by_candidate.append((c, tuple(sorted(listed, key=lambda g: -g.share))))
    return tuple(by_candidate)


def _is_float_work(row: records.LayerRow) -> bool:
    if row.reason:
        return True
    kind = arithmetic.family(row.executed)
    return kind in (arithmetic.FLOAT, arithmetic.HALF) and any(word in row.kind.lower() for word in _WORK)


def recipe(entries: Sequence[Any]) -> tuple[RecipeStep, ...]:
    """The recipe's steps with their settings as text; entries may have any form."""
    steps = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            steps.append(RecipeStep(str(entry), ()))
            continue
        key = next((k for k in _NAMES if isinstance(entry.get(k), str)), None)
        if key is None and len(entry) == 1:  # {"quantize.Static": {...}}
            (name, inner), *_ = entry.items()
            rest = inner if isinstance(inner, Mapping) else {"": inner} if inner is not None else {}
        else:
            name = entry[key] if key else "step"
            rest = {k: v for k, v in entry.items() if k != key}
        steps.append(RecipeStep(str(name), tuple((str(k), setting(v)) for k, v in rest.items() if not _unset(v))))
    return tuple(steps)


def _unset(value: Any) -> bool:
    return value is None or value in ([], {}, ())


def setting(value: Any) -> str:
    """A setting as text; a step within a step as its name and its settings.

    >>> setting({"Finetune": {"epochs": 2, "minutes": None, "clip": [{"Clip": {"norm": "l2"}}]}})
    'Finetune(epochs 2, clip Clip(norm l2))'
    """
    if isinstance(value, Mapping):
        inner = [(k, v) for k, v in value.items() if not _unset(v)]
        if len(inner) == 1 and isinstance(inner[0][1], Mapping):
            name, settings = inner[0]
            return f"{name}({', '.join(f'{k} {setting(v)}' for k, v in settings.items() if not _unset(v))})"
        return ", ".join(f"{k} {setting(v)}" for k, v in inner)
    if isinstance(value, list | tuple):
        return ", ".join(setting(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _decibels(value: float | None) -> str:
    if value is None:
        return numbers.ABSENT
    return numbers.figure(value, "dB") if math.isfinite(value) else "exact"
