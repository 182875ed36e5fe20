"""Quantizer placement: which edges of the network become integers in a runtime, decided before any data is read."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from penjing.analyze.cost import multiplies
from penjing.network.graph import RECURRENT, arguments, is_tensor, kind, operator_name, site, tensor_inputs
from penjing.quantize import gates, mask_values
from penjing.quantize.masking import MOVING, before_softmax
from penjing.quantize.steep import before_steep
from penjing.quantize.toward_outputs import in_floats
from penjing.steps.plan import Capabilities
from penjing.surgery import recurrent

FIXED = "its result is the same for every input: a runtime folds it into a constant"
CONSTANT = "one of its inputs is a constant"
SILENT = frozenset({"dropout", "identity"})  # operators that the export removes
PARTED = frozenset({"split", "split_with_sizes", "chunk", "unbind"})
"""Operators that give several parts of what they read."""
FUNCTIONS = frozenset(
    "celu elu gelu hardsigmoid hardswish leaky_relu mish prelu selu sigmoid silu softplus softsign tanh".split()
)
"""Activation functions of one value, which cost a dequantizer and a quantizer where only they compute in floats."""
BEHIND_FLOATS = "what it reads is not written by an integer kernel"
CHECKED = ("conv", "conv_transpose", "linear", "add", "cat", "avg_pool", "matmul", "attention")


@dataclass(frozen=True)
class Placement:
    """Which edges are quantized, which values determine their ranges, and what stays in floating point.

    Attributes:
        edges: Activation edge ("site:in0") → name of the node whose values it carries.
        weights: Sites of the layers whose weights are quantized.
        stored: Sites of the layers of which only the weights are quantized.
        floats: Site → why it stays in floating point.
        centred: Names of the nodes whose values are read by a product of two activations, a transposed convolution, or
            average pooling that counts zero padding.
        padded: Names of the nodes whose values are read by a convolution that pads.
        results: Edges that are quantized only because the kernel of the preceding operator writes integers.
    """

    edges: dict[str, str]
    weights: tuple[str, ...]
    stored: tuple[str, ...]
    floats: dict[str, str]
    centred: frozenset[str]
    padded: frozenset[str]
    results: frozenset[str]


def place(
    network: fx.GraphModule,
    capabilities: Capabilities,
    excluded: dict[str, str],
    seen: Mapping[str, frozenset[int]] | None = None,
    distant: Collection[str] = (),
    reach: Mapping[str, float] | None = None,
) -> Placement:
    """Decide the edges for one runtime.

    An operator with an integer kernel has all its inputs quantized. Operators that only move values carry the
    scale of their input to their output. If a kernel also needs a quantized result, every reader of the result, behind
    the activation function that the runtime fuses, gets a quantizer.

    Args:
        network: A network as returned by `static.prepare`.
        capabilities: What the runtime computes in integers.
        excluded: Site → why it is excluded.
        seen: Name of a node → signs of the values, far beyond all others, that calibration has detected in it.
        distant: Those of them that are many numbers, and so no mask.
        reach: Name of a node in `mask_values.beside` → its largest magnitude in calibration.
    """
    floats = dict(excluded)
    masked, hold = before_softmax(network), mask_values.holders(network, seen, reach)
    alike = {name: signs for name, signs in (seen or {}).items() if name not in distant}
    hide = mask_values.holders(network, alike, reach)
    decoded, steep = in_floats(network), before_steep(network)
    integer: list[fx.Node] = []
    written: set[fx.Node] = set()
    moves = capabilities.fuses | capabilities.passthrough | SILENT
    fixed: set[fx.Node] = set()
    constant = _constants(network)
    for node in network.graph.nodes:
        what = kind(network, node)
        if node.op != "placeholder" and all(n in fixed for n in node.all_input_nodes):
            fixed.add(node)
        reason = masked.get(node.name) or _refusal(network, node, what, capabilities)
        if what == "add" and reason in (None, CONSTANT) and any(t in constant for t in tensor_inputs(node)):
            reason = FIXED if node in fixed else CONSTANT
        sigmoids = () if reason else gates.gate(network, node, written, moves)
        behind = any(gates.writer(network, x, moves) in written for x in tensor_inputs(node))
        if what in gates.KINDS and (not sigmoids or any(site(s) in excluded for s in sigmoids)):
            reason = reason or gates.REASON
        elif what in FUNCTIONS and not behind:
            reason = reason or BEHIND_FLOATS
        reason = reason or decoded.get(node.name) or steep.get(node.name)
        if reason is None and node in fixed:
            reason = FIXED
        if reason is None and any(t.name in hold for t in tensor_inputs(node)):
            hidden = any(t.name in hide for t in tensor_inputs(node))
            reason = mask_values.REASON if hidden else mask_values.DISTANT
        if site(node) in excluded or not node.meta.get("floating", True):  # indices and masks are integers already
            continue
        if reason is None:
            integer += [node, *(s for s in sigmoids if s not in integer)]
            if what in capabilities.quantized_output:
                written.add(node)
        elif what in CHECKED or multiplies(network, node) or (behind and _interrupts(what, capabilities)):
            floats[site(node)] = reason
    stored = tuple(
        site(n)
        for n in network.graph.nodes
        if (kind(network, n) in capabilities.stored or n in integer and kind(network, n) in RECURRENT)
        and site(n) not in excluded
        and _holds_weights(network, n)
    )
    edges: dict[str, str] = {}
    for node in integer:
        if kind(network, node) in RECURRENT:  # its grid is symmetric, so operators that feed it have their own
            edges[f"{site(node)}:in0"] = tensor_inputs(node)[0].name
            continue
        for port, producer in enumerate(tensor_inputs(node)):
            _carry(network, capabilities, f"{site(node)}:in{port}", producer, edges, hold)
    read = frozenset(edges)
    chosen = {site(n) for n in integer}
    for node in integer:
        if kind(network, node) in capabilities.quantized_output:
            _quantize_readers(network, capabilities, node, chosen, edges)
    weights = tuple(site(n) for n in integer if kind(network, n) in ("conv", "conv_transpose", "linear"))
    centred = {edges[f"{site(n)}:in{port}"] for n in integer for port in _without_zero_point(network, n)}
    convolutions = [n for n in integer if kind(network, n) == "conv" and _pads(network, n)]
    padded = {edges[edge] for n in convolutions if (edge := f"{site(n)}:in0") in edges}
    return Placement(edges, weights, stored, floats, frozenset(centred), frozenset(padded), frozenset(edges) - read)


def _constants(network: fx.GraphModule) -> set[fx.Node]:
    """Values that are computed from stored tensors and sizes alone, such as positions; not the rows of an embedding.

    An embedding's table is stored in integers, so that its rows meet a sum as such.
    """
    constant: set[fx.Node] = set()
    for node in network.graph.nodes:
        inputs = tensor_inputs(node)
        if node.op == "get_attr" or (
            is_tensor(node) and node.op != "placeholder" and all(n in constant for n in inputs)
        ):
            constant.add(node)
    for node in network.graph.nodes:
        if node in constant and kind(network, node) == "embedding":
            rows = [node]
            while rows:  # and where they are moved to
                row = rows.pop()
                constant.discard(row)
                rows += [user for user in row.users if kind(network, user) in MOVING | {"slice", "select"}]
    return constant


def _pads(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a convolution pads its input."""
    if node.op == "call_module":
        padding = getattr(network.get_submodule(str(node.target)), "padding", 0)
    else:
        padding = arguments(node).get("padding", 0)
    if isinstance(padding, str):
        return padding == "same"
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)


