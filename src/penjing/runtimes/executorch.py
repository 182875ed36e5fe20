"""ExecuTorch with XNNPACK on the processor: what it accelerates, export, load, and what it really executes.

A file's sizes that vary have bounds, because memory is set aside for the largest when the file is loaded (see
`penjing.runtimes.executorch_lowering`): more samples are passed in several calls.
"""

from __future__ import annotations

import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import ArtifactError
from penjing.records.manifest import Manifest, Port, Program, sample_axes
from penjing.runtimes.artifact import Executed
from penjing.steps.plan import Capabilities, Formats, QuantSpec, channel_multiple

SETTINGS = {"samples": "together|apart"}
"""What a manifest may tell it, and how that reads: whether more samples than fit may be passed in several calls."""


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Signed integers: activations with a zero point and one scale, weights without one and a scale per channel."""
    return Capabilities(
        runtime="executorch",
        precisions=("fp32", "int8"),
        weight=QuantSpec(bits=8, signed=True, symmetric=True, axis=0),
        activation=QuantSpec(bits=8, signed=True, symmetric=False),
        integer=frozenset({"conv", "linear", "add", "cat", "avg_pool", "conv_transpose"}),
        fuses=frozenset({"relu", "clip"}),
        passthrough=frozenset({"max_pool", "reshape", "transpose"}),
        quantized_output=frozenset({"conv", "linear", "add", "cat", "avg_pool", "conv_transpose"}),
        weights=Formats(symmetric=(True,), per=("tensor", "channel")),
        # Fewer than 8 bits would need a clamp of their own: its kernels write all of int8.
        activations=Formats(bits=(8,), per=("tensor",), grids=("uniform",)),
        dynamic=None,
        channel_multiple=channel_multiple(instruction_sets),
    )


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.pte: fp32, or integers where XNNPACK's kernels have all that they need; other layers in fp32."""
    import torch

    from penjing.network.exporting import input_names, port_names
    from penjing.runtimes import isolated
    from penjing.runtimes.decomposed import decomposed
    from penjing.tasks.outputs import output_names

    args, kwargs = call
    names = input_names(network, args, kwargs)
    values = [*args, *kwargs.values()]
    axes = [_axes(name, i, value, dynamic) for i, (name, value) in enumerate(zip(names, values, strict=True))]
    divisible = _divisible(network, call, axes)
    with tempfile.TemporaryDirectory() as aside:
        crossing = Path(aside) / "crossing.pt2"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(decomposed(network, _of_many(call, axes), dynamic, _for_kernels), crossing)
        target = str(folder.absolute() / "model.pte")
        results = isolated.call("executorch", "lower", crossing, target, axes, divisible, more_s=LOWERING_S)
    inputs, outputs = port_names(network, names, output_names(structure))
    ports = [
        Port(name=word, dtype=_dtype(value), shape=tuple(own.get(str(i), size) for i, size in enumerate(value.shape)))
        for word, value, own in zip(inputs, values, axes, strict=True)
    ]
    results = [
        Port(name=word, dtype=dtype, shape=tuple(sizes)) for word, (dtype, sizes) in zip(outputs, results, strict=True)
    ]
    return Manifest(
        runtime="executorch",
        precision=precision,
        programs=(Program(name="main", files=("model.pte",), inputs=tuple(ports), outputs=tuple(results)),),
        structure=structure,
        settings={"samples": "apart" if divisible else "together"},
    )


def _for_kernels(network: Any, readers: list[Any], stored: Any) -> bool:
    """Whether weights stay in integers: XNNPACK's kernels read integers, and write integers for one reader.

    Where one of both is missing the layer computes in floating point, with the values that the integers stand for.
    """
    from penjing.runtimes.decomposed import narrow

    return narrow(network, readers, stored) and all(_reads_and_writes_integers(network, node) for node in readers)


def _reads_and_writes_integers(network: Any, node: Any) -> bool:
    from penjing.network.graph import kind
    from penjing.runtimes.decomposed import IDLE

    if kind(network, node) not in ("conv", "conv_transpose", "linear"):
        return False
    end = node
    while len(end.users) == 1 and kind(network, next(iter(end.users))) in ("relu", "clip", *IDLE):
        end = next(iter(end.users))
    # Penjing's quantizers, or torch's, if they have been written already.
    before, behind = str(node.args[0].target), [str(user.target) for user in end.users]
    return ".dequantize" in before and len(behind) == 1 and ".quantize" in behind[0]


