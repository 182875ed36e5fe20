"""What every operator of a captured network moves and multiplies: bytes in and out, channels, groups, zeros."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from penjing.analyze.cost import FREE, Call, Shapes, cost, fixed_value, sample_shapes
from penjing.network.graph import RECURRENT, kind, sites, tensor_inputs
from penjing.records import LayerRow

WEIGHTED = ("conv", "conv_transpose", "linear")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One operator, for one sample.

    Attributes:
        row: Its cost.
        read_bytes: Of the values that it reads, without its parameters.
        written_bytes: Of the values that it writes.
        channels: That a convolution or linear layer writes; 0 for other operators.
        groups: Of a convolution, otherwise 1.
        width: Channels in that each channel out reads; 0 for operators without weights.
        matrix_bytes: Of its weight alone, in the type that it has; 0 where it has none.
        zeros: Share of exact zeros among the weights of a convolution or linear layer.
        behind: Kind of the one operator that it alone reads from; "" where there are several, or other readers.
    """

    row: LayerRow
    read_bytes: int
    written_bytes: int
    channels: int = 0
    groups: int = 1
    width: int = 0
    matrix_bytes: int = 0
    zeros: float = 0.0
    behind: str = ""

    @property
    def depthwise(self) -> bool:
        """Whether every channel out reads one channel in."""
        return self.groups > 1 and self.width == 1


def traffic(network: fx.GraphModule, call: Call) -> tuple[Traffic, ...]:
    """One entry for every operator with a cost, in execution order.

    Args:
        network: A captured network.
        call: Example inputs (args, kwargs), batch first.
    """
    values = sample_shapes(network, call)
    nodes = sites(network)
    return tuple(_of(network, nodes[row.name], row, values) for row in cost(network, call) if row.name in nodes)


def _of(network: fx.GraphModule, node: fx.Node, row: LayerRow, values: Shapes) -> Traffic:
    inputs = [n for n in tensor_inputs(node) if not fixed_value(network, n)]
    read = sum(_size(values[n.name]) for n in dict.fromkeys(inputs) if n.name in values)
    producer = _producer(network, inputs[0]) if len(inputs) == 1 else None
    behind = kind(network, producer) if producer is not None else ""
    plain = Traffic(row=row, read_bytes=read, written_bytes=row.activation_bytes, behind=behind)
    layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    weight = getattr(layer, "weight", None)
    if row.kind in RECURRENT:
        return replace(plain, matrix_bytes=row.weight_bytes)
    if not isinstance(weight, torch.Tensor) or not row.weight_bytes:  # or another layer has counted it
        return plain
    if row.kind not in WEIGHTED:
        return replace(plain, matrix_bytes=_size(weight))
    transposed = row.kind == "conv_transpose"
    groups = int(getattr(layer, "groups", 1))
    out, width = (weight.shape[1] * groups, weight.shape[0] // groups) if transposed else weight.shape[:2]
    return Traffic(
        row=row,
        read_bytes=read,
        written_bytes=row.activation_bytes,
        channels=int(out),
        groups=groups,
        width=int(width),
        matrix_bytes=_size(weight),
        zeros=1 - int(torch.count_nonzero(weight)) / (weight.numel() or 1),
        behind=behind,
    )


def _producer(network: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The operator behind views that one reader alone has; None for an input or where there are other readers."""
    while len(node.users) == 1 and node.op in ("call_module", "call_function"):
        if kind(network, node) not in FREE:
            return node
        before = tensor_inputs(node)
        if len(before) != 1:
            return None
        node = before[0]
    return None


def _size(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


FAKE = ("fake_quantize", "quantize_per_", "dequantize", "quantize_affine", "quantize_linear")


def fake_quantized(network: fx.GraphModule) -> tuple[str, ...]:
    """Sites of operators that round values to a grid already: fake quantizers, and pairs of quantize and dequantize."""
    return tuple(name for name, node in sites(network).items() if _rounds(network, node))


def _rounds(network: fx.GraphModule, node: fx.Node) -> bool:
    what = kind(network, node)
    if any(word in what.lower() for word in FAKE) or "fakequantize" in what.lower():
        return True
    # As a composition: a division, a rounding, a clamp and a multiplication.
    if what != "round":
        return False
    return any(kind(network, user) in ("add", "clip", "clamp", "mul", "sub") for user in node.users)
