"""What the time of a layer depends on: its kind and its sizes, read from a captured network."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import fx

from penjing.analyze.cost import Call, sample_shapes
from penjing.analyze.traffic import Traffic, traffic
from penjing.network.graph import sites

FOLDED = ("batch_norm",)  # into the layer before
ABSORBING = ("conv", "linear", "add", "batch_norm")  # behind these an activation that the runtime fuses costs nothing
WEIGHTED = ("conv", "linear")
FEW = 4  # channels: an image has fewer, and keeps them


@dataclass(frozen=True, order=True)
class LayerShape:
    """A layer with the activation that is fused into it.

    Attributes:
        kind: As `penjing.network.graph.kind` names it.
        inputs: Channels in.
        outputs: Channels out.
        kernel: Size of a convolution's window along an axis, the geometric mean where it is not square; otherwise 1.
        stride: Its step.
        groups: Its groups.
        height: Of the input, 1 for vectors.
        width: Of the input, 1 for vectors.
    """

    kind: str
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    height: int = 1
    width: int = 1

    @property
    def out_pixels(self) -> int:
        """Positions of the output of one channel."""
        if self.kind == "avg_pool":
            return 1
        return math.ceil(self.height / self.stride) * math.ceil(self.width / self.stride)

    @property
    def depthwise(self) -> bool:
        """Whether every channel out reads one channel in."""
        return self.groups > 1 and self.groups == self.inputs

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample; 0 for layers without weights."""
        return self.weights * self.out_pixels

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        if self.kind not in WEIGHTED:
            return 0
        return self.outputs * self.inputs // self.groups * self.kernel**2

    @property
    def values(self) -> int:
        """Elements that one sample reads and writes."""
        return self.inputs * self.height * self.width + self.outputs * self.out_pixels

    @property
    def parallel(self) -> bool:
        """Whether copies read the same input: the output has not the input's size, so they can't follow one another."""
        return self.stride > 1 or self.inputs != self.outputs

    def row(self) -> list[Any]:
        """Plain data."""
        return list(astuple(self))

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> LayerShape:
        """From plain data.

        Raises:
            ValueError: It is not a layer.
        """
        kind, *sizes = row
        if not isinstance(kind, str) or len(sizes) != 7 or not all(type(s) is int and s > 0 for s in sizes):
            raise ValueError(f"not a layer: {row}")
        return cls(kind, *sizes)


def layer_shapes(network: fx.GraphModule, call: Call, fuses: Collection[str]) -> tuple[LayerShape, ...]:
    """The layers of a network that take time, in execution order; equal ones as often as they occur.

    Args:
        network: A captured network.
        call: Example inputs (args, kwargs), batch first.
        fuses: Kinds that the runtime computes within the layer before.
    """
    values, nodes = sample_shapes(network, call), sites(network)
    layers = []
    for entry in traffic(network, call):
        if not free(entry, fuses):
            layers.append(_shape(network, nodes[entry.row.name], entry, values))
    return tuple(layers)


def free(entry: Traffic, fuses: Collection[str]) -> bool:
    """Whether an operator is computed within the one before it."""
    if entry.row.kind in FOLDED and entry.behind in WEIGHTED:
        return True
    return not entry.row.parameters and entry.row.kind in fuses and entry.behind in ABSORBING


def _shape(network: fx.GraphModule, node: fx.Node, entry: Traffic, values: dict[str, torch.Tensor]) -> LayerShape:
    layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    kind = entry.row.kind
    shapes = [tuple(values[n.name].shape) for n in node.all_input_nodes if n.name in values]
    read = max(shapes, key=math.prod, default=(1, 1))
    if isinstance(layer, torch.nn.Linear):
        rows = math.prod(read[1:-1])
        return LayerShape("linear", layer.in_features, layer.out_features, height=rows)
    channels, height, width = _sizes(read)
    if isinstance(layer, torch.nn.Conv2d):
        kernel, stride = round(math.sqrt(math.prod(layer.kernel_size))), max(layer.stride)
        return LayerShape("conv", channels, layer.out_channels, kernel, stride, layer.groups, height, width)
    written = _sizes(tuple(values[node.name].shape)) if node.name in values else (channels, height, width)
    stride = max(1, round(height / written[1])) if kind == "max_pool" else 1
    return LayerShape(kind, channels, max(1, written[0]), 1, stride, 1, height, width)


def _sizes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width of (samples, channels, ...), as if there were two axes of positions."""
    if len(shape) < 3:
        return (int(math.prod(shape[1:])) or 1, 1, 1)
    return int(shape[1]), int(shape[2]), int(math.prod(shape[3:])) or 1
