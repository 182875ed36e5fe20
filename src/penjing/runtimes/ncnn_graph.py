"""A frozen network as TorchScript, which pnnx reads, and what is known of its layers' integers."""

from __future__ import annotations

import copy
import io
import operator
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from penjing.network.exporting import with_plain_outputs
from penjing.network.graph import arguments, compute, kind, operator_name, site
from penjing.network.naming import free_name

_LAYERS: dict[str, Any] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
LIMITS = (-127, 127)  # what ncnn rounds the input of a layer to
_RECURRENT: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}
_SETTINGS = ("stride", "padding", "dilation")


@dataclass(frozen=True, eq=False)
class Weighted:
    """A convolution or a linear layer: its weights as pnnx writes them, and the integers that they stand for.

    Attributes:
        site: Of the network.
        weight: (out, in / groups, …), float32.
        bias: (out,), float32, or None.
        integers: Of the shape of `weight`, int8, where the layer computes in integers; None: in floating point.
        scales: (out,), float32: what one step of the integers stands for.
        input_scale: The same of its input, which is rounded where the layer reads it.
    """

    site: str
    weight: np.ndarray
    bias: np.ndarray | None = None
    integers: np.ndarray | None = None
    scales: np.ndarray | None = None
    input_scale: float = 0.0


def in_floats(network: fx.GraphModule) -> tuple[fx.GraphModule, list[Weighted]]:
    """Return a copy of a frozen network in floating point, and its convolutions and linear layers in their order.

    Weights and biases have the values of their integers. A layer that ncnn computes in integers rounds its input
    itself, so that the quantizer before it is gone; the others are written with operators of torch.
    """
    network = copy.deepcopy(network)
    writer = _Writer(network)
    for node in list(network.graph.nodes):
        writer.write(node)
    # pnnx of 2026-10-20 crashes, or gives the wrong one, where not all of them are read: more outputs, at the end.
    end: Any = network.graph.output_node()
    end.args = ((*end.args[0], *writer.unread),)
    network.graph.eliminate_dead_code()
    network.recompile()
    return network, writer.layers