def _interrupts(what: str, capabilities: Capabilities) -> bool:
    """Whether a kind of operator computes in floats what integer kernels around it could read and write."""
    return what in FUNCTIONS and what not in capabilities.integer | capabilities.fuses


def _without_zero_point(network: fx.GraphModule, node: fx.Node) -> tuple[int, ...]:
    """Ports at which some runtimes need a zero point of 0 to compute in integers, or to compute correctly."""
    what = kind(network, node)
    if what == "avg_pool" and operator_name(node).startswith("avg_pool"):  # padding counts as zeros
        named = arguments(node)
        if named.get("divisor_override"):  # whatever the window and its overhang
            return (0,) if any(named["padding"]) or named["ceil_mode"] else ()
        return (0,) if any(named["padding"]) and named["count_include_pad"] else ()
    return {"matmul": (0, 1), "conv_transpose": (0,)}.get(what, ())


def _holds_weights(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether its weights are stored rather than computed."""
    if kind(network, node) not in RECURRENT:
        return node.op == "call_module"
    return recurrent.stores(node)


def _refusal(network: fx.GraphModule, node: fx.Node, what: str, capabilities: Capabilities) -> str | None:
    """The reason why a node has no integer kernel; None if it has one."""
    if node.op not in ("call_module", "call_function"):
        return "not an operator"
    if "float" in node.meta:
        return str(node.meta["float"])
    if what not in capabilities.integer:
        refusal = capabilities.without_kernel(what)
        if what not in capabilities.recurrent or recurrent.refusal(network, node):
            return refusal
        return f"{refusal} with ranges from calibration: quantize.Dynamic takes them at run time"
    if what in RECURRENT:
        return recurrent.static_refusal(network, node)
    if what in ("conv", "conv_transpose", "linear") and node.op != "call_module":
        return "its weight is computed, not stored"
    tensors = tensor_inputs(node)
    if what != "matmul" and any(t.op == "get_attr" for t in tensors):  # of a product it is the weight
        return CONSTANT
    if what in ("add", "mul", "matmul") and len(tensors) < 2:
        return "one of its inputs is a number"
    if what == "add" and node.kwargs.get("alpha", 1) != 1:
        return "its second input is scaled"
    return None


def _carry(
    network: fx.GraphModule,
    capabilities: Capabilities,
    edge: str,
    producer: fx.Node,
    edges: dict[str, str],
    hold: frozenset[str],
) -> None:
    """Quantize an edge, and those before it as long as their operators only move values and carry no mask values."""
    root = producer
    before: list[str] = []
    while (what := kind(network, root)) in SILENT or carries(network, root, capabilities):
        chooses = tensor_inputs(root)[0] if root.target is operator.getitem else root
        if tensor_inputs(chooses)[0].name in hold:
            break  # for example a maximum, which discards mask values
        if what not in SILENT and root.target is not operator.getitem:
            before.append(f"{site(root)}:in0")
        root = tensor_inputs(root)[0]
    for name in (edge, *before):
        edges[name] = root.name


def carries(network: fx.GraphModule, node: fx.Node, capabilities: Capabilities) -> bool:
    """Whether the output contains only input values or zeros; zero is on every grid."""
    what = kind(network, node)
    if node.target is operator.getitem:  # a part, or the values of a maximum; its other result is their indices
        source = node.args[0]
        if not isinstance(source, fx.Node) or (node.args[1] and kind(network, source) not in PARTED):
            return False
        return carries(network, source, capabilities)
    if what in ("max", "min") and len(tensor_inputs(node)) > 1:
        return False  # an elementwise maximum of two tensors
    if what != "pad" or what not in capabilities.passthrough:
        return what in capabilities.passthrough
    named = arguments(node)
    return named.get("mode", "constant") == "constant" and not named["value"]


def _quantize_readers(
    network: fx.GraphModule, capabilities: Capabilities, node: fx.Node, chosen: set[str], edges: dict[str, str]
) -> None:
    end = node
    while len(end.users) == 1 and kind(network, next(iter(end.users))) in capabilities.fuses | SILENT:
        end = next(iter(end.users))
    if end is not node and end.op == "output":
        return
    for user in end.users:
        for port, tensor in enumerate(tensor_inputs(user)):
            name = site(user)
            if tensor is end and f"{name}:in{port}" not in edges:
                edges[f"{name}:in{port}"] = end.name
