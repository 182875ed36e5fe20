"""Misspelt keywords: Python's own TypeError, with a suggestion."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Called = TypeVar("Called", bound=Callable[..., Any])


def suggesting(called: Called) -> Called:
    """Decorate a function or class so that an unknown keyword raises an error with the nearest known one.

    >>> @suggesting
    ... def train(*, epochs=1): ...
    >>> train(epoch=3)
    Traceback (most recent call last):
        ...
    TypeError: train() has no keyword 'epoch': did you mean epochs? It takes epochs
    """
    inner: Any = vars(called)["__init__"] if isinstance(called, type) else called
    names = [
        name
        for name, parameter in inspect.signature(called).parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]

    @functools.wraps(inner)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_keywords(called.__name__, kwargs, names)
        return inner(*args, **kwargs)

    if isinstance(called, type):
        setattr(called, "__init__", checked)  # noqa: B010  the type checker refuses a plain assignment
        return called
    return checked  # type: ignore[return-value]


def check_keywords(called: str, given: Iterable[str], names: list[str]) -> None:
    """Raise TypeError if a keyword is not one of `names`."""
    for word in given:
        if word not in names:
            near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else "."
            raise TypeError(f"{called}() has no keyword {word!r}{hint} It takes {', '.join(names)}")
