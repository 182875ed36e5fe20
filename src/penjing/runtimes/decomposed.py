"""A frozen network in PyTorch's own quantizers, `quantized_decomposed`: what several runtimes read.

torch 2.13 registers them in `torch.ao.quantization.fx._decomposed`. They compute what Penjing's operators do, except
that a value is multiplied by the reciprocal of its scale where Penjing divides by the scale: one that lies between two
integers to the last bit may round to the other.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import fx
from torch.export import ExportedProgram

from penjing.errors import ExportError
from penjing.network.exporting import Dynamic, export, with_plain_outputs
from penjing.network.graph import arguments, compute, kind, line, operator_name
from penjing.network.graph import site as where
from penjing.network.naming import free_name
from penjing.numerics import operators

_SITE = "penjing_site"  # in metadata that torch carries through export, decompositions and files
_FLOAT = "penjing_float"
_LIBRARIES = ("aten", "prims", "higher_order", "penjing", "quantized_decomposed")
_WHOLE = ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")  # with an output of one place
_EPS = torch.finfo(torch.float32).eps  # the smallest scale of a range that is taken at run time

IDLE = ("dropout", "identity")
"""Kinds of operator that do nothing in eval mode."""

Keeps = Callable[[fx.GraphModule, list[fx.Node], torch.Tensor], bool]
"""Whether a stored tensor stays in integers, from the network, the operators that read it, and its integers."""


def narrow(network: fx.GraphModule, readers: list[fx.Node], stored: torch.Tensor) -> bool:
    """All but int32, that is, all but biases."""
    return stored.dtype != torch.int32


def decomposed(
    network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]], dynamic: Dynamic, keeps: Keeps = narrow
) -> ExportedProgram:
    """Export a frozen network with PyTorch's quantizers; `site` tells which operator a node of it comes from.

    Args:
        network: A frozen network (see `penjing.surgery.freeze`), or one in floating point.
        call: Example inputs (args, kwargs).
        dynamic: See `Task.dynamic`.
        keeps: Which stored tensors stay in integers; others, such as biases, become float32 constants.

    Raises:
        ExportError: torch can't export it.
    """
    return export(with_plain_outputs(in_operators_of_torch(network, keeps)), call, dynamic)


def site(node: fx.Node) -> str:
    """The site of the operator that a node of an exported program comes from; empty for one that Penjing added."""
    return str((node.meta.get("custom") or {}).get(_SITE, ""))


def floats(node: fx.Node) -> bool:
    """Whether a node of an exported program is of an operator that the plan leaves in floating point."""
    return bool((node.meta.get("custom") or {}).get(_FLOAT))


def sited(network: fx.GraphModule) -> fx.GraphModule:
    """A copy of a network, of which the nodes of an exported program tell their `site`, and whether it `floats`."""
    network = copy.deepcopy(network)
    for node in network.graph.nodes:
        if node.op in ("call_module", "call_function"):
            node.meta["custom"] = {_SITE: str(node.meta.get("site", ""))}
            if "float" in node.meta:
                node.meta["custom"][_FLOAT] = True
    return network


def maxima_of_axes(network: fx.GraphModule) -> None:
    """Write global max pooling as the maximum of axes, which more converters know; the network is modified."""
    for node in list(network.graph.nodes):
        if node.op != "call_function" or operator_name(node) not in _WHOLE:
            continue
        size, users = arguments(node)["output_size"], list(node.users)
        values = [user for user in users if user.target is operator.getitem and user.args[1] == 0]
        if any(n != 1 for n in size) or any(user.users for user in users if user not in values):
            continue  # of windows, or with the places of the maxima
        axes = list(range(-len(size), 0))
        with network.graph.inserting_before(node):
            largest = network.graph.call_function(torch.ops.aten.amax.default, (node.args[0], axes, True))
        largest.meta.update({key: value for key, value in node.meta.items() if key != "val"})
        for user in users:
            user.replace_all_uses_with(largest)
            network.graph.erase_node(user)
        network.graph.erase_node(node)
    network.recompile()


def _refuse_foreign(network: fx.GraphModule) -> None:
    """Raise ExportError for an operator of a user's or a third library: a converter's process does not have it."""
    for node in network.graph.nodes:
        if getattr(node.target, "namespace", _LIBRARIES[0]) not in _LIBRARIES:
            raise ExportError(
                f"the network has an operator that is not torch's: {where(node)}{line(node)}",
                code="custom-operator",
                got=str(node.target),
                expected=f"operators of {', '.join(_LIBRARIES)}",
                remedy="write it with torch's operators, or choose another runtime",
            )


def in_operators_of_torch(network: fx.GraphModule, keeps: Keeps = narrow, by_channel: bool = False) -> fx.GraphModule:
    """Return a copy of a frozen network with PyTorch's operators in the place of Penjing's.

    Scales and zero points are numbers for a single scale, and tensors (channels,), float32 and int64, for more. A
    linear layer with a range at run time becomes quantizers of the smallest and largest value, and a linear layer.

    Args:
        network: The network.
        keeps: See `decomposed`.
        by_channel: Write a scale for every channel also where a stored tensor has one in all.

    Raises:
        ExportError: An operator is of another library, which no converter knows.
    """
    _refuse_foreign(network)
    network = sited(network)
    maxima_of_axes(network)
    writer = _Writer(network, keeps, by_channel)
    for node in list(network.graph.nodes):
        write = writer.writers.get(node.target)
        if write is None:
            continue
        with network.graph.inserting_before(node):
            new = write(node)
        new.meta["custom"] = node.meta["custom"]
        node.replace_all_uses_with(new)
        network.graph.erase_node(node)
    _without_idle(network)
    network.graph.eliminate_dead_code()
    _forget_unread(network)
    network.recompile()
    return network


def _without_idle(network: fx.GraphModule) -> None:
    """Drop what gives its input in eval mode.

    ExecuTorch's XNNPACK takes a linear layer in integers if a quantizer follows; a dropout between is removed too late.
    """
    for node in list(network.graph.nodes):
        if kind(network, node) in IDLE and len(node.all_input_nodes) == 1:
            node.replace_all_uses_with(node.all_input_nodes[0])
            network.graph.erase_node(node)


def _forget_unread(network: fx.GraphModule) -> None:
    """Delete stored tensors that no operator reads: a saved program would keep them."""
    read = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}
    layers = tuple(f"{node.target}." for node in network.graph.nodes if node.op == "call_module")
    for path in [name for name, _ in network.named_buffers(remove_duplicate=False)]:
        if path not in read and not path.startswith(layers):
            owner, _, leaf = path.rpartition(".")
            delattr(network.get_submodule(owner), leaf)


class _Writer:
    """Writes the operators in the place of Penjing's, into one network."""

    def __init__(self, network: fx.GraphModule, keeps: Keeps, by_channel: bool) -> None:
        self.network, self.call = network, network.graph.call_function
        self.keeps, self.by_channel = keeps, by_channel
        self.limits: dict[fx.Node, tuple[int, int, torch.dtype]] = {}  # quantizer → its smallest, largest, type
        self.writers = {
            torch.ops.penjing.quantize.default: self.quantize,
            torch.ops.penjing.dequantize.default: self.dequantize,
            torch.ops.penjing.linear_dynamic.default: self.linear_dynamic,
        }

    def stored(self, node: Any) -> torch.Tensor:
        """The tensor that a node reads from the network."""
        tensor: torch.Tensor = compute(self.network, node, (), {}).detach()
        return tensor

    def constant(self, value: torch.Tensor) -> fx.Node:
        """Store a tensor and read it."""
        name = free_name(self.network, f"constant{sum(1 for _ in self.network.buffers())}")
        self.network.register_buffer(name, value)
        return self.network.graph.get_attr(name)

    def quantize(self, node: fx.Node) -> fx.Node:
        """The quantizer of an activation."""
        x, scale, zero, axis, low, high = node.args
        limits = (low, high, operators.integer_dtype(low, high))  # type: ignore[arg-type]
        new = self._quantizer("quantize", (x, self.stored(scale), self.stored(zero), axis), limits, False)
        self.limits[new] = limits  # type: ignore[assignment]
        return new

    def dequantize(self, node: fx.Node) -> fx.Node:
        """The dequantizer of an activation, or of a stored tensor; a constant in floating point where it isn't kept."""
        q, scale, zero, axis = node.args
        numbers: Any = (self.stored(scale), self.stored(zero), axis)
        if isinstance(q, fx.Node) and q in self.limits:
            return self._quantizer("dequantize", (q, *numbers), self.limits[q], False)
        value = self.stored(q)
        if not self.keeps(self.network, list(node.users), value):
            return self.constant(torch.ops.penjing.dequantize(value, *numbers))
        info = torch.iinfo(value.dtype)
        limits = (info.min, info.max, value.dtype)
        return self._quantizer("dequantize", (q, *numbers), limits, self.by_channel, value.shape)

    def _quantizer(
        self,
        word: str,
        arguments: Any,
        limits: tuple[Any, Any, torch.dtype],
        by_channel: bool,
        shape: tuple[int, ...] = (),
    ) -> fx.Node:
        x, scale, zero, axis = arguments
        if scale.numel() == 1 and not by_channel:
            one = getattr(torch.ops.quantized_decomposed, f"{word}_per_tensor").default
            return self.call(one, (x, float(scale), int(zero), *limits))
        many = getattr(torch.ops.quantized_decomposed, f"{word}_per_channel").default
        each = (scale, zero.long()) if not by_channel else (v.expand(shape[axis]).clone() for v in (scale, zero.long()))
        return self.call(many, (x, *map(self.constant, each), axis, *limits))

    def linear_dynamic(self, node: fx.Node) -> fx.Node:
        """Signed integers of the input's own range, and a product with a weight of (out, in)."""
        x, weight, scale, zero, bias = node.args
        torch_ops, limits = torch.ops.quantized_decomposed, (-128, 127, torch.int8)
        ranges = self.call(torch_ops.choose_qparams.tensor, (x, -128, 127, _EPS, torch.int8))
        numbers = [self.call(operator.getitem, (ranges, i)) for i in range(2)]
        q = self.call(torch_ops.quantize_per_tensor.tensor, (x, *numbers, *limits))
        rounded = self.call(torch_ops.dequantize_per_tensor.tensor, (q, *numbers, *limits))
        rows = self.constant(self.stored(weight).T.contiguous())
        stored: Any = (rows, self.stored(scale), self.stored(zero), 0)
        matrix = self._quantizer("dequantize", stored, limits, False)
        return self.call(torch.ops.aten.linear.default, (rounded, matrix, bias))
