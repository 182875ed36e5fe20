"""The memory that a call's activations need, in the order of the graph and in the order that needs least.

Weights are not counted, nor what a kernel needs for itself.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from penjing.analyze.cost import Call, fixed_value, sample_shapes
from penjing.network.graph import is_tensor, kind, site, tensor_inputs
from penjing.numerics import schedule
from penjing.numerics.schedule import Operation, Problem

IN_PLACE = frozenset(
    {
        *("relu", "clip", "leaky_relu", "prelu", "elu", "gelu", "silu", "sigmoid", "hardsigmoid", "hardswish", "tanh"),
        *("add", "sub", "mul", "div", "neg", "abs", "exp", "sqrt", "rsqrt", "square", "maximum", "minimum"),
        "batch_norm",
    }
)
"""Kinds that read every value once before they write it: their output may take an input's place."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of inputs and activations that are alive at once.

    Attributes:
        size_bytes: The most, in the best order that was found.
        site: The operator that runs at that moment.
        alive: What is alive then: name of the operator or input that computed it → bytes, the largest first.
        graph_bytes: The most in the order of the graph.
        order: Sites of the operators in the best order, without views.
        proved: Whether no order needs less.
    """

    size_bytes: int
    site: str
    alive: dict[str, int]
    graph_bytes: int
    order: tuple[str, ...]
    proved: bool


def activations(
    network: fx.GraphModule, call: Call, element_bytes: int | None = None, wide: Collection[str] = ()
) -> Activations:
    """What one call needs for one sample.

    Args:
        network: A captured network.
        call: Example inputs, batch first; one sample is counted.
        element_bytes: Of a floating-point value, where it is stored otherwise: 1 in an integer artifact. None: its own.
        wide: Sites whose results keep their own size then.
    """
    graph = _Buffers(network, call, element_bytes, wide)
    problem = Problem(graph.operations, graph.sizes, frozenset(graph.outputs))
    best = schedule.best(problem)
    given = schedule.cost(problem, range(len(graph.operations)))
    if best.position is None:
        return Activations(
            size_bytes=best.size_bytes, site="", alive={}, graph_bytes=best.size_bytes, order=(), proved=True
        )
    sites = [site(node) for node in graph.nodes]
    return Activations(
        size_bytes=best.size_bytes,
        site=sites[best.position],
        alive=graph.alive(best.order, best.position),
        graph_bytes=given.size_bytes,
        order=tuple(sites[i] for i in best.order),
        proved=best.proved,
    )


class _Buffers:
    """A network as operators that read and fill buffers; views are part of what they show."""

    def __init__(self, network: fx.GraphModule, call: Call, element_bytes: int | None, wide: Collection[str]) -> None:
        self.network, self.values = network, sample_shapes(network, call)
        self.element_bytes, self.wide = element_bytes, frozenset(wide)
        self.operations: list[Operation] = []
        self.nodes: list[fx.Node] = []
        self.sizes: list[int] = []
        self.names: list[str] = []
        self.outputs: set[int] = set()
        self._of_storage: dict[int, int] = {}
        self._of: dict[fx.Node, frozenset[int]] = {}
        for node in network.graph.nodes:
            self._take(node)

    def _take(self, node: fx.Node) -> None:
        if node.op == "output":
            self.outputs = {b for read in node.all_input_nodes for b in self._of.get(read, ())}
            return
        if node.op == "get_attr" or not is_tensor(node) or fixed_value(self.network, node):
            self._of[node] = frozenset()
            return
        if node.target is operator.getitem:  # one of several results, which the operator itself has filled
            read = node.all_input_nodes[0]
            mine = self._known(node)
            self._of[node] = self._of.get(read, frozenset()) if mine is None else frozenset({mine})
            return
        reads = frozenset(b for read in tensor_inputs(node) for b in self._of.get(read, ()))
        known = self._known(node)
        if known is not None and node.op != "placeholder":
            self._of[node] = frozenset({known})  # a view of what is there
            return
        shown = [node] if node.name in self.values else [user for user in node.users if user.name in self.values]
        fresh = [self._buffer(one, site(node)) for one in shown if self._known(one) is None]
        self._of[node] = frozenset(fresh) or reads
        if node.op != "placeholder" and fresh:
            over = self._overwritten(node) if kind(self.network, node) in IN_PLACE else frozenset()
            self.operations.append(Operation(reads=reads, writes=frozenset(fresh), over=over))
            self.nodes.append(node)

    def _overwritten(self, node: fx.Node) -> frozenset[int]:
        """What an elementwise operator may overwrite: not what it reads twice, for example transposed."""
        read = [b for one in tensor_inputs(node) for b in self._of.get(one, ())]
        return frozenset(b for b in read if read.count(b) == 1)

    def _known(self, node: fx.Node) -> int | None:
        """The buffer of a value that is computed already."""
        value = self.values.get(node.name)
        return None if value is None else self._of_storage.get(value.untyped_storage()._cdata)

    def _buffer(self, node: fx.Node, name: str) -> int:
        value = self.values[node.name]
        storage = value.untyped_storage()  # `values` keeps every storage alive, so that no number is used twice
        size = storage.nbytes()
        narrow = self.element_bytes is not None and name not in self.wide
        if narrow and value.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            size = size // value.element_size() * (self.element_bytes or 1)
        self._of_storage[storage._cdata] = len(self.sizes)
        self.sizes.append(size)
        self.names.append(name)
        return len(self.sizes) - 1

    def alive(self, order: tuple[int, ...], position: int) -> dict[str, int]:
        """What is alive while an operator runs, by the site that computed it."""
        at = order.index(position)
        before = {b for i in order[:at] for b in self.operations[i].writes}
        written = {b for operation in self.operations for b in operation.writes}
        later = {b for i in order[at:] for b in self.operations[i].reads} | self.outputs
        there = (before | (set(range(len(self.sizes))) - written)) & later | self.operations[position].writes
        sizes: dict[str, int] = {}
        for buffer in sorted(there, key=lambda b: -self.sizes[b]):
            sizes[self.names[buffer]] = sizes.get(self.names[buffer], 0) + self.sizes[buffer]
        return sizes
