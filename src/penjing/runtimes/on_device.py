"""What `bench.py` does on a device: hashes, latency, memory, energy and parity of an artifact, as JSON.

`penjing bench` writes this file's text into a folder, with the artifact's facts and its opener behind it. It runs there
with Python, NumPy and the artifact's runtime alone: the text of `penjing.measure.meters` stands there in place of the
import from it.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # this folder: what lies beside the artifact is not imported
import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

from penjing.measure.meters import gpu_meter, metered, power_meter, text_of

ROUNDS = 7  # of timed calls; their medians show whether the device was steady
WARM_UP_S, WARM_UP_CALLS = 0.5, 5
MOST_THREADS, MOST_SECONDS = 1024, 86_400
HELD, FAILED = 0, 3
Run = Callable[[list[Any]], list[Any]]
"""One call of the artifact: a flat list of arrays in, a flat list of arrays out."""


def main(
    facts: dict[str, Any],
    folder: pathlib.Path,
    opener: Callable[[], Run],
    arguments: Sequence[str] | None = None,
    sysfs: pathlib.Path = pathlib.Path("/sys"),
) -> int:
    """Measure, and print JSON; the exit code: 0, or 3 where the parity does not hold.

    Args:
        facts: What `penjing bench` wrote: hashes, files, batch, limits, packages, whether it runs on a GPU.
        folder: Where the files lie.
        opener: Opens the artifact with as many threads as the environment variable THREADS says.
        arguments: Of the command line.
        sysfs: Where Linux shows its meters.
    """
    parser = argparse.ArgumentParser(description="Measure the artifact in this folder on this device; prints JSON.")
    parser.add_argument("--threads", type=int, default=facts["threads"], help="threads of the runtime (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="timed seconds (%(default)s)")
    parser.add_argument("-o", "--out", help="also write the JSON to this file, for `penjing record add`")
    parsed = parser.parse_args(arguments)
    if not 1 <= parsed.threads <= MOST_THREADS:
        parser.error(f"--threads is from 1 to {MOST_THREADS}")
    if not 0 < parsed.seconds <= MOST_SECONDS:  # NaN is not
        parser.error(f"--seconds is above 0, and at most {MOST_SECONDS}")
    check_hashes(folder, facts["sha256"])
    try:
        import numpy as np
    except ModuleNotFoundError as error:
        sys.exit(_install(error, facts))
    with np.load(folder / facts["samples"], allow_pickle=False) as stored:
        samples = {name: stored[name] for name in stored.files}
    os.environ["THREADS"] = str(parsed.threads)  # what the opener reads
    baseline = _status("VmRSS")
    start = time.perf_counter()
    try:
        run = opener()
    except ModuleNotFoundError as error:
        sys.exit(_install(error, facts))
    load_ms = 1e3 * (time.perf_counter() - start)
    meter = gpu_meter() if facts.get("gpu") else power_meter(sysfs)
    timed = timings(run, _named(samples, "timed"), parsed.seconds, meter)
    peak = _status("VmHWM")
    rows = parity(run(_named(samples, "input")), _named(samples, "expected"), facts["limits"])
    result = {
        "format": 1,
        "runtime": facts["runtime"],
        "precision": facts["precision"],
        "sha256": {name: facts["sha256"][name] for name in facts["artifact"]},
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017  # 3.9
        "device": device(parsed.threads),
        "versions": versions(facts["packages"]),
        "batch": facts["batch"],
        "load_ms": load_ms,
        "peak_memory_bytes": peak,
        "baseline_bytes": baseline,
        **timed,
        "against": facts["against"],
        "parity": rows,
        "holds": all(row["holds"] for row in rows),
    }
    text = json.dumps(result, indent=2, allow_nan=False)
    print(text, flush=True)
    if parsed.out:
        aside = pathlib.Path(f"{parsed.out}.new")
        try:
            aside.write_text(text + "\n", encoding="utf-8")
            os.replace(aside, parsed.out)
        except OSError as error:
            sys.exit(f"{parsed.out} can't be written ({error.strerror}); what it was to hold is printed above")
    return HELD if result["holds"] else FAILED


def _install(error: ModuleNotFoundError, facts: dict[str, Any]) -> str:
    return f"the package {error.name} is not installed here; try: pip install numpy {' '.join(facts['packages'])}"


def check_hashes(folder: pathlib.Path, expected: dict[str, str]) -> None:
    """Exit with a sentence unless every file is the one that was written; before any of them is opened."""
    for name, sha in expected.items():
        try:
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            sys.exit(f"{name} can't be read ({error.strerror}); copy the whole folder again")
        if digest != sha:
            sys.exit(f"{name} is not the file that was written: SHA-256 {digest}, not {sha}; copy the folder again")


def timings(run: Run, inputs: list[Any], seconds: float, meter: tuple[str, Callable[[], Any]] | None) -> dict[str, Any]:
    """Milliseconds of one call over `ROUNDS` rounds, and millijoules where there is a meter."""
    limit = time.perf_counter() + WARM_UP_S
    calls = 0
    while calls < WARM_UP_CALLS or time.perf_counter() < limit:
        run(inputs)
        calls += 1
    rounds: list[list[float]] = []
    with metered(meter) as energy:
        for _ in range(ROUNDS):
            limit = time.perf_counter() + seconds / ROUNDS
            times: list[float] = []
            while not times or time.perf_counter() < limit:
                start = time.perf_counter()
                run(inputs)
                times.append(1e3 * (time.perf_counter() - start))
            rounds.append(times)
    every = sorted(t for times in rounds for t in times)
    median = _percentile(every, 50)
    total = energy.get("mj")
    return {
        "latency_ms": {
            "median": median,
            "p95": _percentile(every, 95),
            "spread": (_percentile(every, 75) - _percentile(every, 25)) / median if median else 0.0,
            "calls": len(every),
            "rounds": [_percentile(sorted(times), 50) for times in rounds],
        },
        "energy_mj": None if total is None else total / len(every),
        "energy_method": meter[0] if meter is not None and total is not None else None,
    }


def _percentile(ordered: list[float], percent: float) -> float:
    """Of sorted values, with linear interpolation."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def parity(outputs: list[Any], expected: list[Any], limits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The difference of every output from what is expected; of integers the share of equal values is judged.

    Args:
        outputs: Of the artifact.
        expected: What it is to answer.
        limits: One for each: "output" is its name, "snr_db" and "equal" are what it has to reach.
    """
    import numpy as np

    if len(outputs) != len(expected):
        sys.exit(f"the artifact gave {len(outputs)} outputs where {len(expected)} were expected")
    rows = []
    for limit, got, want in zip(limits, outputs, expected):  # noqa: B905  # devices may have Python 3.9
        name = limit["output"]
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape:
            sys.exit(f"the output {name} has the shape {got.shape} where {want.shape} was expected")
        equal = float(np.mean((got == want) | ((got != got) & (want != want)))) if got.size else 1.0
        difference = got.astype(np.float64) - want.astype(np.float64)
        both = np.isfinite(difference)
        clean = bool((np.isfinite(got) == np.isfinite(want)).all())
        signal, noise = float(np.sum(want[both].astype(np.float64) ** 2)), float(np.sum(difference[both] ** 2))
        # Clamped to ±200 dB as in records, which is beyond what any type resolves.
        ratio = 10 * math.log10(signal / noise) if noise and signal else 200.0 if not noise else -200.0
        snr = max(-200.0, min(200.0, ratio))
        floating = want.dtype.kind in "fc"
        rows.append(
            {
                "output": name,
                "snr_db": snr if clean else -200.0,
                "largest": float(np.abs(difference[both]).max()) if both.any() else 0.0,
                "equal": None if floating else equal,
                "limit_db": limit["snr_db"] if floating else None,
                "limit_equal": None if floating else limit["equal"],
                "holds": clean and snr >= limit["snr_db"] if floating else equal >= limit["equal"],
            }
        )
    return rows


def device(threads: int) -> dict[str, Any]:
    """What the device says of itself."""
    processor = text_of(pathlib.Path("/proc/device-tree/model")).rstrip("\0")
    fields: dict[str, str] = {}
    for line in text_of(pathlib.Path("/proc/cpuinfo")).splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    processor = processor or fields.get("model name") or fields.get("hardware") or platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = text_of(pathlib.Path("/proc/meminfo")).split()
    return {
        "processor": processor or platform.machine(),
        "instruction_sets": sorted((fields.get("flags") or fields.get("features") or "").split()),
        "cores": cores,
        "threads": threads,
        "memory_bytes": int(memory[1]) * 1024 if memory[:1] == ["MemTotal:"] else 0,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of the packages that are installed."""
    installed = {}
    for name in ["numpy", *packages]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def _status(field: str) -> int | None:
    """Bytes of a field of /proc/self/status; elsewhere the peak that the system tells, or None."""
    for line in text_of(pathlib.Path("/proc/self/status")).splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    if field != "VmHWM" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def _named(samples: dict[str, Any], prefix: str) -> list[Any]:
    return [samples[name] for name in sorted(samples) if name.startswith(f"{prefix}_")]
