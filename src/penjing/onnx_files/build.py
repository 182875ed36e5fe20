"""From the data of an ONNX file to a module: weights, constants that are computed beforehand, nodes in order."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from penjing.errors import SourceError
from penjing.onnx_files.branches import Branch, all_nodes, branches, check_given
from penjing.onnx_files.constants import check_constants
from penjing.onnx_files.first_states import in_one_row
from penjing.onnx_files.layer_weights import moved_weights
from penjing.onnx_files.network import Graph, OnnxNetwork, Operation, reads
from penjing.onnx_files.node import FAILURES, Node, is_known
from penjing.onnx_files.operators import KNOWN_INPUTS, OPERATORS
from penjing.onnx_files.operators.elementwise import TYPES
from penjing.onnx_files.operators.recurrent import layer_tensors
from penjing.onnx_files.sizes import SIZES
from penjing.onnx_files.words import check_words

FOLDED = 1 << 20
"""Most elements of a constant that is computed when the file is read; what is larger is computed by the network."""

_RANDOM = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
)


def build(model: Any, file: str = "model.onnx") -> OnnxNetwork:
    """An ONNX model as a module.

    Args:
        model: A checked ``onnx.ModelProto`` without functions, whose external data is loaded and whose values have
            one name each, those of inner graphs included (`penjing.onnx_files.read.prepared`).
        file: What the file is called in errors.

    Raises:
        SourceError: An operator of it can't be taken; names it, its node and its place.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    constants: dict[str, np.ndarray] = {}
    whole = _branch(model.graph, opset, constants)
    given = [value.name for value in model.graph.input if value.name not in constants]
    check_given(whole, {"", *constants, *given})
    readers: dict[str, list[tuple[Node, int]]] = {}
    for node in all_nodes(whole.nodes):
        for position, name in enumerate(node.inputs):
            readers.setdefault(name, []).append((node, position))
    computed = {name: value for name, value in constants.items() if _is_weight(value, readers.get(name, []))}
    numbers = _among_sizes(whole.nodes, constants)
    weights = in_one_row({name: value for name, value in computed.items() if name not in numbers}, readers)
    statistics = [
        name
        for name in weights
        if any(node.operator == "BatchNormalization" and position > 2 for node, position in readers[name])
    ]
    known = {name: value for name, value in constants.items() if name not in weights}
    nodes, known = _folded(whole.nodes, known, [16 * FOLDED])
    moved, moves = moved_weights(list(all_nodes(nodes)), weights, known, whole.outputs + _inner_outputs(nodes))
    nodes = _without(nodes, moves)
    weights |= moved
    once = {name: value for name, value in weights.items() if len(readers[name]) == 1}
    operations = _operations(nodes, file, once)
    check_constants(operations, known, weights)
    read = {name for step in operations for name in reads(step)} | {*whole.outputs}
    network_type: Any = type("OnnxNetwork", (OnnxNetwork,), {"inputs": _parameters(given), "forward": _forward(given)})
    network: OnnxNetwork = network_type(
        operations,
        {name: value for name, value in known.items() if name in read},
        whole.outputs,
        {name: value for name, value in weights.items() if name in read},
        statistics,
    )
    declared = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    network.types = {name: TYPES[code] for name, code in declared.items() if code in TYPES}
    return network


def _branch(graph: Any, opset: int, constants: dict[str, np.ndarray]) -> Branch:
    """The nodes of a graph as values; its constants, and those of the graphs within, go to `constants`."""
    for sparse in graph.sparse_initializer:
        raise SourceError(
            "sparse tensors of ONNX files are not read",
            code="sparse",
            got=f"{sparse.values.name!r}, of shape {list(sparse.dims)}",
            expected="tensors that hold all their values",
            remedy="store it dense: export the network again without sparse initializers",
        )
    constants |= {tensor.name: to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for line, proto in enumerate(graph.node, 1):
        node = Node(
            operator=proto.op_type,
            name=proto.name,
            line=line,
            opset=opset,
            attributes={a.name: _attribute(a) for a in proto.attribute if not a.HasField("g")},
            inputs=tuple(proto.input),
            outputs=tuple(proto.output),
        )
        if proto.domain not in ("", "ai.onnx"):
            raise node.refuse("it belongs to no standard set of operators", f"domain {proto.domain!r}")
        if proto.op_type == "Constant":
            constants[proto.output[0]] = _constant(node)
            continue
        if proto.op_type != "If" and proto.op_type not in OPERATORS:
            raise node.refuse("no function of torch is known for it", f"operator set {opset}")
        check_words(node)
        inner = {a.name: _branch(a.g, opset, constants) for a in proto.attribute if a.HasField("g")}
        nodes.append(replace(node, attributes=node.attributes | inner))
    return Branch(nodes, tuple(value.name for value in graph.output))


def _constant(node: Node) -> np.ndarray:
    name, value = next(iter(node.attributes.items()), ("", None))
    if name in ("value_float", "value_floats"):
        return np.asarray(value, np.float32)
    if name in ("value_int", "value_ints"):
        return np.asarray(value, np.int64)
    if not isinstance(value, np.ndarray):
        raise node.refuse("its constant is neither numbers nor a tensor", name or "no value")
    return value


def _attribute(attribute: Any) -> Any:
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == onnx.AttributeProto.TENSOR:
        return to_array(value)
    if attribute.type == onnx.AttributeProto.STRING:
        return value.decode("utf-8", "replace")
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [item.decode("utf-8", "replace") for item in value]
    return list(value) if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS) else value


