"""LSTM layers with projections, unrolled step by step, because neither runtime has such an operator.

Sak, Senior and Beaufays, "Long short-term memory based recurrent neural network architectures", Interspeech 2014.
"""

from __future__ import annotations

from typing import Any

import torch

from penjing.errors import ExportError
from penjing.network.graph import line
from penjing.network.recurrent_steps import add
from penjing.network.rewriting import Builder

aten = torch.ops.aten
MOST_STEPS = 512  # each adds a dozen operators to the graph


def lstm(build: Builder, a: dict[str, Any]) -> Any:
    """Output, hidden state and cell state of `aten.lstm` with projections; None if it has none.

    Raises:
        ExportError: The length varies, or is above 512 steps.
    """
    if "input" not in a or "hx" not in a:  # of packed sequences
        return None
    first_hidden, first_cell = a["hx"]
    width = build.value(first_cell).shape[-1]
    if build.value(first_hidden).shape[-1] == width:
        return None
    x, time = a["input"], 1 if a["batch_first"] else 0
    steps = build.value(x).shape[time]
    if not isinstance(steps, int) or steps > MOST_STEPS:
        raise ExportError(
            f"an LSTM with projections (proj_size) is unrolled step by step{line(build.node)}",
            code="length",
            got=f"{steps} steps",
            expected=f"a fixed length, of {MOST_STEPS} steps at most",
            remedy="fix the length to the example's, Task(dynamic={'x': {0: 'batch'}}), or leave proj_size out",
        )
    tensors = iter(a["params"])
    directions = 2 if a["bidirectional"] else 1
    hidden_states, cell_states = [], []
    for layer in range(a["num_layers"]):
        sides = []
        for direction in range(directions):
            w_input, w_hidden = next(tensors), next(tensors)
            biases = (next(tensors), next(tensors)) if a["has_biases"] else (None, None)
            project = next(tensors)
            position = layer * directions + direction
            hidden = build(aten.select.int, first_hidden, 0, position)
            cell = build(aten.select.int, first_cell, 0, position)
            gates = build(aten.linear.default, x, w_input, biases[0])
            outputs = [None] * steps
            for step in reversed(range(steps)) if direction else range(steps):
                step_gates = build(aten.select.int, gates, time, step)
                step_gates = add(build, step_gates, build(aten.linear.default, hidden, w_hidden, biases[1]))
                parts = [build(aten.slice.Tensor, step_gates, -1, k * width, (k + 1) * width) for k in range(4)]
                input_gate, forget_gate, output_gate = (build(aten.sigmoid.default, parts[k]) for k in (0, 1, 3))
                candidate = build(aten.mul.Tensor, input_gate, build(aten.tanh.default, parts[2]))
                cell = add(build, build(aten.mul.Tensor, forget_gate, cell), candidate)
                gated = build(aten.mul.Tensor, output_gate, build(aten.tanh.default, cell))
                hidden = outputs[step] = build(aten.linear.default, gated, project, None)
            sides.append(build(aten.stack.default, outputs, time))
            hidden_states.append(hidden)
            cell_states.append(cell)
        x = build(aten.cat.default, sides, -1) if len(sides) > 1 else sides[0]
    return x, build(aten.stack.default, hidden_states, 0), build(aten.stack.default, cell_states, 0)
