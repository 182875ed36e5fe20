"""From a plan to stored integers: the network that an exporter writes."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import fx, nn

from penjing.errors import QuantizationError
from penjing.network.graph import sites
from penjing.network.naming import free_name
from penjing.numerics import grid, operators
from penjing.steps.plan import Entry, Plan
from penjing.surgery.quantizers import constant_node, rewire

SHARED = 64  # number of values from which on equal tensors are stored once


def freeze(network: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Return a copy of `network` whose quantized weights are stored as integers, ready for export.

    Operators that the plan leaves in floating point have the reason in their metadata, as `float`.
    """
    network = copy.deepcopy(network)
    if not plan:
        return network
    nodes = sites(network)
    for name in plan.floats.keys() & nodes.keys():
        nodes[name].meta["float"] = plan.floats[name]
    writer = _Writer(network)
    rewire(network, plan, writer.place, writer.weight, writer.bias, writer.constant, writer.linear_dynamic, writer.rows)
    for node in reversed(list(network.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            network.graph.erase_node(node)
            _forget(network, str(node.target))
    network.recompile()
    for layer, _ in writer.entries:
        if not _is_used(network, layer):
            network.delete_submodule(layer)  # a saved program would keep unused float weights
    return network


class _Writer:
    """Stores tensors in one submodule of a network, and writes the nodes that read them, for `rewire`."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.integers = free_name(network, "integers")
        network.add_module(self.integers, nn.Module())
        self.paths: dict[tuple[Any, ...], str] = {}  # type, shape and hash of a tensor → its path
        self.entries: dict[tuple[str, str], list[Entry | None]] = {}  # layer and role → its grids

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """Store a tensor and read it; equal tensors, such as a tied table, are stored once."""
        key = (value.dtype, tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).digest())
        if value.numel() >= SHARED and key in self.paths:
            return self.network.graph.get_attr(self.paths[key])
        self.paths[key] = f"{self.integers}.{name}"
        return constant_node(self.network, self.paths[key], value)

    def place(self, producer: fx.Node, entry: Entry) -> fx.Node:
        """The value of `producer`, quantized and dequantized."""
        if entry.dynamic:
            return producer  # quantized by the operator that reads it
        if entry.spec.grid != "uniform":
            raise QuantizationError(
                "no runtime rounds activations to powers of two",
                code="activation-grid",
                got=f"an activation on the grid {entry.spec.grid}",
                expected="activation_grid='uniform'; weights may be of any grid",
                remedy="pj.apply computes it in torch",
            )
        if producer.op == "get_attr":  # a stored operand of a product, that is, a weight
            path = str(producer.target)
            owner, _, leaf = path.rpartition(".")
            return self._dequantized(path, getattr(self.network.get_submodule(owner), leaf).detach(), entry)
        stored = list(self.network.get_submodule(self.integers).buffers())
        scale, zero = self._numbers(f"activation{len(stored)}", entry)
        axis, call = entry.spec.axis or 0, self.network.graph.call_function
        q = call(torch.ops.penjing.quantize.default, (producer, scale, zero, axis, *entry.spec.limits))
        return call(torch.ops.penjing.dequantize.default, (q, scale, zero, axis))

    def weight(self, layer: str, entry: Entry) -> fx.Node:
        """A layer's weight, stored as integers and dequantized."""
        return self._stored(layer, "weight", entry)

    def bias(self, layer: str, entry: Entry | None) -> fx.Node | None:
        """A layer's bias, in floating point without an entry; None if the layer has no bias."""
        value: Any = self.network.get_submodule(layer).bias
        if value is None:
            return None
        if entry is None:
            return self.constant(self._name(layer, "bias", None), value.detach())
        return self._stored(layer, "bias", entry)

    def rows(self, layer: str, positions: fx.Node, entry: Entry) -> fx.Node:
        """Rows of a table: their integers are gathered first, so that only they are dequantized."""
        value: Any = self.network.get_submodule(layer).weight
        name = self._name(layer, "weight", entry)
        call, gather = self.network.graph.call_function, torch.ops.aten.embedding.default

        def each(what: str, numbers: tuple[float, ...]) -> fx.Node:
            rows = torch.tensor(numbers, dtype=torch.float32)
            if rows.numel() == 1:
                return self.constant(f"{name}_{what}", rows.reshape(()))
            return call(gather, (self.constant(f"{name}_{what}", rows.reshape(-1, 1)), positions))

        q = call(gather, (self.constant(name, _in_integers(value.detach(), entry)), positions))
        x = call(torch.ops.aten.to.dtype, (q, torch.float32))
        if any(entry.zero_point):
            x = call(torch.ops.aten.sub.Tensor, (x, each("row_zero", entry.zero_point)))
        return call(torch.ops.aten.mul.Tensor, (x, each("row_scale", entry.scale)))

    def linear_dynamic(self, layer: str, x: fx.Node, entry: Entry) -> fx.Node:
        """A linear layer whose input is quantized with a range computed at run time."""
        value: Any = self.network.get_submodule(layer).weight
        scale, zero = torch.tensor(entry.scale), torch.tensor(entry.zero_point, dtype=torch.int32)
        q = grid.integers(value.detach(), scale, zero, entry.spec).to(torch.int8)
        name = self._name(layer, "weight", entry)
        nodes = (self.constant(name, q.T.contiguous()), *self._numbers(name, entry), self.bias(layer, None))
        return self.network.graph.call_function(torch.ops.penjing.linear_dynamic.default, (x, *nodes))

    def _name(self, layer: str, role: str, entry: Entry | None) -> str:
        """Name of a stored tensor, numbered per grid: a layer called twice may have two bias grids."""
        known = self.entries.setdefault((layer, role), [])
        if entry not in known:
            known.append(entry)
        number = known.index(entry)
        return f"{layer}.{role}_{number}" if number else f"{layer}.{role}"

    def _numbers(self, name: str, entry: Entry) -> tuple[fx.Node, fx.Node]:
        """Scale and zero point, as scalars if there is one: runtimes read a vector of one element as one channel."""
        shape = (-1,) if len(entry.scale) > 1 else ()
        dtype = operators.integer_dtype(*entry.spec.limits)
        return (
            self.constant(f"{name}_scale", torch.tensor(entry.scale, dtype=torch.float32).reshape(shape)),
            self.constant(f"{name}_zero_point", torch.tensor(entry.zero_point, dtype=dtype).reshape(shape)),
        )

    def _stored(self, layer: str, role: str, entry: Entry) -> fx.Node:
        value = getattr(self.network.get_submodule(layer), role).detach()
        return self._dequantized(self._name(layer, role, entry), value, entry)

    def _dequantized(self, name: str, value: torch.Tensor, entry: Entry) -> fx.Node:
        q, call = _in_integers(value, entry), self.network.graph.call_function
        if entry.spec.group is None:
            nodes = (self.constant(name, q), *self._numbers(name, entry))
            return call(torch.ops.penjing.dequantize.default, (*nodes, entry.spec.axis or 0))
        # One row for every scale: every runtime supports per-channel quantization.
        grouped = q.movedim(entry.spec.axis or 0, 0).reshape(-1, entry.spec.group)
        nodes = (self.constant(name, grouped), *self._numbers(name, entry))
        rows = call(torch.ops.penjing.dequantize.default, (*nodes, 0))
        return call(torch.ops.aten.reshape.default, (rows, list(value.shape)))


def _in_integers(value: torch.Tensor, entry: Entry) -> torch.Tensor:
    scale = torch.tensor(entry.scale, dtype=torch.float32)
    zero = torch.tensor(entry.zero_point, dtype=torch.int32)
    return grid.integers(value, scale, zero, entry.spec).to(operators.integer_dtype(*entry.spec.limits))


def _forget(network: fx.GraphModule, path: str) -> None:
    """Delete a stored tensor unless an operator or layer reads it."""
    holder, _, leaf = path.rpartition(".")
    owner = network.get_submodule(holder)
    layers = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    if hasattr(owner, leaf) and holder not in layers and not any(n.target == path for n in network.graph.nodes):
        delattr(owner, leaf)


def _is_used(network: fx.GraphModule, layer: str) -> bool:
    """Whether the layer is still called, or an operator reads one of its tensors."""
    targets = (str(n.target) for n in network.graph.nodes if n.op in ("call_module", "get_attr"))
    return any(target == layer or target.startswith(f"{layer}.") for target in targets)
