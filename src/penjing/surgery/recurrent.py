"""LSTM layers in integers: `aten.lstm` of a graph becomes one ``penjing::lstm_dynamic`` for every layer of the stack.

Hochreiter & Schmidhuber, "Long Short-Term Memory", Neural Computation 1997. Gates are reordered from torch's (input,
forget, cell, output) to those of the ONNX standard (input, output, forget, cell).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from penjing.network.graph import arguments, compute, kind, layer_site, site, tensor_inputs
from penjing.numerics import grid
from penjing.steps.plan import Entry, Plan


@dataclass(frozen=True)
class Direction:
    """The parameters that one direction of one layer reads: (4·hidden, in), (4·hidden, hidden) and two (4·hidden,)."""

    input: fx.Node
    hidden: fx.Node
    biases: tuple[fx.Node, ...]


def directions(node: fx.Node) -> list[Direction]:
    """Layer after layer, forward before backward."""
    given = arguments(node)
    params, step = given["params"], 4 if given["has_biases"] else 2
    return [Direction(params[i], params[i + 1], tuple(params[i + 2 : i + step])) for i in range(0, len(params), step)]


def refusal(network: fx.GraphModule, node: fx.Node) -> str | None:
    """Why a recurrent layer has no form in integers; None where it has one."""
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


def stores(node: fx.Node) -> bool:
    """Whether two matrices of every layer and direction are stored tensors: not a packed sequence, not projected."""
    given = arguments(node)
    if "data" in given or "params" not in given:
        return False
    whole = (4 if given["has_biases"] else 2) * given["num_layers"] * (1 + given["bidirectional"])
    return len(given["params"]) == whole and all(isinstance(p, fx.Node) and p.op == "get_attr" for p in given["params"])


def value(network: fx.GraphModule, stored: fx.Node) -> torch.Tensor:
    """The tensor that a get_attr node reads."""
    found: torch.Tensor = compute(network, stored, (), {}).detach()
    return found


def weights(network: fx.GraphModule, node: fx.Node) -> dict[str, torch.Tensor]:
    """The matrices of a recurrent layer by the edges of a plan."""
    ports = tensor_inputs(node)
    matrices = [m for d in directions(node) for m in (d.input, d.hidden)]
    return {f"{site(node)}:in{ports.index(m)}": value(network, m) for m in matrices}


def in_integers(
    network: fx.GraphModule, node: fx.Node, plan: Plan, store: Callable[[str, torch.Tensor], fx.Node]
) -> None:
    """Replace an LSTM whose matrices `plan` has entries for. `store` keeps a tensor under a name and reads it."""
    given, ports = arguments(node), tensor_inputs(node)
    each, both = directions(node), 1 + given["bidirectional"]

    def entry(matrix: fx.Node) -> Entry:
        return plan.entries[f"{site(node)}:in{ports.index(matrix)}"]

    def numbers(name: str, matrices: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
        integers, scales = [], []
        for matrix in matrices:
            mine, x = entry(matrix), value(network, matrix)
            scale = torch.tensor(mine.scale).expand(len(x))
            zero = torch.tensor(mine.zero_point, dtype=torch.int32)
            q = grid.integers(x, torch.tensor(mine.scale), zero, mine.spec).to(torch.int8)
            integers.append(_reordered(q).T)
            scales.append(_reordered(scale))
        return store(f"{name}", torch.stack(integers)), store(f"{name}_scale", torch.stack(scales))

    call = network.graph.call_function
    with network.graph.inserting_before(node):
        x: Any = given["input"]
        if given["batch_first"]:
            x = call(torch.ops.aten.transpose.int, (x, 0, 1))
        states: tuple[list[fx.Node], list[fx.Node]] = ([], [])
        for layer in range(given["num_layers"]):
            mine = each[layer * both : (layer + 1) * both]
            name = f"{str(mine[0].input.target).rpartition('.')[0]}.layer{layer}"
            bias = [torch.cat([_reordered(value(network, b)) for b in d.biases]) for d in mine if d.biases]
            hidden = value(network, mine[0].hidden).shape[1]
            made = call(
                torch.ops.penjing.lstm_dynamic.default,
                (
                    x,
                    *(call(torch.ops.aten.slice.Tensor, (s, 0, layer * both, (layer + 1) * both)) for s in given["hx"]),
                    *numbers(f"{name}.input", [d.input for d in mine]),
                    *numbers(f"{name}.hidden", [d.hidden for d in mine]),
                    store(f"{name}.bias", torch.stack(bias) if bias else torch.zeros(both, 8 * hidden)),
                ),
            )
            made.meta["site"] = layer_site(site(node), layer)
            x, *after = (call(operator.getitem, (made, i)) for i in range(3))
            for state, found in zip(states, after, strict=True):
                state.append(found)
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


def _reordered(x: torch.Tensor) -> torch.Tensor:
    """(4·hidden, …) from torch's order of gates to that of ONNX."""
    i, f, g, o = x.chunk(4)
    return torch.cat([i, o, f, g])
