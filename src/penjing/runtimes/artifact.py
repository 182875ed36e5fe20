"""Opened artifacts: how they are called, and what a runtime made of their operators."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from penjing.errors import TaskError
from penjing.records.manifest import Manifest, Port, Program, read_manifest, sample_axes

__all__ = ["Checked", "Executed", "Timed", "arrange", "check_inputs", "predictor", "read_manifest"]


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


class Checked:
    """A session whose inputs are compared with the manifest before a runtime sees them.

    Some runtimes read an array of another shape or type as if it were their own, or end the process.
    """

    def __init__(self, session: Any, program: Program) -> None:
        self.session, self.program = session, program
        self.form: list[Any] = []  # of the last inputs: those of a loop have one
        self.empty: list[tuple[int, ...]] | None = None

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call; inputs and outputs in the order of the manifest.

        Raises:
            TaskError: The inputs are not those of the manifest.
        """
        inputs = narrowed(self.program.inputs, inputs)
        form = [(x.shape, x.dtype) for x in inputs]
        if form != self.form:
            check_inputs(self.program.inputs, inputs)
            self.form, self.empty = form, _of_nothing(self.program, inputs)
        if self.empty is not None:
            return [np.zeros(size, p.dtype) for size, p in zip(self.empty, self.program.outputs, strict=True)]
        results: list[np.ndarray] = self.session.run(inputs)
        return results


def narrowed(ports: tuple[Port, ...], inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Integers in int64, as torch has tokens and stored samples are, in the int32 of a runtime that has no int64.

    >>> [x.dtype.name for x in narrowed((Port(name="ids", dtype="int32", shape=(2,)),), [np.zeros(2, np.int64)])]
    ['int32']
    """
    if len(inputs) != len(ports):
        return inputs  # check_inputs says so
    return [
        x.astype(np.int32) if port.dtype == "int32" and x.dtype == np.int64 else x
        for port, x in zip(ports, inputs, strict=True)
    ]


def check_inputs(ports: tuple[Port, ...], inputs: list[np.ndarray]) -> None:
    """Compare arrays with the inputs of a program.

    Raises:
        TaskError: Their number, the type or the shape of one differs, or sizes of one name do.
    """
    if len(inputs) != len(ports):
        raise TaskError(
            "the artifact was called with another number of inputs",
            code="inputs", got=f"{len(inputs)} arrays", expected=[port.name for port in ports],
        )  # fmt: skip
    sizes: dict[str, int] = {}
    for port, x in zip(ports, inputs, strict=True):
        if x.dtype != np.dtype(port.dtype):  # in the byte order of this machine
            raise TaskError(
                f"the input {port.name} is of another type", code="dtype", got=str(x.dtype), expected=port.dtype
            )
        fits = len(port.shape) == x.ndim and all(
            sizes.setdefault(own, n) == n if isinstance(own, str) else own == n
            for own, n in zip(port.shape, x.shape, strict=True)
        )
        if not fits:
            raise TaskError(
                f"the input {port.name} has another shape than the artifact takes",
                code="shape", got=list(x.shape), expected=[sizes.get(n, n) for n in port.shape],
                remedy="sizes that vary are named in Task(dynamic=…)",
            )  # fmt: skip


def _of_nothing(program: Program, inputs: list[np.ndarray]) -> list[tuple[int, ...]] | None:
    """The shapes of the outputs of no sample at all, if there is none and they have none either."""
    axes = sample_axes(program.inputs)
    axis, x, port = next(
        ((a, x, port) for a, x, port in zip(axes, inputs, program.inputs, strict=True) if a is not None),
        (None, None, None),
    )
    if axis is None or x is None or port is None or x.shape[axis]:
        return None
    word = port.shape[axis]
    shapes = [tuple(0 if n == word else n for n in output.shape) for output in program.outputs]
    known = all(isinstance(n, int) for shape in shapes for n in shape)
    return shapes if known and all(word in output.shape for output in program.outputs) else None


def predictor(session: Any, manifest: Manifest) -> Callable[..., Any]:
    """`predict` for a session: called as the network is called, NumPy in, NumPy out, in the network's structure."""
    from penjing.tasks.outputs import unflatten_outputs  # brings torch, which opening an artifact does not need

    ports = manifest.programs[0].inputs

    def predict(*args: Any, **kwargs: Any) -> Any:
        return unflatten_outputs(session.run(arrange(ports, args, kwargs)), manifest.structure)

    return predict


def arrange(ports: tuple[Port, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[np.ndarray]:
    """Positional and keyword inputs in the order and the types of the ports.

    A name that is not an identifier is taken with underscores, too, as the network's own forward takes it.
    """
    words = [port.name if port.name in kwargs else re.sub(r"\W", "_", port.name) for port in ports]
    values = list(args) + [kwargs[word] for word in words[len(args) :] if word in kwargs]
    if len(values) != len(ports) or len(args) + len(kwargs) != len(ports):
        raise TaskError(
            "the artifact was called with inputs that do not match its own",
            code="inputs",
            got=f"{len(args)} positional and {sorted(kwargs)}",
            expected=f"{[p.name for p in ports]}",
        )
    # NumPy gives an array without axes one.
    return [
        np.ascontiguousarray(np.asarray(v), dtype=p.dtype).reshape(np.shape(v))
        for v, p in zip(values, ports, strict=True)
    ]
