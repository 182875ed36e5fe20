"""The saved state of a training: tensors and plain numbers in one file, loaded without running code."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from penjing.errors import CheckpointError, OutputError, PenjingError
from penjing.steps.identity import identity

State = dict[str, Any]


def save(path: Path, state: State) -> None:
    """Write a state whole or not at all. ``state["request"]`` says what the training was asked for, in any values.

    Raises:
        OutputError: The disk is full or the folder can't be written; what was saved before is untouched.
    """
    aside = path.with_suffix(".new")
    try:
        with _undisturbed():
            with aside.open("wb") as file:
                torch.save({**state, "request": json.dumps(identity(state["request"]))}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        with suppress(OSError):
            aside.unlink()
        raise OutputError(
            "the state of the training can't be saved",
            code="unwritable",
            got=f"{type(error).__name__}: {error} ({path.parent})",
            expected="a folder with write permission and free space",
            remedy="free some space; what was saved before is untouched",
        ) from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """CTRL-C waits for the end of the block: inside torch's writer it would come out as a broken file."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def loading(path: Path, request: dict[str, Any]) -> Iterator[State]:
    """The state in a file, for a block that puts it in place; what does not fit there is said as of a damaged file.

    Args:
        path: A file that `save` wrote.
        request: What the training is asked for now; it must be what was asked for then.

    Raises:
        CheckpointError: The file is damaged, holds code, or belongs to another request or another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_request(path, json.loads(state["request"]), identity(request))
        yield state
    except PenjingError:
        raise
    except Exception as error:  # a damaged file fails in many ways, deep inside zip, pickle and torch
        raise CheckpointError(
            "the saved training state can't be read",
            code="unreadable",
            got=f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            expected="a state written by penjing.train.finetune for this network: tensors and numbers, no code",
            remedy="delete the file; the step starts over",
        ) from None


def _check_request(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise CheckpointError(
            f"the saved training state belongs to another {', '.join(changed)}",
            code="settings",
            field=changed[0],
            got=f"{changed[0]} = {now[changed[0]]}",
            expected=f"{changed[0]} = {before.get(changed[0])}",
            remedy=f"resume with the settings of that run, or delete {path}",
        )
