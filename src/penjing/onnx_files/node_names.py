"""Naming the nodes of an ONNX file after the sites that they compute."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from torch import fx

from penjing.network.graph import RECURRENT, arguments, is_tensor, kind, layer_site, tensor_inputs
from penjing.numerics import operators  # noqa: F401  registers the operators that are translated here


def name_nodes(model: Any, network: fx.GraphModule) -> None:
    """Name every ONNX node after the site that it computes.

    Exporting keeps the order of the operators, so the n-th convolution of the network is the n-th Conv of the file.
    It merges those that compute the same from the same: they are called by the first. Sums and products with a number
    or a constant are left out on both sides; of what is computed from constants alone, it stores some. Where the counts
    differ all the same (it split some), that kind of operator keeps its generated names.
    """
    first, tensors, fixed = _first_alike(network), network.graph.find_nodes(op="get_attr"), _fixed(network)
    ways = [_sites(network, constants, merged) for merged in ({}, first) for constants in ({*tensors}, fixed)]
    stored = {tensor.name for tensor in model.graph.initializer}
    by_kind: dict[str, list[Any]] = defaultdict(list)
    for node in model.graph.node:
        if what := _kind_of(node, stored):
            by_kind[what].append(node)
    for what, nodes in by_kind.items():
        names = next((sites[what] for sites in ways if len(sites[what]) == len(nodes)), [])
        for node, name in zip(nodes, names, strict=False):
            node.name = name or node.name
    products = {node.output[0]: node.name for node in by_kind["linear"] + by_kind["matmul"] if node.op_type == "MatMul"}
    readers = Counter(name for node in model.graph.node for name in node.input)
    products = {result: name for result, name in products.items() if readers[result] == 1}
    for node in model.graph.node:  # what a runtime fuses is called by its last node
        if node.op_type == "Add" and _made_of(node) == "linear" and node.input[0] in products:
            node.name = f"{products[node.input[0]]}/bias"
        elif node.op_type == "Mul" and node.input[0] in products and node.input[1] in stored:
            node.name = f"{products[node.input[0]]}/scale"


def _sites(
    network: fx.GraphModule, constants: Collection[fx.Node], merged: Mapping[fx.Node, fx.Node]
) -> dict[str, list[str]]:
    """Kind → sites in the order of the network.

    Args:
        network: The network.
        constants: Operands that are stored.
        merged: Node → the first that computes the same, which alone counts; where it is missing, all count.
    """
    sites: dict[str, list[str]] = defaultdict(list)
    for node in network.graph.nodes:
        if node.op not in ("call_module", "call_function") or not is_tensor(node) or merged.get(node, node) is not node:
            continue
        operator = kind(network, node)
        if operator in ("add", "mul") and sum(n not in constants for n in tensor_inputs(node)) < 2:
            continue
        # The exporter writes a node for each layer.
        layers = arguments(node)["num_layers"] if operator in RECURRENT else 1
        sites[operator] += [layer_site(str(node.meta.get("site", "")), layer) for layer in range(layers)]
    return sites


def _fixed(network: fx.GraphModule) -> set[fx.Node]:
    """What is the same for every input."""
    fixed: set[fx.Node] = set()
    for node in network.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(n in fixed for n in node.all_input_nodes)):
            fixed.add(node)
    return fixed


def _first_alike(network: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Every node → the first that computes the same from the same."""
    first: dict[fx.Node, fx.Node] = {}
    known: dict[str, fx.Node] = {}
    for node in network.graph.nodes:
        read = fx.node.map_arg((node.args, node.kwargs), lambda n: first[n])
        key = node.name if node.op == "placeholder" else repr((node.op, str(node.target), read))
        first[node] = known.setdefault(key, node)
    return first


def _kind_of(node: Any, stored: set[str]) -> str | None:
    """The kind of operator (see `penjing.network.graph.kind`) that an ONNX node is; None where it is not looked for."""
    made_of = _made_of(node)
    if node.op_type in ("Add", "Mul"):
        computed = [name for name in node.input if name not in stored]
        word = str(node.op_type).lower()
        return word if len(computed) == 2 and made_of == word else None
    if node.op_type == "MatMul":
        return made_of if made_of == "linear" else "matmul" if made_of in ("matmul", "mm", "bmm") else None
    if node.op_type == "LSTM" and not made_of:
        return "lstm_static"
    return _ONNX_KINDS.get(node.op_type)


def _made_of(node: Any) -> str:
    """The ATen operator that the exporter translated: one of several nodes of a linear layer or of an attention."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    match = re.search(r"target=torch\.ops\.aten\.(\w+?)_?\.", notes.get("pkg.torch.onnx.fx_node", ""))
    return match[1] if match else ""


_ONNX_KINDS = {
    "Conv": "conv",
    "ConvTranspose": "conv_transpose",
    "Gemm": "linear",
    "MatMulInteger": "linear_dynamic",
    "LSTM": "lstm",
    "GRU": "gru",
    "DynamicQuantizeLSTM": "lstm_dynamic",
    "Concat": "cat",
    "Relu": "relu",
    "Clip": "clip",
    "MaxPool": "max_pool",
    "AveragePool": "avg_pool",
    "GlobalAveragePool": "avg_pool",
    "ReduceMean": "avg_pool",
    "HardSigmoid": "hardsigmoid",
    "HardSwish": "hardswish",
    "LeakyRelu": "leaky_relu",
    "Sigmoid": "sigmoid",
    "LayerNormalization": "layer_norm",
    "Softmax": "softmax",
}
