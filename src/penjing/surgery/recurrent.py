"""LSTM layers in integers: `aten.lstm` is replaced by one custom operator for every layer of the stack.

``penjing::lstm_dynamic`` computes ranges at run time; ``penjing::lstm_static`` has one fixed grid for input and state.

Hochreiter & Schmidhuber, "Long Short-Term Memory", Neural Computation 1997. Gates are reordered from torch's (input,
forget, cell, output) to those of the ONNX standard (input, output, forget, cell).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from penjing.network.graph import arguments, compute, kind, layer_site, site, tensor_inputs
from penjing.network.recurrent_steps import is_zero
from penjing.numerics import grid, operators
from penjing.steps.plan import Entry, Plan, QuantSpec


@dataclass(frozen=True)
class Direction:
    """Parameters of one direction of one layer: (4·hidden, in), (4·hidden, hidden), two or no biases (4·hidden,)."""

    input: fx.Node
    hidden: fx.Node
    biases: tuple[fx.Node, ...]


def directions(node: fx.Node) -> list[Direction]:
    """The directions of all layers, layer by layer, forward before backward."""
    given = arguments(node)
    params, step = given["params"], 4 if given["has_biases"] else 2
    return [Direction(params[i], params[i + 1], tuple(params[i + 2 : i + step])) for i in range(0, len(params), step)]


def refusal(network: fx.GraphModule, node: fx.Node) -> str | None:
    """Why a recurrent layer can't be computed in integers; None if it can."""
    what, given = kind(network, node), arguments(node)
    if what != "lstm":
        return f"no runtime has an integer kernel for {what}"
    if "data" in given:
        return "its input is a packed sequence"
    if len(given["params"]) != (4 if given["has_biases"] else 2) * given["num_layers"] * (1 + given["bidirectional"]):
        return "its state is projected, and no integer kernel does that"
    if any(not isinstance(p, fx.Node) or p.op != "get_attr" for p in given["params"]):
        return "its weight is computed, not stored"
    if any(value(network, p).dtype != torch.float32 for p in given["params"]):
        return f"its weight is {value(network, given['params'][0]).dtype}"
    return None


def static_refusal(network: fx.GraphModule, node: fx.Node) -> str | None:
    """Why a recurrent layer can't be computed in integers with ranges from calibration; None if it can."""
    if (reason := refusal(network, node)) is not None:
        return reason
    if not all(is_zero(state) for state in arguments(node)["hx"]):
        return "its first state is given, and its range is that of a state: zero, or the runtime would cut it"
    return None


def grids(read: torch.Tensor, own: torch.Tensor, ratio: float, spec: QuantSpec) -> torch.Tensor:
    """The scales (4·hidden,) of the rows of one direction's matrices (4·hidden, in) and (4·hidden, hidden).

    The kernel has one scale for a row of both matrices, the first of which is divided by `ratio` (its input is
    multiplied by it). OpenVINO 2026.4 swaps the scales of input and forget gates, so these are made equal.
    """
    scale = same_gates(torch.maximum(read.abs().amax(1) / ratio, own.abs().amax(1)) / spec.limits[1])
    return scale if spec.axis is not None else scale.max().expand(len(scale))


def same_gates(scale: torch.Tensor) -> torch.Tensor:
    """Scales (4·hidden,) with the maximum of input and forget gate for both of these gates."""
    i, f, g, o = scale.chunk(4)
    larger = torch.maximum(i, f)
    return torch.cat([larger, larger, g, o])


def input_scale(reach: float, first: list[Direction], network: fx.GraphModule) -> float:
    """The scale of the input's grid, for inputs of absolute value up to `reach`.

    Input and state share a grid, and so do the rows of their matrices. If the input's own scale would leave the first
    matrix too small a part of that grid, the loss is balanced: input and matrix lose the same factor.
    """
    sizes = [[float(value(network, m).abs().max()) for m in (d.input, d.hidden)] for d in first]
    balance = max(own for _, own in sizes) / max(
        *(read for read, _ in sizes), 1e-12
    )  # the reach at which both matrices use the whole grid
    return max(reach, math.sqrt(reach * balance), 1e-12) / 127


