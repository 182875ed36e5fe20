"""A process of its own in which one runtime works: ``python -m penjing.runtimes.worker RUNTIME``.

It answers requests (see `penjing.measure.processes`) until its input ends. What a library raises is the answer, and the
process goes on; what crashes it ends it alone. Torch is not imported.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import itertools
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penjing import runtimes
from penjing.errors import UsageError
from penjing.measure.processes import channel, error_as_dict, leave, receive, send
from penjing.records.manifest import read_manifest
from penjing.runtimes.isolated import plain

Answer = tuple[dict[str, Any], list[np.ndarray]]


class Worker:
    """What is open in this process, and the commands."""

    def __init__(self) -> None:
        self.sessions: dict[int, runtimes.Session] = {}
        self.handles = itertools.count()

    def open(self, inputs: list[np.ndarray], folder: str, threads: int) -> Answer:
        """Open an artifact."""
        handle = next(self.handles)
        self.sessions[handle] = runtimes.open_artifact(folder, threads)
        return {"handle": handle}, []

    def run(self, inputs: list[np.ndarray], handle: int) -> Answer:
        """One call of it."""
        return {}, self.sessions[handle].run(inputs)

    def executed(self, inputs: list[np.ndarray], folder: str) -> Answer:
        """How the runtime executes an artifact's operators."""
        path = Path(folder)
        return {"operators": plain(runtimes.executed(path, read_manifest(path)))}, []

    def profile(self, inputs: list[np.ndarray], folder: str, threads: int, calls: int) -> Answer:
        """Times of an artifact's operators."""
        return {"operators": plain(runtimes.profile(Path(folder), inputs, threads, calls))}, []

    def expose(self, inputs: list[np.ndarray], folder: str, sites: list[str], into: str) -> Answer:
        """Write a copy of an artifact with inner values as additional outputs."""
        path = Path(folder)
        return {"sites": runtimes.expose(path, read_manifest(path), sites, Path(into))}, []

    def call(self, inputs: list[np.ndarray], runtime: str, function: str, arguments: list[Any]) -> Answer:
        """One of the functions that a runtime's file lists for this."""
        module: Any = runtimes.get(runtime)
        if function not in module.APART:
            raise UsageError(
                "the worker does not know this function",
                code="unknown-function",
                got=function,
                expected=sorted(module.APART),
            )
        return {"result": getattr(module, function)(*arguments)}, []


def main(arguments: Sequence[str]) -> int:
    """Import the runtime, then serve until the input ends or a request says stop; the exit code."""
    (runtime,) = arguments
    requests, answers = channel()
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # OpenVINO's converter sends usage data with it
    faulthandler.enable()  # a crash in native code leaves its stack on standard error
    with contextlib.suppress(Exception):  # the first request meets it again, and answers with it
        runtimes.get(runtime)
        importlib.import_module(runtimes.SPECS[runtime].packages[0])
    worker = Worker()
    commands = {name: getattr(worker, name) for name in ("open", "run", "executed", "profile", "expose", "call")}
    while (received := receive(requests)) is not None:
        request, arrays = received
        command = request.pop("cmd")
        for handle in request.pop("forget", ()):
            worker.sessions.pop(handle, None)
        if command == "stop":
            send(answers, {"stopped": True})
            break
        try:
            message, results = commands[command](arrays, **request)
        except Exception as error:
            traceback.print_exc()
            message, results = {"error": error_as_dict(error)}, []
        send(answers, message, results)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
