"""A Core ML package computed in torch, from its own files: the stand-in for Core ML on other systems than macOS.

It reads the program and the weights back with coremltools, and computes operator by operator. Every result is rounded
to the type that the package gives it; sums are float32. Core ML itself chooses kernels and orders of summation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from penjing.errors import ArtifactError
from penjing.runtimes.coreml_convert import SPEC, WEIGHTS
from penjing.runtimes.coreml_operators import OPERATORS, rounded


def program(package: Path) -> Any:
    """The program of a package, as coremltools reads it."""
    from coremltools.converters.mil.frontend.milproto import load
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()  # not by coremltools' MLModel, which writes the package's list of contents anew
    spec.ParseFromString((package / SPEC).read_bytes())
    return load.load(spec, spec.specificationVersion, str((package / WEIGHTS).parent)).functions["main"]


def weights(function: Any) -> dict[str, dict[str, np.ndarray]]:
    """The compressed tensors of a program: name → "data", "scale" and "offset", or "indices" and "lut"."""
    return {
        op.outputs[0].name: {name: np.asarray(v.val) for name, v in op.inputs.items() if v is not None}
        for op in function.operations
        if op.op_type.startswith("constexpr_")
    }


class Reading:
    """A package, and what it computes."""

    def __init__(self, package: Path) -> None:
        self.function = program(package)
        unknown = sorted({op.op_type for op in self.function.operations if not _constant(op)} - OPERATORS.keys())
        if unknown:
            raise ArtifactError(
                "Penjing's reading of Core ML packages does not know an operator of this one",
                code="unread",
                got=", ".join(unknown),
                expected=f"one of {', '.join(sorted(OPERATORS))}",
                remedy="on a Mac Core ML itself computes it",
            )
        self.stored: dict[Any, Any] = {}
        for op in self.function.operations:
            if _constant(op):
                (output,) = op.outputs
                value = output.val if op.op_type == "const" else op.materialized_val_inference()
                self.stored[output] = _tensor(value)

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs, in the program's order, for inputs by name."""
        values = dict(self.stored)
        for name, var in self.function.inputs.items():
            values[var] = rounded(torch.from_numpy(np.ascontiguousarray(inputs[name])), _type(var))
        with torch.inference_mode():
            for op in self.function.operations:
                if _constant(op):
                    continue
                result = OPERATORS[op.op_type](**{n: _value(v, values) for n, v in op.inputs.items() if v is not None})
                results = result if isinstance(result, tuple) else (result,)
                for var, tensor in zip(op.outputs, results, strict=False):
                    values[var] = rounded(tensor, _type(var))
        return [values[var].numpy() for var in self.function.outputs]


def _constant(op: Any) -> bool:
    return bool(op.op_type == "const" or op.op_type.startswith("constexpr_"))


def _type(var: Any) -> str:
    from coremltools.converters.mil.mil import types

    name: str = types.builtin_to_string(var.dtype)
    return name


def _value(var: Any, values: dict[Any, Any]) -> Any:
    if isinstance(var, tuple | list):
        return [_value(v, values) for v in var]
    return values[var] if var in values else _tensor(var.val)


def _tensor(value: Any) -> Any:
    """A stored value: a tensor, in float32 where it is float16, or a number or a word."""
    if isinstance(value, np.ndarray):
        array = value.astype(np.float32) if value.dtype == np.float16 else value
        return torch.from_numpy(np.ascontiguousarray(array)) if array.ndim else array.item()
    return value.item() if isinstance(value, np.generic) else value
