"""From a plan to a network: fake quantizers for torch (`insert`), integers for a runtime (`freeze`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from penjing.errors import QuantizationError
from penjing.network.graph import OUTPUT, RECURRENT, is_tensor, kind, sites, tensor_inputs
from penjing.network.naming import free_name
from penjing.numerics import grid
from penjing.steps.plan import Entry, Plan
from penjing.surgery import recurrent
from penjing.surgery.functional_layers import functional_layer
from penjing.surgery.straight_through import Grid, wide

SMALLEST = 1e-12  # lower bound of a learned scale


class FakeQuantize(nn.Module):
    """Rounds its input to the values that the integers of `entry` can hold."""

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, entry: Entry, *, learns: bool = False) -> None:
        super().__init__()
        self.spec = entry.spec
        self.dynamic = entry.dynamic
        scale = torch.tensor(entry.scale, dtype=torch.float32)
        if learns and not entry.dynamic and entry.spec.scale == "free":
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.tensor(entry.zero_point, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape to the same shape; bit-identical to penjing::quantize and penjing::dequantize.

        Gradients pass straight through inside the range, and are 0 outside.
        """
        x = wide(x)
        scale, zero = grid.measured(x.detach(), self.spec) if self.dynamic else (self.scale, self.zero_point)
        if scale.requires_grad:
            scale = scale.abs().clamp(min=SMALLEST)
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            rounded: torch.Tensor = Grid.apply(x, scale, zero, self.spec, "lsq")  # type: ignore[no-untyped-call]
            return rounded
        return grid.on_grid(x, scale, zero, self.spec)


def replace_port(node: fx.Node, port: int, new: fx.Node) -> None:
    """Make a node read `new` at its tensor input number `port`."""
    seen = -1

    def swap(n: fx.Node) -> fx.Node:
        nonlocal seen
        if is_tensor(n):
            seen += 1
        return new if is_tensor(n) and seen == port else n

    args = fx.node.map_arg(node.args, swap)
    kwargs = fx.node.map_arg(node.kwargs, swap)
    node.args, node.kwargs = args, kwargs


def insert(network: fx.GraphModule, plan: Plan, *, trains: bool = False, learns: bool = False) -> fx.GraphModule:
    """Return a copy of `network` with fake quantizers for `plan`: floating point, rounded to the integers' values.

    Weights keep their names; the quantizers are submodules of ``quantizers`` (with trailing underscores if that name is
    in use).

    Args:
        network: A captured network.
        plan: The plan of this network.
        trains: Compute recurrent layers in floating point, with quantizers on inputs and weights, so that these can be
            trained: their integer operator has no gradient.
        learns: Make scales parameters, and leave biases in floating point, as their grid depends on the scales.
    """
    network = copy.deepcopy(network)
    quantizers = free_name(network, "quantizers")
    network.add_module(quantizers, nn.Module())

    def place(producer: fx.Node, entry: Entry) -> fx.Node:
        holder = network.get_submodule(quantizers)
        name = str(len(list(holder.children())))
        holder.add_module(name, FakeQuantize(entry, learns=learns))
        node = network.graph.call_module(f"{quantizers}.{name}", (producer,))
        node.meta["site"] = f"{quantizers}.{name}"
        return node

    def weight(layer: str, entry: Entry) -> fx.Node:
        return place(network.graph.get_attr(f"{layer}.weight"), entry)

    def bias(layer: str, entry: Entry | None) -> fx.Node | None:
        if network.get_submodule(layer).bias is None:
            return None
        stored = network.graph.get_attr(f"{layer}.bias")
        return stored if entry is None or learns else place(stored, entry)

    def keep(name: str, value: torch.Tensor) -> fx.Node:
        return constant_node(network, f"{quantizers}.{name}", value)

    rewire(network, plan, place, weight, bias, None if trains else keep)
    return network


def quantizer_calls(network: fx.GraphModule, plan: Plan) -> dict[str, fx.Node]:
    """Edge of the plan → the call of its quantizer in a network from `insert(trains=True)`."""
    nodes = {**sites(network), OUTPUT: next(n for n in network.graph.nodes if n.op == "output")}
    edges: dict[str, Any] = {}
    for edge in plan.entries:
        name, _, port = edge.rpartition(":")
        node = nodes[name]
        position = 0 if kind(network, node) == "embedding" else 1
        edges[edge] = node.args[position] if port == "weight" else tensor_inputs(node)[int(port.removeprefix("in"))]
    return edges


