"""Equivalent rewrites of an ONNX file with operators for which the runtimes have integer kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

SMALLEST_IN_HALF = 64  # values of a constant: below that a Cast takes more bytes than it saves


def pool_globally(model: Any) -> None:
    """ReduceMean over the image becomes GlobalAveragePool, for which ONNX Runtime has an integer kernel."""
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in [*graph.value_info, *graph.input, *graph.output]}
    for position, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
            continue
        axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
        if sorted(a % 4 for a in axes) != [2, 3] or ranks.get(node.input[0]) != 4:
            continue
        keeps = all(a.i for a in node.attribute if a.name == "keepdims")
        pooled = node.output[0] if keeps else f"{node.output[0]}_pooled"
        new = [helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name)]
        if not keeps:
            # Quantizers move through Squeeze to the pooling's side, through Flatten they do not.
            square = f"{node.name}_axes"
            graph.initializer.append(numpy_helper.from_array(np.array([2, 3], dtype=np.int64), square))
            new.append(helper.make_node("Squeeze", [pooled, square], [node.output[0]], name=f"{node.name}_flat"))
        del graph.node[position]
        for offset, added in enumerate(new):
            graph.node.insert(position + offset, added)


def pad_in_convolutions(model: Any) -> None:
    """A Pad with zeros moves into the convolution behind it, which pads for nothing and not evenly where it must.

    Between quantizers the runtimes leave it alone, and then it runs in floating point. Quantizing again behind the
    Pad, on the same grid, changes nothing, for every grid holds the zero.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    outputs = {value.name for value in graph.output}
    removed = []
    for conv in graph.node:
        if conv.op_type != "Conv" or conv.input[0] not in producers or _pads_itself(conv):
            continue
        chain = [producers[conv.input[0]]]
        if chain[0].op_type == "DequantizeLinear" and chain[0].input[0] in producers:
            chain += _requantized(chain[0], producers)
        pad = chain[-1]
        pads = _zero_pads(pad, constants)
        # What stands before may have other outputs than the one that the convolution reads.
        sole = all(readers.get(node.output[0]) == 1 and node.output[0] not in outputs for node in chain)
        if (
            pads is None
            or not sole
            or (len(chain) > 1 and not _holds_all(chain, producers.get(pad.input[0]), producers, constants))
        ):
            continue
        before, after = pads[: len(pads) // 2], pads[len(pads) // 2 :]
        if any(before[:2]) or any(after[:2]):
            continue  # it pads the batch or the channels
        own = next((a for a in conv.attribute if a.name == "pads"), None)
        if own is None:
            own = conv.attribute.add(name="pads", type=7)
            own.ints.extend([0] * (len(pads) - 4))
        summed = [int(a) + int(b) for a, b in zip(own.ints, [*before[2:], *after[2:]], strict=True)]
        own.ints[:] = summed
        conv.input[0] = pad.input[0]
        removed += chain
    for node in removed:
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for name in {name for node in removed for name in node.input} - used - outputs:
        if name in constants:
            graph.initializer.remove(constants[name])
        elif name in producers and producers[name].op_type == "Constant":
            graph.node.remove(producers[name])


def _pads_itself(conv: Any) -> bool:
    return any(a.name == "auto_pad" and a.s not in (b"", b"NOTSET") for a in conv.attribute)


def _requantized(dequantize: Any, producers: dict[str, Any]) -> list[Any]:
    """The quantizer before a dequantizer (with its Clip, where there is one), and what is quantized."""
    chain = [producers[dequantize.input[0]]]
    if chain[-1].op_type == "Clip" and chain[-1].input[0] in producers:
        chain.append(producers[chain[-1].input[0]])
    if chain[-1].op_type == "QuantizeLinear" and chain[-1].input[0] in producers:
        chain.append(producers[chain[-1].input[0]])
    return chain


def _holds_all(chain: list[Any], other: Any, producers: dict[str, Any], constants: dict[str, Any]) -> bool:
    """Whether what another dequantizer gives passes through this quantizer (its nodes, last first) unchanged."""
    from onnx import numpy_helper

    if other is None or other.op_type != "DequantizeLinear" or len(chain[0].input) != len(other.input):
        return False

    def value(name: str) -> Any:
        if name in constants:
            return numpy_helper.to_array(constants[name])
        node = producers.get(name)
        stored = [a.t for a in node.attribute if a.name == "value"] if node is not None else []
        return numpy_helper.to_array(stored[0]) if stored else None

    mine, theirs = [*chain[0].input[1:]], [*other.input[1:]]
    clip, before = chain[1], producers.get(other.input[0])
    if clip.op_type == "Clip":  # a narrow range: the other has to be as narrow
        if before is None or before.op_type != "Clip":
            return False
        mine, theirs = mine + clip.input[1:], theirs + before.input[1:]
    pairs = [(value(a), value(b)) for a, b in zip(mine, theirs, strict=True)]
    return all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs)


