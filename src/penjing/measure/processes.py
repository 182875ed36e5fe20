"""Worker processes that answer requests: a library that crashes or hangs in one does no harm.

Both sides speak in messages: one line of JSON, and the bytes of the arrays that it announces. Nothing is unpickled.
A process imports nothing from the current folder, and ends when its input ends or its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import numpy.typing as npt

from penjing import errors
from penjing.errors import ArtifactError, PenjingError

Arrays = Sequence[npt.NDArray[Any]]
_TAIL = 2000  # bytes of a process's standard error that an error shows
_PATIENCE = 5.0  # seconds that a process that was told to stop may take
_LINE = 1 << 26  # bytes of a message without its arrays
_KINDS = "biufc"  # of arrays: numbers and truth values
_WATCH_S = 1.0  # between looks at whether the parent is still there
_PRIVATE = {"ORT_DISABLE_TELEMETRY": "1"}  # ONNX Runtime's; read when it is imported


class Process:
    """One process, started by the constructor; `close` ends it.

    Args:
        name: What it works for, for errors.
        module: What it runs, by name.
        arguments: Of the command line.
        environment: Variables besides those of this process.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str] = (), environment: dict[str, str] | None = None
    ) -> None:
        """Start the process."""
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # a file and not a pipe: it can't fill up while nobody reads
        self._said = 0  # bytes of it that belong to earlier requests
        self._late: float | None = None  # the limit that it has passed
        self._process = subprocess.Popen(
            # -P: nothing is imported from the current folder
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment() | _PRIVATE | (environment or {}),
            start_new_session=True,  # a group of its own, with all that it may start; Ctrl-C reaches the parent alone
        )
        self._burial = threading.Thread(target=self._bury, daemon=True)
        self._burial.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._burial.is_alive()  # asking the system would free its number

    def ask(
        self, request: dict[str, Any], arrays: Arrays = (), *, limit_s: float
    ) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
        """The answer to a request.

        Raises:
            ArtifactError: It crashed, or did not answer in time, and is ended; or what it was asked for failed.
            PenjingError: Of the kind that was raised there.
        """
        self._said = self._stderr.seek(0, os.SEEK_END)
        with self._limited(limit_s):
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):  # it is gone; what it said last is still there to be read
                send(self._process.stdin, request, arrays)
            return self._received()

    def answer(self, *, limit_s: float) -> dict[str, Any]:
        """Its first message, sent without a request: it is ready. Raises as `ask` does."""
        with self._limited(limit_s):
            return self._received()[0]

    def close(self, asking: bool = True) -> None:
        """End it: it is asked to stop, and killed if it does not at once or is not to be asked."""
        try:
            if asking and self.alive:
                with contextlib.suppress(PenjingError):
                    self.ask({"cmd": "stop"}, limit_s=_PATIENCE)
                self._burial.join(_PATIENCE)
        finally:
            self._kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._stderr):
                with contextlib.suppress(OSError):  # flushing to a process that is gone
                    if stream is not None:
                        stream.close()

    @contextlib.contextmanager
    def _limited(self, limit_s: float) -> Iterator[None]:
        """Kill the process when the block lasts longer, or is left by an exception that is not its answer."""
        timer = threading.Timer(limit_s, self._too_late, (limit_s,))
        timer.daemon = True
        timer.start()
        try:
            yield
        except PenjingError:
            raise
        except BaseException:  # Ctrl-C: the answer that is still to come would be taken for that of the next request
            self._kill()
            raise
        finally:
            timer.cancel()

    def _too_late(self, limit_s: float) -> None:
        self._late = limit_s
        self._kill()  # also ends a process that is stopped

    def _kill(self) -> None:
        """End it and all that it started: a process that a library forked would keep the pipe of the answers open.

        Once somebody has asked how it ended, the system may give its number to a process of somebody else.
        """
        if self._process.returncode is not None:
            return
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def _bury(self) -> None:
        """Wait until it has ended, and end what it started while its number is still its own."""
        if not hasattr(os, "waitid"):
            with contextlib.suppress(OSError):
                self._process.wait()
            return
        try:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        except OSError:  # somebody has asked how it ended
            return
        self._kill()

    def _received(self) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
        assert self._process.stdout is not None
        try:
            told = receive(self._process.stdout)
        except (ValueError, TypeError, LookupError, MemoryError, OverflowError) as error:
            self._kill()
            raise ArtifactError(
                f"the process of {self.name!r} gave an answer that can't be read",
                code="unreadable",
                got=f"{type(error).__name__}: {error}",
            ) from None
        if told is None:
            self._died()
        message, arrays = told
        if "error" in message:
            self._failed(message["error"])
        return message, arrays

    def _died(self) -> NoReturn:
        self._burial.join(_PATIENCE)
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # its output is closed, so it can answer no more
            self._kill()
            code = self._process.wait()
        remedy = "open the artifact with its own load.py to see whether the runtime itself fails"
        if self._late is not None:
            raise ArtifactError(
                f"the process of {self.name!r} did not answer and was ended",
                code="hung",
                got=f"nothing within {self._late:.0f} s; its last output:\n{self.tail()}",
                expected="an answer; the limit is many times what the source took for the same work",
                remedy=remedy,
            )
        if code == -getattr(signal, "SIGKILL", 9):
            remedy = "most often the system was out of memory: free some, or take a smaller batch"
        raise ArtifactError(
            f"the process of {self.name!r} crashed",
            code="crashed",
            got=f"{_ending(code)}; its last output:\n{self.tail()}",
            expected="a runtime that opens the artifact and runs it",
            remedy=remedy,
        )

    def _failed(self, told: dict[str, str | None]) -> NoReturn:
        kind = getattr(errors, str(told["kind"]), None)
        if isinstance(kind, type) and issubclass(kind, PenjingError):
            parts: dict[str, Any] = {k: told[k] for k in ("got", "expected", "remedy")}
            parts |= {k: told.get(k) or "" for k in ("code", "field")}
            raise kind(f"{self.name}: {told['what']}", **parts)
        raise ArtifactError(
            f"{self.name!r} can't be run in its runtime",
            code="failed",
            got=f"{told['kind']}: {told['what']}",
            expected="a runtime that opens the artifact and runs it",
            remedy="open the artifact with its own load.py to see whether the runtime itself fails",
        )

    def tail(self) -> str:
        """The last of what it wrote to standard error since the last request."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(self._said, size - _TAIL))
        return self._stderr.read().decode(errors="replace").strip()


def send(stream: IO[bytes], message: dict[str, Any], arrays: Arrays = ()) -> None:
    """Write a message, and arrays as they lie in memory."""
    whole = [np.ascontiguousarray(x).reshape(x.shape) for x in arrays]
    if whole:
        message = {**message, "arrays": [[x.dtype.str, list(x.shape)] for x in whole]}
    stream.write(json.dumps(message).encode() + b"\n")
    for x in whole:
        if x.size:
            stream.write(x.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[npt.NDArray[Any]]] | None:
    """The next message; None at the end of the stream.

    Raises:
        ValueError: It is not a message.
    """
    line = stream.readline(_LINE)
    if not line.endswith(b"\n"):
        return None
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("no message")
    arrays: list[npt.NDArray[Any]] = []
    for kind, shape in message.pop("arrays", ()):
        dtype = np.dtype(str(kind))
        if dtype.kind not in _KINDS:
            raise ValueError(f"an array of {dtype}")
        x = np.empty([int(n) for n in shape], dtype)
        if x.size:
            view = x.reshape(-1).view(np.uint8).data
            filled = 0
            while filled < len(view):
                count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
                if not count:
                    return None
                filled += count
        arrays.append(x)
    return message, arrays


def channel() -> tuple[IO[bytes], IO[bytes]]:
    """In the process: where requests come from and answers go to. What others print goes to standard error."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # written out line by line, so that a crash loses nothing
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    return sys.stdin.buffer, answers


def told(error: Exception) -> dict[str, str | None]:
    """In the process: an error as data, so that the parent can raise it again."""
    if isinstance(error, PenjingError):
        parts = {"got": error.got, "expected": error.expected, "remedy": error.remedy}
        texts = {key: None if value is None else str(value) for key, value in parts.items()}
        return {"kind": type(error).__name__, "what": error.what, "code": error.code, "field": error.field, **texts}
    return {"kind": type(error).__name__, "what": str(error)}


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, also in the middle of a call that never returns."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    if sys.platform != "win32" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _environment() -> dict[str, str]:
    env = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    if root not in {str(Path(sysconfig.get_path(kind)).resolve()) for kind in ("purelib", "platlib")}:
        # Penjing runs from a source folder: the process has to find the same one.
        env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    if "PYTHONPATH" in env:  # an empty entry is the current folder
        env["PYTHONPATH"] = os.pathsep.join(filter(None, env["PYTHONPATH"].split(os.pathsep)))
    return env