def to_array(proto: Any) -> np.ndarray:
    """A tensor of a file as an array."""
    import onnx

    if proto.data_type == onnx.TensorProto.STRING:
        raise SourceError(
            "tensors of text are not taken",
            code="text",
            got=f"{proto.name!r} in the ONNX file",
            expected="tensors of numbers",
            remedy="export the network without the text in it: what turns text into numbers runs before the network",
        )
    return np.asarray(onnx.numpy_helper.to_array(proto))


def _is_weight(value: np.ndarray, readers: list[tuple[Node, int]]) -> bool:
    """Whether a constant is a tensor of the network, not a number that an operator has to know."""
    floating = np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16"
    needed = [position in KNOWN_INPUTS.get(node.operator, ()) for node, position in readers]
    return floating and value.size > 1 and bool(readers) and not any(needed)


_OF_SIZES = frozenset((
    "Cast", "Gather", "Identity", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Slice", "Split",
    "Squeeze", "Transpose", "Unsqueeze",
))  # fmt: skip
"""Operators that give sizes where their first input is sizes, whatever the others say."""
_NO_SIZES = frozenset(("ConstantOfShape", "Expand", "Range"))
_LONGEST = 16
"""Most numbers that a constant has which is computed with sizes: no tensor has more axes."""


def _among_sizes(nodes: list[Node], constants: dict[str, np.ndarray]) -> set[str]:
    """Constants that are computed with sizes, and so have to be known like them: ``Floor(Cast(Shape(x)) * [2, 2])``."""
    of_sizes: set[str] = set()
    numbers: set[str] = set()
    for node in all_nodes(nodes):
        inputs = [name for name in node.inputs if name]
        if node.operator in ("Shape", "Size"):
            of_sizes |= {*node.outputs}
        elif node.operator in SIZES and node.operator not in _NO_SIZES and inputs:
            if node.operator in _OF_SIZES:
                follows = inputs[0] in of_sizes
            else:
                others = [constants[name] for name in inputs if name in constants]
                follows = any(name in of_sizes for name in inputs) and all(
                    name in of_sizes or name in constants for name in inputs
                )
                follows = follows and all(value.size <= _LONGEST and value.ndim < 2 for value in others)
            if follows:
                of_sizes |= {*node.outputs}
                numbers |= {name for name in inputs if name in constants}
    return numbers


def _inner_outputs(nodes: list[Node]) -> tuple[str, ...]:
    """Names that the graphs within nodes give."""
    return tuple(name for node in all_nodes(nodes) for branch in branches(node) for name in branch.outputs)


def _without(nodes: list[Node], gone: set[int]) -> list[Node]:
    """The nodes, and those of the graphs within, but for some; `gone` holds their ``id``."""
    left = []
    for node in nodes:
        if id(node) not in gone:
            inner = {
                n: Branch(_without(b.nodes, gone), b.outputs)
                for n, b in node.attributes.items()
                if isinstance(b, Branch)
            }
            left.append(replace(node, attributes=node.attributes | inner) if inner else node)
    return left


def _folded(
    nodes: list[Node], known: dict[str, np.ndarray], room: list[int]
) -> tuple[list[Node], dict[str, np.ndarray]]:
    """The nodes that are left where those of constants alone were computed, and all constants.

    Args:
        nodes: In their order.
        known: Constants.
        room: One number, how many elements may still be computed; it shrinks.
    """
    known = dict(known)
    left: list[Node] = []
    for node in nodes:
        inputs = [known.get(name) for name in node.inputs]
        whole = all(name == "" or value is not None for name, value in zip(node.inputs, inputs, strict=True))
        if node.operator == "If":
            if whole and inputs[0] is not None:
                if inputs[0].size != 1:
                    raise node.refuse("its condition is not one value", f"shape {list(inputs[0].shape)}")
                taken = node.attributes["then_branch" if bool(inputs[0].reshape(-1)[0]) else "else_branch"]
                if len(taken.outputs) != len(node.outputs):
                    raise node.refuse("its branch gives another number of outputs", str(len(taken.outputs)))
                inside, known = _folded(taken.nodes, known, room)
                left += inside
                for outer, inner in zip(node.outputs, taken.outputs, strict=True):
                    left.append(replace(node, operator="Identity", attributes={}, inputs=(inner,), outputs=(outer,)))
                    if inner in known:
                        known[outer] = known[inner]
                continue
            attributes = dict(node.attributes)
            for name, value in node.attributes.items():
                if isinstance(value, Branch):
                    inside, known = _folded(value.nodes, known, room)
                    attributes[name] = Branch(inside, value.outputs)
            left.append(replace(node, attributes=attributes))
            continue
        results = _computed(node, inputs) if whole and node.operator not in _RANDOM else None
        count = sum(value.size for value in results or () if value is not None)
        if results is None or count > room[0]:
            left.append(node)
        else:
            room[0] -= count
            known.update({name: value for name, value in zip(node.outputs, results, strict=False) if value is not None})
    return left, known


