"""Runtimes at work in a process of their own: one that crashes or hangs there costs a candidate, and not the run.

There is one process for every runtime; it opens artifacts, runs them, tells what became of their operators, and
converts. It is started when it is needed, again after a crash, and ends after a minute without work. Every request
has a time limit that grows with the work: a base and a multiple of what the source network itself took for it in
torch. Torch, which the run itself stands on, has no other process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from penjing import runtimes
from penjing.errors import PenjingError
from penjing.measure.processes import Process
from penjing.measure.time_limits import call_s, opening_s
from penjing.records import from_dict
from penjing.records.manifest import Manifest, read_manifest
from penjing.runtimes.artifact import Executed, Timed, check_inputs, narrowed

IDLE_S = 60.0  # after which a process without open artifacts ends

_lock = threading.RLock()
_workers: dict[str, _Worker] = {}


class _Worker:
    """The process of one runtime, how many artifacts are open in it, and which of them nobody needs any more."""

    def __init__(self, runtime: str) -> None:
        self.runtime = runtime
        self.process = Process(runtime, "penjing.runtimes.worker", [runtime])
        self.owner = os.getpid()
        self.open = 0
        self.forgotten: list[int] = []  # told with the next request: a destructor may come in the middle of one
        self.timer: threading.Timer | None = None

    def ask(
        self, request: dict[str, Any], arrays: Sequence[np.ndarray] = (), *, limit_s: float
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        with _lock:
            if self.timer is not None:
                self.timer.cancel()
            forgotten, self.forgotten = self.forgotten, []
            self.open -= len(forgotten)
            try:
                limit_s += runtimes.SPECS[self.runtime].importing_s
                return self.process.ask({**request, "forget": forgotten}, arrays, limit_s=limit_s)
            finally:
                self.rest()

    def rest(self) -> None:
        """End the process after a minute without requests."""
        self.timer = threading.Timer(IDLE_S, self._idle)
        self.timer.daemon = True
        self.timer.start()

    def _idle(self) -> None:
        with _lock:
            if self.open <= len(self.forgotten):
                self.close()

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if os.getpid() == self.owner:  # a fork of this process has no say
            self.process.close()


def _worker(runtime: str) -> _Worker:
    """The process of a runtime, started if it is not alive."""
    with _lock:
        worker = _workers.get(runtime)
        if worker is None or worker.owner != os.getpid() or not worker.process.alive:
            if worker is not None:
                worker.close()
            worker = _workers[runtime] = _Worker(runtime)
        return worker


def begin(runtime: str) -> None:
    """Start the process of a runtime, which imports it while this process goes on with something else."""
    if apart(runtime):
        with _lock:
            worker = _worker(runtime)
            if worker.timer is None:
                worker.rest()


@atexit.register
def close() -> None:
    """End all processes."""
    with _lock:
        for worker in _workers.values():
            with contextlib.suppress(PenjingError, OSError):
                worker.close()
        _workers.clear()


class Session:
    """An artifact that is open in another process, until this object is gone.

    Where another artifact's crash has ended that process, it is opened again at the next call.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        self.folder, self.runtime, self.threads = folder, manifest.runtime, threads
        self.ports = manifest.programs[0].inputs
        self.worker, self.handle = self._opened()

    def _opened(self) -> tuple[_Worker, int]:
        worker = _worker(self.runtime)
        request = {"cmd": "open", "folder": str(self.folder.absolute()), "threads": self.threads}
        answer, _ = worker.ask(request, limit_s=opening_s(self.folder))
        worker.open += 1
        return worker, int(answer["handle"])

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call; inputs and outputs in the order of the manifest.

        Raises:
            ArtifactError: The runtime raised, crashed, or did not answer in time.
            TaskError: The inputs are not those of the manifest.
        """
        inputs = narrowed(self.ports, inputs)
        check_inputs(self.ports, inputs)
        if not self.worker.process.alive or self.worker.owner != os.getpid():
            self.worker, self.handle = self._opened()
        return self.worker.ask({"cmd": "run", "handle": self.handle}, inputs, limit_s=call_s(inputs))[1]

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.worker.forgotten.append(self.handle)


def open_artifact(folder: Path | str, threads: int) -> runtimes.Session:
    """Open an artifact folder in its own runtime, in another process. Nothing in the folder is executed as code.

    Raises:
        ArtifactError: There is no artifact, or the runtime can't read it, crashes or hangs.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    runtimes.get(manifest.runtime)
    return Session(folder, manifest, threads) if apart(manifest.runtime) else runtimes.open_artifact(folder, threads)


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """The operators of the graph that the artifact's runtime made of it; see `penjing.runtimes.executed`."""
    runtimes.get(manifest.runtime)
    if not apart(manifest.runtime):
        return runtimes.executed(folder, manifest)
    request = {"cmd": "executed", "folder": str(folder.absolute())}
    answer, _ = _worker(manifest.runtime).ask(request, limit_s=opening_s(folder))
    return [from_dict(Executed, row) for row in answer["operators"]]


def profile(folder: Path, inputs: list[np.ndarray], threads: int, calls: int = 30) -> list[Timed]:
    """Every operator of the runtime's optimized graph with its time; see `penjing.runtimes.profile`."""
    manifest = read_manifest(folder)
    if not apart(manifest.runtime):
        return runtimes.profile(folder, inputs, threads, calls)
    runtimes.get(manifest.runtime)
    request = {"cmd": "profile", "folder": str(folder.absolute()), "threads": threads, "calls": calls}
    limit = opening_s(folder) + calls * call_s(inputs)
    answer, _ = _worker(manifest.runtime).ask(request, inputs, limit_s=limit)
    return [from_dict(Timed, row) for row in answer["operators"]]


def expose(folder: Path, manifest: Manifest, sites: Sequence[str], into: Path) -> list[str]:
    """Write a copy of an artifact with inner values as additional outputs; see `penjing.runtimes.expose`."""
    runtimes.get(manifest.runtime)
    if not apart(manifest.runtime):
        return runtimes.expose(folder, manifest, sites, into)
    request = {"cmd": "expose", "folder": str(folder.absolute()), "sites": list(sites), "into": str(into.absolute())}
    answer, _ = _worker(manifest.runtime).ask(request, limit_s=opening_s(folder))
    return [str(site) for site in answer["sites"]]


def call(runtime: str, function: str, path: Path, *arguments: Any, more_s: float = 0.0) -> Any:
    """Call one of the functions that a runtime's file lists as `APART` in the runtime's process; plain data alone.

    Args:
        runtime: Its name.
        function: The function's name.
        path: Its first argument, whose size makes the time limit.
        arguments: The others.
        more_s: Seconds that it may take beyond what the path's size explains.
    """
    request = {"cmd": "call", "runtime": runtime, "function": function, "arguments": [str(path), *arguments]}
    return _worker(runtime).ask(request, limit_s=opening_s(path) + more_s)[0]["result"]


def apart(runtime: str) -> bool:
    """Whether a runtime runs in a separate process."""
    return not runtimes.SPECS[runtime].in_process


def plain(operators: Sequence[Executed | Timed]) -> list[dict[str, Any]]:
    """Operators as plain data."""
    return [asdict(operator) for operator in operators]
