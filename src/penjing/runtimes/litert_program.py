"""A frozen network as an exported program for one sample, in quantizers that LiteRT's converter turns into integers.

The converter (litert-torch 0.10) knows no varying sizes and no stored integers. So the program is for a single sample,
and the artifact is called sample by sample; weights and biases are stored as the floats that their integers stand for,
in front of quantizers with the plan's scales, which give the same integers again.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from penjing.network.graph import arguments, kind, operator_name, tensor_inputs
from penjing.numerics import operators  # noqa: F401  registers the operators that are translated here
from penjing.records.manifest import Port
from penjing.runtimes.decomposed import in_operators_of_torch
from penjing.runtimes.single_sample import exported

_NARROW = {"int64": "int32", "float64": "float32"}  # the converter's, of inputs and outputs too


def save(
    network: fx.GraphModule,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic: Mapping[str | int, Mapping[int, str]] | None,
    outputs: list[str],
    path: Path,
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Write the program of one sample to `path`, a .pt2 file.

    Args:
        network: A frozen network.
        call: Example inputs (args, kwargs).
        dynamic: See `Task.dynamic`.
        outputs: Names of the flat outputs.
        path: The file to write.

    Returns:
        The ports of inputs and outputs; the axis of the samples has its name in the place of its size.

    Raises:
        ExportError: More than the number of samples varies, or the samples of a batch affect each other.
    """
    program, given, results = exported(network, call, dynamic, outputs, "LiteRT", requantized, _NARROW)
    torch.export.save(program, path)
    return given, results


def requantized(network: fx.GraphModule) -> fx.GraphModule:
    """A copy in PyTorch's quantizers, with a float tensor and a quantizer in the place of every stored integer tensor.

    Biases, in int32, become floats alone: the converter gives them the scale that their layer's kernel needs, which is
    the plan's.
    """
    network = in_operators_of_torch(network, by_channel=True)
    _unpadded(network)
    decomposed, graph = torch.ops.quantized_decomposed, network.graph
    back = decomposed.dequantize_per_channel.default
    for number, node in enumerate([n for n in graph.nodes if n.target is back and n.args[0].op == "get_attr"]):
        read, scales, zeros, axis, low, high, dtype = node.args
        owner, _, leaf = str(read.target).rpartition(".")
        q = getattr(network.get_submodule(owner), leaf)
        scale, zero = (getattr(network, str(n.target)) for n in (scales, zeros))
        shape = [-1 if i == axis else 1 for i in range(q.dim())]
        value = (q.to(torch.float64) - zero.reshape(shape)) * scale.double().reshape(shape)
        network.register_buffer(name := f"requantized{number}", value.float())
        with graph.inserting_before(node):
            numbers = (scales, zeros, axis, low, high, dtype)
            forth = graph.call_function(decomposed.quantize_per_channel.default, (graph.get_attr(name), *numbers))
        node.args = (forth, *numbers)
    _in_equal_scales(network)
    network.graph.eliminate_dead_code()
    _for_each_reader(network)
    network.recompile()
    return network


def _unpadded(network: fx.GraphModule) -> None:
    """Crop what transposed convolutions give without padding: the converter knows no others."""
    graph = network.graph
    edited: dict[str, tuple[list[int], list[int]]] = {}  # layer → what it padded and appended, until its first call
    for node in [n for n in graph.nodes if kind(network, n) == "conv_transpose"]:
        layer: Any = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        named = vars(layer) if layer is not None else arguments(node)
        rank = len(named["stride"])
        padding, further = edited.get(str(node.target)) or (
            [named[name][0]] * rank if len(named[name]) == 1 else list(named[name])
            for name in ("padding", "output_padding")
        )
        if not any(padding) or any(more > less for more, less in zip(further, padding, strict=True)):
            continue
        none = dict.fromkeys(("padding", "output_padding"), (0,) * rank)
        if layer is None:
            node.args, node.kwargs = tuple({**named, **none}.values()), {}
        else:
            edited[str(node.target)] = (padding, further)
            vars(layer).update(none)
        end = node
        for axis, (less, more) in enumerate(zip(padding, further, strict=True), 2):
            stop = more - less if less > more else torch.iinfo(torch.int64).max
            with graph.inserting_after(end):
                cut = graph.call_function(torch.ops.aten.slice.Tensor, (end, axis, less, stop))
            cut.meta = {"custom": node.meta.get("custom", {})}
            end.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
            end = cut


def _for_each_reader(network: fx.GraphModule) -> None:
    """Give every reader of a quantized value a dequantizer of its own.

    The converter's layout pass forgets the layout of one that has several readers, of which some are channels-last.
    """
    back = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    for node in [n for n in network.graph.nodes if n.target is back]:
        for reader in list(node.users)[1:]:
            with network.graph.inserting_after(node):
                reader.replace_input_with(node, network.graph.node_copy(node))


