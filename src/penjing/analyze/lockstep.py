"""A network and its quantized replica, run side by side, operator by operator, on the same samples.

At every layer an observer sees the inputs and outputs of both: enough to measure where quantization noise arises, to
correct a layer's bias, and to choose how its weights are rounded or pruned, each layer behind those already changed.
One pass over the samples serves all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from penjing.network.graph import compute, flat_inputs, is_tensor, kind, site
from penjing.numerics.grid import measured, on_grid
from penjing.steps.plan import Entry, Plan
from penjing.tasks.task import Call

LAYERS = ("conv", "linear")
Chunks = list[Any]  # one value for every chunk of samples


@dataclass(frozen=True)
class Layer:
    """What an observer sees at a convolution or linear layer.

    Attributes:
        site: The layer's name in the plan.
        kind: "conv" or "linear".
        module: The layer, with the weights of the floating-point network.
        weight: The replica's weight: on its grid where the plan has one.
        entry: The plan's entry of the weight; None where it stays in floating point.
        inputs: The network's input, one tensor a chunk of samples.
        replica_inputs: The replica's, quantized where the plan says so.
        outputs: The network's output.
    """

    site: str
    kind: str
    module: Any
    weight: torch.Tensor
    entry: Entry | None
    inputs: list[torch.Tensor]
    replica_inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]

    def replica_outputs(
        self, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The replica's outputs, with its own or with another weight and bias."""
        bias = self.module.bias if bias is None else bias
        return [apply(self.module, x, self.weight if weight is None else weight, bias) for x in self.replica_inputs]

    def part(self, first: int, last: int) -> Layer:
        """The same layer with some of the chunks."""
        chunks = {name: getattr(self, name)[first:last] for name in ("inputs", "replica_inputs", "outputs")}
        return replace(self, **chunks)

    def noise(self, weight: torch.Tensor) -> float:
        """Power of the replica's error with this weight, after bias correction."""
        outputs = self.replica_outputs(weight)
        outputs = shifted(outputs, self.shift(outputs), self.axis)
        errors = [(output - replica).square_() for output, replica in zip(self.outputs, outputs, strict=True)]
        if (weights := self.row_weights()) is not None:
            errors = [error * w[..., None] for error, w in zip(errors, weights, strict=True)]
        return sum(float(error.sum()) for error in errors)

    def shift(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """The bias correction that gives `outputs` the channel means of the layer's outputs: (channels,), float64."""
        return mean_difference(self.outputs, outputs, self.axis, self.row_weights())

    def row_weights(self) -> list[torch.Tensor] | None:
        """Weights of the output rows, (…) without the channels; None where all rows weigh the same.

        A linear layer in a transformer sees tokens, and a few of them (the first, the separators) carry values that
        are larger by orders of magnitude (Sun et al., "Massive Activations in Large Language Models", 2024). The
        following norm removes that scale, so a row's error matters relative to the row itself.
        """
        if self.kind != "linear" or self.outputs[0].dim() < 3:
            return None
        powers = [y.square().sum(-1) for y in self.outputs]
        typical = torch.cat([p.reshape(-1) for p in powers]).median().clamp(min=1e-30)
        return [typical / p.clamp(min=0.01 * typical) for p in powers]

    @property
    def axis(self) -> int:
        """The channel axis of the outputs."""
        return 1 if self.kind == "conv" else -1


Watcher = Callable[[Layer], "list[torch.Tensor] | None"]


def run(
    network: fx.GraphModule, plan: Plan, calls: Iterable[Call], watch: Watcher, replica: fx.GraphModule | None = None
) -> tuple[Chunks, Chunks]:
    """Run both over `calls` at once.

    Args:
        network: A captured network in eval mode.
        plan: What the replica quantizes.
        calls: Chunks of samples; all their activations that are still needed are held in memory.
        watch: Called at every convolution and linear layer that is a module, in execution order. What it returns
            replaces the replica's output.
        replica: A copy of the network with other tensors, used wherever `watch` does not replace an output; None is the
            network itself.

    Returns:
        The outputs of the network and of the replica, one for each chunk.
    """
    inputs = [flat_inputs(network, call) for call in calls]
    with torch.no_grad():
        return _Replicas(network, plan, inputs, watch, replica or network).run()


def apply(module: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A layer's forward with other tensors."""
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        convolved: torch.Tensor = module._conv_forward(x, weight, bias)
        return convolved
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    result: torch.Tensor = torch.func.functional_call(module, tensors, (x,))
    return result


class _Replicas:
    def __init__(
        self, network: fx.GraphModule, plan: Plan, inputs: list[list[Any]], watch: Watcher, other: fx.GraphModule
    ) -> None:
        self.network, self.plan, self.watch, self.other = network, plan, watch, other
        self.inputs = inputs
        self.source: dict[fx.Node, Chunks] = {}
        self.replica: dict[fx.Node, Chunks] = {}
        self.grids: dict[tuple[fx.Node, Entry], Chunks] = {}

    def run(self) -> tuple[Chunks, Chunks]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.network.graph.nodes:
            for read in node.all_input_nodes:
                last[read] = node
        placeholders = 0
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self.source[node] = [chunk[placeholders] for chunk in self.inputs]
                self.replica[node] = self.source[node]
                placeholders += 1
            elif node.op == "output":
                break
            else:
                self._step(node)
            for read in [n for n in node.all_input_nodes if last[n] is node] + ([node] if node not in last else []):
                del self.source[read], self.replica[read]
                for key in [key for key in self.grids if key[0] is read]:
                    del self.grids[key]
        chunks = range(len(self.inputs))
        outputs = [self._arguments(node, self.source, i)[0][0] for i in chunks]
        return outputs, [self._arguments(node, self.replica, i, self._grid)[0][0] for i in chunks]

    def _step(self, node: fx.Node) -> None:
        chunks = range(len(self.inputs))
        self.source[node] = [compute(self.network, node, *self._arguments(node, self.source, i)) for i in chunks]
        if node.op == "get_attr":
            own = self.other is not self.network
            self.replica[node] = [compute(self.other, node, (), {}) for _ in chunks] if own else self.source[node]
            return
        arguments = [self._arguments(node, self.replica, i, self._grid) for i in chunks]
        what = kind(self.network, node)
        if node.op == "call_module" and what in LAYERS:
            self.replica[node] = self._layer(node, what, [a[0][0] for a in arguments])
        elif node.op == "call_module" and (entry := self.plan.entries.get(f"{site(node)}:weight")) is not None:
            module: Any = self.other.get_submodule(str(node.target))
            weight = rounded(module.weight, entry)
            self.replica[node] = [apply(module, a[0][0], weight, getattr(module, "bias", None)) for a in arguments]
        else:
            self.replica[node] = [compute(self.other, node, *a) for a in arguments]

    def _layer(self, node: fx.Node, what: str, replica_inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        module: Any = self.network.get_submodule(str(node.target))
        entry = self.plan.entries.get(f"{site(node)}:weight")
        weight = module.weight if entry is None else rounded(module.weight, entry)
        producer = node.args[0]
        assert isinstance(producer, fx.Node)
        layer = Layer(site(node), what, module, weight, entry, self.source[producer], replica_inputs, self.source[node])
        replaced = self.watch(layer)
        return layer.replica_outputs() if replaced is None else replaced

    def _arguments(
        self,
        node: fx.Node,
        env: Mapping[fx.Node, Chunks],
        chunk: int,
        grid: Callable[[fx.Node, Entry, int], torch.Tensor] | None = None,
    ) -> tuple[Any, Any]:
        port = -1

        def value(n: fx.Node) -> Any:
            nonlocal port
            port += is_tensor(n)
            entry = self.plan.entries.get(f"{site(node)}:in{port}") if grid and is_tensor(n) else None
            return env[n][chunk] if entry is None or grid is None else grid(n, entry, chunk)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return args, kwargs

    def _grid(self, node: fx.Node, entry: Entry, chunk: int) -> torch.Tensor:
        if (node, entry) not in self.grids:
            self.grids[node, entry] = [rounded(x, entry) for x in self.replica[node]]
        on_grid_chunk: torch.Tensor = self.grids[node, entry][chunk]
        return on_grid_chunk


def rounded(x: torch.Tensor, entry: Entry) -> torch.Tensor:
    """`x` (any shape) with every value on the grid of `entry`."""
    if entry.dynamic:
        return on_grid(x, *measured(x, entry.spec), entry.spec)
    scale = torch.tensor(entry.scale, dtype=torch.float32)
    zero = torch.tensor(entry.zero_point, dtype=torch.int32)
    return on_grid(x, scale, zero, entry.spec)


def countable(network: fx.GraphModule) -> tuple[str, ...]:
    """Convolution and linear layers that are called once and share no weights, so that one call may change them.

    Layers whose rows are selected by values (a mixture of experts) are left out: few samples or none may reach them,
    and the replica may select others.
    """
    called: dict[str, int] = {}
    for node in network.graph.nodes:
        if node.op == "call_module" and kind(network, node) in LAYERS and not node.meta.get("chosen"):
            called[str(node.target)] = called.get(str(node.target), 0) + 1
    owners: dict[int, int] = {}
    read = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}  # by functional operators
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if name in read:
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return tuple(
        name
        for name, count in called.items()
        if count == 1 and all(owners[id(p)] == 1 for p in network.get_submodule(name).parameters(recurse=False))
    )


def mean_difference(
    reference: list[torch.Tensor], outputs: list[torch.Tensor], axis: int, weights: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """Mean of `reference` − `outputs` over all chunks and all axes but one: (channels,), float64.

    `weights`, of the shape without the last axis, weight the rows.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for i, (x, y) in enumerate(zip(reference, outputs, strict=True)):
        difference = x - y if weights is None else (x - y) * weights[i][..., None]
        others = [j for j in range(x.dim()) if j != axis % x.dim()]
        if others[1:]:  # one sample's positions in 32 bits, which is fast and loses nothing beside the rest
            difference = difference.sum(others[1:], keepdim=True)
        total = total + difference.sum(others, dtype=torch.float64)
        count += x.numel() / x.shape[axis] if weights is None else float(weights[i].sum())
    return total / count


def shifted(outputs: list[torch.Tensor], shift: torch.Tensor, axis: int) -> list[torch.Tensor]:
    """Every chunk with `shift` (channels,) added along `axis`, in place."""
    shape = [1] * outputs[0].dim()
    shape[axis] = -1
    return [chunk.add_(shift.to(chunk.dtype).reshape(shape)) for chunk in outputs]
