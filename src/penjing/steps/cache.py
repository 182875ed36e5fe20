"""A run's cache of computed results: statistics are collected once and shared between steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
M = TypeVar("M", bound=dict[str, Any])


@dataclass(frozen=True, eq=False)
class Identity:
    """Wraps an object to compare by identity; the object is kept alive so that its identity is not reused."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True, kw_only=True)
class Key(Generic[T]):
    """Everything that a result depends on.

    Attributes:
        kind: The class of the result, distinct for every computation.
        network: Fingerprint of the operators and tensors it is computed with.
        data: The object that provides the data, compared by identity.
        samples: Number of samples that are read.
        settings: Everything else it depends on.
    """

    kind: type[T]
    network: str
    data: Identity
    samples: int
    settings: Hashable = ()


class Cache:
    """Results by key, for the lifetime of the run that owns it."""

    def __init__(self) -> None:
        self._results: dict[Key[Any], Any] = {}
        self._asked: dict[Key[Any], set[str]] = {}

    def once(self, key: Key[T], compute: Callable[[], T]) -> T:
        """Return the result for this key, computing it on first use; a failed computation is not cached."""
        if key not in self._results:
            self._results[key] = compute()
        result: T = self._results[key]
        return result

    def forget(self, kind: type[Any], *, but: Key[Any] | None = None) -> None:
        """Drop the results of a kind, except those of one key."""
        for key in [key for key in self._results if key.kind is kind and key != but]:
            del self._results[key]
            self._asked.pop(key, None)

    def by_name(
        self, key: Key[M], names: Iterable[str], compute: Callable[[list[str]], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Named results, for example one per layer; those that are missing are computed together.

        Args:
            key: The key of all results by name.
            names: The names asked for.
            compute: Missing names → their results; a name without a result is not computed again.
        """
        results = self.once(key, key.kind)
        asked = self._asked.setdefault(key, set())
        names = list(names)
        if new := [name for name in names if name not in asked]:
            results.update(compute(new))
            asked.update(new)
        return {name: results[name] for name in names if name in results}


__all__ = ["Cache", "Identity", "Key"]
