"""The one interface of a compression step, and what a step is told about the world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch.fx import GraphModule

from penjing.steps.cache import Cache
from penjing.steps.draft import Draft
from penjing.steps.plan import Capabilities
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
        capabilities: What the target runtime gains from on this processor; None when no runtime was named.
        events: `events(kind, **values)` reports progress; `kind` "progress" carries `label`, `done`, `total`.
        latency: Measures drafts side by side in the target runtime, in milliseconds, one figure each, each as the
            precision that is named; None when nothing can be measured.
        profile: Measures the operators of one draft in the target runtime: the sites that each computes, and
            milliseconds; None when nothing can be measured.
        folder: Where a step may keep what it needs to resume; None when nothing is kept.
        source: The captured source network, the teacher of steps that learn without or beside labels.
        cache: Statistics that later steps on the same network and data take instead of collecting them again.
    """

    task: Task
    seed: int = 0
    device: str = "cpu"
    capabilities: Capabilities | None = None
    events: Callable[..., None] = _silent
    latency: Callable[[Sequence[Draft], str], list[float]] | None = None
    profile: Callable[[Draft, str], list[tuple[tuple[str, ...], float]]] | None = None
    folder: Path | None = None
    source: GraphModule | None = None
    cache: Cache = field(default_factory=Cache)


@runtime_checkable
class Step(Protocol):
    """A frozen dataclass with one method and three declarations. It never changes the draft that it is given.

    Attributes:
        stage: Its row of `penjing.steps.stages.STAGES`: what it may follow and what it leaves.
        per_runtime: Whether its result depends on the target runtime (`context.capabilities`). Then it runs once for
            every runtime, and the steps before it only once.
        for_floats: Whether floating-point artifacts take it too. They go without a step of `per_runtime` that is not
            for them, and without what follows.
    """

    @property
    def stage(self) -> str: ...  # noqa: D102

    @property
    def per_runtime(self) -> bool: ...  # noqa: D102

    @property
    def for_floats(self) -> bool: ...  # noqa: D102

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a new draft."""
        ...
