"""A worker process (see `penjing.measure.worker`) as its parent sees it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from penjing import errors
from penjing.errors import ArtifactError, PenjingError

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_TAIL = 2000  # bytes of a worker's standard error that an error shows
_PATIENCE = 5.0  # seconds that a worker that was told to stop may take


class Child:
    """One worker, started by the constructor; leaving the `with` block always ends it.

    Args:
        name: How the artifact is called in errors.
        folder: The artifact.
        inputs: .npz file with the inputs in the order of the manifest.
        threads: Number of threads that the runtime may use.
        cpus: Logical processors that the worker stays on; empty for all.
        opener: "module:function" that opens the folder.
    """

    def __init__(
        self, name: str, folder: Path, inputs: Path, *, threads: int, cpus: Sequence[int], opener: str
    ) -> None:
        """Start the process; `ready` waits for it."""
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # a file and not a pipe: it can't fill up while nobody reads
        command = [sys.executable, "-P", "-m", "penjing.measure.worker", str(folder), str(inputs)]
        command += ["--threads", str(threads), "--cpus", ",".join(map(str, cpus)), "--opener", opener]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(threads),
        )

    def ready(self) -> None:
        """Wait until the artifact is open.

        Raises:
            ArtifactError: It can't be opened, or its runtime crashed; another `PenjingError` if the runtime
                raised that.
        """
        self._answer()

    def run(self, *, seconds: float, max_calls: int, min_calls: int = 1, skip: int = 0) -> list[float]:
        """Milliseconds of every call of one turn; see `penjing.measure.worker.times_ms`."""
        answer = self._ask(cmd="run", seconds=seconds, max_calls=max_calls, min_calls=min_calls, skip=skip)
        return [float(t) for t in answer["times_ms"]]

    def peak(self) -> tuple[int, int]:
        """Bytes: the worker's peak so far, and what it held before it opened the artifact."""
        answer = self._ask(cmd="peak")
        return int(answer["peak_memory_bytes"]), int(answer["baseline_bytes"])

    def __enter__(self) -> Child:
        """The worker itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ask the worker to stop, and end it at once if it does not, or if an error is on its way."""
        try:
            if kind is None:
                with contextlib.suppress(PenjingError):  # all was measured: how it ends is no longer of interest
                    self._ask(cmd="stop")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._stderr):
                with contextlib.suppress(OSError):  # flushing to a process that is gone
                    if stream is not None:
                        stream.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is gone; what it said last is still there to be read
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self._failed(answer["error"])
        return answer

    def _died(self) -> NoReturn:
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # its output is closed, so it can answer no more
            self._process.kill()
            code = self._process.wait()
        remedy = "open the artifact with its own load.py to see whether the runtime itself fails"
        if code == -getattr(signal, "SIGKILL", 9):
            remedy = "most often the system was out of memory: free some, or measure a smaller batch"
        raise ArtifactError(
            f"the process that ran {self.name!r} crashed",
            got=f"{_ending(code)}; it said last:\n{self._tail()}",
            expected="a runtime that opens the artifact and runs it",
            remedy=remedy,
        )

    def _failed(self, told: dict[str, str | None]) -> NoReturn:
        kind = getattr(errors, str(told["kind"]), None)
        if isinstance(kind, type) and issubclass(kind, PenjingError):
            raise kind(f"{self.name}: {told['what']}", **{k: told[k] for k in ("got", "expected", "remedy")})
        raise ArtifactError(
            f"{self.name!r} can't be run in its runtime",
            got=f"{told['kind']}: {told['what']}; the process said last:\n{self._tail()}",
            expected="a runtime that opens the artifact and runs it",
            remedy="open the artifact with its own load.py to see whether the runtime itself fails",
        )

    def _tail(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _TAIL))
        return self._stderr.read().decode(errors="replace").strip()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _environment(threads: int) -> dict[str, str]:
    env = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
    root = str(Path(__file__).resolve().parents[2])
    if root not in {str(Path(sysconfig.get_path(kind)).resolve()) for kind in ("purelib", "platlib")}:
        # Penjing runs from a source folder: the worker has to find the same one.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    return env
