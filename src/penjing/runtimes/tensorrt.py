"""TensorRT on NVIDIA's GPUs: an ONNX file that obeys its rules of explicit quantization, and the builder's command.

Where there is a GPU and the package tensorrt, an engine is built and run; elsewhere ONNX Runtime computes the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penjing.records.manifest import Manifest, Port, Program
from penjing.runtimes import NVIDIA, onnxruntime, tensorrt_engine
from penjing.runtimes.artifact import Executed
from penjing.steps.plan import Capabilities, Formats, QuantSpec

SETTINGS = {"shapes": "[A-Za-z0-9_.=:;]*"}
"""What a manifest may tell it, and how that reads."""
APART = ()
"""What else is done in a process of its own (see `penjing.runtimes.isolated`)."""
MOST = 64
"""The largest batch that an engine is built for."""
LONGER = 4
"""By this factor other sizes that vary may exceed the example's."""
_FILES = ("model.onnx", "model.sh")


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Signed integers without a zero point, one scale for an activation, one for every output channel of a weight."""
    return Capabilities(
        runtime="tensorrt",
        precisions=("fp32", "int8"),
        weight=QuantSpec(bits=8, signed=True, symmetric=True, axis=0),
        activation=QuantSpec(bits=8, signed=True, symmetric=True, narrow=False),
        integer=frozenset({"conv", "linear", "add", "matmul"}),
        fuses=frozenset({"relu", "clip"}),
        passthrough=frozenset({"max_pool", "reshape", "transpose"}),
        weights=Formats(symmetric=(True,), per=("tensor", "channel")),
        activations=Formats(bits=(8,), symmetric=(True,), per=("tensor",), grids=("uniform",)),
        dynamic=None,
        stored=frozenset(),
    )


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.onnx, and model.sh with the builder's command.

    Raises:
        ExportError: The file breaks one of TensorRT's rules; names the layer.
    """
    import onnx

    from penjing.onnx_files import rewrites, tensorrt_rules
    from penjing.onnx_files import write as onnx_file
    from penjing.tasks.outputs import output_names

    path = folder / _FILES[0]
    inputs, outputs = onnx_file.write(network, call, dynamic, output_names(structure), path)
    if precision == "int8":
        model = onnx.load(str(path))
        tensorrt_rules.obey(model)
        rewrites.drop_unread(model)
        tensorrt_rules.check(model)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString(deterministic=True))
    args, kwargs = call
    shapes = _shapes(inputs, [*args, *kwargs.values()])
    (folder / _FILES[1]).write_text(_command(shapes), encoding="utf-8")
    return Manifest(
        runtime="tensorrt",
        precision=precision,
        programs=(Program(name="main", files=_FILES, inputs=inputs, outputs=outputs),),
        structure=structure,
        settings={"shapes": shapes},
    )


def _shapes(ports: Sequence[Port], values: Sequence[Any]) -> str:
    """The smallest, the usual and the largest shape of inputs that vary: one sample, and the example's other sizes."""
    parts = []
    for port, value in zip(ports, values, strict=True):
        if not any(isinstance(n, str) for n in port.shape):
            continue
        rows = []
        for other, batch in ((0, 1), (1, 1), (LONGER, MOST)):
            sizes = [
                n if isinstance(n, int) else batch if axis == 0 else max(1, own * other)
                for axis, (n, own) in enumerate(zip(port.shape, value.shape, strict=True))
            ]
            rows.append("x".join(map(str, sizes)))
        parts.append(f"{port.name}={':'.join(rows)}")
    return ";".join(parts)


def _command(shapes: str) -> str:
    """A script that builds the engine of the ONNX file beside it that has its own name."""
    rows = tensorrt_engine.shapes_of(shapes)
    lines = []
    for i, word in enumerate(("min", "opt", "max") if rows else ()):
        sizes = ["x".join(map(str, row[i])) for row in rows.values()]
        lines.append(f"--{word}Shapes=" + ",".join(f"{name}:{n}" for name, n in zip(rows, sizes, strict=True)))
    options = " \\\n  ".join(['--onnx="$file.onnx"', '--saveEngine="$file.engine"', "--stronglyTyped", *lines])
    return f'#!/bin/sh\n# Builds the engine on the GPU that it is for.\nfile="${{0%.sh}}"\ntrtexec {options}\n'


class _Session:
    """An engine. It has no word for threads."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        program = manifest.programs[0]
        self.engine = tensorrt_engine.Engine(str(folder / program.files[0]), manifest.settings["shapes"])
        self.inputs = [port.name for port in program.inputs]
        self.outputs = [port.name for port in program.outputs]

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return self.engine.run(dict(zip(self.inputs, inputs, strict=True)), self.outputs)


def open_session(folder: Path, manifest: Manifest, threads: int) -> Any:
    """Build an engine where there is a GPU, and open the same file in ONNX Runtime elsewhere."""
    if NVIDIA.here():
        return _Session(folder, manifest)
    return onnxruntime.open_session(folder, manifest, threads)


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """Nothing: what an engine makes of the file is not shown."""
    return []


expose = onnxruntime.expose

LOAD = (
    '''\
"""Open this artifact with TensorRT: ``from load import predict``. Needs: numpy, tensorrt, torch."""
@ALONE@import json, os, pathlib
from typing import Any
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent / "@FOLDER@"
MANIFEST = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
PROGRAM = MANIFEST["programs"][0]
THREADS = int(os.environ.get("THREADS", @THREADS@))  # TensorRT has no word for it


'''
    + inspect.getsource(tensorrt_engine.shapes_of)
    + "\n\n"
    + inspect.getsource(tensorrt_engine.Engine)
    + '''

engine = Engine(str(HERE / PROGRAM["files"][0]), MANIFEST["settings"]["shapes"])


def run(inputs):
    """Flat list of arrays in, flat list of arrays out."""
    named = {port["name"]: x for port, x in zip(PROGRAM["inputs"], inputs)}
    return engine.run(named, [port["name"] for port in PROGRAM["outputs"]])

'''
)
