"""The interface of a compression step, and the context it receives."""

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
    """The context in which a step runs.

    Attributes:
        task: The user's data, metric and loss.
        seed: Seed from which every random choice derives.
        device: Where training runs, for example "cpu" or "cuda".
        capabilities: What the target runtime accelerates on this processor; None if no runtime was named.
        events: `events(kind, **values)` reports progress; `kind` "progress" has `label`, `done`, `total`.
        latency: Measures drafts side by side in the target runtime at the named precision, and returns milliseconds for
            each; None if nothing can be measured.
        profile: Profiles a draft in the target runtime, and returns the sites of every executed operator with its
            milliseconds; None if nothing can be measured.
        folder: Where a step may save what it needs to resume; None if nothing is saved.
        source: The captured source network, the default teacher of distillation.
        cache: Statistics shared by steps on the same network and data.
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
    """A frozen dataclass with one method and three declarations. It never modifies the draft it receives.

    Attributes:
        stage: Its row of `penjing.steps.stages.STAGES`: what it may follow and what it leaves.
        per_runtime: Whether its result depends on the target runtime (`context.capabilities`). If so, it runs once per
            runtime, while the steps before it run only once.
        for_floats: Whether it applies to floating-point artifacts too. They are built without a `per_runtime` step that
            does not apply to them, and without the steps after it.
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