LOWERING_S = 300.0  # beyond what a file's size explains: a network of six layers took 12 s of one core
MANY = 19
"""Samples of the example that is lowered: torch asks whether sizes are equal, and one of two would often equal another;
for a convolution it asks whether they are below 16. It holds the answers for true of every number of samples."""


def _of_many(call: Any, axes: list[dict[str, str]]) -> Any:
    """The call with its samples repeated."""
    import torch

    args, kwargs = call
    batch = _batch(axes)

    def many(value: Any, words: dict[str, str]) -> Any:
        axis = next((int(axis) for axis, word in words.items() if word == batch), None)
        if axis is None:
            return value
        return torch.cat([value] * -(-MANY // value.shape[axis]), axis).narrow(axis, 0, MANY).clone()

    values = [many(value, words) for value, words in zip([*args, *kwargs.values()], axes, strict=True)]
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _batch(axes: list[dict[str, str]]) -> str | None:
    """Name of the axis of samples: the first one of an input that varies."""
    return next((words["0"] for words in axes if "0" in words), None)


def _axes(name: str, position: int, value: Any, dynamic: Any) -> dict[str, str]:
    """Axis of an input that varies, as text → its name."""
    axes = {0: "batch"} if dynamic is None else dynamic.get(name, dynamic.get(position, {}))
    return {str(axis): word for axis, word in axes.items() if axis < value.dim()}


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _divisible(network: Any, call: Any, axes: list[dict[str, str]]) -> bool:
    """Whether two samples get the same answers alone, so that several calls answer as one does."""
    import torch

    from penjing.tasks.outputs import flatten_outputs

    args, kwargs = call
    values = [*args, *kwargs.values()]
    batch = _batch(axes)
    if batch is None:
        return False
    own = [next((int(axis) for axis, word in words.items() if word == batch), None) for words in axes]

    def two(value: torch.Tensor, axis: int) -> torch.Tensor:
        other = value * 0.5 if value.shape[axis] == 1 and value.is_floating_point() else value
        return torch.cat([value.narrow(axis, 0, 1), other.narrow(axis, -1, 1)], axis)

    pairs = [v if axis is None else two(v, axis) for v, axis in zip(values, own, strict=True)]

    def run(first: int, count: int) -> list[torch.Tensor]:
        mine = [v if axis is None else v.narrow(axis, first, count) for v, axis in zip(pairs, own, strict=True)]
        results = network(*mine[: len(args)], **dict(zip(kwargs, mine[len(args) :], strict=True)))
        return flatten_outputs(results)[0]

    with torch.no_grad():
        both, one, other = run(0, 2), run(0, 1), run(1, 1)
    return all(_joined(*results) for results in zip(both, one, other, strict=True))


def _joined(whole: Any, one: Any, other: Any) -> bool:
    """Whether two results, one behind the other, are the third but for roundings."""
    import torch

    if whole.dim() == 0 or (len(whole), len(one), len(other)) != (2, 1, 1):
        return False
    parts = torch.cat([one, other])
    error = (whole.double() - parts.double()).nan_to_num().square().sum()
    return bool(error <= 1e-3 * whole.double().nan_to_num().square().sum())


def lower(path: str, file: str, axes: list[dict[str, str]], divisible: bool) -> list[list[Any]]:
    """Write a .pte file from an exported program; type and sizes of its outputs."""
    from penjing.runtimes.executorch_lowering import lower

    return lower(path, file, axes, divisible)


APART = ("lower",)
"""What else is done in a process of its own (see `penjing.runtimes.isolated`)."""

_sessions: weakref.WeakSet[_Session] = weakref.WeakSet()


class _Session:
    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        self.path, self.threads = folder / manifest.programs[0].files[0], threads
        self.ports, self.apart = manifest.programs[0].inputs, manifest.settings.get("samples") == "apart"
        self.axes = sample_axes(self.ports)
        self.method: Any = self._loaded()
        _sessions.add(self)
        meta = self.method.metadata
        self.largest = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]

    def _loaded(self) -> Any:
        from executorch.runtime import Runtime

        _use_threads(self.threads)
        return Runtime.get().load_program(self.path).load_method("forward")

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        if self.method is None or _threads() != self.threads:
            self.method = self._loaded()
        sizes = [
            (x.shape[a], most[a]) for x, a, most in zip(inputs, self.axes, self.largest, strict=True) if a is not None
        ]
        samples, most = max((s for s, _ in sizes), default=0), min((m for _, m in sizes), default=0)
        if samples <= most or not self.apart:
            self._check(inputs)
            return self._call(inputs)
        parts = []
        for start in range(0, samples, most):
            own = [
                x if a is None else np.take(x, range(start, min(start + most, x.shape[a])), a)
                for x, a in zip(inputs, self.axes, strict=True)
            ]
            self._check(own)
            parts.append(self._call(own))
        return [np.concatenate(results) for results in zip(*parts, strict=True)]

    def _call(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        import torch

        results = self.method.execute([torch.from_numpy(np.ascontiguousarray(x)) for x in inputs])
        return [result.numpy() for result in results]

    def _check(self, inputs: list[np.ndarray]) -> None:
        """Raise ArtifactError where an input is larger than the memory that was set aside for it."""
        for x, port, largest in zip(inputs, self.ports, self.largest, strict=True):
            if any(size > most for size, most in zip(x.shape, largest, strict=True)):
                raise ArtifactError(
                    f"the artifact can't take an input of this size: {port.name}",
                    code="size",
                    got=x.shape,
                    expected=f"at most {largest}",
                    remedy="ExecuTorch sets memory aside for the largest sizes when a file is loaded: pass fewer "
                    "samples at a time, or choose another runtime",
                )


def _threads() -> int:
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count

    return int(_threadpool_get_thread_count())


def _use_threads(count: int) -> None:
    """Give the process a pool of that many threads. What was loaded with another one has to be loaded again."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    if _threads() != count:
        for session in _sessions:
            session.method = None
        _unsafe_reset_threadpool(count)


def open_session(folder: Path, manifest: Manifest, threads: int) -> _Session:
    """Open model.pte; the number of threads is that of the process."""
    return _Session(folder, manifest, threads)


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """The operators of the file: those of XNNPACK's delegates, and those of ExecuTorch's own kernels."""
    from penjing.runtimes.executorch_graph import operators

    open_session(folder, manifest, 1)
    return operators((folder / manifest.programs[0].files[0]).read_bytes())


LOAD = '''\
"""Open this artifact with ExecuTorch: ``from load import predict``. Needs: numpy, executorch.

ExecuTorch's Python package brings torch, as it takes and gives torch's tensors; its runtime for C++ needs neither.
"""
@ALONE@import json, os, pathlib
import numpy as np
import torch
from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
from executorch.runtime import Runtime

HERE = pathlib.Path(__file__).resolve().parent / "@FOLDER@"
MANIFEST = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
PROGRAM = MANIFEST["programs"][0]
_unsafe_reset_threadpool(int(os.environ.get("THREADS", @THREADS@)))  # before anything is loaded
program = Runtime.get().load_program(HERE / PROGRAM["files"][0])
method = program.load_method("forward")
PORTS = PROGRAM["inputs"]
LARGEST = [tuple(method.metadata.input_tensor_meta(i).sizes()) for i in range(len(PORTS))]  # memory is set aside for
BATCH = next((port["shape"][0] for port in PORTS if port["shape"] and isinstance(port["shape"][0], str)), None)
AXES = [port["shape"].index(BATCH) if BATCH in port["shape"] else None for port in PORTS]  # of the samples


def call(inputs):
    """One call. ExecuTorch compares numbers of values alone, and would read other sizes as its own."""
    for x, port, most in zip(inputs, PORTS, LARGEST):
        if len(x.shape) != len(most) or any(
            n > m or (n != m and not isinstance(own, str)) for n, m, own in zip(x.shape, most, port["shape"])
        ):
            raise ValueError(f"{port['name']} is {x.shape}, and the file takes at most {most}")
    return [x.numpy() for x in method.execute([torch.from_numpy(x) for x in inputs])]


def run(inputs):
    """Flat list of arrays in, flat list of arrays out; more samples than the file takes are passed in several calls."""
    counts = [(x.shape[a], most[a]) for x, a, most in zip(inputs, AXES, LARGEST) if a is not None]
    samples, most = max((n for n, _ in counts), default=0), min((m for _, m in counts), default=0)
    if samples <= most or MANIFEST["settings"].get("samples") != "apart":  # samples may depend on each other
        return call(inputs)
    parts = [
        call([x if a is None else np.ascontiguousarray(np.take(x, range(i, min(i + most, samples)), a))
              for x, a in zip(inputs, AXES)])
        for i in range(0, samples, most)
    ]
    return [np.concatenate(results) for results in zip(*parts)]

'''
