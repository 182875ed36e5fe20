"""Worker processes that answer requests, so that a library that crashes or hangs does not take its caller with it.

Both sides exchange messages: one line of JSON, followed by the bytes of the arrays that it lists. Nothing is unpickled.
A worker imports nothing from the current folder, and exits when its standard input is closed or its parent has exited.
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
_TAIL_BYTES = 2000  # of standard error that an error message quotes, at most
_STOP_S = 5.0  # how long a worker may take to exit after it was asked to
_LINE_BYTES = 1 << 26  # length of a message without its arrays, at most
_DTYPE_KINDS = "biufc"  # of NumPy: booleans and numbers
_WATCH_S = 1.0  # between two checks whether the parent is running
_NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1"}  # read by ONNX Runtime when it is imported


class Process:
    """A worker process, started by the constructor; `close` ends it.

    Args:
        name: Name of the artifact or task it works on, used in error messages.
        module: Name of the Python module that it runs.
        arguments: Command-line arguments.
        environment: Environment variables in addition to those of this process.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str] = (), environment: dict[str, str] | None = None
    ) -> None:
        """Start the process."""
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # a file: a pipe would fill up while nobody reads it
        self._stderr_start = 0  # offset in bytes at which the output of the current request starts
        self._exceeded_s: float | None = None  # the time limit after which it was killed
        self._process = start_worker(module, arguments, worker_environment(environment or {}), self._stderr)
        self._exit_watch = threading.Thread(target=self._watch_exit, daemon=True)
        self._exit_watch.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it is running."""
        return self._exit_watch.is_alive()  # polling the process would reap it and free its process id

    def ask(
        self, request: dict[str, Any], arrays: Arrays = (), *, limit_s: float
    ) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
        """Send a request and return the answer with its arrays.

        Raises:
            ArtifactError: The worker crashed, exceeded `limit_s` and was killed, or the request failed.
            PenjingError: The worker raised an error of this class.
        """
        self._stderr_start = self._stderr.seek(0, os.SEEK_END)
        with self._limited(limit_s):
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):  # it has exited; its last answer may still be in the pipe
                send(self._process.stdin, request, arrays)
            return self._next_answer()

    def answer(self, *, limit_s: float) -> dict[str, Any]:
        """Its first message, which it sends unasked when it is ready. Raises the errors of `ask`."""
        with self._limited(limit_s):
            return self._next_answer()[0]

    def close(self, asking: bool = True) -> None:
        """End the process: ask it to stop, and kill it if it does not in time, or if `asking` is false."""
        try:
            if asking and self.alive:
                with contextlib.suppress(PenjingError):
                    self.ask({"cmd": "stop"}, limit_s=_STOP_S)
                self._exit_watch.join(_STOP_S)
        finally:
            self._kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._stderr):
                with contextlib.suppress(OSError):  # flushing to a process that has exited
                    if stream is not None:
                        stream.close()

    @contextlib.contextmanager
    def _limited(self, limit_s: float) -> Iterator[None]:
        """Kill the process when the block exceeds the limit, or raises anything but the error that it answered."""
        timer = threading.Timer(limit_s, self._time_out, (limit_s,))
        timer.daemon = True
        timer.start()
        try:
            yield
        except PenjingError:
            raise
        except BaseException:  # Ctrl-C: the pending answer would be read as that of the next request
            self._kill()
            self._exit_watch.join(_STOP_S)  # `alive` tells it at once
            raise
        finally:
            timer.cancel()

    def _time_out(self, limit_s: float) -> None:
        self._exceeded_s = limit_s
        self._kill()  # also a stopped (SIGSTOP) process

    def _kill(self) -> None:
        """Kill the process and its children: a child that a library forked would keep the pipe of the answers open.

        Does nothing once its exit code has been read: from then on the system may reuse the process id.
        """
        if self._process.returncode is not None:
            return
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def _watch_exit(self) -> None:
        """Wait for the process to exit, then kill its children, before its id can be reused."""
        if not hasattr(os, "waitid"):
            with contextlib.suppress(OSError):
                self._process.wait()
            return
        try:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        except OSError:  # another thread has read its exit code
            return
        self._kill()

    def _next_answer(self) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
        assert self._process.stdout is not None
        try:
            answer = receive(self._process.stdout)
        except (ValueError, TypeError, LookupError, MemoryError, OverflowError) as error:
            self._kill()
            raise ArtifactError(
                f"the process of {self.name!r} gave an answer that can't be read",
                code="unreadable",
                got=f"{type(error).__name__}: {error}",
            ) from None
        if answer is None:
            self._raise_crash()
        message, arrays = answer
        if "error" in message:
            self._raise_failure(message["error"])
        return message, arrays

    def _raise_crash(self) -> NoReturn:
        self._exit_watch.join(_STOP_S)
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:  # its output is closed, so it can't answer any more
            self._kill()
            code = self._process.wait()
        remedy = "open the artifact with its own load.py to see whether the runtime itself fails"
        if self._exceeded_s is not None:
            raise ArtifactError(
                f"the process of {self.name!r} did not answer and was ended",
                code="hung",
                got=f"nothing within {self._exceeded_s:.0f} s; its last output:\n{self.tail()}",
                expected="an answer; the limit is many times what the source took for the same work",
                remedy=remedy,
            )
        if code == -getattr(signal, "SIGKILL", 9):
            remedy = "most often the system was out of memory: free some, or take a smaller batch"
        raise ArtifactError(
            f"the process of {self.name!r} crashed",
            code="crashed",
            got=f"{_exit_cause(code)}; its last output:\n{self.tail()}",
            expected="a runtime that opens the artifact and runs it",
            remedy=remedy,
        )

    def _raise_failure(self, failure: dict[str, str | None]) -> NoReturn:
        kind = getattr(errors, str(failure["kind"]), None)
        if isinstance(kind, type) and issubclass(kind, PenjingError):
            parts: dict[str, Any] = {k: failure[k] for k in ("got", "expected", "remedy")}
            parts |= {k: failure.get(k) or "" for k in ("code", "field")}
            raise kind(f"{self.name}: {failure['what']}", **parts)
        raise ArtifactError(
            f"{self.name!r} can't be run in its runtime",
            code="failed",
            got=f"{failure['kind']}: {failure['what']}",
            expected="a runtime that opens the artifact and runs it",
            remedy="open the artifact with its own load.py to see whether the runtime itself fails",
        )

    def tail(self) -> str:
        """The end of its standard error since the last request, at most 2000 bytes."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(self._stderr_start, size - _TAIL_BYTES))
        return self._stderr.read().decode(errors="replace").strip()