def _zero_pads(node: Any, constants: dict[str, Any]) -> list[int] | None:
    """Sizes of a Pad with the constant 0, starts before ends; None where a node is not such a Pad."""
    from onnx import numpy_helper

    if node.op_type != "Pad" or node.input[1] not in constants or len(node.input) > 3 and node.input[3]:
        return None
    if any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
        return None
    if len(node.input) > 2 and node.input[2]:
        value = constants.get(node.input[2])
        if value is None or np.any(numpy_helper.to_array(value)):
            return None
    pads: list[int] = numpy_helper.to_array(constants[node.input[1]]).tolist()
    return pads if all(p >= 0 for p in pads) else None


def turn_for_each(model: Any) -> None:
    """A quantized weight that several matrix products read turned is turned for each of them.

    ONNX Runtime turns a stored weight when it loads a file; one that is turned once for several readers it
    dequantizes, and they compute in floating point.
    """
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    places = {name: i for i, node in enumerate(graph.node) for name in node.output}
    seen: set[str] = set()
    copies: list[tuple[int, tuple[Any, Any]]] = []
    for product in graph.node:
        turned = product.input[1] if product.op_type == "MatMul" else ""
        transpose = producers.get(turned)
        dequantize = producers.get(transpose.input[0]) if transpose is not None else None
        if transpose is None or transpose.op_type != "Transpose" or dequantize is None:
            continue
        if dequantize.op_type != "DequantizeLinear" or dequantize.input[0] not in stored:
            continue
        if turned not in seen:
            seen.add(turned)
            continue
        number = len(copies) + 2
        pair = type(dequantize)(), type(transpose)()
        for copy, node in zip(pair, (dequantize, transpose), strict=True):
            copy.CopyFrom(node)
            copy.name = copy.output[0] = f"{node.output[0]}_{number}"
        pair[1].input[0] = pair[0].output[0]
        product.input[1] = pair[1].output[0]
        copies.append((places[turned], pair))
    for position, pair in sorted(copies, key=lambda c: c[0], reverse=True):
        for copy in reversed(pair):
            graph.node.insert(position + 1, copy)


_SAME_SIZES = frozenset(
    "Relu LeakyRelu PRelu Elu Selu Clip Sigmoid HardSigmoid HardSwish Tanh Gelu Mish Softplus Erf Neg Abs Sqrt Exp "
    "Cast Identity QuantizeLinear DequantizeLinear".split()
)


def read_sizes_behind(model: Any) -> None:
    """A shape is read of the last value of a chain of activations and quantizers, whose values all have it.

    The exporter reads it wherever its sizes first occur, such as at a convolution. ONNX Runtime computes in floating
    point what has a second reader between it and its quantizer.
    """
    graph = model.graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    outputs = {port.name for port in graph.output}
    place = {node.output[0]: i for i, node in enumerate(graph.node)}
    moved: dict[str, list[Any]] = {}
    for shape in [node for node in graph.node if node.op_type == "Shape"]:
        value = before = shape.input[0]
        first = min((place[reader.output[0]] for reader in readers.get(shape.output[0], ())), default=len(place))
        while value not in outputs:
            others = [node for node in readers.get(value, ()) if node.op_type != "Shape"]
            if len(others) != 1 or others[0].op_type not in _SAME_SIZES or others[0].input[0] != value:
                break
            if place[others[0].output[0]] >= first:
                break
            (value,) = others[0].output
        if value != before:
            shape.input[0] = value
            moved.setdefault(value, []).append(shape)
    nodes = [node for node in graph.node if not any(node is shape for shapes in moved.values() for shape in shapes)]
    ordered = [each for node in nodes for each in (node, *moved.get(node.output[0], ()))]
    del graph.node[:]
    graph.node.extend(ordered)


