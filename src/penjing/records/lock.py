"""One writer at a time in a folder: a lock that the system releases when its process dies, however it dies."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from penjing.errors import OutputError

LOCK = ".penjing.lock"
_BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_MOST = 4096  # bytes that are read of what the holder wrote about itself
_ORPHANS_S = 10.0  # a dead holder's children (workers of a data loader) may keep the lock until they notice

if sys.platform == "win32":
    import msvcrt

    def _take(handle: int) -> None:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # a byte that nobody reads: locked ones can't be
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _take(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(folder: Path | str, what: str = "the output folder", wait_s: float = 0.0) -> Iterator[None]:
    """Hold a folder, which is made where there is none; what was made and stayed empty goes again.

    Args:
        folder: The folder; nothing of it should be read before.
        what: How it is called in errors.
        wait_s: Seconds to wait for another process that holds it.

    Raises:
        OutputError: Another process holds it (says which), or it can't be made or locked.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{what} is a file", code="file", got=str(folder), expected="a folder, or nothing yet")
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    handle = _opened(folder, what, wait_s)
    try:
        with contextlib.suppress(OSError):  # a full disk: held all the same
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(_holder()).encode()[:_MOST])
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is still held: nobody else's can be removed
            (folder / LOCK).unlink()
        os.close(handle)
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


def _opened(folder: Path, what: str, wait_s: float) -> int:
    """The lock file of a folder, held."""
    path = folder / LOCK
    start = time.monotonic()
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            if error.errno == errno.ENOENT:  # who held it removed what was empty
                continue
            raise OutputError(
                f"{what} can't be written",
                code="unwritable",
                got=f"{type(error).__name__}: {error.strerror} ({folder})",
                expected="a folder with write permission and free space",
                remedy="choose another folder, for a run with --out",
            ) from error
        try:
            _take(handle)
        except OSError as error:
            holder = _read(handle)
            os.close(handle)
            if error.errno not in _BUSY:
                raise OutputError(
                    f"{what} can't be locked",
                    code="unlockable",
                    got=f"{type(error).__name__}: {error.strerror} ({folder})",
                    expected="a file system with locks",
                    remedy="choose a folder on another disk, for a run with --out",
                ) from error
            if time.monotonic() - start < (wait_s if _alive(holder) else max(wait_s, _ORPHANS_S)):
                time.sleep(0.02)
                continue
            raise OutputError(
                f"{what} is in use by another process",
                code="held",
                got=f"{folder}, held by {_told(holder)}",
                expected="one process at a time",
                remedy="wait until it has ended, or choose another folder, for a run with --out",
            ) from None
        except BaseException:
            os.close(handle)
            raise
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its last holder removed it between the opening and the locking


def _holder() -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": " ".join(sys.argv)[:500]}


def _read(handle: int) -> dict[str, Any]:
    """What the holder wrote about itself; nothing where it was not there yet."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        told = json.loads(os.read(handle, _MOST))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _alive(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or not 0 < pid < 1 << 31:
        return bool(holder)
    return bool(psutil.pid_exists(pid))


def _told(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    where = "" if holder.get("host") == socket.gethostname() else f" on {holder.get('host')}"
    text = f"process {holder.get('pid')}{where} since {holder.get('since')}: {holder.get('command')}"
    return "".join(c if c.isprintable() else "?" for c in text)
