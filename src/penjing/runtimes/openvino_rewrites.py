"""What OpenVINO 2026.4 gets wrong, written so that it gets it right: every rule changes a model in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

LARGEST_BFLOAT16 = np.float32(3.3895314e38)
STATE_LIMITS = (-128 / 127, 1.0)  # of the grid that input and state of an LSTM share (`numerics.operators`)


def select_for_booleans(model: Any) -> None:
    """A boolean becomes a number by a selection of 1 or 0.

    Version 2026.4 fuses a conversion into the arithmetic behind it, a mask's for example, and then refuses the boolean
    input of what it fused, or answers with an empty batch.
    """
    import openvino
    from openvino import opset13

    for op in model.get_ordered_ops():
        if op.get_type_name() != "Convert" or op.get_input_element_type(0) != openvino.Type.boolean:
            continue
        numbers = [opset13.constant(x, op.get_output_element_type(0)) for x in (1, 0)]
        selection = opset13.select(op.input_value(0), *numbers, name=op.get_friendly_name())
        op.output(0).replace(selection.output(0))


def first_of_equals(model: Any) -> None:
    """The largest or smallest of many come in the order of their places where they are equal, as ONNX says.

    Version 2026.4 reads ONNX's TopK as one that leaves the order of equal values open.
    """
    from openvino import opset11

    for op in model.get_ordered_ops():
        if op.get_type_name() != "TopK" or op.get_attributes().get("sort") != "value":
            continue
        told = op.get_attributes()
        stable = opset11.topk(
            op.input_value(0),
            op.input_value(1),
            told["axis"],
            told["mode"],
            "value",
            told["index_element_type"],
            stable=True,
            name=op.get_friendly_name(),
        )
        for port in (0, 1):
            op.output(port).replace(stable.output(port))


def magnitudes_of_sizes(model: Any) -> None:
    """Absolute values of what follows from sizes alone, such as the distances of positions, become the larger sign.

    Where version 2026.4 knows a shape when it compiles, it computes such values beforehand, and leaves out Abs.
    """
    from openvino import opset13

    of_sizes: set[str] = set()
    for op in model.get_ordered_ops():
        names = [value.get_node().get_name() for value in op.input_values()]
        kind = op.get_type_name()
        if kind in ("Constant", "ShapeOf") or (kind != "Parameter" and names and of_sizes.issuperset(names)):
            of_sizes.add(op.get_name())
        if kind == "Abs" and of_sizes.issuperset(names):
            value = op.input_value(0)
            larger = opset13.maximum(value, opset13.negative(value), name=op.get_friendly_name())
            op.output(0).replace(larger.output(0))
            of_sizes.add(larger.get_name())


def unequal_biases(model: Any) -> None:
    """Every layer with integer weights gets a bias whose elements are not all equal.

    Version 2026.4 merges a bias that is missing or the same everywhere into the quantizer behind the product. With one
    thread, fixed shapes and few rows it then takes the bits of the product's 32-bit integers for floating-point
    numbers; behind a convolution, a mean over places is wrong from the second sample on (3 to 28 dB from the plan), and
    a reshape loses a batch. What is added is too small to change a value: 1e-30, and the last bit of one element of an
    equal bias.
    """
    from openvino import opset13

    for op in model.get_ordered_ops():
        if op.get_type_name() not in ("MatMul", "Convolution", "GroupConvolution") or not _has_integer_weights(op):
            continue
        width, *places = op.get_output_partial_shape(0)[1:]
        shape = (width.get_length(), *[1] * len(places))
        tiny, one = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        tiny.flat[0], one.flat[0] = 1e-30, np.nextafter(np.float32(1), np.float32(2))
        readers = list(op.output(0).get_target_inputs())
        addition = readers[0].get_node() if len(readers) == 1 else None
        if addition is not None and addition.get_type_name() == "Add":
            bias = addition.input_value(1 - readers[0].get_index())
            stored = _stored(bias.get_node())
            if stored:
                if all(np.all(constant == constant.flat[0]) for constant in stored):
                    other = opset13.add(opset13.multiply(bias, opset13.constant(one)), opset13.constant(tiny))
                    addition.input(1 - readers[0].get_index()).replace_source_output(other.output(0))
                continue
        site = op.get_friendly_name().removesuffix("/WithoutBiases")
        addition = opset13.add(op.output(0), opset13.constant(tiny), name=f"{site}/bias")
        for reader in readers:
            reader.replace_source_output(addition.output(0))


def _has_integer_weights(layer: Any) -> bool:
    """Whether a layer's weights are stored integers; of products, those of a matrix with a matrix."""
    shapes = [layer.get_output_partial_shape(0), *(value.get_partial_shape() for value in layer.input_values())]
    if any(shape.rank.is_dynamic for shape in shapes) or shapes[0][1].is_dynamic:
        return False
    if layer.get_type_name() == "MatMul" and any(len(shape) != 2 for shape in shapes):
        return False
    return any(constant.dtype in (np.int8, np.uint8) for constant in _stored(layer.input_value(1).get_node()))


