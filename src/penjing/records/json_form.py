"""Records as JSON: writing, reading, and what is refused while reading."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from penjing.errors import RecordError
from penjing.records import reading
from penjing.records.record import FORMAT, MOST_THREADS, Record

T = TypeVar("T")


def to_json(value: Any) -> str:
    """JSON text of a record or a part of one; keys in the order of the fields, NaN refused."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_dict(kind: type[T], data: Any) -> T:
    """Build a frozen record of `kind` from plain JSON data; a field that does not fit is named.

    Fields that a newer Penjing added are ignored; missing fields take their default.

    Raises:
        RecordError: A required field is missing or has another type.
    """
    return typing.cast(T, _build(kind, data, kind.__name__))


def _build(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return _build(next(a for a in args if a is not type(None)), data, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            raise RecordError(
                f"{where} can't be read", code="type", field=where, got=type(data).__name__, expected="a JSON object"
            )
        hints = typing.get_type_hints(kind)
        values = {}
        for f in dataclasses.fields(kind):
            if f.name in data:
                values[f.name] = _build(hints[f.name], data[f.name], f"{where}.{f.name}")
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise RecordError(
                    f"{where} has no field {f.name!r}", code="no-field", field=where, got=sorted(data), expected=f.name
                )
        return typing.cast(Any, kind)(**values)
    if origin is typing.Literal:
        if data not in args:
            raise RecordError(
                f"{where} can't be read", code="value", field=where, got=repr(data)[:100], expected=f"one of {args}"
            )
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise RecordError(
                f"{where} can't be read", code="type", field=where, got=type(data).__name__, expected="a JSON list"
            )
        return tuple(_build(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is list:
        if not isinstance(data, list):
            raise RecordError(
                f"{where} can't be read", code="type", field=where, got=type(data).__name__, expected="a JSON list"
            )
        return [_build(args[0], item, where) for item in data]
    if origin is dict:
        if not isinstance(data, dict):
            raise RecordError(
                f"{where} can't be read", code="type", field=where, got=type(data).__name__, expected="a JSON object"
            )
        return {k: _build(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise RecordError(
            f"{where} can't be read", code="type", field=where, got=repr(data)[:200], expected=kind.__name__
        )
    return data


_SIZE = (0, 2**53)
_BOUNDS: dict[str, tuple[float, float]] = {
    "threads": (1, MOST_THREADS), "cores": (1, 2**16), "batch": (1, 2**20), "calls": (0, 2**40), "samples": (0, 2**40),
    "size_bytes": _SIZE, "packed_bytes": _SIZE, "parameters": _SIZE, "peak_memory_bytes": _SIZE,
    "activation_bytes": _SIZE, "weight_bytes": _SIZE, "macs": (0, 2**62),
    "median": (0, 1e12), "p95": (0, 1e12), "spread": (0, 1e12),
}  # fmt: skip
"""Fields whose values are used in calculations, and between what they lie."""


def check_values(data: Any, where: str = "Record") -> None:
    """Raise RecordError where a number of plain data is beyond all that was ever measured."""
    inner: Iterable[tuple[Any, Any]] = data.items() if isinstance(data, dict) else ()
    if isinstance(data, list):
        inner = enumerate(data)
    for name, value in inner:
        low, high = _BOUNDS.get(name, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise RecordError(
                f"{where}.{name} can't be right",
                code="value",
                field=f"{where}.{name}",
                got=value,
                expected=f"{low:g} to {high:g}",
            )
        check_values(value, f"{where}.{name}")


def read(path: Path | str) -> Record:
    """Read `record.json`, given the file or its run folder. Reading never runs code that the file names.

    Raises:
        RecordError: The file is missing, is not JSON, or lacks a field.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "record.json"
    try:
        data = reading.json_file(path)
    except FileNotFoundError:
        raise RecordError(
            "there is no record here",
            code="missing",
            got=str(path),
            expected="a run folder that `penjing compress` finished",
            remedy="name the folder given to --out; an interrupted run is continued with --resume",
        ) from None
    except (OSError, ValueError) as error:
        raise RecordError(
            "the record can't be read",
            code="unreadable",
            got=f"{path}: {error}",
            expected="the JSON that `penjing compress` wrote",
            remedy="run `penjing compress` again",
        ) from None
    if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
        raise RecordError(
            "the record was written by a newer Penjing",
            code="newer",
            got=f"format {data['format']}",
            expected=f"format {FORMAT} or older",
            remedy="pip install --upgrade penjing",
        )
    record = from_dict(Record, data)
    check_values(data)
    return record