def stores(node: fx.Node) -> bool:
    """Whether all parameters are stored tensors, and the layer has neither packed sequences nor projections."""
    given = arguments(node)
    if "data" in given or "params" not in given:
        return False
    whole = (4 if given["has_biases"] else 2) * given["num_layers"] * (1 + given["bidirectional"])
    return len(given["params"]) == whole and all(isinstance(p, fx.Node) and p.op == "get_attr" for p in given["params"])


def value(network: fx.GraphModule, stored: fx.Node) -> torch.Tensor:
    """The tensor that a get_attr node reads."""
    tensor: torch.Tensor = compute(network, stored, (), {}).detach()
    return tensor


def weights(network: fx.GraphModule, node: fx.Node) -> dict[str, torch.Tensor]:
    """The matrices of a recurrent layer by their edges in a plan."""
    ports = tensor_inputs(node)
    matrices = [m for d in directions(node) for m in (d.input, d.hidden)]
    return {f"{site(node)}:in{ports.index(m)}": value(network, m) for m in matrices}


def entries(
    network: fx.GraphModule, node: fx.Node, reach: float, inputs: QuantSpec, spec: QuantSpec
) -> dict[str, Entry]:
    """The grids of an LSTM's input and of its matrices, for ``penjing::lstm_static``.

    Args:
        network: A captured network.
        node: An LSTM for which `static_refusal` is None.
        reach: The largest absolute value of its input.
        inputs: The format of activations; the kernel supports 8 bits only.
        spec: The format of weights.
    """
    inputs = replace(inputs, bits=8, signed=False, symmetric=False, narrow=False)
    rows = replace(spec, axis=0)
    ports, each = tensor_inputs(node), directions(node)
    both = 1 + arguments(node)["bidirectional"]
    step = input_scale(reach, each[:both], network)
    planned = {f"{site(node)}:in0": Entry(inputs, (step,), (operators.STATE_ZERO,))}
    for i, d in enumerate(each):
        ratio = operators.STATE_SCALE / step if i < both else 1.0
        scale = grids(value(network, d.input), value(network, d.hidden), ratio, spec)
        zeros = (0,) * len(scale)
        planned[f"{site(node)}:in{ports.index(d.input)}"] = Entry(rows, tuple((scale * ratio).tolist()), zeros)
        planned[f"{site(node)}:in{ports.index(d.hidden)}"] = Entry(rows, tuple(scale.tolist()), zeros)
    return planned


def in_integers(
    network: fx.GraphModule, node: fx.Node, plan: Plan, store: Callable[[str, torch.Tensor], fx.Node]
) -> None:
    """Replace, in place, an LSTM for whose input and matrices `plan` has entries; `store` stores a tensor."""
    lstm, given, call = _Lstm(network, node, plan, store), arguments(node), network.graph.call_function
    with network.graph.inserting_before(node):
        x: Any = given["input"]
        if given["batch_first"]:
            x = call(torch.ops.aten.transpose.int, (x, 0, 1))
        states: tuple[list[fx.Node], list[fx.Node]] = ([], [])
        for layer in range(given["num_layers"]):
            outputs = call(*(lstm.dynamic if lstm.first.dynamic else lstm.static)(x, layer))
            outputs.meta["site"] = layer_site(site(node), layer)
            x, *after = (call(operator.getitem, (outputs, i)) for i in range(3))
            for state, final in zip(states, after, strict=True):
                state.append(final)
        y = call(torch.ops.aten.transpose.int, (x, 0, 1)) if given["batch_first"] else x
        results = (y, *(call(torch.ops.aten.cat.default, (state, 0)) for state in states))
    for user in list(node.users):
        which: Any = user.args[1]
        user.replace_all_uses_with(results[which])
        network.graph.erase_node(user)
    network.graph.erase_node(node)
    for matrix in given["params"]:
        if not matrix.users:
            network.graph.erase_node(matrix)


