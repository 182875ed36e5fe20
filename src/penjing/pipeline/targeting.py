"""A run for another device: what its runtimes accelerate there, and which figures say nothing of it."""

from __future__ import annotations

import difflib
from pathlib import Path

from penjing import runtimes, targets
from penjing.errors import GoalError, MissingDependency, TargetError, UsageError
from penjing.goals.goal import Goal
from penjing.records import TargetRow
from penjing.records.figures import FIGURES
from penjing.steps.plan import GENERIC, Capabilities
from penjing.targets import Target
from penjing.targets.narrowing import narrowed

GOAL = "minimize size_bytes, drop<=1%"
"""The goal where a target was named and none was given: this machine's latency is not the device's."""

OF_THIS_MACHINE = tuple(
    name for name, figure in FIGURES.items() if figure.unit in ("ms", "/s", "mJ") or name == "peak_memory_bytes"
)
"""Figures that hold for the machine on which they were measured alone."""


def as_target(target: str | Path | Target | None) -> Target | None:
    """A profile, read where its name or file was given.

    Raises:
        UsageError: There is no such profile.
        TargetError: The file is not a profile, or names a runtime that Penjing does not know.
    """
    if target is None:
        return None
    read = target if isinstance(target, Target) else targets.load(target)
    unknown = [name for name in read.runtimes if name not in runtimes.SPECS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], runtimes.SPECS, n=1)
        raise TargetError(
            f"the device profile {read.name} names a runtime that Penjing does not know",
            code="unknown-runtime",
            field="runtimes",
            got=", ".join(unknown)[:200],
            expected=f"some of {', '.join(runtimes.SPECS)}",
            remedy=f"did you mean {near[0]}?" if near else "`penjing runtimes` lists them",
        )
    return read


def capabilities(runtime: str, instruction_sets: tuple[str, ...], target: Target | None) -> Capabilities:
    """What a runtime accelerates: on a processor with these instruction sets, or on the target.

    Raises:
        UsageError: There is no such runtime.
        MissingDependency: It is not installed.
        TargetError: It makes nothing that the target runs.
    """
    if target is None:
        return runtimes.get(runtime).capabilities(instruction_sets)
    return narrowed(target, runtimes.get(runtime).capabilities(target.instruction_sets))


def expected(target: Target) -> Capabilities:
    """What the target accelerates, as far as its profile alone tells: for a runtime that is not here."""
    return narrowed(target, GENERIC)


def usable(target: Target) -> tuple[str, ...]:
    """The target's runtimes that are installed, in its order."""
    return tuple(name for name in target.runtimes if name in runtimes.SPECS and runtimes.installed(name))


def runtime_names(target: Target, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The runtimes of a run for a target: those that were named, or the first of the target's that is installed.

    Raises:
        UsageError: One that was named does not run there.
        MissingDependency: None of the target's is installed.
    """
    if asked is not None:
        others = [name for name in asked if name not in target.runtimes]
        if others:
            raise UsageError(
                f"{target.name} does not run this runtime's artifacts",
                code="not-of-the-target",
                got=", ".join(others),
                expected=", ".join(target.runtimes),
                remedy="leave --runtime out, or write a profile of your own: `penjing targets NAME --yaml`",
            )
        return asked
    here = usable(target)
    if not here:
        known = [name for name in target.runtimes if name in runtimes.SPECS]
        missing = [error.remedy for name in known if (error := runtimes.missing(name)) and error.remedy]
        raise MissingDependency(
            f"no runtime that makes artifacts for {target.name} is installed",
            code="not-installed",
            got="none of its runtimes",
            expected=f"one of {', '.join(target.runtimes)}",
            remedy=" or ".join(missing) or None,
        )
    return here[:1]


def check_goal(goal: Goal, target: Target) -> None:
    """Refuse a goal on a figure of this machine.

    Raises:
        GoalError: It names a latency, or what else this machine's measurement can't tell of the target.
    """
    named = dict.fromkeys((goal.objective()[0], *(limit.figure for limit in goal.all_limits())))
    wrong = [name for name in named if name in OF_THIS_MACHINE]
    if wrong:
        raise GoalError(
            f"the goal names {', '.join(wrong)}, and what is measured here is this machine's and not {target.name}'s",
            code="not-of-the-target",
            got=goal.text(),
            expected=f"figures that hold anywhere: {', '.join(n for n in FIGURES if n not in OF_THIS_MACHINE)}",
            remedy=f'--goal "{GOAL}", and measure on the device: `penjing bench`',
        )


def told(target: Target) -> str:
    """What has to be said of every run for a target."""
    return (
        f"latency, throughput and memory were measured on this machine and are not {target.name}'s: "
        "they show that the artifact runs, and nothing of its speed there"
    )


def row(target: Target) -> TargetRow:
    """The target as the record holds it."""
    return TargetRow(
        name=target.name,
        description=target.description,
        instruction_sets=target.instruction_sets,
        storage_bytes=target.limits.storage_bytes,
        memory_bytes=target.limits.memory_bytes,
        commands=target.commands,
        sha256=target.sha256,
    )
