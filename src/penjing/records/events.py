"""Events of a run in progress: one JSON object per line in `events.jsonl`, and listeners."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penjing.errors import OutputError

Listener = Callable[[dict[str, Any]], None]
PROGRESS_EVERY_S = 0.5


class Events:
    """Appends events to a file and hands them to listeners; called as ``events(kind, **values)``.

    Progress ({"kind": "progress", "label", "done", "total"}) is written at most twice a second, and when it is done.
    """

    def __init__(self, path: Path | None = None, listeners: tuple[Listener, ...] = ()) -> None:
        self.path = path
        self.listeners = listeners
        self._context: dict[str, Any] = {}
        self._shown: dict[str, float] = {}

    def into(self, path: Path) -> None:
        """From now on write to this file as well."""
        self.path = path

    @contextmanager
    def heard(self, listener: Listener) -> Iterator[None]:
        """One listener more while the block lasts."""
        before = self.listeners
        self.listeners = (*before, listener)
        try:
            yield
        finally:
            self.listeners = before

    @contextmanager
    def within(self, **context: Any) -> Iterator[None]:
        """Values that every event has while the block lasts."""
        before = self._context
        self._context = before | context
        try:
            yield
        finally:
            self._context = before

    def __call__(self, kind: str, **values: Any) -> None:
        """Report one event."""
        if kind == "progress":
            now, label = time.monotonic(), str(values.get("label"))
            if now - self._shown.get(label, 0.0) < PROGRESS_EVERY_S and values.get("done") != values.get("total"):
                return
            self._shown[label] = now
        event = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"), "kind": kind}
        event |= self._context | values
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(event, ensure_ascii=False) + "\n")
            except OSError as error:
                raise OutputError(
                    "the run folder can't be written",
                    code="unwritable",
                    got=f"{error.strerror or error} ({self.path.parent})",
                    expected="a folder with write permission and free space",
                    remedy="free some space and continue with --resume, or choose another folder with --out",
                ) from error
        for listener in self.listeners:
            listener(event)
