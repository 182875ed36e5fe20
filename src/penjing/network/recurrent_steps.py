"""Plain recurrent layers (`nn.RNN`) and recurrent cells, decomposed into products and sums.

Elman, "Finding structure in time", Cognitive Science 1990. No runtime has a plain recurrent layer as an operator: the
ONNX exporter unrolls it. Decomposed here, its matrices are linear layers that every step of a recipe supports and that
the runtimes multiply in integers. The whole input sequence is multiplied at once; the state's matrix is one layer that
is called at every step. The two biases are merged, since they are added to the same sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from penjing.network.graph import operator_name
from penjing.network.rewriting import Builder, Rewrite

aten = torch.ops.aten
_ZEROS = ("zeros", "zeros_like", "new_zeros")
_SAME = ("alias", "clone", "contiguous", "expand", "identity", "permute", "reshape", "slice", "to", "transpose", "view")
"""Operators that give no value that their first input has not."""
_SUM = "it is a sum within a step of a recurrent layer, whose gates and activations are computed in floating point"


def rnn(activation: Callable[..., Any]) -> Rewrite:
    """Rewrite `aten.rnn_tanh` or `aten.rnn_relu`: output and final states.

    Packed sequences and varying lengths are left unchanged.
    """

    def rewrite(build: Builder, a: dict[str, Any]) -> Any:
        if "input" not in a or "hx" not in a:  # of packed sequences
            return None
        x, time = a["input"], 1 if a["batch_first"] else 0
        steps = build.value(x).shape[time]
        if not isinstance(steps, int):
            return None
        tensors = iter(a["params"])
        directions = 2 if a["bidirectional"] else 1
        states = []
        for layer in range(a["num_layers"]):
            if layer and a["dropout"]:
                x = build(aten.dropout.default, x, a["dropout"], a["train"])
            sides = []
            for direction in range(directions):
                w_input, w_state = next(tensors), next(tensors)
                bias = build(aten.add.Tensor, next(tensors), next(tensors)) if a["has_biases"] else None
                state = None
                if not is_zero(a["hx"]):
                    state = build(aten.select.int, a["hx"], 0, layer * directions + direction)
                sums = build(aten.linear.default, x, w_input, bias)
                outputs = [None] * steps
                for step in reversed(range(steps)) if direction else range(steps):
                    total = build(aten.select.int, sums, time, step)
                    if state is not None:
                        total = add(build, total, build(aten.linear.default, state, w_state, None))
                    state = outputs[step] = build(activation, total)
                sides.append(build(aten.stack.default, outputs, time))
                states.append(state)
            x = build(aten.cat.default, sides, -1) if len(sides) > 1 else sides[0]
        return x, build(aten.stack.default, states, 0)

    return rewrite


def rnn_cell(activation: Callable[..., Any]) -> Rewrite:
    """Rewrite `aten.rnn_tanh_cell` or `aten.rnn_relu_cell`: the next state."""

    def rewrite(build: Builder, a: dict[str, Any]) -> Any:
        return build(activation, _gates(build, a, a["hx"]))

    return rewrite


def lstm_cell(build: Builder, a: dict[str, Any]) -> Any:
    """Rewrite an LSTM cell: the next hidden and cell state. Hochreiter & Schmidhuber, Neural Computation 1997."""
    hidden, cell = a["hx"]
    input_gate, forget_gate, candidate, output_gate = _parts(build, _gates(build, a, hidden), 4)
    new = build(aten.mul.Tensor, build(aten.sigmoid.default, input_gate), build(aten.tanh.default, candidate))
    if not is_zero(cell):
        new = add(build, build(aten.mul.Tensor, build(aten.sigmoid.default, forget_gate), cell), new)
    return build(aten.mul.Tensor, build(aten.sigmoid.default, output_gate), build(aten.tanh.default, new)), new


def gru_cell(build: Builder, a: dict[str, Any]) -> Any:
    """Rewrite a GRU cell: the next state; the reset gate applies to the state's product. Cho et al., EMNLP 2014."""
    state = a["hx"]
    input_parts = _parts(build, build(aten.linear.default, a["input"], a["w_ih"], a["b_ih"]), 3)
    state_parts = _parts(build, build(aten.linear.default, state, a["w_hh"], a["b_hh"]), 3)
    reset, update = (
        build(aten.sigmoid.default, add(build, *both)) for both in zip(input_parts[:2], state_parts[:2], strict=True)
    )
    candidate = build(aten.tanh.default, add(build, input_parts[2], build(aten.mul.Tensor, reset, state_parts[2])))
    return add(build, candidate, build(aten.mul.Tensor, update, build(aten.sub.Tensor, state, candidate)))


def add(build: Builder, one: fx.Node, two: fx.Node) -> fx.Node:
    """A sum within a step, kept in floating point: quantizing it costs 2 to 4 dB and time for the conversions."""
    total: fx.Node = build(aten.add.Tensor, one, two)
    total.meta["float"] = _SUM
    return total


def _gates(build: Builder, a: dict[str, Any], state: fx.Node) -> fx.Node:
    """The sum of a cell's input and state products: (batch, gates × hidden)."""
    bias = None if a["b_ih"] is None else build(aten.add.Tensor, a["b_ih"], a["b_hh"])
    sums: fx.Node = build(aten.linear.default, a["input"], a["w_ih"], bias)
    if is_zero(state):
        return sums
    return add(build, sums, build(aten.linear.default, state, a["w_hh"], None))


def _parts(build: Builder, x: fx.Node, number: int) -> list[fx.Node]:
    width = build.value(x).shape[-1] // number
    return [build(aten.slice.Tensor, x, -1, i * width, (i + 1) * width) for i in range(number)]


def is_zero(state: fx.Node) -> bool:
    """Whether a state is zeros, as the default initial state of a layer is, whichever operators write them."""
    if state.op != "call_function":
        return False
    name = operator_name(state)
    if name in ("full", "full_like", "new_full"):
        return bool(state.args[-1] == 0)
    if name in _SAME and isinstance(state.args[0], fx.Node):
        return is_zero(state.args[0])
    return name in _ZEROS
