"""Which layers read the channels of which operator, through operators that commute with a positive channel scale.

If every reader of a value is a layer with weights, its channels can be divided by any positive factors and the
readers' weights multiplied by them: the function is unchanged, while the ranges are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze.channel_statistics import LARGEST, shared
from penjing.network.graph import kind, operator_name, tensor_inputs
from penjing.quantize.labels import Sizes, behind, sizes
from penjing.steps.step import Context
from penjing.tasks.task import Call

LAYERS = ("conv", "linear")


@dataclass(frozen=True)
class Couple:
    """A producer of channels and all of their readers.

    Attributes:
        source: Target of the module, or name of the node, whose output channels can be scaled.
        tensors: Names of the parameters that produce them; axis 0 of each is the channel.
        readers: Names of the convolutions and linear layers that read them; there are no other readers.
        columns: For every reader, the channel that each of its input channels corresponds to, (in_channels,) each.
    """

    source: str
    tensors: tuple[str, ...]
    readers: tuple[str, ...]
    columns: tuple[torch.Tensor, ...] = field(repr=False, compare=False)


def couples(network: fx.GraphModule, call: Call, sources: Iterable[str], readers: Iterable[str]) -> list[Couple]:
    """Find all pairs of producer and readers in a captured network, in execution order.

    Args:
        network: In eval mode.
        call: Example inputs, from which sizes are recorded in one forward pass.
        sources: Kinds of operators whose output channels may be scaled: "conv", "linear", "layer_norm", "rms_norm" or
            "mul".
        readers: Kinds of layers that may read them.
    """
    return _Tracer(network, call, tuple(readers)).run(tuple(sources))


def layers(network: fx.GraphModule) -> tuple[str, ...]:
    """Return the names of all convolution and linear modules that the network calls."""
    nodes = [n for n in network.graph.nodes if n.op == "call_module" and kind(network, n) in LAYERS]
    return tuple(dict.fromkeys(str(n.target) for n in nodes))


def divide(network: fx.GraphModule, couple: Couple, factor: torch.Tensor) -> None:
    """Divide the producer's channels by `factor` (channels,) and multiply its readers' columns by it, in place."""
    with torch.no_grad():
        for name in couple.tensors:
            tensor = network.get_parameter(name)
            shape = (-1, *[1] * (tensor.dim() - 1))
            tensor.copy_(tensor.double() / factor.to(tensor.device).reshape(shape))
        for name, columns in zip(couple.readers, couple.columns, strict=True):
            module: Any = network.get_submodule(name)
            grouped = by_input(module)
            spread = factor[columns].reshape(grouped.shape[0], 1, -1, 1).to(grouped.device)
            module.weight.copy_((grouped.double() * spread).reshape(module.weight.shape))


def by_input(module: Any) -> torch.Tensor:
    """View a layer's weight as (groups, out_channels/groups, in_channels/groups, taps); axes 0 and 2 are its inputs."""
    weight: torch.Tensor = module.weight.detach()
    groups = getattr(module, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def over_channels(values: Iterable[torch.Tensor], couple: Couple, channels: int) -> torch.Tensor:
    """Reduce the readers' values, each (in_channels,), to their maximum per channel: (channels,)."""
    largest = torch.zeros(channels, dtype=torch.float64)
    for value, columns in zip(values, couple.columns, strict=True):
        largest.scatter_reduce_(0, columns, value.double().cpu(), "amax")
    return largest


def range_of_inputs(module: nn.Module) -> torch.Tensor:
    """Return the largest absolute weight of every input channel: (in_channels,), float64."""
    return by_input(module).abs().amax((1, 3)).flatten().double()


class _Tracer:
    def __init__(self, network: fx.GraphModule, call: Call, readers: tuple[str, ...]) -> None:
        self.network, self.readers = network, readers
        self.sizes: Sizes = sizes(network, call)
        self.tensors = dict(network.named_parameters(remove_duplicate=False))
        # A tensor that is read twice (tied weights, a layer called twice) has a reader that would not be rescaled.
        self.reads: Counter[int] = Counter()
        for node in network.graph.nodes:
            for name in self._owned(node):
                self.reads[id(self.tensors[name])] += 1 if node.op == "call_module" else len(node.users)

    def run(self, sources: tuple[str, ...]) -> list[Couple]:
        coupled: list[Couple] = []
        for node in self.network.graph.nodes:
            names = self._produced_by(node) if kind(self.network, node) in sources else ()
            labels = self._labels(node, names) if self._alone(names) else None
            ends = None if labels is None else self._follow(node, labels)
            if ends:
                source = str(node.target) if node.op == "call_module" else node.name
                coupled.append(Couple(source, names, tuple(ends), tuple(ends.values())))
        return coupled

    def _owned(self, node: fx.Node) -> tuple[str, ...]:
        """Names of the parameters of a module or a constant."""
        if node.op == "get_attr":
            return (str(node.target),) if str(node.target) in self.tensors else ()
        if node.op != "call_module":
            return ()
        module = self.network.get_submodule(str(node.target))
        return tuple(f"{node.target}.{name}" for name, _ in module.named_parameters(recurse=False))

    def _produced_by(self, node: fx.Node) -> tuple[str, ...]:
        if node.op == "call_module":
            return self._owned(node)
        return tuple(name for n in tensor_inputs(node) if n.op == "get_attr" for name in self._owned(n))

    def _alone(self, names: tuple[str, ...]) -> bool:
        return bool(names) and all(self.reads[id(self.tensors[name])] == 1 for name in names)

    def _labels(self, node: fx.Node, names: tuple[str, ...]) -> torch.Tensor | None:
        """The channel of every element of a producer's output; None if the parameters do not lie along one axis."""
        size, what = self.sizes[node], kind(self.network, node)
        shapes = [tuple(self.tensors[name].shape) for name in names]
        if not isinstance(size, torch.Size) or (what in LAYERS and node.op != "call_module"):
            return None
        if what == "conv":  # an unbatched one has its channels on another axis
            along = torch.arange(size[1]).reshape(-1, *[1] * (len(size) - 2))
            return along.expand(size) if len(size) == len(shapes[0]) else None
        if what != "linear" and (set(shapes) != {(size[-1],)} or (what == "mul" and len(names) > 1)):
            return None
        return torch.arange(size[-1]).expand(size)

    def _follow(self, node: fx.Node, labels: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """Reading layer → the channel of each of its inputs; None if anything else reads the value."""
        ends: dict[str, torch.Tensor] = {}
        for user in node.users:
            if user.op == "call_function" and operator_name(user) == "sym_size":
                continue
            if kind(self.network, user) in LAYERS and user.op == "call_module":
                columns = self._columns(user, labels)
                if columns is None:
                    return None
                ends[str(user.target)] = columns
                continue
            after = behind(self.network, self.sizes, node, user, labels)
            more = None if after is None else self._follow(user, after)
            if more is None:
                return None
            ends |= more
        return ends

    def _columns(self, user: fx.Node, labels: torch.Tensor) -> torch.Tensor | None:
        module: Any = self.network.get_submodule(str(user.target))
        what = kind(self.network, user)
        if what not in self.readers or not self._alone(self._owned(user)):
            return None
        if what == "conv":
            if labels.dim() != module.weight.dim():
                return None
            labels = labels.movedim(1, -1)
        if not labels.numel():
            return None
        first = labels[(0,) * (labels.dim() - 1)]
        return first.clone() if bool((labels == first).all()) else None  # compared in place: labels are views


def maxima(network: fx.GraphModule, names: set[str], context: Context, samples: int) -> dict[str, torch.Tensor]:
    """Return linear layer → largest magnitude of each of its inputs over the calibration data, (in_features,)."""
    layers = {name: network.get_submodule(name) for name in sorted(names)}
    return shared(network, layers, context, LARGEST, samples=samples, label="magnitudes")


def linears_by_input(network: fx.GraphModule) -> list[list[fx.Node]]:
    """Group linear layers by the value they read: modules that are called once and whose weights are not tied."""
    called: dict[str, int] = {}
    owners: dict[int, int] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            called[str(node.target)] = called.get(str(node.target), 0) + 1
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in network.graph.nodes:
        if node.op != "call_module" or called[str(node.target)] > 1 or "float" in node.meta:
            continue
        module = network.get_submodule(str(node.target))
        source = node.args[0]
        if isinstance(module, nn.Linear) and isinstance(source, fx.Node) and owners[id(module.weight)] == 1:
            readers.setdefault(source, []).append(node)
    return list(readers.values())
