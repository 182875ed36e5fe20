"""The run folder: who may write into it, what it keeps to resume, and what is left in it at the end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penjing.errors import OutputError
from penjing.records import reading
from penjing.records.files import write_text
from penjing.records.lock import LOCK

STATE, CANDIDATES, SOURCE, ARTIFACT, SEARCH = "state", "candidates", "source", "artifact", "search"
RECORD, EVENTS, EVIDENCE, STUDY = "record.json", "events.jsonl", "evidence.npz", "study.db"
_OURS = (
    STATE, CANDIDATES, SOURCE, ARTIFACT, SEARCH, RECORD, EVENTS, EVIDENCE, "report.html", "load.py",
    "weights.safetensors", "edits.json", "plan.json",
)  # fmt: skip
_REMEDY = "free some space and continue with --resume, or choose another folder with --out"


class RunFolder:
    """A folder that holds one run. Looking at it writes nothing and removes nothing; `claim` does.

    Who writes into it holds its lock (`penjing.records.lock.locked`) from before it looks.

    Raises:
        OutputError: It already holds a run (and neither `resume` nor `force` is given), holds something else, or
            can't be written.
    """

    def __init__(self, path: Path | str, *, resume: bool = False, force: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(
                "the output folder is a file", code="file", got=str(self.path), expected="a folder, or nothing yet"
            )
        held = [name for name in _OURS if (self.path / name).exists()]
        there = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
        foreign = [name for name in there if name not in _OURS and name != LOCK]
        if held and not (resume or force):
            raise OutputError(
                "the output folder already holds a run",
                code="run",
                got=f"{self.path} with {', '.join(held[:4])}",
                expected="an empty folder, or a new name",
                remedy="--resume continues that run, --force replaces it, --out names another folder",
            )
        if foreign and not held:
            raise OutputError(
                "the output folder holds other files",
                code="foreign",
                got=f"{self.path} with {', '.join(sorted(foreign)[:4])}",
                expected="an empty folder, or a new name",
                remedy="choose another folder with --out",
            )
        self.resumed = resume and bool(held)
        self._replaced = [] if resume else held
        standing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        with writing(self.path), tempfile.TemporaryFile(dir=standing) as probe:
            probe.write(b"writable")

    def claim(self, request: dict[str, Any], finished: dict[str, Any] | None = None) -> None:
        """Take the folder for a run: what it replaces is removed, and what is asked for is written down.

        Args:
            request: Plain data; a resumed run must be asked for the same.
            finished: What a run that was finished had been asked for, as far as its record tells.

        Raises:
            OutputError: The folder's run was asked for something else; names the difference.
        """
        path = self.path / STATE / "request.json"
        plain = json.loads(json.dumps(request))
        before = self.read_state("request") if self.resumed and path.exists() else finished
        if before is not None:
            if not isinstance(before, dict):
                raise OutputError(
                    "the state that the run saved is damaged", code="damaged", got=path, remedy="--force starts over"
                )
            changed = [k for k in plain if k in before and before[k] != plain[k]]
            if changed:
                where, now, then = _difference(changed[0], plain[changed[0]], before[changed[0]])
                raise OutputError(
                    f"the run in this folder was started with different settings: {', '.join(changed)}",
                    code="settings",
                    got=f"{where} = {now}",
                    expected=f"{where} = {then}",
                    remedy="resume with the same request, or start over with --force",
                )
            return
        with writing(self.path):
            for name in self._replaced:
                old = self.path / name
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            (self.path / STATE).mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(plain, indent=1) + "\n")

    def read_state(self, name: str) -> Any:
        """What `write_state` stored under this name; None where nothing was."""
        path = self.path / STATE / f"{name}.json"
        if not path.exists():
            return None
        try:
            return reading.json_file(path, finite=False)
        except (OSError, ValueError) as error:
            raise OutputError(
                "the state that the run saved is damaged",
                code="damaged",
                got=f"{path}: {error}",
                expected="the JSON that the run wrote",
                remedy="start over with --force",
            ) from None

    def write_state(self, name: str, value: Any) -> None:
        """Store plain data for a resume."""
        write_text(self.path / STATE / f"{name}.json", json.dumps(value, indent=1) + "\n")

    @contextmanager
    def building(self, name: str) -> Iterator[Path]:
        """A folder that becomes ``path/name`` when all went well, and vanishes otherwise."""
        with writing(self.path), replacing(self.path / name) as aside:
            yield aside

    def reopen(self) -> None:
        """Take back that the run has finished: its record goes, and it may be claimed and gone on with."""
        with writing(self.path):
            (self.path / RECORD).unlink(missing_ok=True)

    def finish(self) -> None:
        """Drop what was kept to resume."""
        shutil.rmtree(self.path / STATE, ignore_errors=True)


def _difference(where: str, now: Any, then: Any) -> tuple[str, Any, Any]:
    """The innermost place where two plain values differ, and both values there.

    >>> _difference("recipe", [{"Finetune": {"labels": 0.7}}], [{"Finetune": {"labels": 0.5}}])
    ('recipe[0].Finetune.labels', 0.7, 0.5)
    """
    if isinstance(now, dict) and isinstance(then, dict) and now.keys() == then.keys():
        name = next(name for name in now if now[name] != then[name])
        return _difference(f"{where}.{name}", now[name], then[name])
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        place = next(i for i in range(len(now)) if now[i] != then[i])
        return _difference(f"{where}[{place}]", now[place], then[place])
    return where, now, then


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its place when all went well, and vanishes otherwise."""
    aside = final.parent / f".{final.name}.new"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def writing(folder: Path, *, what: str = "the run folder", remedy: str = _REMEDY) -> Iterator[None]:
    """Full disks and missing permissions as an OutputError that calls the folder `what`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{what} can't be written",
            code="unwritable",
            got=f"{type(error).__name__}: {error.strerror or error} ({error.filename or folder})",
            expected="a folder with write permission and free space",
            remedy=remedy,
        ) from error


def check_writable(file: Path) -> None:
    """Raise OutputError where a file can't be written, before it is computed; its folders may be missing."""
    what = "the file to write"
    if file.is_dir() or not file.name:
        raise OutputError(f"{what} is a folder", code="folder", got=str(file), expected="the name of a file")
    with writing(file.parent, what=what, remedy="free some space, or choose another place"):
        standing = next(parent for parent in file.absolute().parents if parent.exists())
        tempfile.TemporaryFile(dir=standing).close()
