"""Reading what an artifact's `bench.py` measured on a device: with care, for it comes from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penjing.errors import RecordError
from penjing.records import json_form, reading
from penjing.records.record import DeviceRun

FORMAT = 1
BENCH_BYTES = 1 << 20
MOST_ROUNDS = 1000
MOST = 1e12  # milliseconds, or millijoules
WORD = 1000  # characters of what a device says of itself


def read_bench(path: Path | str) -> DeviceRun:
    """Read the JSON that `bench.py` wrote on a device.

    Raises:
        RecordError: It is missing, damaged, of a newer format, or holds numbers that can't be right.
    """
    try:
        data = reading.json_file(path, BENCH_BYTES)
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise RecordError(
            "the device's figures can't be read",
            code="unreadable",
            got=f"{path}: {error}",
            expected="the JSON that bench.py wrote",
            remedy="run it again on the device: python bench.py -o bench.json",
        ) from None
    if data.get("format") != FORMAT:
        raise RecordError(
            "the device's figures have another format",
            code="newer",
            got=f"format {data.get('format')!r}"[:100],
            expected=f"format {FORMAT}",
            remedy="pip install --upgrade penjing, or write the folder again with `penjing bench`",
        )
    return _run(data)


def _run(data: dict[str, Any]) -> DeviceRun:
    latency = data.get("latency_ms")
    machine = data.get("device")
    fields = dict(data)
    if isinstance(latency, dict) and isinstance(machine, dict):
        fields["latency_ms"] = latency | {"batch": data.get("batch"), "threads": machine.get("threads")}
    energy = data.get("energy_mj")
    fields["energy_mj"] = None
    if energy is not None:
        fields["energy_mj"] = {"value": energy, "method": f"measured, {data.get('energy_method')}"[:200]}
    run = json_form.from_dict(DeviceRun, fields)
    json_form.check_values(fields, "DeviceRun")
    _check(run)
    if len(run.latency_ms.rounds) > MOST_ROUNDS or not run.parity:
        raise RecordError(
            "the device's figures are not those of a whole run",
            code="incomplete",
            got=f"{len(run.latency_ms.rounds)} rounds, {len(run.parity)} outputs compared",
            expected=f"at most {MOST_ROUNDS} rounds, and one output or more",
            remedy="run it again on the device: python bench.py -o bench.json",
        )
    return run


def _check(run: DeviceRun) -> None:
    """Raise RecordError where values can't be right by themselves, or do not agree with each other."""
    latency, energy = run.latency_ms, run.energy_mj
    times = [run.load_ms, *latency.rounds, *([energy.value] if energy else [])]
    wrong = [f"{value:g}" for value in times if not 0 <= value <= MOST]
    if not 0 < latency.median <= latency.p95:
        wrong.append(f"a median of {latency.median:g} ms, a 95th percentile of {latency.p95:g} ms")
    for row in run.parity:
        share = row.equal is not None
        value, limit = (row.equal, row.limit_equal) if share else (row.snr_db, row.limit_db)
        if value is None or limit is None or row.holds != (value >= limit) or row.largest < 0:
            wrong.append(f"{row.output[:40]!r}: {value} of {limit}, {'holds' if row.holds else 'does not hold'}")
    words = [run.runtime, run.precision, run.created, run.device.processor, run.device.system, *run.versions.values()]
    wrong += [f"{word[:40]!r}, {len(word):,} characters" for word in words if len(word) > WORD]
    if wrong:
        raise RecordError(
            "the device's figures can't be right",
            code="value",
            got="; ".join(wrong[:3]),
            expected=f"times and energies from 0 to {MOST:g}, parities that are held against their limits, short words",
            remedy="run it again on the device: python bench.py -o bench.json",
        )
