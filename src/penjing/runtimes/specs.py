"""What is known about every runtime without importing it: one row each."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a runtime works that does not work on every machine.

    Attributes:
        name: In words.
        here: Whether this machine is one.
    """

    name: str
    here: Callable[[], bool]


def _nvidia() -> bool:
    return importlib.util.find_spec("tensorrt") is not None and Path("/dev/nvidiactl").exists()


MAC = Place(name="a Mac", here=lambda: sys.platform == "darwin")
NVIDIA = Place(name="a machine with an NVIDIA GPU and the package tensorrt", here=_nvidia)


@dataclass(frozen=True, kw_only=True)
class RuntimeSpec:
    """What is known about a runtime without importing it.

    Attributes:
        name: As users and manifests write it.
        module: Of `penjing.runtimes`, with the functions of `Runtime`.
        suffixes: Of an artifact's files, where all are of one name: of the one that it opens, and of those beside it.
        packages: What has to be installed, as Python imports it.
        distributions: What pip calls those of them that have another name there.
        deployed: Whether a device loads an artifact without torch; of some, the package for Python brings it along.
        by_default: Whether `compress` considers it when no runtime is named; the others are for other devices than
            this one, or take minutes.
        in_process: Whether it works in the process of the run, and not in one of its own: what the run stands on.
        compiles: Whether it needs a C++ compiler: the one that the environment variable CXX names, or the system's.
        shows_operators: Whether it makes a graph of its own of an artifact, which `executed` tells.
        times_operators: Whether its module has `profile`.
        shows_values: Whether its module has `expose`.
        importing_s: Seconds that importing it may take beyond what is usual, on a busy machine.
        levels: Whether it takes networks alone that have binary or ternary layers, so that the source itself is not
            measured in it.
        place: Where it runs what it exports everywhere; None: here. Elsewhere an artifact is not timed, and not
            offered: `stand_in` computes it, to be compared with its plan.
        stand_in: What computes an artifact where the runtime itself does not run, in words.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    distributions: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    deployed: bool = True
    by_default: bool = True
    in_process: bool = False
    compiles: bool = False
    shows_operators: bool = True
    times_operators: bool = False
    shows_values: bool = False
    importing_s: int = 0
    levels: bool = False
    place: Place | None = None
    stand_in: str = ""


SPECS: dict[str, RuntimeSpec] = {
    spec.name: spec
    for spec in (
        RuntimeSpec(
            name="onnxruntime",
            module="penjing.runtimes.onnxruntime",
            packages=("onnxruntime", "onnx", "onnxscript"),
            suffixes=(".onnx",),
            shows_values=True,
        ),
        RuntimeSpec(
            name="openvino",
            module="penjing.runtimes.openvino",
            packages=("openvino", "onnx", "onnxscript"),
            suffixes=(".xml", ".bin"),
            times_operators=True,
            shows_values=True,
        ),
        RuntimeSpec(
            name="ncnn",
            module="penjing.runtimes.ncnn",
            packages=("ncnn", "pnnx"),
            suffixes=(".param", ".bin"),
            by_default=False,
        ),
        RuntimeSpec(
            name="executorch",
            module="penjing.runtimes.executorch",
            packages=("executorch",),
            suffixes=(".pte",),
            by_default=False,
        ),
        RuntimeSpec(
            name="torch",
            module="penjing.runtimes.eager",
            packages=("torch",),
            deployed=False,
            in_process=True,
            shows_operators=False,
        ),
        RuntimeSpec(
            name="torch-compile",
            module="penjing.runtimes.compiled",
            packages=("torch",),
            deployed=False,
            compiles=True,
        ),
        RuntimeSpec(
            name="litert",
            module="penjing.runtimes.litert",
            packages=("ai_edge_litert", "litert_torch"),
            suffixes=(".tflite",),
            by_default=False,
        ),
        RuntimeSpec(
            name="tvm",
            module="penjing.runtimes.tvm",
            packages=("tvm",),
            distributions=("apache-tvm",),
            suffixes=(".so",),
            by_default=False,
            shows_operators=False,
        ),
        RuntimeSpec(
            name="kernels",
            module="penjing.runtimes.kernels",
            packages=("tvm",),
            distributions=("apache-tvm",),
            suffixes=(".so",),
            by_default=False,
            levels=True,
        ),
        RuntimeSpec(
            name="coreml",
            module="penjing.runtimes.coreml",
            packages=("coremltools",),
            suffixes=(".mlpackage",),
            by_default=False,
            shows_operators=False,
            importing_s=120,
            place=MAC,
            stand_in="Penjing's own reading of the package",
        ),
        RuntimeSpec(
            name="tensorrt",
            module="penjing.runtimes.tensorrt",
            packages=("onnxruntime", "onnx", "onnxscript"),
            suffixes=(".onnx", ".sh"),
            by_default=False,
            shows_operators=False,
            shows_values=True,
            place=NVIDIA,
            stand_in="ONNX Runtime, which computes the same file",
        ),
    )
}
"""Every runtime, each in one row."""

DEPLOYED = tuple(name for name, spec in SPECS.items() if spec.deployed and spec.by_default)
"""Those that are considered when none is named."""

AUTO = "auto"
"""What stands for the one of these that the source is fastest in."""

ALL = "all"
"""What stands for every runtime that is installed and loads an artifact without torch."""
