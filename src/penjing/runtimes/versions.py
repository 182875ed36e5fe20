"""Whether the installed packages of a runtime fit together: what Penjing and the packages themselves ask for."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import InvalidRequirement, Requirement

PENJING = "penjing"


@functools.cache
def clashes(extra: str) -> tuple[str, ...]:
    """What does not fit, as "litert-torch needs xdsl==0.28, 0.29 is installed", for the packages of an extra.

    Nothing is imported. A package that is not installed is another matter.
    """
    own = list(_requirements(PENJING, extra))
    misfits = [text for requirement in own for text in _misfit(PENJING, requirement)]
    for requirement in own:
        for further in _requirements(requirement.name):
            misfits += _misfit(requirement.name, further)
    return tuple(dict.fromkeys(misfits))


def _requirements(package: str, extra: str = "") -> Iterator[Requirement]:
    """What a package asks for; with `extra`, what that extra adds."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        if marker is None:
            if not extra:
                yield requirement
        elif marker.evaluate({"extra": extra}) and (not extra or not marker.evaluate({"extra": ""})):
            yield requirement


def _misfit(package: str, requirement: Requirement) -> list[str]:
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return []
    if requirement.specifier.contains(installed, prereleases=True):
        return []
    return [f"{package} needs {requirement.name}{requirement.specifier}, {installed} is installed"]
