"""What every tracker can do, and what is common to them: names, waiting, packages that are missing."""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol, TypeVar

from penjing.errors import MissingDependency, OutputError

T = TypeVar("T")
ANSWER_S = 9.0  # for a server at the start, with all that is asked of it: told within ten seconds


class Tracker(Protocol):
    """A place that keeps the numbers of runs. Methods may raise anything; who calls them bears it."""

    def start(self, name: str, parameters: Mapping[str, Any]) -> None:
        """A run begins.

        Args:
            name: Of the run.
            parameters: Plain values by name: numbers, texts, lists of them, None.
        """
        ...

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Finite numbers by name, at a step."""
        ...

    def texts(self, values: Mapping[str, str]) -> None:
        """Texts by name; a later one of the same name replaces the earlier."""
        ...

    def end(self, failure: str | None) -> None:
        """The run ends; `failure` says why it broke off."""
        ...


def package(name: str, extra: str) -> ModuleType:
    """Import a package that is not always installed.

    Raises:
        MissingDependency: It is not installed; names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"a log for {extra} needs the package {name.split('.')[0]}",
            code="not-installed",
            got=f"{type(error).__name__}: {error}",
            expected=f"{name} to be importable",
            remedy=f"pip install 'penjing[{extra}]'",
        ) from None


def unreachable(where: str, error: object, remedy: str) -> OutputError:
    """The error for a log that can't be written to, before the run begins."""
    text = str(error).strip().splitlines()
    got = f"{where}: {type(error).__name__}" if isinstance(error, BaseException) else where
    return OutputError(
        "the log can't be written to",
        code="log",
        got=f"{got}: {text[0][:300]}" if text else got,
        expected="a place that answers and may be written to",
        remedy=remedy,
    )


def check_server(address: str) -> None:
    """Ask a server for its front page; any answer of it will do.

    Raises:
        OSError: There is none within half of `ANSWER_S`.
    """
    try:
        within(ANSWER_S / 2, lambda: urllib.request.urlopen(address, timeout=ANSWER_S / 2).close())
    except urllib.error.HTTPError:
        return  # it is there, and says what it thinks of the front page
    except ValueError as error:
        raise OSError(str(error)) from None


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns or raises, unless it takes too long: then it is left to itself.

    Raises:
        TimeoutError: It has not returned.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answers[0]


def safe_name(name: str) -> str:
    """A name of letters, digits and ``_-. /``, which every tracker takes, of at most 250 characters.

    >>> safe_name("1 Finetune.clip[0].Clip.norm")
    '1 Finetune.clip_0_.Clip.norm'
    """
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables while the block lasts, where the user has not set them."""
    import os

    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
