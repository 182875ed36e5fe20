"""The manifest of an artifact: its programs, their inputs and outputs, and the settings that are not in the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import ArtifactError, RecordError, TaskError
from penjing.files import write_text
from penjing.records import from_dict

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output: its name, NumPy type, and sizes (a name where the size varies)."""

    name: str
    dtype: str
    shape: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Program:
    """One file set that a runtime loads as a whole; the first of `files` is the one to name when loading."""

    name: str
    files: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder with an artifact holds.

    Attributes:
        runtime: Name of the runtime.
        precision: For example "int8".
        programs: One or more programs.
        structure: How the outputs of the network are nested, as `penjing.outputs.flatten_outputs` describes it.
        settings: What the runtime must be told when loading, for example {"INFERENCE_PRECISION_HINT": "f32"}.
        fixed_shapes: Whether the runtime was seen to compile it for fixed input shapes, where that is faster.
    """

    runtime: str
    precision: str
    programs: tuple[Program, ...]
    structure: Any
    settings: dict[str, str] = field(default_factory=dict)
    fixed_shapes: bool = False
    format: int = 1

    def files(self) -> tuple[str, ...]:
        """Every file of every program."""
        return tuple(name for program in self.programs for name in program.files)


@dataclass(frozen=True)
class Executed:
    """One operator of a runtime's optimized graph: the source operators that it computes, its type and precision."""

    sites: tuple[str, ...]
    type: str
    precision: str  # "int8", "bf16", "fp16", "fp32"


@dataclass(frozen=True)
class Timed:
    """One operator of a runtime's optimized graph with its share of a call's time."""

    sites: tuple[str, ...]
    type: str
    ms: float


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`."""
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        ArtifactError: It is missing or damaged, or names a file outside its folder.
    """
    try:
        manifest = from_dict(Manifest, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ArtifactError(
            "there is no artifact in this folder",
            got=str(folder),
            expected=f"a folder with {MANIFEST}, such as RUN/artifact",
            remedy="name the run folder that `penjing compress` wrote, or its artifact folder",
        ) from None
    except (ValueError, RecordError) as error:
        raise ArtifactError(f"{MANIFEST} is damaged", got=f"{folder}: {error}") from None
    if not manifest.programs or not all(program.files for program in manifest.programs):
        raise ArtifactError(f"{MANIFEST} is damaged", got=f"{folder}: a program without files", expected="a program")
    for name in manifest.files():
        if Path(name).name != name or name in ("", ".", ".."):
            raise ArtifactError(f"{MANIFEST} names a file outside its folder", got=name, expected="a plain file name")
        if not (folder / name).is_file():
            raise ArtifactError(
                "a file of the artifact is missing", got=str(folder / name), expected=list(manifest.files())
            )
    return manifest


def predictor(session: Any, manifest: Manifest) -> Callable[..., Any]:
    """`predict` for a session: called as the network is called, NumPy in, NumPy out, in the network's structure."""
    from penjing.outputs import unflatten_outputs  # brings torch, which opening an artifact does not need

    ports = manifest.programs[0].inputs

    def predict(*args: Any, **kwargs: Any) -> Any:
        return unflatten_outputs(session.run(arrange(ports, args, kwargs)), manifest.structure)

    return predict


def arrange(ports: tuple[Port, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[np.ndarray]:
    """Positional and keyword inputs in the order and the types of the ports."""
    values = list(args) + [kwargs[p.name] for p in ports[len(args) :] if p.name in kwargs]
    if len(values) != len(ports) or len(args) + len(kwargs) != len(ports):
        raise TaskError(
            "the artifact was called with other inputs than it has",
            got=f"{len(args)} positional and {sorted(kwargs)}",
            expected=f"{[p.name for p in ports]}",
        )
    return [np.ascontiguousarray(np.asarray(v), dtype=p.dtype) for v, p in zip(values, ports, strict=True)]
