"""A worker process that opens one artifact and times it: ``python -m penjing.measure.worker``.

It answers JSON lines on standard input with JSON lines on standard output:

    (when the artifact is open)                           {"ready": true, "load_ms": 41.2}
    {"cmd": "run", "seconds": 0.1, "max_calls": 1000}     {"times_ms": [0.21, ...]}
        optional: "min_calls" (1), "skip" (0): untimed calls before the timed ones
    {"cmd": "peak"}                                       {"peak_memory_bytes": ..., "baseline_bytes": ...}
    {"cmd": "stop"} or the end of the input               {"stopped": true}

A failure is answered with {"error": {...}} and ends the process. Everything that the runtime prints goes to standard
error. The worker does not import torch, unless the artifact's runtime does.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import psutil

from penjing.errors import UsageError
from penjing.measure.memory import peak_memory_bytes, rss_bytes
from penjing.measure.processes import channel, error_as_dict, leave, receive, send

OPENER = "penjing.runtimes:open_artifact"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve requests for one artifact until "stop"; returns the exit code."""
    requests, answers = channel()
    faulthandler.enable()  # a crash in native code leaves its stack on standard error
    try:
        options = _options(arguments)
        if options.cpus and hasattr(psutil.Process, "cpu_affinity"):
            # Before the runtime starts its threads, which inherit it.
            psutil.Process().cpu_affinity([int(cpu) for cpu in options.cpus.split(",")])
        inputs = stored_inputs(options.inputs)
        baseline = rss_bytes()
        opener, start = opener_named(options.opener), perf_counter_ns()
        artifact = opener(options.folder, threads=options.threads)
        send(answers, {"ready": True, "load_ms": (perf_counter_ns() - start) / 1e6})
        gc.collect()
        gc.freeze()  # scanning the objects of the imports before every turn would take longer than the turn
        _serve(lambda: artifact.run(inputs), baseline, requests, answers)
    except Exception as error:
        traceback.print_exc()
        send(answers, {"error": error_as_dict(error)})
        return 1
    send(answers, {"stopped": True})
    return 0


def _serve(call: Callable[[], Any], baseline: int, requests: IO[bytes], answers: IO[bytes]) -> None:
    while (received := receive(requests)) is not None:
        request, _ = received
        command = request.pop("cmd")
        if command == "run":
            send(answers, {"times_ms": times_ms(call, **request)})
        elif command == "peak":
            send(answers, {"peak_memory_bytes": peak_memory_bytes(), "baseline_bytes": baseline})
        elif command == "stop":
            return
        else:
            raise UsageError(
                "the worker does not know this command",
                code="unknown-command",
                got=command,
                expected="run, peak or stop",
            )


def times_ms(
    call: Callable[[], Any],
    *,
    seconds: float,
    max_calls: int,
    min_calls: int = 1,
    skip: int = 0,
) -> list[float]:
    """Milliseconds of each call: at least `min_calls` of them, then until `seconds` or `max_calls` is reached.

    The first `skip` calls are not timed: after a pause the caches are cold and the threads asleep.
    """
    for _ in range(skip):
        call()
    times: list[float] = []
    gc.collect()
    gc.disable()  # a collection during a call would add to its time
    try:
        end = perf_counter_ns() + int(seconds * 1e9)
        while len(times) < min_calls or (len(times) < max_calls and perf_counter_ns() < end):
            start = perf_counter_ns()
            call()
            times.append((perf_counter_ns() - start) / 1e6)
    finally:
        gc.enable()
    return times


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="penjing.measure.worker", description=__doc__)
    parser.add_argument("folder", type=Path, help="the artifact")
    parser.add_argument("inputs", type=Path, help=".npz with arr_0, arr_1, ... in the order of the manifest")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cpus", default="", help="logical processors to stay on, for example 0,1")
    parser.add_argument("--opener", default=OPENER, help="module:function that opens the folder")
    return parser.parse_args(arguments)


def stored_inputs(path: Path) -> list[npt.NDArray[Any]]:
    """The arrays of a file of `Child`."""
    with np.load(path, allow_pickle=False) as stored:
        return [stored[f"arr_{i}"] for i in range(len(stored.files))]


def opener_named(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    opener: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return opener


if __name__ == "__main__":
    leave(main())
