"""An ONNX graph as a module of torch: what `torch.export` captures like any other network.

Every node is a module of its own, called after the node, so that the captured operators know where in the file they
stand; the weights are parameters under their names in the file. Nothing of a graph is compiled or executed as code:
it is read as data, and run operator by operator.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from penjing.onnx_files.node import FAILURES, Node, Value, from_array, is_known, tensor
from penjing.onnx_files.operators import OPERATORS
from penjing.onnx_files.sizes import SIZES


class Operation(nn.Module):
    """One node; called with the values of its inputs, in order.

    Attributes:
        node: The node.
        origin: Where it stands, as a frame of a stack trace says it.
    """

    def __init__(
        self,
        node: Node,
        file: str,
        branches: Mapping[str, Graph] | None = None,
        layer: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.node = node
        self.layer = tuple(layer or ())
        for name, value in (layer or {}).items():
            self.register_parameter(name, nn.Parameter(value))
        self.origin = f'File "{file}", line {node.line}, in {node.operator}\n    {node.name or node.operator}'
        for name, graph in (branches or {}).items():
            self.add_module(name, graph)

    def forward(self, *values: Value) -> Any:
        """The outputs of the node."""
        node = self.node
        sizes = node.operator in SIZES and all(value is None or is_known(value) for value in values)
        function = SIZES[node.operator] if sizes else OPERATORS.get(node.operator)
        if function is None:
            raise node.refuse("no function of torch is known for it", f"operator set {node.opset}")
        # A recurrent layer has its tensors in torch's order. Other weights may lie here because of their names alone.
        stored = {"stored": {name: self._parameters[name] for name in self.layer}} if self.layer else {}
        try:
            return function(node, *values, **stored)
        except FAILURES as error:
            own = isinstance(error, KeyError | ArithmeticError | MemoryError)
            if torch.compiler.is_exporting() and not own:  # torch reads its own errors
                raise
            given = ", ".join(str(list(value.shape)) for value in values if value is not None)
            raise node.refuse(
                "it fails", f"{type(error).__name__}: {' '.join(str(error).split())[:300]} for inputs of shapes {given}"
            ) from error


class Graph(nn.Module):
    """The nodes of a graph in their order, with the constants among its values."""

    # Of the class, so that no node and no weight is called so.
    _order: Sequence[str] = ()
    _freed: Sequence[tuple[str, ...]] = ()

    def __init__(
        self, operations: Iterable[Operation], known: Mapping[str, np.ndarray], outputs: Iterable[str]
    ) -> None:
        super().__init__()
        self._known = dict(known)
        self._outputs = tuple(outputs)
        same: Counter[str] = Counter()
        self._order = [_add(self, operation, same) for operation in operations]
        steps = [self.get_submodule(path) for path in self._order]
        last = {name: i for i, step in enumerate(steps) for name in reads(step)}
        freed: list[list[str]] = [[] for _ in steps]
        for name, at in last.items():
            if name not in self._outputs:
                freed[at].append(name)
        self._freed = [tuple(names) for names in freed]

    def compute(self, values: Mapping[str, Value]) -> list[Value]:
        """The outputs, tensors or known arrays, of what is known before: inputs, weights, values around the graph."""
        values = {"": None, **values, **self._known}
        for path, freed in zip(self._order, self._freed, strict=True):
            step: Any = self.get_submodule(path)
            node = step.node
            if node.operator == "If":
                results: Any = self._branch(step, values)
            else:
                results = step(*[values[name] for name in node.inputs])
            results = results if isinstance(results, tuple | list) else (results,)
            absent = [name for name in node.outputs[len(results) :] if name]
            if absent:
                raise node.refuse("it gives fewer outputs", f"{len(results)}, without {absent[0]!r}")
            values.update(zip(node.outputs, results, strict=False))
            for name in freed:
                values.pop(name, None)
            values[""] = None
        return [values[name] for name in self._outputs]

    def _branch(self, step: Any, values: Mapping[str, Value]) -> list[Value]:
        node = step.node
        condition = values[node.inputs[0]]
        if not is_known(condition):
            raise node.refuse(
                "which branch runs follows from the values of a tensor",
                f"condition {node.inputs[0]!r}",
                remedy="fix that input: give it as a number in Task.example, or export the network without the branch",
                code="branch",
            )
        taken = step.then_branch if bool(np.asarray(condition).reshape(-1)[0]) else step.else_branch
        results: list[Value] = taken.compute(values)
        return results


class OnnxNetwork(Graph):
    """A whole ONNX file as a module: called with its inputs in order or by name.

    Attributes:
        inputs: Names of parameters of `forward` → names in the file.
        declared: The inputs as the file declares them, in words.
        fixed_axes: Axes that the file declares as varying and that can't be, in words.
        fixed_because: Why they can't.
        of_operators: That its modules are operators, after which capturing names the layers whose weights' names are
            numbers (``onnx::Conv_311``).
        types: Of the outputs, as the file declares them.
    """

    inputs: dict[str, str]
    declared: tuple[str, ...] = ()
    fixed_axes: tuple[str, ...] = ()
    fixed_because = "the steps of recurrent layers are written out when a network is captured"
    of_operators = True
    types: Mapping[str, torch.dtype] = {}
    _stored: Mapping[str, str] = {}

    def __init__(
        self,
        operations: Iterable[Operation],
        known: Mapping[str, np.ndarray],
        outputs: Iterable[str],
        weights: Mapping[str, np.ndarray],
        buffers: Iterable[str],
    ) -> None:
        super().__init__(operations, known, outputs)
        self._stored = {name: _store(self, name, value, name in buffers) for name, value in weights.items()}

    @property
    def ports(self) -> dict[str, Any]:
        """Names in the file: of each parameter of `forward`, and of the outputs in their order."""
        return {"inputs": dict(self.inputs), "outputs": self._outputs}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The outputs for inputs by their names in the file: a tensor, or a dict by name where there are several."""
        values = {name: _read(self, path) for name, path in self._stored.items()}
        given = {
            name: value if isinstance(value, torch.Tensor) else np.asarray(value) for name, value in inputs.items()
        }
        computed = zip(self._outputs, self.compute({**values, **given}), strict=True)
        results = [tensor(value, self.types.get(name)) for name, value in computed]
        return results[0] if len(results) == 1 else dict(zip(self._outputs, results, strict=True))


