"""A worker process that opens many artifacts and times them in turns: ``python -m penjing.measure.series_worker``.

    {"cmd": "open", "folder": ..., "inputs": "x.npz", "warmup": 5}    {"opened": 3}
    {"cmd": "time", "rounds": 7, "seconds": 0.1}                      {"rounds": [[0.21, ...], ...]}
    {"cmd": "stop"} or the end of the input                           {"stopped": true}

A failure is answered with {"error": {...}} and ends the process.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil

from penjing.errors import UsageError
from penjing.measure.latency import MAX_CALLS, MIN_CALLS, OPENER, order
from penjing.measure.processes import channel, error_as_dict, leave, receive, send
from penjing.measure.worker import opener_named, stored_inputs, times_ms


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve requests until "stop"; returns the exit code."""
    requests, answers = channel()
    faulthandler.enable()
    try:
        options = _options(arguments)
        if options.cpus and hasattr(psutil.Process, "cpu_affinity"):
            psutil.Process().cpu_affinity([int(cpu) for cpu in options.cpus.split(",")])
        _serve(options.threads, requests, answers)
    except Exception as error:
        traceback.print_exc()
        send(answers, {"error": error_as_dict(error)})
        return 1
    send(answers, {"stopped": True})
    return 0


def _serve(threads: int, requests: IO[bytes], answers: IO[bytes]) -> None:
    calls: list[Any] = []
    opener = opener_named(OPENER)
    while (received := receive(requests)) is not None:
        request, _ = received
        command = request.pop("cmd")
        if command == "open":
            artifact = opener(Path(request["folder"]), threads=threads)
            calls.append(partial(artifact.run, stored_inputs(Path(request["inputs"]))))
            for _ in range(request["warmup"]):
                calls[-1]()
            send(answers, {"opened": len(calls)})
        elif command == "time":
            gc.collect()
            gc.freeze()  # scanning the objects of the imports before every turn would take longer than the turn
            send(answers, {"rounds": _timed(calls, **request)})
        elif command == "stop":
            return
        else:
            raise UsageError(
                "the worker does not know this command",
                code="unknown-command",
                got=command,
                expected="open, time or stop",
            )


def _timed(calls: Sequence[Any], rounds: int, seconds: float) -> list[list[float]]:
    medians: list[list[float]] = [[] for _ in calls]
    for turn in order(len(calls), rounds):
        for index in turn:
            times = times_ms(calls[index], seconds=seconds / rounds, max_calls=MAX_CALLS, min_calls=MIN_CALLS, skip=2)
            medians[index].append(float(np.median(times)))
    return medians


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="penjing.measure.series_worker", description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cpus", default="", help="logical processors to stay on, for example 0,1")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    leave(main())
