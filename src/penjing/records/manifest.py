"""The manifest of an artifact: its programs, their inputs and outputs, and the settings that are not in the files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import ArtifactError, RecordError
from penjing.records import from_dict, reading
from penjing.records.files import write_text

MANIFEST = "manifest.json"
MOST_AXES = 32
MOST_VALUES = 1 << 28  # of an input or output
MOST_OPENING_S = 3600
_TYPES = {
    name: name
    for name in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    + ("float16", "float32", "float64", "complex64", "complex128")
}


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output: its name, NumPy type, and sizes (a name where the size varies)."""

    name: str
    dtype: str
    shape: tuple[Any, ...]


def sample_axes(ports: tuple[Port, ...]) -> list[int | None]:
    """The axis of each input that holds its samples: the one called as the first axis of an input that varies."""
    batch = next((port.shape[0] for port in ports if port.shape and isinstance(port.shape[0], str)), None)
    return [port.shape.index(batch) if batch is not None and batch in port.shape else None for port in ports]


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
        structure: How the outputs of the network are nested, as `penjing.tasks.outputs.flatten_outputs` describes it.
        settings: What the runtime must be told when loading, for example {"INFERENCE_PRECISION_HINT": "f32"}.
        fixed_shapes: Whether the runtime was seen to compile it for fixed input shapes, where that is faster.
        opening_s: Seconds that opening it may take beyond what its size explains: a compiler works then.
    """

    runtime: str
    precision: str
    programs: tuple[Program, ...]
    structure: Any
    settings: dict[str, str] = field(default_factory=dict)
    fixed_shapes: bool = False
    opening_s: int = 0
    format: int = 1

    def files(self) -> tuple[str, ...]:
        """Every file of every program."""
        return tuple(name for program in self.programs for name in program.files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`."""
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        ArtifactError: It is missing or damaged, or names a file outside its folder.
    """
    try:
        manifest = from_dict(Manifest, reading.json_file(folder / MANIFEST))
        _check(manifest)
    except FileNotFoundError:
        raise ArtifactError(
            "there is no artifact in this folder",
            code="no-artifact",
            got=str(folder),
            expected=f"a folder with {MANIFEST}, such as RUN/artifact",
            remedy="name the run folder that `penjing compress` wrote, or its artifact folder",
        ) from None
    except (OSError, ValueError, RecordError) as error:
        raise ArtifactError(f"{MANIFEST} is damaged", code="damaged", got=f"{folder}: {error}") from None
    if not manifest.programs or not all(program.files for program in manifest.programs):
        raise ArtifactError(
            f"{MANIFEST} is damaged", code="damaged", got=f"{folder}: a program without files", expected="a program"
        )
    for name in manifest.files():
        if not _inside(name):
            raise ArtifactError(
                f"{MANIFEST} names a file outside its folder",
                code="outside",
                got=name,
                expected="the name of a file below it",
            )
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(
                f"{MANIFEST} names a link out of its folder", code="outside", got=name, expected="a file inside it"
            )
        if not (folder / name).is_file():
            raise ArtifactError(
                "a file of the artifact is missing",
                code="missing",
                got=str(folder / name),
                expected=list(manifest.files()),
            )
    return manifest


def _inside(name: str) -> bool:
    """Whether it names a file of the folder, or of a folder in it, such as of a Core ML package."""
    parts = name.split("/")
    return all(Path(part).name == part and part not in ("", ".", "..") for part in parts)


def _check(manifest: Manifest) -> None:
    """Raise ValueError where a manifest's values are none that Penjing writes."""
    if not 0 <= manifest.opening_s <= MOST_OPENING_S:
        raise ValueError(f"opening_s = {manifest.opening_s}"[:100])
    for port in (port for program in manifest.programs for port in (*program.inputs, *program.outputs)):
        if np.dtype(_TYPES.get(port.dtype, "O")).hasobject:
            raise ValueError(f"{port.name[:100]!r} is of {port.dtype[:100]!r}")
        sizes = [n for n in port.shape if not isinstance(n, str)]
        if not all(type(n) is int and n >= 0 for n in sizes) or len(port.shape) > MOST_AXES:
            raise ValueError(f"{port.name[:100]!r} has the shape {list(port.shape)}"[:300])
        if math.prod(sizes) > MOST_VALUES:
            raise ValueError(f"{port.name[:100]!r} has {math.prod(sizes):,} values")
    # A program may give more: values of its middle, where they are asked for.
    if manifest.programs and _tensors(manifest.structure) > len(manifest.programs[0].outputs):
        raise ValueError("the structure names more outputs than the program has")


def _tensors(structure: Any) -> int:
    """How many tensors a structure of outputs has (see `penjing.tasks.outputs.flatten_outputs`)."""
    kind = structure.get("kind") if isinstance(structure, dict) else None
    items = structure.get("items") if isinstance(structure, dict) else None
    if kind == "tuple" and isinstance(items, list):
        return sum(map(_tensors, items))
    if kind == "dict" and isinstance(items, dict):
        return sum(map(_tensors, items.values()))
    if kind not in ("tensor", "constant", "none"):
        raise ValueError(f"the outputs are {str(structure)[:100]}")
    return int(kind == "tensor")
