"""The runtimes that an artifact can be made for, one file each. Importing this does not import any of them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from penjing.errors import ArtifactError, MissingDependency, PenjingError, UsageError
from penjing.records.manifest import Manifest, Port, read_manifest, write_manifest
from penjing.runtimes.artifact import Executed, Timed
from penjing.steps.plan import Accelerates

_FILES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "torch": "eager"}
_INSTALL = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "torch": ("torch",),
}
DEPLOYED = ("onnxruntime", "openvino")
"""Runtimes that load an artifact without torch; what `compress` considers when none is named."""


class Session(Protocol):
    """An opened artifact."""

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call; inputs and outputs in the order of the manifest."""
        ...


class Runtime(Protocol):
    """What a runtime's file provides as module-level functions."""

    SETTINGS: dict[str, str]
    """The settings that a manifest may tell it, and the pattern of their values."""

    def accelerates(self, instruction_sets: tuple[str, ...]) -> Accelerates:
        """What it gains from on a processor with these instruction sets."""
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


def names() -> tuple[str, ...]:
    """All runtimes that Penjing knows."""
    return tuple(_FILES)


def installed(name: str) -> bool:
    """Whether everything that the runtime needs for export and inference is installed."""
    return all(importlib.util.find_spec(package) is not None for package in _INSTALL[name])


def get(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        UsageError: There is no such runtime.
        MissingDependency: It is not installed; names the install command.
    """
    if name not in _FILES:
        raise UsageError("there is no such runtime", got=repr(name), expected=f"one of {', '.join(_FILES)}")
    missing = [p for p in _INSTALL[name] if importlib.util.find_spec(p) is None]
    if missing:
        raise MissingDependency(
            f"the runtime {name} is not installed",
            got=f"no package {', '.join(missing)}",
            expected=f"{', '.join(_INSTALL[name])}",
            remedy=f"pip install {' '.join(missing)}",
        )
    module: Any = importlib.import_module(f"penjing.runtimes.{_FILES[name]}")
    return module  # type: ignore[no-any-return]


def open_artifact(folder: Path | str, threads: int) -> Session:
    """Open an artifact folder in its own runtime. Nothing in the folder is executed as code.

    Raises:
        ArtifactError: There is no artifact, or the runtime can't read it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    runtime = get(manifest.runtime)
    with _opening(folder, manifest, runtime):
        return runtime.open_session(folder, manifest, threads)


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
        UsageError: This runtime does not tell.
    """
    manifest = read_manifest(folder)
    runtime = get(manifest.runtime)
    if not hasattr(runtime, "profile"):
        raise UsageError("this runtime does not time its operators", got=manifest.runtime, expected="openvino")
    with _opening(folder, manifest, runtime):
        timed: list[Timed] = runtime.profile(folder, manifest, inputs, threads, calls)
        return timed


def expose(folder: Path, manifest: Manifest, sites: Sequence[str], into: Path) -> list[str]:
    """Write a copy of an artifact that also gives the values of operators in its middle, as further outputs.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        sites: Whose values are wanted.
        into: An empty folder.

    Returns:
        The sites that the artifact's file names, in the order of the further outputs.

    Raises:
        ArtifactError: The runtime can't read the artifact.
        UsageError: This runtime has no such form.
    """
    runtime = get(manifest.runtime)
    if not hasattr(runtime, "expose"):
        raise UsageError("this runtime does not show values", got=manifest.runtime, expected="onnxruntime or openvino")
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
                "the manifest has a setting that is not handed to a runtime",
                got=f"{name} = {value}"[:200],
                expected=f"for {manifest.runtime}: {', '.join(runtime.SETTINGS) or 'none'}, with values of Penjing's",
                remedy="`penjing verify` tells whether the files are as they were written",
            )
    try:
        yield
    except PenjingError:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        raise ArtifactError(
            f"{manifest.runtime} can't open the artifact",
            got=f"{folder}: {' '.join(str(error).split())[:400]}",
            expected=f"files that {manifest.runtime} loads on this processor",
            remedy="`penjing verify` tells whether the files are as they were written",
        ) from error