class _Writer:
    """Writes operators of torch in the place of Penjing's, into one network."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.network, self.call = network, network.graph.call_function
        self.layers: list[Weighted] = []
        self.unread: list[fx.Node] = []  # of a recurrent layer whose last state is read: what else it gives
        self.stored: dict[fx.Node, _Stored] = {}  # a constant in floating point → the integers that it stands for
        self.rounded: dict[fx.Node, _Rounded] = {}  # the value behind a quantizer → the quantizer

    def write(self, node: fx.Node) -> None:
        """Rewrite one operator; those before it are rewritten already."""
        if node.op == "call_module":
            module: Any = self.network.get_submodule(str(node.target))
            if isinstance(module, _WEIGHTED):
                self.layers.append(Weighted(site(node), _array(module.weight), _array(module.bias)))
        elif node.target is torch.ops.penjing.dequantize.default:
            self._dequantize(node)
        elif node.op == "call_function" and kind(self.network, node) in ("conv", "linear"):
            self._layer(node)
        elif node.op == "call_function" and operator_name(node) in _RECURRENT:
            self._recurrent(node)

    def value(self, node: Any) -> torch.Tensor:
        """The tensor that a node reads from the network."""
        tensor: torch.Tensor = compute(self.network, node, (), {}).detach()
        return tensor

    def constant(self, value: torch.Tensor) -> fx.Node:
        """Store a tensor and read it."""
        name = free_name(self.network, f"constant{sum(1 for _ in self.network.buffers())}")
        self.network.register_buffer(name, value)
        return self.network.graph.get_attr(name)

    def _dequantize(self, node: fx.Node) -> None:
        q, scale, zero, axis = node.args
        assert isinstance(q, fx.Node)
        with self.network.graph.inserting_before(node):
            if q.target is torch.ops.penjing.quantize.default:
                new = self._round(q)
            else:
                integers, scales, zeros = map(self.value, (q, scale, zero))
                new = self.constant(torch.ops.penjing.dequantize(integers, scales, zeros, axis))
                self.stored[new] = _Stored(integers, scales, zeros, int(axis))  # type: ignore[arg-type]
        node.replace_all_uses_with(new)

    def _round(self, node: fx.Node) -> fx.Node:
        """A quantizer and its dequantizer in floating point, for readers that do not round their input themselves."""
        x, scale, zero, _, low, high = node.args
        step, offset = float(self.value(scale)), int(self.value(zero))
        aten, limits = torch.ops.aten, (int(low), int(high))  # type: ignore[arg-type]
        steps = self.call(aten.round.default, (self.call(aten.div.Tensor, (x, step)),))
        shifted = self.call(aten.add.Tensor, (steps, float(offset))) if offset else steps
        inside = self.call(aten.clamp.default, (shifted, *map(float, limits)))
        back = self.call(aten.sub.Tensor, (inside, float(offset))) if offset else inside
        new = self.call(aten.mul.Tensor, (back, step))
        self.rounded[new] = _Rounded(x, step, offset, limits)  # type: ignore[arg-type]
        return new

    def _layer(self, node: fx.Node) -> None:
        """A functional convolution or linear layer whose weight is stored, as a layer."""
        named = arguments(node)
        weight, bias, x = named["weight"], named["bias"], named["input"]
        if not all(n is None or n.op == "get_attr" for n in (weight, bias)):
            return
        values = self.value(weight), None if bias is None else self.value(bias)
        layer = _layer_of(node, *values)
        if layer is None:
            return
        line = isinstance(layer, nn.Conv1d)
        over_images = _over_images(layer) if line else layer
        integers = self._integers(over_images, weight, x)
        path = free_name(self.network, f"layer{len(self.layers)}")
        self.network.add_module(path, over_images if integers else layer)
        with self.network.graph.inserting_before(node):
            # What is rounded to fewer steps than ncnn has is so when it gets there, and stays as it is.
            before = self.rounded[x].before if integers and self.rounded[x].limits == LIMITS else x
            if integers and line:
                before = self.call(torch.ops.aten.unsqueeze.default, (before, 2))
            new = self.network.graph.call_module(path, (before,))
            if integers and line:
                new = self.call(torch.ops.aten.squeeze.dim, (new, 2))
        new.meta["site"] = site(node)
        self.layers.append(Weighted(site(node), _array(values[0]), _array(values[1]), **integers))
        node.replace_all_uses_with(new)

    def _recurrent(self, node: fx.Node) -> None:
        """A functional stack of recurrent layers as a layer: pnnx knows no other form of it."""
        named: Any = arguments(node)
        if "hx" not in named or not all(n.op == "get_attr" for n in named["params"]):
            return
        name, several = operator_name(node), isinstance(named["hx"], list | tuple)
        values = [self.value(n) for n in named["params"]]
        settings = {"bias": named["has_biases"], "batch_first": named["batch_first"]}
        settings |= {"bidirectional": named["bidirectional"], "num_layers": named["num_layers"]}
        layer = _RECURRENT[name](values[0].shape[1], values[1].shape[1], **settings)
        if [p.shape for p in layer.parameters()] != [v.shape for v in values]:
            return  # with a projection of its state
        for parameter, value in zip(layer.parameters(), values, strict=True):
            parameter.data, parameter.requires_grad = value.contiguous(), False
        path = free_name(self.network, f"recurrent{len(list(self.network.children()))}")
        self.network.add_module(path, layer)
        states = list(named["hx"]) if several else [named["hx"]]
        first = () if all(n.target is torch.ops.aten.zeros.default for n in states) else (named["hx"],)
        with self.network.graph.inserting_before(node):
            new = self.network.graph.call_module(path, (named["input"], *map(_as_tuple, first)))
            given, last = (self.call(operator.getitem, (new, i)) for i in range(2))
            parts = [given, *(self.call(operator.getitem, (last, i)) for i in range(2))] if several else [given, last]
        for user in list(node.users):
            user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
        if any(part.users for part in parts[1:]):
            self.unread += [part for part in parts if not part.users]

    def _integers(self, layer: nn.Module, weight: fx.Node, x: fx.Node) -> dict[str, Any]:
        """What the integers of a layer are, as fields of `Weighted`; empty where ncnn has no kernel for it."""
        if not _has_kernel(layer) or weight not in self.stored or x not in self.rounded:
            return {}
        stored, rounded = self.stored[weight], self.rounded[x]
        by_rows = stored.scales.numel() == 1 or stored.axis == 0
        symmetric = rounded.offset == 0 and rounded.step > 0 and not stored.zeros.any()
        if stored.integers.dtype != torch.int8 or not by_rows or not symmetric:
            return {}
        scales = stored.scales.expand(len(stored.integers))
        return {"integers": _array(stored.integers), "scales": _array(scales), "input_scale": rounded.step}


def _over_images(layer: nn.Conv1d) -> nn.Conv2d:
    """The same convolution over images of one row: only such have integer kernels."""
    padding = layer.padding if isinstance(layer.padding, str) else (0, *layer.padding)
    across: Any = {"stride": (1, *layer.stride), "padding": padding, "dilation": (1, *layer.dilation)}
    size = (1, *layer.kernel_size)
    image = nn.Conv2d(layer.in_channels, layer.out_channels, size, groups=layer.groups, bias=False, **across)  # type: ignore[arg-type]
    image.weight = nn.Parameter(layer.weight.unsqueeze(2), requires_grad=False)
    image.bias = layer.bias
    return image


def _has_kernel(layer: nn.Module) -> bool:
    """Whether ncnn computes a layer in integers with a scale for every output: of convolutions over images alone."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 or layer.groups == layer.in_channels == layer.out_channels
    return isinstance(layer, nn.Linear)


@dataclass(frozen=True)
class _Rounded:
    """A quantizer: the value before it, one step, and the limits and the offset of its integers."""

    before: fx.Node
    step: float
    offset: int
    limits: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Stored:
    integers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    axis: int


def _as_tuple(states: Any) -> Any:
    return tuple(states) if isinstance(states, list | tuple) else states


def _array(value: torch.Tensor | None) -> Any:
    return None if value is None else value.detach().contiguous().numpy()


def _layer_of(node: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """The layer of a functional operator with these parameters; None for one that has none."""
    name = operator_name(node)
    layer: Any = None
    outputs, inputs = weight.shape[:2]
    if name == "linear":
        layer = nn.Linear(inputs, outputs, bias is not None)
    elif name in _LAYERS:
        named: Any = arguments(node)
        settings = {key: named[key] if isinstance(named[key], str) else tuple(named[key]) for key in _SETTINGS}
        settings |= {"groups": named["groups"], "bias": bias is not None}
        layer = _LAYERS[name](inputs * named["groups"], outputs, tuple(weight.shape[2:]), **settings)
    if layer is not None:
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def scripted(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bytes:
    """A network in floating point as TorchScript, traced with these inputs: flat inputs, flat outputs."""
    network = with_plain_outputs(network).eval()
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = tensor.data.contiguous()
    count = len(call[0])
    names = list(call[1])

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *inputs: torch.Tensor) -> Any:
            return self.network(*inputs[:count], **dict(zip(names, inputs[count:], strict=True)))

    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = tuple(x.contiguous() for x in (*call[0], *call[1].values()))
        torch.jit.save(torch.jit.trace(Flat(), values, check_trace=False), buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()
