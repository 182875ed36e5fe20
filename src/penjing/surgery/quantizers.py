"""From a plan to a network: fake quantizers for torch (`insert`), integers for a runtime (`freeze`)."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from penjing.errors import QuantizationError
from penjing.network.graph import OUTPUT, RECURRENT, is_tensor, kind, sites, tensor_inputs
from penjing.network.naming import free_name
from penjing.numerics import grid, operators
from penjing.steps.plan import Entry, Plan
from penjing.surgery import recurrent
from penjing.surgery.straight_through import Grid, wide

SMALLEST = 1e-12  # that a scale becomes when it learns

SHARED = 64  # values from which on an equal tensor is looked for


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
        """Any shape in, the same shape out; the bits of penjing::quantize and penjing::dequantize.

        Gradients pass straight through, and none passes where a value lies outside the range.
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
    """Let port `port` of a node read `new`."""
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
    """A copy of `network` that computes in floating point what the integers of `plan` can express.

    Weights keep their names; the quantizers live under ``quantizers`` (with underscores behind it where the network
    has a part that is called so).

    Args:
        network: Raised.
        plan: Of this network.
        trains: Let recurrent layers read their weights through quantizers, so that these learn: their integer
            operator has no gradient, and rounds the inputs too.
        learns: Scales are parameters, and biases stay in floating point: their grid follows from scales that move.
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
        return _stored(network, f"{quantizers}.{name}", value)

    _rewire(network, plan, place, weight, bias, None if trains else keep)
    return network


def quantizer_calls(network: fx.GraphModule, plan: Plan) -> dict[str, fx.Node]:
    """Edge of the plan → the call of its quantizer in a network that `insert` made to train."""
    nodes = {**sites(network), OUTPUT: next(n for n in network.graph.nodes if n.op == "output")}
    edges: dict[str, Any] = {}
    for edge in plan.entries:
        name, _, port = edge.rpartition(":")
        node = nodes[name]
        position = 0 if kind(network, node) == "embedding" else 1
        edges[edge] = node.args[position] if port == "weight" else tensor_inputs(node)[int(port.removeprefix("in"))]
    return edges


def freeze(network: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """A copy of `network` whose quantized weights are stored as integers: what a runtime's file is made from."""
    network = copy.deepcopy(network)
    if not plan:
        return network
    integers = free_name(network, "integers")
    network.add_module(integers, nn.Module())
    paths: dict[tuple[Any, ...], str] = {}

    def constant(name: str, value: torch.Tensor) -> fx.Node:
        # A table that is a layer's weight too is stored once.
        key = (value.dtype, tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).digest())
        if value.numel() >= SHARED and key in paths:
            return network.graph.get_attr(paths[key])
        paths[key] = f"{integers}.{name}"
        return _stored(network, paths[key], value)

    def numbers(name: str, entry: Entry) -> tuple[fx.Node, fx.Node]:
        # A single number has no axis: runtimes take a one-element vector for one channel.
        shape = (-1,) if len(entry.scale) > 1 else ()
        dtype = operators.integer_dtype(*entry.spec.limits)
        return (
            constant(f"{name}_scale", torch.tensor(entry.scale, dtype=torch.float32).reshape(shape)),
            constant(f"{name}_zero_point", torch.tensor(entry.zero_point, dtype=dtype).reshape(shape)),
        )

    def place(producer: fx.Node, entry: Entry) -> fx.Node:
        if entry.dynamic:
            return producer  # quantized by the operator that reads it
        if entry.spec.grid != "uniform":
            raise QuantizationError(
                "no runtime rounds activations to powers of two",
                got=f"an activation on the grid {entry.spec.grid}",
                expected="activation_grid='uniform'; weights may be of any grid",
                remedy="pj.apply computes it in torch",
            )
        if producer.op == "get_attr":  # the other operand of a product: a weight, by whatever name
            path = str(producer.target)
            owner, _, leaf = path.rpartition(".")
            return dequantized(path, getattr(network.get_submodule(owner), leaf).detach(), entry)
        scale, zero = numbers(f"activation{len(list(network.get_submodule(integers).buffers()))}", entry)
        axis = entry.spec.axis or 0
        call = network.graph.call_function
        q = call(torch.ops.penjing.quantize.default, (producer, scale, zero, axis, *entry.spec.limits))
        return call(torch.ops.penjing.dequantize.default, (q, scale, zero, axis))

    written: dict[tuple[str, str], list[Entry | None]] = {}

    def name_for(layer: str, role: str, entry: Entry | None) -> str:
        # A layer that is called twice has two bias grids where its two inputs have two scales.
        known = written.setdefault((layer, role), [])
        if entry not in known:
            known.append(entry)
        number = known.index(entry)
        return f"{layer}.{role}_{number}" if number else f"{layer}.{role}"

    def stored(layer: str, role: str, entry: Entry) -> fx.Node:
        value = getattr(network.get_submodule(layer), role).detach()
        return dequantized(name_for(layer, role, entry), value, entry)

    def in_integers(value: torch.Tensor, entry: Entry) -> torch.Tensor:
        scale = torch.tensor(entry.scale, dtype=torch.float32)
        zero = torch.tensor(entry.zero_point, dtype=torch.int32)
        return grid.integers(value, scale, zero, entry.spec).to(operators.integer_dtype(*entry.spec.limits))

    def dequantized(name: str, value: torch.Tensor, entry: Entry) -> fx.Node:
        q = in_integers(value, entry)
        call = network.graph.call_function
        if entry.spec.group is None:
            nodes = (constant(name, q), *numbers(name, entry))
            return call(torch.ops.penjing.dequantize.default, (*nodes, entry.spec.axis or 0))
        # One row for every scale: per-channel quantization is what every runtime reads.
        nodes = (
            constant(name, q.movedim(entry.spec.axis or 0, 0).reshape(-1, entry.spec.group)),
            *numbers(name, entry),
        )
        return call(
            torch.ops.aten.reshape.default, (call(torch.ops.penjing.dequantize.default, (*nodes, 0)), list(value.shape))
        )

    def weight(layer: str, entry: Entry) -> fx.Node:
        return stored(layer, "weight", entry)

    def rows(layer: str, positions: fx.Node, entry: Entry) -> fx.Node:
        """Rows of a table: their integers are gathered first, and they alone are dequantized."""
        value: Any = network.get_submodule(layer).weight
        name = name_for(layer, "weight", entry)
        call, gather = network.graph.call_function, torch.ops.aten.embedding.default

        def each(what: str, numbers: tuple[float, ...]) -> fx.Node:
            rows = torch.tensor(numbers, dtype=torch.float32)
            if rows.numel() == 1:
                return constant(f"{name}_{what}", rows.reshape(()))
            return call(gather, (constant(f"{name}_{what}", rows.reshape(-1, 1)), positions))

        q = call(gather, (constant(name, in_integers(value.detach(), entry)), positions))
        x = call(torch.ops.aten.to.dtype, (q, torch.float32))
        if any(entry.zero_point):
            x = call(torch.ops.aten.sub.Tensor, (x, each("row_zero", entry.zero_point)))
        return call(torch.ops.aten.mul.Tensor, (x, each("row_scale", entry.scale)))

    def dynamic(layer: str, x: fx.Node, entry: Entry) -> fx.Node:
        value: Any = network.get_submodule(layer).weight
        scale, zero = torch.tensor(entry.scale), torch.tensor(entry.zero_point, dtype=torch.int32)
        q = grid.integers(value.detach(), scale, zero, entry.spec).to(torch.int8)
        name = name_for(layer, "weight", entry)
        nodes = (constant(name, q.T.contiguous()), *numbers(name, entry), bias(layer, None))
        return network.graph.call_function(torch.ops.penjing.linear_dynamic.default, (x, *nodes))

    def bias(layer: str, entry: Entry | None) -> fx.Node | None:
        value: Any = network.get_submodule(layer).bias
        if value is None:
            return None
        if entry is None:
            return constant(name_for(layer, "bias", None), value.detach())
        return stored(layer, "bias", entry)

    _rewire(network, plan, place, weight, bias, constant, dynamic, rows)
    for node in reversed(list(network.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            network.graph.erase_node(node)
            _forget(network, str(node.target))
    network.recompile()
    for layer, _ in written:
        if not _is_used(network, layer):
            network.delete_submodule(layer)  # float weights without a user would stay in a saved program
    return network


def _stored(network: fx.GraphModule, path: str, value: torch.Tensor) -> fx.Node:
    """Keep a tensor under a dotted path and read it."""
    holder: nn.Module = network
    *parents, leaf = path.split(".")
    for part in parents:
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    holder.register_buffer(leaf, value)
    return network.graph.get_attr(path)


def _forget(network: fx.GraphModule, path: str) -> None:
    """Delete a stored tensor that no operator and no layer reads."""
    holder, _, leaf = path.rpartition(".")
    owner = network.get_submodule(holder)
    layers = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    if hasattr(owner, leaf) and holder not in layers and not any(n.target == path for n in network.graph.nodes):
        delattr(owner, leaf)


def _is_used(network: fx.GraphModule, layer: str) -> bool:
    """Whether a call of the layer is left in floating point, or an operator reads one of its tensors."""
    targets = (str(n.target) for n in network.graph.nodes if n.op in ("call_module", "get_attr"))
    return any(target == layer or target.startswith(f"{layer}.") for target in targets)


def bias_entry(plan: Plan, layer: str) -> Entry | None:
    """Int32 with scale = weight scale × input scale: the accumulator's own grid; None where there is no such grid."""
    weight, inputs = plan.entries.get(f"{layer}:weight"), plan.entries.get(f"{layer}:in0")
    if weight is None or inputs is None or inputs.dynamic or weight.spec.group is not None:
        return None
    spec = type(weight.spec)(bits=32, signed=True, symmetric=True, axis=0 if len(weight.scale) > 1 else None)
    # In float32, as the runtimes multiply them.
    scales = (torch.tensor(weight.scale) * torch.tensor(inputs.scale)).tolist()
    return Entry(spec, tuple(scales), (0,) * len(scales))


def _rewire(
    network: fx.GraphModule,
    plan: Plan,
    place: Callable[[fx.Node, Entry], fx.Node],
    weight: Callable[[str, Entry], fx.Node],
    bias: Callable[[str, Entry | None], fx.Node | None],
    store: Callable[[str, torch.Tensor], fx.Node] | None,
    dynamic: Callable[[str, fx.Node, Entry], fx.Node] | None = None,
    rows: Callable[[str, fx.Node, Entry], fx.Node] | None = None,
) -> None:
    """Put quantizers on the plan's edges; layers with integer weights become functional."""
    nodes = {**sites(network), OUTPUT: next(n for n in network.graph.nodes if n.op == "output")}
    placed: dict[tuple[fx.Node, Entry], fx.Node] = {}
    cells: dict[str, fx.Node] = {}
    for edge, entry in plan.entries.items():
        name, _, port = edge.rpartition(":")
        if name not in nodes:
            raise QuantizationError(
                "the plan names an operator that the network does not have",
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
        if (
            entry.dynamic
            and not recurs
            and (kind(network, consumer) != "linear" or f"{name}:weight" not in plan.entries)
        ):
            raise QuantizationError(
                "an activation range taken at run time needs a linear layer with quantized weights",
                got=f"{edge}, of kind {kind(network, consumer)}",
                expected="a plan of quantize.Dynamic, or quantize.Static for the others",
            )
        producer = tensor_inputs(consumer)[int(port.removeprefix("in"))]
        if (producer, entry) not in placed:
            with network.graph.inserting_after(producer if producer.op != "placeholder" else _last_input(network)):
                placed[producer, entry] = _after(network, producer, entry, place)
        replace_port(consumer, int(port.removeprefix("in")), placed[producer, entry])
    for edge, entry in plan.entries.items():
        name, _, port = edge.rpartition(":")
        if port == "weight":
            _functional_layer(network, nodes[name], plan, entry, weight, bias, dynamic, rows)
    for node in cells.values():
        assert store is not None
        recurrent.in_integers(network, node, plan, store)
    network.graph.lint()
    network.recompile()


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


def _functional_layer(
    network: fx.GraphModule,
    node: fx.Node,
    plan: Plan,
    entry: Entry,
    weight: Callable[[str, Entry], fx.Node],
    bias: Callable[[str, Entry | None], fx.Node | None],
    dynamic: Callable[[str, fx.Node, Entry], fx.Node] | None,
    rows: Callable[[str, fx.Node, Entry], fx.Node] | None,
) -> None:
    layer, site = str(node.target), str(node.meta["site"])
    module: Any = network.get_submodule(layer)
    what = kind(network, node)
    x: Any = node.args[0]
    inputs = plan.entries.get(f"{site}:in0")
    with network.graph.inserting_before(node):
        # With a scale for every few values it is the runtime that quantizes, when it sees integer weights.
        by_operator = dynamic is not None and inputs is not None and inputs.dynamic and inputs.spec.group is None
        by_rows = what == "embedding" and rows is not None
        w = None if by_operator or by_rows else weight(layer, entry)
        if rows is not None and by_rows:
            new = rows(layer, x, entry)
        elif what == "embedding":
            padding = -1 if module.padding_idx is None else module.padding_idx
            new = network.graph.call_function(torch.ops.aten.embedding.default, (w, x, padding))
        elif dynamic is not None and by_operator:
            new = dynamic(layer, x, entry)
        elif what == "linear":
            # One bias grid needs one integer accumulator; a 3-D linear becomes a matrix product and an addition.
            b = bias(layer, bias_entry(plan, site) if node.meta.get("rank", 2) == 2 else None)
            new = network.graph.call_function(torch.ops.aten.linear.default, (x, w, b))
        else:
            b = bias(layer, bias_entry(plan, site))
            new = network.graph.call_function(_convolution(module), (x, w, b, *_conv_settings(module)))
    new.meta["site"] = site
    node.replace_all_uses_with(new)
    network.graph.erase_node(node)


def _conv_settings(module: Any) -> tuple[Any, ...]:
    padding = module.padding if isinstance(module.padding, str) else list(module.padding)
    if module.transposed:
        return (list(module.stride), padding, list(module.output_padding), module.groups, list(module.dilation))
    return (list(module.stride), padding, list(module.dilation), module.groups)


def _convolution(module: nn.Module) -> Any:
    operator = _CONVOLUTIONS[type(module)]
    if not hasattr(operator, "default"):
        return operator.input
    return operator.padding if isinstance(module.padding, str) else operator.default


_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: torch.ops.aten.conv1d,
    nn.Conv2d: torch.ops.aten.conv2d,
    nn.Conv3d: torch.ops.aten.conv3d,
    nn.ConvTranspose1d: torch.ops.aten.conv_transpose1d,
    nn.ConvTranspose2d: torch.ops.aten.conv_transpose2d,
    nn.ConvTranspose3d: torch.ops.aten.conv_transpose3d,
}
