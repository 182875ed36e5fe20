"""The runtimes that an artifact can be made for, one file each. Importing this does not import any of them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from penjing.errors import ArtifactError, MissingDependency, PenjingError, UsageError
from penjing.records.manifest import Manifest, Port, read_manifest, write_manifest
from penjing.runtimes.artifact import Checked, Executed, Timed
from penjing.runtimes.specs import ALL, AUTO, DEPLOYED, MAC, NVIDIA, SPECS, Place, RuntimeSpec
from penjing.runtimes.versions import clashes
from penjing.steps.plan import Capabilities


class Session(Protocol):
    """An opened artifact."""

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call; inputs and outputs in the order of the manifest."""
        ...


class Runtime(Protocol):
    """What a runtime's file provides as module-level functions."""

    SETTINGS: dict[str, str]
    """The settings that a manifest may tell it, and the pattern of their values."""

    def capabilities(self, instruction_sets: tuple[str, ...]) -> Capabilities:
        """The operators and formats that it accelerates on a processor with these instruction sets."""
        ...

    def export(self, network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
        """Write the artifact's files for a frozen network into an empty folder."""
        ...

    def open_session(self, folder: Path, manifest: Manifest, threads: int) -> Session:
        """Open the files of an artifact."""
        ...

    def executed(self, folder: Path, manifest: Manifest) -> list[Executed]:
        """The operators of the runtime's own optimized graph."""
        ...

    def profile(
        self, folder: Path, manifest: Manifest, inputs: list[np.ndarray], threads: int, calls: int
    ) -> list[Timed]:
        """Every operator with its time, where the spec has `times_operators`."""
        ...

    def expose(self, folder: Path, manifest: Manifest, sites: Sequence[str], into: Path) -> list[str]:
        """Write a copy that also outputs the values of `sites`, where the spec has `shows_values`."""
        ...


def names() -> tuple[str, ...]:
    """All runtimes that Penjing knows."""
    return tuple(SPECS)


def missing(name: str) -> MissingDependency | None:
    """What the runtime needs for export and inference and is not here, or clashes, as an error to raise; or None."""
    spec = SPECS[name]
    packages = [package for package in spec.packages if importlib.util.find_spec(package) is None]
    if packages:
        return MissingDependency(
            f"the runtime {name} is not installed",
            code="not-installed",
            got=f"no package {', '.join(packages)}",
            expected=", ".join(spec.packages),
            remedy=_remedy(spec),
        )
    if clashing := clashes(name):
        return MissingDependency(
            f"the packages of the runtime {name} do not fit together",
            code="clash",
            got="; ".join(clashing[:3]),
            expected="versions that all of them take",
            remedy=f"{_remedy(spec)}, in an environment of its own where another package holds a version back",
        )
    compiler = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    if spec.compiles and shutil.which(compiler) is None:
        return MissingDependency(
            f"the runtime {name} needs a C++ compiler",
            code="no-compiler",
            got=f"no program {compiler}",
            expected=f"{compiler}, or another one that the environment variable CXX names",
            remedy="install a C++ compiler (Debian: apt install g++; macOS: xcode-select --install; "
            "Windows: Visual Studio's build tools), or set CXX to one",
        )
    return None


def _remedy(spec: RuntimeSpec) -> str:
    return "pip install torch" if spec.packages == ("torch",) else f"pip install 'penjing[{spec.name}]'"


def installed(name: str) -> bool:
    """Whether everything that the runtime needs for export and inference is installed."""
    return missing(name) is None


def absent(name: str) -> str:
    """Why a runtime that is installed does not run here, in words; empty where it does."""
    spec = SPECS[name]
    if spec.place is None or spec.place.here():
        return ""
    return f"{name} runs on {spec.place.name} alone: it is not timed here, and its answers are those of {spec.stand_in}"


def get(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        UsageError: There is no such runtime.
        MissingDependency: It is not installed, or a compiler is missing; names what to install.
    """
    if name not in SPECS:
        raise UsageError(
            "the runtime is unknown", code="unknown-runtime", got=repr(name), expected=f"one of {', '.join(SPECS)}"
        )
    if (refusal := missing(name)) is not None:
        raise refusal
    module: Any = importlib.import_module(SPECS[name].module)
    return module  # type: ignore[no-any-return]


def open_artifact(folder: Path | str, threads: int) -> Session:
    """Open an artifact folder in its own runtime. Nothing in the folder is executed as code.

    Raises:
        ArtifactError: There is no artifact, or the runtime can't read it.
        UsageError: There is no such number of threads.
    """
    from penjing.measure.machine import check_threads

    folder = Path(folder)
    manifest = read_manifest(folder)
    runtime = get(manifest.runtime)
    check_threads(threads)
    with _opening(folder, manifest, runtime):
        return Checked(runtime.open_session(folder, manifest, threads), manifest.programs[0])


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """The operators of the graph that the artifact's runtime made of it.

    Raises:
        ArtifactError: The runtime can't read it.
    """
    runtime = get(manifest.runtime)
    with _opening(folder, manifest, runtime):
        return runtime.executed(folder, manifest)


def profile(folder: Path, inputs: list[np.ndarray], threads: int, calls: int = 30) -> list[Timed]:
    """Every operator of the runtime's optimized graph with its time, mean of `calls` calls.

    Raises:
        ArtifactError: The runtime can't read the artifact.
        UsageError: This runtime does not time its operators.
    """
    manifest = read_manifest(folder)
    runtime = get(manifest.runtime)
    if not SPECS[manifest.runtime].times_operators:
        raise UsageError(
            "this runtime does not time its operators",
            code="no-times",
            got=manifest.runtime,
            expected=" or ".join(name for name, spec in SPECS.items() if spec.times_operators),
        )
    with _opening(folder, manifest, runtime):
        timed: list[Timed] = runtime.profile(folder, manifest, inputs, threads, calls)
        return timed


def expose(folder: Path, manifest: Manifest, sites: Sequence[str], into: Path) -> list[str]:
    """Write a copy of an artifact with the values of inner operators as additional outputs.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        sites: The operators whose values are shown.
        into: An empty folder.

    Returns:
        The sites that the artifact's file names, in the order of the further outputs.

    Raises:
        ArtifactError: The runtime can't read the artifact.
        UsageError: This runtime does not show inner values.
    """
    runtime = get(manifest.runtime)
    if not SPECS[manifest.runtime].shows_values:
        raise UsageError(
            "this runtime does not show values",
            code="no-values",
            got=manifest.runtime,
            expected=" or ".join(name for name, spec in SPECS.items() if spec.shows_values),
        )
    with _opening(folder, manifest, runtime):
        shown: list[str] = runtime.expose(folder, manifest, sites, into)
    main, *others = manifest.programs
    ports = tuple(Port(name=site, dtype="float32", shape=()) for site in shown)
    write_manifest(into, replace(manifest, programs=(replace(main, outputs=(*main.outputs, *ports)), *others)))
    return shown


@contextlib.contextmanager
def _opening(folder: Path, manifest: Manifest, runtime: Runtime) -> Iterator[None]:
    for name, value in manifest.settings.items():
        if not re.fullmatch(runtime.SETTINGS.get(name, "(?!)"), value):
            raise ArtifactError(
                "the manifest has a setting that may not be passed to a runtime",
                code="setting",
                got=f"{name} = {value}"[:200],
                expected=f"for {manifest.runtime}: {', '.join(runtime.SETTINGS) or 'none'}, with their known values",
                remedy="`penjing verify` checks whether the files are unchanged",
            )
    try:
        yield
    except PenjingError:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        raise ArtifactError(
            f"{manifest.runtime} can't open the artifact",
            code="unopenable",
            got=f"{folder}: {' '.join(str(error).split())[:400]}",
            expected=f"files that {manifest.runtime} loads on this processor",
            remedy="`penjing verify` checks whether the files are unchanged",
        ) from error


__all__ = [
    "ALL",
    "AUTO",
    "DEPLOYED",
    "MAC",
    "NVIDIA",
    "Place",
    "Runtime",
    "RuntimeSpec",
    "SPECS",
    "Session",
    "absent",
    "executed",
    "expose",
    "get",
    "installed",
    "missing",
    "names",
    "open_artifact",
    "profile",
]