def constant_node(network: fx.GraphModule, path: str, value: torch.Tensor) -> fx.Node:
    """Store a tensor as a buffer under a dotted path, and return a node that reads it."""
    holder: nn.Module = network
    *parents, leaf = path.split(".")
    for part in parents:
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    holder.register_buffer(leaf, value)
    return network.graph.get_attr(path)


def rewire(
    network: fx.GraphModule,
    plan: Plan,
    place: Callable[[fx.Node, Entry], fx.Node],
    weight: Callable[[str, Entry], fx.Node],
    bias: Callable[[str, Entry | None], fx.Node | None],
    store: Callable[[str, torch.Tensor], fx.Node] | None,
    dynamic: Callable[[str, fx.Node, Entry], fx.Node] | None = None,
    rows: Callable[[str, fx.Node, Entry], fx.Node] | None = None,
) -> None:
    """Put quantizers on the plan's edges, in place; layers with quantized weights become functional operators.

    Args:
        network: A captured network.
        plan: The plan of this network.
        place: Writes a quantizer of a producer's value.
        weight: Writes a layer's quantized weight.
        bias: Writes a layer's bias; None if it has none.
        store: Stores a tensor for integer LSTMs; None to quantize their inputs and weights instead.
        dynamic: See `functional_layer`.
        rows: See `functional_layer`.

    Raises:
        QuantizationError: The plan does not fit the network.
    """
    nodes = {**sites(network), OUTPUT: next(n for n in network.graph.nodes if n.op == "output")}
    placed: dict[tuple[fx.Node, Entry], fx.Node] = {}
    cells: dict[str, fx.Node] = {}
    for edge, entry in plan.entries.items():
        name, _, port = edge.rpartition(":")
        if name not in nodes:
            raise QuantizationError(
                "the plan names an operator that the network does not have",
                code="misfit",
                got=edge,
                expected="the network that the plan was made for",
            )
        if port == "weight":
            continue
        consumer = nodes[name]
        recurs = kind(network, consumer) in RECURRENT
        first = plan.entries.get(f"{name}:in0")
        if recurs and store is not None and first is not None and (first.dynamic or name not in plan.floats):
            cells[name] = consumer
            continue
        if entry.dynamic and not recurs:
            _check_dynamic(network, consumer, edge, plan)
        producer = tensor_inputs(consumer)[int(port.removeprefix("in"))]
        if (producer, entry) not in placed:
            with network.graph.inserting_after(producer if producer.op != "placeholder" else _last_input(network)):
                placed[producer, entry] = _after(network, producer, entry, place)
        replace_port(consumer, int(port.removeprefix("in")), placed[producer, entry])
    for edge, entry in plan.entries.items():
        if edge.endswith(":weight"):
            functional_layer(network, nodes[edge.removesuffix(":weight")], plan, entry, weight, bias, dynamic, rows)
    for node in cells.values():
        assert store is not None
        recurrent.in_integers(network, node, plan, store)
    network.graph.lint()
    network.recompile()


def _check_dynamic(network: fx.GraphModule, consumer: fx.Node, edge: str, plan: Plan) -> None:
    """Raise QuantizationError unless the consumer of a range at run time is a linear layer with a quantized weight."""
    if kind(network, consumer) != "linear" or f"{edge.rpartition(':')[0]}:weight" not in plan.entries:
        raise QuantizationError(
            "an activation range taken at run time needs a linear layer with quantized weights",
            code="dynamic-range",
            got=f"{edge}, of kind {kind(network, consumer)}",
            expected="a plan of quantize.Dynamic, or quantize.Static for the others",
        )


def _last_input(network: fx.GraphModule) -> fx.Node:
    last: fx.Node = [n for n in network.graph.nodes if n.op == "placeholder"][-1]
    return last


def _after(
    network: fx.GraphModule, producer: fx.Node, entry: Entry, place: Callable[[fx.Node, Entry], fx.Node]
) -> fx.Node:
    # Nodes made inside one inserting_after land in reverse, so the place is moved behind each new node.
    following = producer.next if producer.op != "placeholder" else _last_input(network).next
    with network.graph.inserting_before(following):
        return place(producer, entry)