def _stored(node: Any) -> list[np.ndarray]:
    """The tensors that a value is computed from; none where it is computed from an input too."""
    return [constant.data for constant in _constants(node)]


def _constants(node: Any) -> list[Any]:
    """The same as constants, which have a name."""
    constants, waiting, known = [], [node], {node.get_name()}
    while waiting:  # residual networks have more ways back than can be walked: every node is looked at once
        node = waiting.pop()
        if node.get_type_name() == "Constant":
            constants.append(node)
        elif not node.get_input_size():
            return []
        for value in node.input_values():
            before = value.get_node()
            if before.get_name() not in known:
                known.add(before.get_name())
                waiting.append(before)
    return constants


def integer_lstms(model: Any, sites: Mapping[str, str]) -> None:
    """An LSTM with integer matrices is written so that its integer kernel takes it, and keeps its name.

    Its matrices are read as they are: OpenVINO's reader of ONNX puts their gates into another order after they have
    become floats. Each direction is an LSTM. The state before the first step, which is 0, is computed from the input:
    version 2026.4 takes the quantizer of a constant state, as it is for fixed shapes, for that of a weight, signed, for
    which it has no kernel.

    Args:
        model: Is changed.
        sites: Name of the constant that holds the matrix of a layer's inputs → what the layer is called.
    """
    from openvino import opset13

    for op in model.get_ordered_ops():
        if op.get_type_name() != "LSTMSequence":
            continue
        parts = (_integer_matrix(op.input_value(port).get_node()) for port in (4, 5))
        matrices = [part for part in parts if part is not None]
        bias = _stored(op.input_value(6).get_node())
        if len(matrices) < 2 or len(bias) != 1 or str(matrices[0][0].get_friendly_name()) not in sites:
            continue  # stored in integers, but computed in floating point
        directions, gates = bias[0].shape
        x, _, cell, lengths = op.input_values()[:4]
        state = _zero_state(x, gates // 4)
        cells = opset13.split(cell, opset13.constant(1), directions).outputs()
        name = sites[str(matrices[0][0].get_friendly_name())]
        sides = []
        for d, way in enumerate(("FORWARD", "REVERSE")[:directions]):
            floats = []
            for matrix, scale in matrices:
                q, steps = (_gates(t.reshape(directions, gates, -1)[d : d + 1]) for t in (matrix.data, scale))
                floats.append(
                    opset13.multiply(opset13.convert(opset13.constant(q), np.float32), opset13.constant(steps))
                )
            settings = (opset13.constant(bias[0][d : d + 1]), gates // 4, way)
            sides.append(opset13.lstm_sequence(x, state, cells[d], lengths, *floats, *settings))
            sides[-1].set_friendly_name(f"{name}/reverse" if d else name)
        for output in range(3):
            values = [side.output(output) for side in sides]
            together = values[0] if directions == 1 else opset13.concat(values, 1).output(0)
            for reader in list(op.output(output).get_target_inputs()):
                reader.replace_source_output(together)


def _integer_matrix(node: Any) -> tuple[Any, np.ndarray] | None:
    """The constant with integers that a matrix is computed from, and the scales of its rows; None where it has none."""
    constants = _constants(node)
    matrix = next((c for c in constants if c.data.dtype == np.int8), None)
    if matrix is None:
        return None
    rows = len(matrix.data)
    scale = next((c.data for c in constants if c.data.dtype == np.float32 and c.data.size == rows), None)
    return None if scale is None else (matrix, scale)


def _zero_state(x: Any, hidden: int) -> Any:
    """The quantized first state (batch, 1, hidden), which is 0, computed from the input (batch, steps, size)."""
    from openvino import opset13

    zeros = opset13.constant(np.zeros((1, 1, hidden), np.float32))
    state = opset13.multiply(opset13.reduce_sum(x, opset13.constant(np.array([1, 2])), True), zeros)
    limits = [opset13.constant(np.full((1, 1, 1), limit, np.float32)) for limit in STATE_LIMITS]
    return opset13.fake_quantize(state, *limits, *limits, 256)


def _gates(x: np.ndarray) -> np.ndarray:
    """(directions, 4·hidden, …) from ONNX's order of gates (input, output, forget, cell) to OpenVINO's."""
    i, o, f, c = np.split(x, 4, axis=1)
    return np.concatenate([f, i, c, o], axis=1)


def finite_in_bfloat16(model: Any) -> None:
    """Stored numbers that bfloat16 rounds to infinity become its largest: the smallest float32, which hides in masks.

    Where a mask hides a whole row, infinities would make NaN of it.
    """
    from openvino import Type, opset13

    for op in model.get_ordered_ops():
        if op.get_type_name() != "Constant" or op.get_element_type() != Type.f32:
            continue
        beyond = np.isfinite(op.data) & (np.abs(op.data) > LARGEST_BFLOAT16)
        if beyond.any():
            clipped = np.where(beyond, np.sign(op.data) * LARGEST_BFLOAT16, op.data)
            op.output(0).replace(opset13.constant(clipped.astype(np.float32), name=op.get_friendly_name()).output(0))


def reductions_alone(model: Any) -> None:
    """No reduction is fused with what has a constant for each channel behind it, and no maximum with a quantizer.

    Version 2026.4 looks the constants up by the wrong channel, in floating point too, unless all axes behind the
    second of four or five are reduced. It gives wrong numbers for a largest or smallest value that a quantizer reads.
    A change of shape between the two keeps them apart; it moves no value.
    """
    from openvino import opset13

    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if not kind.startswith("Reduce") or kind.startswith("ReduceLogical"):
            continue
        if not _reads_channels(op, or_quantizer=kind in ("ReduceMax", "ReduceMin")):
            continue
        rank, axes = op.get_input_partial_shape(0).rank, _stored(op.input_value(1).get_node())
        if rank.is_dynamic or not axes:
            continue
        reduced = sorted(axis % rank.get_length() for axis in axes[0].ravel().tolist())
        if rank.get_length() > 3 and reduced == list(range(2, rank.get_length())):
            continue
        value, dropped = op.input_value(0), reduced
        if op.get_attributes()["keep_dims"]:  # an axis more, which is reduced with the others and dropped again
            dropped = [rank.get_length()]
            value = opset13.unsqueeze(value, opset13.constant(np.array(dropped))).output(0)
            reduced = reduced + dropped
        readers = list(op.output(0).get_target_inputs())
        site = op.get_friendly_name()
        reduce = getattr(opset13, f"reduce_{kind.removeprefix('Reduce').lower()}")
        reduction = reduce(value, opset13.constant(np.array(reduced)), True, name=f"{site}/axes")
        reshaped = opset13.squeeze(reduction.output(0), opset13.constant(np.array(dropped)), name=site)
        for reader in readers:
            reader.replace_source_output(reshaped.output(0))


def _reads_channels(op: Any, or_quantizer: bool) -> bool:
    """Whether elementwise operators that alone read the value, one behind another, have a constant that varies.

    Or whether one of them is a quantizer.
    """
    while True:
        readers = list(op.output(0).get_target_inputs())
        if len(readers) != 1:
            return False
        op = readers[0].get_node()
        if op.get_type_name() not in _BY_CHANNEL and op.get_input_size() != 1 or op.get_output_size() != 1:
            return False
        others = [value for i, value in enumerate(op.input_values()) if i != readers[0].get_index()]
        if or_quantizer and op.get_type_name() == "FakeQuantize":
            return True
        if any(constant.size > 1 for value in others for constant in _stored(value.get_node())):
            return True


_BY_CHANNEL = {"Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Power", "PRelu", "FakeQuantize"}