class _Lstm:
    """Converts an LSTM layer by layer to the arguments of a custom operator, and stores its tensors."""

    def __init__(
        self, network: fx.GraphModule, node: fx.Node, plan: Plan, store: Callable[[str, torch.Tensor], fx.Node]
    ) -> None:
        self.network, self.store = network, store
        given, name, ports = arguments(node), site(node), tensor_inputs(node)
        self.states = given["hx"]
        self.both = 1 + given["bidirectional"]  # directions
        self.directions = directions(node)
        self.first = plan.entries[f"{name}:in0"]
        matrices = {matrix for d in self.directions for matrix in (d.input, d.hidden)}
        self.entries = {matrix: plan.entries[f"{name}:in{ports.index(matrix)}"] for matrix in matrices}

    def dynamic(self, x: fx.Node, layer: int) -> tuple[Any, tuple[Any, ...]]:
        """Operator and arguments of a layer with ranges at run time."""
        layer_directions, name = self._layer(layer)
        matrices = (
            *self._numbers(f"{name}.input", [d.input for d in layer_directions]),
            *self._numbers(f"{name}.hidden", [d.hidden for d in layer_directions]),
        )
        read = (x, *self._states_before(layer), *matrices, self.store(f"{name}.bias", self._bias(layer_directions)))
        return torch.ops.penjing.lstm_dynamic.default, read

    def static(self, x: fx.Node, layer: int) -> tuple[Any, tuple[Any, ...]]:
        """Operator and arguments of a layer with one fixed grid for input and state."""
        (layer_directions, name), ratio = (
            self._layer(layer),
            1.0 if layer else operators.STATE_SCALE / self.first.scale[0],
        )
        integers: dict[str, list[torch.Tensor]] = {"input": [], "hidden": [], "scale": []}
        for d in layer_directions:
            own, read = (torch.tensor(self.entries[m].scale) for m in (d.hidden, d.input))
            scale = same_gates(torch.maximum(own, read / ratio))  # the two differ only if scales were learned
            zero = torch.zeros(len(scale), dtype=torch.int32)
            matrices = (("input", value(self.network, d.input) / ratio), ("hidden", value(self.network, d.hidden)))
            for what, matrix in matrices:
                q = grid.integers(matrix, scale, zero, self.entries[d.hidden].spec).to(torch.int8)
                integers[what].append(_reordered(q))
            integers["scale"].append(_reordered(scale))
        stored = [self.store(f"{name}.{what}", torch.cat(parts)) for what, parts in integers.items()]
        state = [
            self.store(f"{name}.state_scale", torch.tensor(operators.STATE_SCALE)),
            self.store(f"{name}.state_zero", torch.tensor(operators.STATE_ZERO, dtype=torch.uint8)),
        ]
        bias = self.store(f"{name}.bias", self._bias(layer_directions))
        return torch.ops.penjing.lstm_static.default, (x, *self._states_before(layer), *stored, bias, *state, ratio)

    def _layer(self, layer: int) -> tuple[list[Direction], str]:
        """The directions of a layer, and the prefix of its tensors' names."""
        layer_directions = self.directions[layer * self.both : (layer + 1) * self.both]
        return layer_directions, f"{str(layer_directions[0].input.target).rpartition('.')[0]}.layer{layer}"

    def _states_before(self, layer: int) -> list[fx.Node]:
        call, start = self.network.graph.call_function, layer * self.both
        return [call(torch.ops.aten.slice.Tensor, (state, 0, start, start + self.both)) for state in self.states]

    def _bias(self, layer_directions: list[Direction]) -> torch.Tensor:
        bias = [torch.cat([_reordered(value(self.network, b)) for b in d.biases]) for d in layer_directions if d.biases]
        return (
            torch.stack(bias)
            if bias
            else torch.zeros(self.both, 8 * value(self.network, layer_directions[0].hidden).shape[1])
        )

    def _numbers(self, name: str, matrices: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
        """Stored integers of one matrix per direction (directions, in, 4·hidden), and scales (directions, 4·hidden)."""
        integers, scales = [], []
        for matrix in matrices:
            entry, x = self.entries[matrix], value(self.network, matrix)
            zero = torch.tensor(entry.zero_point, dtype=torch.int32)
            q = grid.integers(x, torch.tensor(entry.scale), zero, entry.spec).to(torch.int8)
            integers.append(_reordered(q).T)
            scales.append(_reordered(torch.tensor(entry.scale).expand(len(x))))
        return self.store(f"{name}", torch.stack(integers)), self.store(f"{name}_scale", torch.stack(scales))


def _reordered(x: torch.Tensor) -> torch.Tensor:
    """Reorder (4·hidden, …) from torch's order of gates to that of ONNX."""
    i, f, g, o = x.chunk(4)
    return torch.cat([i, o, f, g])
