"""Core ML on Apple's devices: what it accelerates, export, and load; a package is written anywhere, and runs on a Mac.

Elsewhere `penjing.runtimes.coreml_reading` computes what the package says, operator by operator, so that it can be
compared with its plan.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from penjing.records.manifest import Manifest, Program
from penjing.runtimes.artifact import Executed
from penjing.steps.plan import Capabilities, Formats, QuantSpec

PACKAGE = "model.mlpackage"
_SHORTER = {"int64": "int32", "float64": "float32", "bool": "int32"}  # of a package's inputs

SETTINGS: dict[str, str] = {}
"""What a manifest may tell it, and how that reads."""


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Signed integers without a zero point, whose scales float16 has: the Neural Engine computes in it.

    coremltools' own quantizer of activations takes the same format (`linear_quantize_activations`); the A17 Pro and the
    M4 multiply integers, others compute in float16 with integer weights.
    """
    return Capabilities(
        runtime="coreml",
        precisions=("fp32", "fp16", "int8-fp16", "int8"),
        weight=QuantSpec(bits=8, signed=True, symmetric=True, axis=0, scale="half"),
        activation=QuantSpec(bits=8, signed=True, symmetric=True, narrow=False, scale="half"),
        integer=frozenset({"conv", "linear", "add", "avg_pool", "matmul"}),
        fuses=frozenset({"relu", "clip"}),
        passthrough=frozenset({"max_pool", "pad", "reshape", "transpose"}),
        weights=Formats(symmetric=(True,), per=("tensor", "channel")),
        activations=Formats(bits=(8,), symmetric=(True,), per=("tensor",), grids=("uniform",)),
        dynamic=None,
        stored=frozenset(),
        notes=("the Neural Engine takes fp16 and int8-fp16",),
    )


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.mlpackage; "int8" computes what is not in integers in float32, "int8-fp16" in float16."""
    from penjing.runtimes import coreml_convert, coreml_program, isolated
    from penjing.tasks.outputs import output_names

    with tempfile.TemporaryDirectory() as aside:
        inputs, outputs = coreml_program.save(network, call, dynamic, output_names(structure), Path(aside))
        names = [[port.name for port in ports] for ports in (inputs, outputs)]
        package = str(folder.absolute() / PACKAGE)
        isolated.call("coreml", "convert", Path(aside), package, precision in ("fp16", "int8-fp16"), *names)
    files = tuple(f"{PACKAGE}/{name}" for name in coreml_convert.FILES)
    program = Program(name="main", files=files, inputs=inputs, outputs=outputs)
    return Manifest(runtime="coreml", precision=precision, programs=(program,), structure=structure)


def convert(folder: str, package: str, half: bool, inputs: list[str], outputs: list[str]) -> None:
    """See `penjing.runtimes.coreml_convert.convert`, which brings torch."""
    from penjing.runtimes import coreml_convert

    coreml_convert.convert(folder, package, half, inputs, outputs)


APART = ("convert",)
"""What is done in a process of its own (see `penjing.runtimes.isolated`)."""


def _narrowed(inputs: list[np.ndarray]) -> list[np.ndarray]:
    return [x.astype(_SHORTER.get(str(x.dtype), x.dtype)) for x in inputs]


class _Session:
    """Core ML itself, on a Mac. It has no word for threads."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        import coremltools

        self.model = coremltools.models.MLModel(str(folder / PACKAGE))
        self.inputs, self.outputs = ([port.name for port in p] for p in _ports(manifest))

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        answer = self.model.predict(dict(zip(self.inputs, _narrowed(inputs), strict=True)))
        return [np.asarray(answer[name]) for name in self.outputs]


class _Reading:
    """The package as it is read elsewhere."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        from penjing.runtimes.coreml_reading import Reading

        self.reading = Reading(folder / PACKAGE)
        self.inputs, outputs = _ports(manifest)
        self.types = [port.dtype for port in outputs]

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        names = [port.name for port in self.inputs]
        answers = self.reading.run(dict(zip(names, _narrowed(inputs), strict=True)))
        return [answer.astype(kind) for answer, kind in zip(answers, self.types, strict=True)]


def _ports(manifest: Manifest) -> Any:
    return manifest.programs[0].inputs, manifest.programs[0].outputs


def open_session(folder: Path, manifest: Manifest, threads: int) -> _Session | _Reading:
    """Open the package: in Core ML on a Mac, elsewhere as Penjing reads it."""
    return _Session(folder, manifest) if sys.platform == "darwin" else _Reading(folder, manifest)


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """Nothing: the graph that Core ML makes of a package is not shown."""
    return []


LOAD = '''\
"""Open this artifact with Core ML, on a Mac: ``from load import predict``. Needs: numpy, coremltools."""
@ALONE@import json, os, pathlib
import numpy as np
import coremltools

HERE = pathlib.Path(__file__).resolve().parent / "@FOLDER@"
MANIFEST = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
PROGRAM = MANIFEST["programs"][0]
THREADS = int(os.environ.get("THREADS", @THREADS@))  # Core ML has no word for it
SHORTER = {"int64": "int32", "float64": "float32", "bool": "int32"}
model = coremltools.models.MLModel(str(HERE / "model.mlpackage"))


def run(inputs):
    """Flat list of arrays in, flat list of arrays out."""
    named = {port["name"]: np.asarray(x) for port, x in zip(PROGRAM["inputs"], inputs)}
    named = {name: x.astype(SHORTER.get(str(x.dtype), x.dtype)) for name, x in named.items()}
    answer = model.predict(named)
    return [np.asarray(answer[port["name"]]) for port in PROGRAM["outputs"]]

'''
