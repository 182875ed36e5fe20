"""A process of its own that opens one artifact and times it: ``python -m penjing.measure.worker``.

It answers JSON lines on standard input with JSON lines on standard output:

    (when the artifact is open)                           {"ready": true}
    {"cmd": "run", "seconds": 0.1, "max_calls": 1000}     {"times_ms": [0.21, ...]}
        also "min_calls" (1) and "skip" (0), calls before the timed ones
    {"cmd": "peak"}                                       {"peak_memory_bytes": ..., "baseline_bytes": ...}
    {"cmd": "stop"} or the end of the input               {"stopped": true}

A failure is answered with {"error": {...}} and ends the process. Whatever else the runtime prints goes to
standard error. No module of this process imports torch, unless the artifact's own runtime does.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from penjing.errors import PenjingError, UsageError
from penjing.measure.memory import peak_memory_bytes, rss_bytes

OPENER = "penjing.runtimes:open_artifact"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one artifact until told to stop; the exit code."""
    say = _protocol()
    faulthandler.enable()  # a crash in native code leaves its stack on standard error
    try:
        options = _options(arguments)
        if options.cpus and hasattr(psutil.Process, "cpu_affinity"):
            # Before the runtime starts its threads, which inherit it.
            psutil.Process().cpu_affinity([int(cpu) for cpu in options.cpus.split(",")])
        inputs = _inputs(options.inputs)
        baseline = rss_bytes()
        artifact = _opener(options.opener)(options.folder, threads=options.threads)
        say({"ready": True})
        _serve(lambda: artifact.run(inputs), baseline, say)
    except Exception as error:
        traceback.print_exc()
        say({"error": _told(error)})
        return 1
    say({"stopped": True})
    return 0


def _serve(call: Callable[[], Any], baseline: int, say: Callable[[dict[str, Any]], None]) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("cmd")
        if command == "run":
            say({"times_ms": times_ms(call, **request)})
        elif command == "peak":
            say({"peak_memory_bytes": peak_memory_bytes(), "baseline_bytes": baseline})
        elif command == "stop":
            return
        else:
            raise UsageError("the worker does not know this command", got=command, expected="run, peak or stop")


def times_ms(
    call: Callable[[], Any],
    *,
    seconds: float,
    max_calls: int,
    min_calls: int = 1,
    skip: int = 0,
) -> list[float]:
    """Milliseconds of each call: at least `min_calls` of them, then until `seconds` or `max_calls` is reached.

    `skip` calls go before, untimed: after a pause the caches are cold and the threads asleep.
    """
    for _ in range(skip):
        call()
    times: list[float] = []
    gc.collect()
    gc.disable()  # a collection in the middle of a call would be counted as the runtime's
    try:
        end = perf_counter_ns() + int(seconds * 1e9)
        while len(times) < min_calls or (len(times) < max_calls and perf_counter_ns() < end):
            start = perf_counter_ns()
            call()
            times.append((perf_counter_ns() - start) / 1e6)
    finally:
        gc.enable()
    return times


def _protocol() -> Callable[[dict[str, Any]], None]:
    """Keep standard output for the protocol, and send to standard error what others print there."""
    sys.stdout.flush()
    real = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # written out line by line, so that a crash loses nothing

    def say(message: dict[str, Any]) -> None:
        real.write(json.dumps(message) + "\n")
        real.flush()

    return say


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="penjing.measure.worker", description=__doc__)
    parser.add_argument("folder", type=Path, help="the artifact")
    parser.add_argument("inputs", type=Path, help=".npz with arr_0, arr_1, ... in the order of the manifest")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cpus", default="", help="logical processors to stay on, for example 0,1")
    parser.add_argument("--opener", default=OPENER, help="module:function that opens the folder")
    return parser.parse_args(arguments)


def _inputs(path: Path) -> list[npt.NDArray[Any]]:
    with np.load(path, allow_pickle=False) as stored:
        return [stored[f"arr_{i}"] for i in range(len(stored.files))]


def _opener(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    opener: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return opener


def _told(error: Exception) -> dict[str, str | None]:
    """An error as data, so that the parent can raise it again."""
    if isinstance(error, PenjingError):
        parts = {"got": error.got, "expected": error.expected, "remedy": error.remedy}
        told = {key: None if value is None else str(value) for key, value in parts.items()}
        return {"kind": type(error).__name__, "what": error.what, **told}
    return {"kind": type(error).__name__, "what": str(error)}


if __name__ == "__main__":
    raise SystemExit(main())