def _in_equal_scales(network: fx.GraphModule) -> None:
    """Let kernels that read and write one grid do so, and those that write a grid of their own.

    A concatenation reads the grid that it writes; average pooling over a window, and what only moves values, write the
    grid that they read; a sigmoid or hyperbolic tangent writes a grid of the kernel's own. What reads them takes it
    from there: a grid of its own would only round again, and XNNPACK rescales with factors of 8 bits. Where a quantizer
    behind moved values is missing, the converter carries one of a later reader in front of them, past other readers.
    """
    forth = torch.ops.quantized_decomposed.quantize_per_tensor.default
    back = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    node: Any
    for node in list(network.graph.nodes):
        what, inputs = kind(network, node), tensor_inputs(node)
        quantizers = [user for user in node.users if user.target is forth]
        if what == "pad" and _moves(network, node) and _in_convolutions(network, node, quantizers):
            continue
        if _moves(network, node) and inputs[0].target is back:
            parts = [user for user in node.users if user.target is operator.getitem] or [node]
            for part in parts:
                if any(user.args[1:] != inputs[0].args[1:] for user in part.users):
                    _requantized(network, part, inputs[0].args[1:], list(part.users))
        elif not quantizers or not inputs or not all(x.target is back for x in inputs):
            continue
        elif what == "cat":
            numbers = quantizers[0].args[1:]
            for x in dict.fromkeys(inputs):
                q: Any = x.args[0]
                if x.args[1:] == numbers:
                    continue
                if len(x.users) == 1 and len(q.users) == 1 and not _moves(network, q.args[0]):
                    _renumber(q, numbers)
                else:
                    _requantized(network, x, numbers, [node])
        else:
            numbers = quantizers[0].args[1:]
            own = _FIXED.get(what) or (inputs[0].args[1:] if _pools(node) else numbers)
            for quantizer in quantizers:
                _renumber(quantizer, own)


def _in_convolutions(network: fx.GraphModule, pad: Any, quantizers: list[fx.Node]) -> bool:
    """Let convolutions read zeros that are padded without a quantizer between, if nothing else reads these.

    The converter then takes them for the convolution's own, and computes no transposed copy of what is padded.
    """
    read = tensor_inputs(pad)[0]
    if len(quantizers) < len(pad.users) or any(q.args[1:] != read.args[1:] for q in quantizers):
        return False
    behind = [back for q in quantizers for back in q.users]
    if not all(kind(network, reader) == "conv" for back in behind for reader in back.users):
        return False
    for back in behind:
        back.replace_all_uses_with(pad)
    return True


def _renumber(quantizer: Any, numbers: tuple[Any, ...]) -> None:
    """Give a quantizer and its dequantizers another grid."""
    for node in (quantizer, *quantizer.users):
        node.args = (node.args[0], *numbers)


def _requantized(network: fx.GraphModule, value: fx.Node, numbers: tuple[Any, ...], readers: list[fx.Node]) -> None:
    """Let these readers of a value read it from a grid: scale, zero point, smallest, largest, type."""
    decomposed, graph = torch.ops.quantized_decomposed, network.graph
    with graph.inserting_after(value):
        q = graph.call_function(decomposed.quantize_per_tensor.default, (value, *numbers))
    with graph.inserting_after(q):
        x = graph.call_function(decomposed.dequantize_per_tensor.default, (q, *numbers))
    q.meta = x.meta = {"custom": value.meta.get("custom", {})}
    for reader in readers:
        reader.replace_input_with(value, x)


def _moves(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operator gives values that it reads, or zeros, which are on every grid."""
    what = kind(network, node)
    if what == "pad":
        named = arguments(node)
        return named.get("mode", "constant") == "constant" and not named["value"]
    return what in _MOVING


def _pools(node: fx.Node) -> bool:
    """Whether an operator averages over windows: its kernel writes the grid that it reads; a mean has its own."""
    name = operator_name(node)
    if name.startswith("adaptive_avg_pool"):
        size = arguments(node)["output_size"]
        return any(n != 1 for n in (size if isinstance(size, list | tuple) else [size]))
    return name.startswith("avg_pool")


_MOVING = frozenset(
    "reshape transpose select slice split split_with_sizes chunk unbind expand identity dropout max_pool".split()
)
"""Kinds of operator that move values, as one operator of integers each."""
_FIXED = {
    "sigmoid": (1 / 256, -128, -128, 127, torch.int8),
    "tanh": (1 / 128, 0, -128, 127, torch.int8),
}
"""Kinds of operator whose integer kernels write one grid: scale, zero point, smallest, largest, type."""
