"""What one step has computed, for those that ask for the same again: statistics are collected once a run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Identity:
    """An object as itself: equal to nothing else, whatever it holds. It is kept, so that none takes its place."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True, kw_only=True)
class Key(Generic[T]):
    """All that a result depends on.

    Attributes:
        kind: The class of the result; every computation has one of its own.
        network: Fingerprint of the operators and tensors that it is computed with.
        data: The object that gives the data; what is equal but another object is read again.
        samples: How many of them are read.
        settings: What else it depends on.
    """

    kind: type[T]
    network: str
    data: Identity
    samples: int
    settings: Hashable = ()


class Cache:
    """Results by their keys, for as long as the run that owns it."""

    def __init__(self) -> None:
        self._results: dict[Key[Any], Any] = {}

    def once(self, key: Key[T], compute: Callable[[], T]) -> T:
        """The result for this key, computed where it is not there yet; nothing is kept of a computation that fails."""
        if key not in self._results:
            self._results[key] = compute()
        result: T = self._results[key]
        return result


__all__ = ["Cache", "Identity", "Key"]