def start_worker(
    module: str, arguments: Sequence[str], environment: dict[str, str], stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a Python module as a process with pipes for its input and output; `environment` is all that it gets."""
    return subprocess.Popen(
        # -P: nothing is imported from the current folder
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        start_new_session=True,  # a separate process group with its children; Ctrl-C reaches only the parent
    )


def send(stream: IO[bytes], message: dict[str, Any], arrays: Arrays = ()) -> None:
    """Write a message: a line of JSON, then the bytes of the arrays in C order."""
    contiguous = [np.ascontiguousarray(x).reshape(x.shape) for x in arrays]
    if contiguous:
        message = {**message, "arrays": [[x.dtype.str, list(x.shape)] for x in contiguous]}
    stream.write(json.dumps(message).encode() + b"\n")
    for x in contiguous:
        if x.size:
            stream.write(x.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[npt.NDArray[Any]]] | None:
    """Read the next message and its arrays; None at the end of the stream.

    Raises:
        ValueError: The bytes are not a message.
    """
    line = stream.readline(_LINE_BYTES)
    if not line.endswith(b"\n"):
        return None
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("the message is not a JSON object")
    arrays: list[npt.NDArray[Any]] = []
    for kind, shape in message.pop("arrays", ()):
        dtype = np.dtype(str(kind))
        if dtype.kind not in _DTYPE_KINDS:
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
    """In the worker: the streams of requests and of answers. Everything printed goes to standard error instead."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # flushed line by line, so that a crash loses nothing
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    return sys.stdin.buffer, answers


def leave(code: int) -> NoReturn:
    """In the worker: exit at once. Taking down an interpreter that has imported torch takes up to a second."""
    sys.stderr.flush()
    os._exit(code)


def error_as_dict(error: Exception) -> dict[str, str | None]:
    """In the worker: an error as plain data, from which the parent raises it again."""
    if isinstance(error, PenjingError):
        parts = {"got": error.got, "expected": error.expected, "remedy": error.remedy}
        texts = {key: None if value is None else str(value) for key, value in parts.items()}
        return {"kind": type(error).__name__, "what": error.what, "code": error.code, "field": error.field, **texts}
    return {"kind": type(error).__name__, "what": str(error)}


def _exit_with_parent(parent: int) -> None:
    """Exit with the parent process, even during a call that does not return."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    if sys.platform != "win32" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _exit_cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def worker_environment(additional: dict[str, str]) -> dict[str, str]:
    """The environment variables of a worker: those of this process, and additional ones."""
    env = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    if root not in {str(Path(sysconfig.get_path(kind)).resolve()) for kind in ("purelib", "platlib")}:
        # Penjing runs from a source folder: the process has to find the same one.
        env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    if "PYTHONPATH" in env:  # an empty entry is the current folder
        env["PYTHONPATH"] = os.pathsep.join(filter(None, env["PYTHONPATH"].split(os.pathsep)))
    return env | _NO_TELEMETRY | additional
