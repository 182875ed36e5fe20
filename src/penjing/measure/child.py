"""The parent's side of a timing worker (see `penjing.measure.worker`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from penjing.errors import ArtifactError
from penjing.measure.processes import Process

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


class TargetError(ArtifactError):
    """An artifact can't be timed; `target` is its name."""

    target = ""


class Child:
    """One worker, started by the constructor; leaving the `with` block ends it.

    Args:
        name: Name of the artifact in error messages.
        folder: The artifact's folder.
        inputs: .npz file with the inputs in the order of the manifest.
        threads: Number of threads that the runtime may use.
        cpus: Logical processors that the worker is pinned to; empty for all.
        opener: "module:function" that opens the folder.
        opening_s: Time limit of opening the artifact, in seconds.
        call_s: Time limit of one call, in seconds.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        inputs: Path,
        *,
        threads: int,
        cpus: Sequence[int],
        opener: str,
        opening_s: float,
        call_s: float,
    ) -> None:
        """Start the process; `ready` waits for it."""
        self.name = name
        self.opening_s, self.call_s = opening_s, call_s
        arguments = [str(folder), str(inputs), "--threads", str(threads)]
        arguments += ["--cpus", ",".join(map(str, cpus)), "--opener", opener]
        environment = dict.fromkeys(THREAD_VARIABLES, str(threads))
        self._process = Process(name, "penjing.measure.worker", arguments, environment)

    def ready(self) -> float:
        """Wait until the artifact is open; returns the milliseconds of importing its runtime and opening it.

        Raises:
            ArtifactError: It can't be opened, or its runtime crashed or exceeded its time limit.
            PenjingError: The worker raised an error of this class.
        """
        with self._named():
            answer = self._process.answer(limit_s=self.opening_s)
        return float(answer["load_ms"])

    def run(self, *, seconds: float, max_calls: int, min_calls: int = 1, skip: int = 0) -> list[float]:
        """Time one turn: milliseconds of every call; see `penjing.measure.worker.times_ms`."""
        request = {"cmd": "run", "seconds": seconds, "max_calls": max_calls, "min_calls": min_calls, "skip": skip}
        with self._named():
            answer, _ = self._process.ask(request, limit_s=seconds + (min_calls + skip) * self.call_s)
        return [float(t) for t in answer["times_ms"]]

    def peak(self) -> tuple[int, int]:
        """Resident memory of the worker in bytes: its peak so far, and the amount before it opened the artifact."""
        with self._named():
            answer, _ = self._process.ask({"cmd": "peak"}, limit_s=self.opening_s)
        return int(answer["peak_memory_bytes"]), int(answer["baseline_bytes"])

    def __enter__(self) -> Child:
        """Return the worker."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ask the worker to stop, and kill it if it does not, or at once if the block raised an error."""
        self._process.close(asking=kind is None)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ArtifactError as error:
            target_error = TargetError(
                error.what, got=error.got, expected=error.expected, remedy=error.remedy, code=error.code
            )
            target_error.target = self.name
            raise target_error from None
