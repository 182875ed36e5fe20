"""Where quantizers stand: the edges of the network that become integers in a runtime, decided before any data."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from penjing.analyze.cost import multiplies
from penjing.network.graph import RECURRENT, arguments, kind, site, tensor_inputs
from penjing.quantize.masking import FILLED, before_softmax, filled
from penjing.steps.plan import Accelerates
from penjing.surgery import recurrent

SILENT = frozenset({"dropout", "identity"})  # operators that an export removes
CHECKED = ("conv", "conv_transpose", "linear", "add", "cat", "avg_pool", "matmul", "attention")


@dataclass(frozen=True)
class Placement:
    """Which edges are quantized, whose values set their range, and what stays in floating point.

    Attributes:
        edges: Activation edge ("site:in0") → name of the node whose values it carries.
        weights: Sites of the layers whose weights are quantized.
        stored: Sites of the layers whose weights are quantized, and nothing else of them.
        floats: Site → why it stays in floating point.
        products: Names of the nodes whose values a product of two activations reads.
        results: Edges that are quantized for the operator before them alone: its kernel writes integers only.
    """

    edges: dict[str, str]
    weights: tuple[str, ...]
    stored: tuple[str, ...]
    floats: dict[str, str]
    products: frozenset[str]
    results: frozenset[str]


def place(network: fx.GraphModule, accelerates: Accelerates, excluded: dict[str, str]) -> Placement:
    """Decide the edges for one runtime.

    An operator with an integer kernel has all its inputs quantized. Operators that only move values carry the
    scale of their input to their output. Where a kernel needs quantized results too, every reader of the result,
    behind the activation that the runtime fuses, gets a quantizer.
    """
    floats = dict(excluded)
    masked = before_softmax(network)
    integer: list[fx.Node] = []
    for node in network.graph.nodes:
        what = kind(network, node)
        reason = masked.get(node.name) or _refusal(network, node, what, accelerates)
        if reason is None and any(filled(network, _root(network, accelerates, t)[0]) for t in tensor_inputs(node)):
            reason = FILLED
        if site(node) in excluded or not node.meta.get("floating", True):  # positions and masks are integers already
            continue
        if reason is None:
            integer.append(node)
        elif what in CHECKED or multiplies(network, node):
            floats[site(node)] = reason
    stored = tuple(
        site(n)
        for n in network.graph.nodes
        if kind(network, n) in accelerates.stored and site(n) not in excluded and _holds_weights(network, n)
    )
    edges: dict[str, str] = {}
    for node in integer:
        for port, producer in enumerate(tensor_inputs(node)):
            _carry(network, accelerates, f"{site(node)}:in{port}", producer, edges)
    read = frozenset(edges)
    chosen = {site(n) for n in integer}
    for node in integer:
        if kind(network, node) in accelerates.quantized_output:
            _quantize_readers(network, accelerates, node, chosen, edges)
    weights = tuple(site(n) for n in integer if kind(network, n) in ("conv", "conv_transpose", "linear"))
    products = {edges[f"{site(n)}:in{i}"] for n in integer if kind(network, n) == "matmul" for i in range(2)}
    return Placement(edges, weights, stored, floats, frozenset(products), frozenset(edges) - read)


def _holds_weights(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether its weights are stored, and not computed."""
    if kind(network, node) not in RECURRENT:
        return node.op == "call_module"
    return recurrent.stores(node)


def _refusal(network: fx.GraphModule, node: fx.Node, what: str, accelerates: Accelerates) -> str | None:
    """Why a node has no integer kernel; None when it has one."""
    if node.op not in ("call_module", "call_function"):
        return "not an operator"
    if "float" in node.meta:
        return str(node.meta["float"])
    if what not in accelerates.integer:
        refusal = f"{accelerates.runtime} has no integer kernel for {what}"
        if what not in accelerates.recurrent or recurrent.refusal(network, node):
            return refusal
        return f"{refusal} with ranges from calibration: quantize.Dynamic takes them at run time"
    if what in ("conv", "conv_transpose", "linear") and node.op != "call_module":
        return "its weight is computed, not stored"
    tensors = tensor_inputs(node)
    if what != "matmul" and any(t.op == "get_attr" for t in tensors):  # of a product it is the weight
        return "one of its inputs is a constant"
    if what in ("add", "mul", "matmul") and len(tensors) < 2:
        return "one of its inputs is a number"
    if what == "add" and node.kwargs.get("alpha", 1) != 1:
        return "its second input is scaled"
    return None


def _carry(
    network: fx.GraphModule, accelerates: Accelerates, edge: str, producer: fx.Node, edges: dict[str, str]
) -> None:
    """Quantize an edge, and the edges before it as long as the operators only move values."""
    root, before = _root(network, accelerates, producer)
    for name in (edge, *before):
        edges[name] = root.name


def _root(network: fx.GraphModule, accelerates: Accelerates, producer: fx.Node) -> tuple[fx.Node, list[str]]:
    """The operator whose values come through to `producer`, and the edges on the way."""
    root = producer
    before: list[str] = []
    while (what := kind(network, root)) in SILENT or carries(network, root, accelerates):
        if what not in SILENT and root.target is not operator.getitem:
            before.append(f"{site(root)}:in0")
        root = tensor_inputs(root)[0]
    return root, before


def carries(network: fx.GraphModule, node: fx.Node, accelerates: Accelerates) -> bool:
    """Whether nothing but values that went in, or zeros, comes out: every grid holds the zero."""
    what = kind(network, node)
    if node.target is operator.getitem:  # the values of a maximum; the other result says where they are
        source = node.args[0]
        return isinstance(source, fx.Node) and not node.args[1] and carries(network, source, accelerates)
    if what in ("max", "min") and len(tensor_inputs(node)) > 1:
        return False  # of two tensors, element by element
    if what != "pad" or what not in accelerates.passes:
        return what in accelerates.passes
    given = arguments(node)
    return given.get("mode", "constant") == "constant" and not given["value"]


def _quantize_readers(
    network: fx.GraphModule, accelerates: Accelerates, node: fx.Node, chosen: set[str], edges: dict[str, str]
) -> None:
    end = node
    while len(end.users) == 1 and kind(network, next(iter(end.users))) in accelerates.absorbs | SILENT:
        end = next(iter(end.users))
    if end is not node and end.op == "output":
        return
    for user in end.users:
        for port, tensor in enumerate(tensor_inputs(user)):
            name = site(user)
            if tensor is end and f"{name}:in{port}" not in edges:
                edges[f"{name}:in{port}"] = end.name
