"""Writing operators into an exported program, each with an example value, as the exporter does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.utils import _pytree as pytree

aten = torch.ops.aten
END = 2**63 - 1  # ATen's "to the end"


def editable(program: ExportedProgram) -> ExportedProgram:
    """Return a copy whose graph, signature and constants can be edited; tensors are shared."""
    program = copy.copy(program)
    program._graph_module = copy.deepcopy(program.graph_module)
    program._graph_signature = copy.deepcopy(program.graph_signature)
    program._constants = dict(program.constants)
    program._state_dict = dict(program.state_dict)
    return program


class Builder:
    """Writes operators in front of the one being rewritten, each with its shape as in an exported program."""

    def __init__(self, program: ExportedProgram, node: fx.Node) -> None:
        self.program = program
        self.node = node

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Write an operator; its arguments are nodes and literals."""
        with self.node.graph.inserting_before(self.node):
            new = self.node.graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace", "torch_fn"):
            if key in self.node.meta:
                new.meta[key] = self.node.meta[key]
        values = fx.node.map_arg((args, kwargs), self.value)
        with self._fake_mode(), torch.no_grad():
            new.meta["val"] = target(*values[0], **values[1])
        return new

    def constant(self, value: torch.Tensor) -> Any:
        """Store a tensor with the program."""
        names = {spec.target for spec in self.program._graph_signature.input_specs}
        name = next(name for i in itertools.count() if (name := f"constant_of_{self.node.name}_{i}") not in names)
        first = next(node for node in self.program.graph.nodes if node.op == "placeholder")
        with self.program.graph.inserting_before(first):
            new = self.program.graph.placeholder(f"c_{name}")
        new.meta["val"] = self._fake_mode().from_tensor(value, static_shapes=True)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=new.name), name)
        self.program._graph_signature.input_specs.insert(0, spec)
        self.program._constants[name] = value
        return new

    def value(self, node: fx.Node) -> Any:
        """Return the example value of a node: a tensor without data, or a size."""
        return node.meta["val"]

    def _fake_mode(self) -> Any:
        return next(
            value.fake_mode
            for node in self.program.graph.nodes
            for value in pytree.tree_leaves(node.meta.get("val"))
            if isinstance(value, FakeTensor)
        )

    def size(self, x: fx.Node, dim: int) -> Any:
        """Return a size of x: a number if it is fixed, a node if it is dynamic."""
        size = self.value(x).shape[dim]
        return size if isinstance(size, int) else self(aten.sym_size.int, x, dim % self.value(x).dim())


Rewrite = Callable[[Builder, dict[str, Any]], Any]  # a node, a tuple of them, or None to keep the operator