def weights_of_their_own(model: Any) -> bool:
    """A quantized weight that several layers read becomes one for each; whether there was any.

    OpenVINO merges two layers that read the same values and the same weight, and where a bias or an activation
    follows one of them alone, version 2026.4 gives wrong numbers from the third input shape on. Its own files hold
    equal constants once.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    places = {name: (i, node) for i, node in enumerate(graph.node) for name in node.output}
    read: dict[str, int] = {}
    copies = []
    for node in graph.node:
        if node.op_type not in _LAYERS or node.input[1] not in places:
            continue
        weight = node.input[1]
        position, dequantize = places[weight]
        if dequantize.op_type != "DequantizeLinear" or dequantize.input[0] not in stored:
            continue
        number = read[weight] = read.get(weight, 0) + 1
        if number == 1:
            continue
        copy, tensor = type(dequantize)(), type(stored[dequantize.input[0]])()
        copy.CopyFrom(dequantize)
        tensor.CopyFrom(stored[dequantize.input[0]])
        copy.name, copy.output[0] = f"{dequantize.name}_{number}", f"{weight}_{number}"
        tensor.name = copy.input[0] = f"{tensor.name}_{number}"
        node.input[1] = copy.output[0]
        graph.initializer.append(tensor)
        copies.append((position, copy))
    for position, copy in sorted(copies, key=lambda c: c[0], reverse=True):
        graph.node.insert(position + 1, copy)
    return bool(copies)


_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def without_zero_points(model: Any) -> bool:
    """Quantized weights of layers lose zero points that are all 0; whether there were any.

    The exporter stores equal tensors once. Where a convolution and a linear layer, or a transposed convolution, read
    the same zeros along different axes, OpenVINO 2026.4 does not fold them, and hardly a layer of the whole network
    computes in integers.
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    writers = {name: node for node in model.graph.node for name in node.output}
    changed = False
    for node in model.graph.node:
        dequantize = writers.get(node.input[1]) if node.op_type in _LAYERS else None
        while dequantize is not None and dequantize.op_type in ("Transpose", "Reshape"):
            dequantize = writers.get(dequantize.input[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or len(dequantize.input) < 3:
            continue
        zeros = stored.get(dequantize.input[2])
        if zeros is not None and dequantize.input[0] in stored and not numpy_helper.to_array(zeros).any():
            del dequantize.input[2]
            changed = True
    return changed


def cast_when_loaded(model: Any) -> None:
    """Stored integers that only operators in floating point read become floats when a file is loaded.

    ONNX Runtime folds a Cast of a constant, and not a DequantizeLinear, which would run at every call.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def in_floats(name: str) -> bool:
        consumers = readers.get(name, [])
        return bool(consumers) and all(
            n.op_type in _IN_FLOATS or (n.op_type in _MOVES and all(in_floats(out) for out in n.output))
            for n in consumers
        )

    for position, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "DequantizeLinear" or not all(name in stored for name in node.input):
            continue
        value, scale, *zero = (numpy_helper.to_array(stored[name]) for name in node.input)
        if not in_floats(node.output[0]) or (zero and np.any(zero[0])):
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if i == axis % value.ndim else 1 for i in range(value.ndim)] if scale.ndim else []
        spread, whole = f"{node.output[0]}_scale", f"{node.output[0]}_integers"
        graph.initializer.append(numpy_helper.from_array(scale.reshape(shape), spread))
        del graph.node[position]
        graph.node.insert(position, helper.make_node("Mul", [whole, spread], [node.output[0]], name=f"{node.name}_mul"))
        cast = helper.make_node("Cast", [node.input[0]], [whole], name=f"{node.name}_cast", to=TensorProto.FLOAT)
        graph.node.insert(position, cast)


_IN_FLOATS = ("ConvTranspose", "GRU", "LSTM", "RNN")
_MOVES = ("Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Identity", "Gather")


def store_in_half(model: Any) -> None:
    """Floating-point constants are stored in half precision, with a Cast to float32 behind, which folds at load.

    Those with a value beyond what half precision holds stay as they are.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < SMALLEST_IN_HALF or not np.all(np.abs(values) <= np.finfo(np.float16).max):
            continue
        name, half = tensor.name, f"{tensor.name}_half"
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), half))
        casts.append(helper.make_node("Cast", [half], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    for cast in reversed(casts):
        graph.node.insert(0, cast)


def integer_lstms(model: Any) -> dict[str, str]:
    """Name of the stored tensor that holds the matrix of an LSTM's inputs → name of the LSTM.

    Of those alone whose matrices have their scales in common (``penjing::lstm_static``): others are only stored in
    integers, and compute in floating point.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    names = {}
    for node in model.graph.node:
        if node.op_type != "LSTM":
            continue
        reshapes = [producers[value] for value in node.input[1:3] if value in producers]
        dequantized = [producers[n.input[0]] for n in reshapes if n.input[0] in producers]
        if [n.op_type for n in dequantized] == ["DequantizeLinear", "DequantizeLinear"]:
            (matrix, scale), (_, other) = (n.input[:2] for n in dequantized)
            if scale == other:
                names[matrix] = node.name
    return names


def drop_unread(model: Any) -> None:
    """Drop stored tensors that nothing reads, such as scales that were folded: ONNX Runtime warns of each."""
    read: set[str] = set()
    for graph in graphs(model.graph):
        read |= {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)


def graphs(graph: Any) -> Iterator[Any]:
    """A graph and all within its nodes (the branches of a condition)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from graphs(inner)
