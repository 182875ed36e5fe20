"""The request of a run, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.export import ExportedProgram

from penjing import runtimes
from penjing.errors import MissingDependency
from penjing.goals.goal import Goal
from penjing.pipeline import targeting
from penjing.pipeline.applied import Applied
from penjing.quantize import BiasCorrection, CoordinateRounding, Static
from penjing.recipes.recipe import Recipe
from penjing.records.events import Listener
from penjing.sources.source import Source
from penjing.targets import Target
from penjing.tasks.task import Task

FEWER_SAMPLES = 150  # calibration samples of the recipe that does not search the rounding
BIAS_SAMPLES = 48  # of those, for its biases


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How artifacts are timed.

    Attributes:
        threads: Of the runtimes.
        batch: Samples of a timed call.
        seconds: Timed seconds per artifact.
    """

    threads: int
    batch: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Order:
    """One run, as `compress` and `deliver` are called; they describe the fields.

    Attributes:
        model: The source, open or to be opened, or an applied draft that is trained already.
        recipe: The steps that are still to be taken.
        runtimes: Their names, all of them installed.
        target: The device that artifacts are for; None: this machine.
        auto: Whether one of the runtimes is to be picked, by what the source takes in each.
        searches: Whether many recipes are tried, of which none is in `recipe`.
        precisions: That are built; None: all that a runtime has.
    """

    model: str | nn.Module | ExportedProgram | Source | Applied
    task: Task
    goal: Goal
    recipe: Recipe
    reference: str | nn.Module | ExportedProgram | None
    runtimes: tuple[str, ...]
    seed: int
    device: str
    bench: Bench
    listeners: tuple[Listener, ...]
    target: Target | None = None
    auto: bool = False
    searches: bool = False
    precisions: tuple[str, ...] | None = None


def default_recipe(exclude: Sequence[str] = (), *, rounding: bool = True) -> Recipe:
    """Post-training quantization: ranges from calibration data, then adaptive rounding.

    Args:
        exclude: Name patterns that stay in floating point.
        rounding: Whether the rounding of every weight is searched; otherwise biases are corrected alone, and ranges are
            those of the first `FEWER_SAMPLES` calibration samples.
    """
    static = Static(exclude=tuple(exclude), outliers="mitigate")
    if rounding:
        return Recipe(static, CoordinateRounding())
    return Recipe(replace(static, samples=FEWER_SAMPLES), BiasCorrection(samples=BIAS_SAMPLES))


def as_goal(goal: Goal | str) -> Goal:
    """A goal, parsed where it is written in words.

    Raises:
        GoalError: The words are not a goal.
    """
    return Goal.parse(goal) if isinstance(goal, str) else goal


def is_auto(asked: str | Sequence[str] | None) -> bool:
    """Whether a runtime is to be picked."""
    return asked == runtimes.AUTO or (asked is not None and tuple(asked) == (runtimes.AUTO,))


def runtime_names(asked: str | Sequence[str] | None, target: Target | None = None) -> tuple[str, ...]:
    """The runtimes of a request: by name, "all" that are installed, or those that are considered by default.

    Args:
        asked: Names, "all", or None; "auto" is None here, for what it is picked from.
        target: The device that artifacts are for: those that run there alone.

    Raises:
        UsageError: There is no such runtime, or it does not run on the target.
        MissingDependency: It is not installed, or none is.
    """
    if target is not None and asked in (None, runtimes.ALL, (runtimes.ALL,), [runtimes.ALL]):
        return targeting.runtime_names(target, targeting.usable(target) or None if asked else None)
    if asked is None or is_auto(asked):
        names = tuple(name for name in runtimes.DEPLOYED if runtimes.installed(name))
        if not names:
            raise MissingDependency(
                "no runtime is installed",
                code="not-installed",
                got="torch alone",
                expected=f"one of {', '.join(runtimes.DEPLOYED)}",
                remedy=" or ".join(f"pip install 'penjing[{name}]'" for name in runtimes.DEPLOYED),
            )
        return names
    names = tuple(asked.replace(",", " ").split()) if isinstance(asked, str) else tuple(asked)
    if names == (runtimes.ALL,):
        names = tuple(n for n, spec in runtimes.SPECS.items() if spec.deployed and runtimes.installed(n))
    for name in names:
        runtimes.get(name)
    return names if target is None else targeting.runtime_names(target, names)