def _computed(node: Node, inputs: list[np.ndarray | None]) -> list[np.ndarray | None] | None:
    """The outputs of a node of constants; None where they are too large, or where it fails."""
    function = OPERATORS.get(node.operator) or SIZES[node.operator]
    if node.operator in _GROWING and _announced(node, inputs) > FOLDED:
        return None
    try:
        with torch.no_grad():
            results = function(node, *inputs)
    except (SourceError, *FAILURES):  # in a branch that is not taken, for one
        return None
    results = results if isinstance(results, tuple | list) else (results,)
    arrays = [value if value is None or is_known(value) else _as_array(value) for value in results]
    return None if any(value is not None and value.size > FOLDED for value in arrays) else arrays


_GROWING = {
    "ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Reshape": 1, "Range": 1, "OneHot": 1, "Pad": 1, "EyeLike": 0,
    "BlackmanWindow": 0, "HammingWindow": 0, "HannWindow": 0, "MelWeightMatrix": 1, "DFT": 1, "Col2Im": 1,
}  # fmt: skip
"""Operators whose results can be far larger than their inputs → the input that says how large."""


def _announced(node: Node, inputs: list[np.ndarray | None]) -> int:
    """Elements that a result may have, by what the input says; no more than the product of its numbers."""
    count = 1
    if len(inputs) <= _GROWING[node.operator]:
        return count
    for value in (inputs[_GROWING[node.operator]], inputs[0] if node.operator in ("Tile", "OneHot") else None):
        if value is not None and value is not inputs[0]:
            for n in np.abs(value.astype(np.float64)).reshape(-1):
                count = min(int(count * max(n, 1.0)), FOLDED * 2)
        elif value is not None:
            sizes = value.reshape(-1) if node.operator == "ConstantOfShape" else [value.size]
            for n in sizes:
                count = min(count * max(int(n), 1), FOLDED * 2)
    return count


def _as_array(value: torch.Tensor) -> np.ndarray:
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(value.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(value.numpy())


def _operations(nodes: list[Node], file: str, once: dict[str, np.ndarray]) -> list[Operation]:
    """The modules of nodes.

    Args:
        nodes: In their order.
        file: What the file is called.
        once: Weights that one node reads; those of a recurrent layer become its own.
    """
    operations = []
    for node in nodes:
        inner = {name: value for name, value in node.attributes.items() if isinstance(value, Branch)}
        plain = replace(node, attributes={k: v for k, v in node.attributes.items() if k not in inner})
        graphs = {n: Graph(_operations(branch.nodes, file, once), {}, branch.outputs) for n, branch in inner.items()}
        layer = None
        names = [name for name in node.inputs[1:4] if name]
        if node.operator in ("LSTM", "GRU", "RNN") and all(name in once for name in names):
            try:
                layer = layer_tensors(node, [once.get(name) for name in (*node.inputs, "")[1:4]])
            except FAILURES as error:
                raise node.refuse("its weights are not those of such a layer", str(error)[:300]) from error
        if layer is not None:
            plain = replace(plain, inputs=(node.inputs[0], "", "", "", *node.inputs[4:]))
        operations.append(Operation(plain, file, graphs, layer))
    return operations


def _parameters(names: list[str]) -> dict[str, str]:
    """Names of parameters of a forward → names of inputs."""
    parameters: dict[str, str] = {}
    for name in names:
        word = re.sub(r"\W", "_", name) or "input"
        word = f"_{word}" if word[0].isdigit() else f"{word}_" if keyword.iskeyword(word) or word == "self" else word
        while word in parameters:
            word += "_"
        parameters[word] = name
    return parameters


def _forward(names: list[str]) -> Callable[..., Any]:
    """A forward with these inputs as its parameters: what exporting, tasks and errors read."""
    parameters = _parameters(names)

    def forward(self: OnnxNetwork, *args: Any, **kwargs: Any) -> Any:
        bound = dict(zip(parameters, args, strict=False)) | kwargs
        if len(args) > len(parameters) or bound.keys() != parameters.keys():
            raise TypeError(f"the network takes {', '.join(parameters)}; got {len(args)} and {', '.join(kwargs) or 0}")
        return self.run({parameters[word]: value for word, value in bound.items()})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(word, kind) for word in ("self", *parameters)])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


__all__ = ["Branch", "build", "to_array"]
