"""The one interface of a compression step, and what a step is told about the world."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch.fx import GraphModule

from penjing.steps.draft import Draft
from penjing.steps.plan import Accelerates
from penjing.tasks.task import Task


def _silent(kind: str, **values: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a step may know.

    Attributes:
        task: The user's data, metric and loss.
        seed: Every random choice derives from it.
        device: Where training runs, for example "cpu" or "cuda".
        accelerates: What the target runtime gains from on this processor; None when no runtime was named.
        events: `events(kind, **values)` reports progress; `kind` "progress" carries `label`, `done`, `total`.
        latency: Measures drafts side by side in the target runtime, in milliseconds, one figure each, each as the
            precision that is named; None when nothing can be measured.
        profile: Measures the operators of one draft in the target runtime: the sites that each computes, and
            milliseconds; None when nothing can be measured.
        folder: Where a step may keep what it needs to resume; None when nothing is kept.
        source: The raised source network, the teacher of steps that learn without or beside labels.
        memo: Results that later runs on the same network and data may reuse (collected statistics).
    """

    task: Task
    seed: int = 0
    device: str = "cpu"
    accelerates: Accelerates | None = None
    events: Callable[..., None] = _silent
    latency: Callable[[Sequence[Draft], str], list[float]] | None = None
    profile: Callable[[Draft, str], list[tuple[tuple[str, ...], float]]] | None = None
    folder: Path | None = None
    source: GraphModule | None = None
    memo: MutableMapping[Any, Any] = field(default_factory=dict)


@runtime_checkable
class Step(Protocol):
    """A frozen dataclass with one method. It never changes the draft that it is given.

    A step whose result depends on the target runtime (`context.accelerates`) says so with a class attribute
    ``per_runtime = True``; then it runs once for every runtime, and the steps before it only once. Floating-point
    artifacts go without it and what follows, unless it says ``for_floats = True``. A step that only prepares for
    integers and computes the same says ``for_integers = True``: where it fails, floating-point artifacts go without it.
    """

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a new draft."""
        ...