def _store(module: nn.Module, name: str, value: np.ndarray, buffer: bool) -> str:
    """Make a weight a tensor of the module, under its name in the file as far as it can be held; its path."""
    parts = [part for part in name.split(".") if part] or ["weight"]
    owner: Any = module
    for n, part in enumerate(parts[:-1]):
        if part not in owner._modules:
            if hasattr(owner, part):
                parts = [*parts[:n], "_".join(parts[n:])]
                break
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]
    leaf = parts[-1]
    while hasattr(owner, leaf):
        leaf += "_"
    if buffer:
        owner.register_buffer(leaf, from_array(value))
    else:
        owner.register_parameter(leaf, nn.Parameter(from_array(value)))
    return ".".join([*parts[:-1], leaf])


def _read(module: nn.Module, path: str) -> torch.Tensor:
    parent, _, leaf = path.rpartition(".")
    result: torch.Tensor = getattr(module.get_submodule(parent) if parent else module, leaf)
    return result


def _add(graph: nn.Module, operation: Operation, same: Counter[str]) -> str:
    """Make an operation a part of the graph, called after its node, whose name often is a path; where it lies.

    Args:
        graph: Its owner.
        operation: Of a node.
        same: Path → how many operations were called so; it grows.
    """
    words = [_word(part) for part in _scope(operation.node.name)] or [operation.node.operator]
    owner: Any = graph
    for n, word in enumerate(words[:-1]):
        below = owner._modules.get(word)
        if isinstance(below, Operation) or (below is None and hasattr(owner, word)):
            words = [*words[:n], "_".join(words[n:])]
            break
        if below is None:
            owner.add_module(word, nn.Module())
        owner = owner._modules[word]
    path, leaf = ".".join(words), words[-1]
    while hasattr(owner, leaf):
        same[path] += 1
        leaf = f"{words[-1]}_{same[path]}"
    owner.add_module(leaf, operation)
    return ".".join([*words[:-1], leaf])


def _scope(name: str) -> list[str]:
    """The words of a node's name; torch's older exporter repeats those of a Sequential: ``/stage/stage.0/Conv``."""
    parts: list[str] = []
    for part in filter(None, name.split("/")):
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    return [word for part in parts for word in part.split(".") if word]


def _word(text: str) -> str:
    word = re.sub(r"\W", "_", text)
    return f"{word}_" if keyword.iskeyword(word) or hasattr(_PLAIN, word) else word


def reads(step: Any) -> list[str]:
    """Names that a node reads, those of the graphs within it included."""
    names = [*step.node.inputs]
    for branch in (part for part in step.children() if isinstance(part, Graph)):
        names += [name for path in branch._order for name in reads(branch.get_submodule(path))] + [*branch._outputs]
    return names


_PLAIN = nn.Module()

__all__ = ["Graph", "OnnxNetwork", "Operation", "reads"]
