"""ONNX recurrent layers.

What torch's own layers compute becomes one of them, with the gates in torch's order; the rest (peepholes, other
activations, lengths of their own, a reset before the product) is written out step by step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from penjing.onnx_files.first_states import one_row
from penjing.onnx_files.node import Node, Value, from_array, is_known, tensor

_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "affine": lambda x, alpha=1.0, beta=0.0: x * alpha + beta,
    "elu": lambda x, alpha=1.0, beta=0.0: torch.nn.functional.elu(x, alpha),
    "hardsigmoid": lambda x, alpha=0.2, beta=0.5: (x * alpha + beta).clamp(0, 1),
    "leakyrelu": lambda x, alpha=0.01, beta=0.0: torch.nn.functional.leaky_relu(x, alpha),
    "relu": lambda x, alpha=0.0, beta=0.0: torch.relu(x),
    "scaledtanh": lambda x, alpha=1.0, beta=1.0: torch.tanh(x * beta) * alpha,
    "sigmoid": lambda x, alpha=0.0, beta=0.0: torch.sigmoid(x),
    "softplus": lambda x, alpha=0.0, beta=0.0: torch.nn.functional.softplus(x),
    "softsign": lambda x, alpha=0.0, beta=0.0: torch.nn.functional.softsign(x),
    "tanh": lambda x, alpha=0.0, beta=0.0: torch.tanh(x),
    "thresholdedrelu": lambda x, alpha=1.0, beta=0.0: torch.where(x > alpha, x, torch.zeros_like(x)),
}


def _activations(
    node: Node, plain: Sequence[str], directions: int
) -> list[list[Callable[[torch.Tensor], torch.Tensor]]]:
    """The functions of every direction, with their constants."""
    words = [word.lower() for word in node.get("activations", list(plain) * directions)]
    words = words * directions if len(words) == len(plain) and directions == 2 else words
    alphas, betas = list(node.get("activation_alpha", [])), list(node.get("activation_beta", []))
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for word in words:
        if word not in _ACTIVATIONS:
            raise node.refuse("its activation is not known", word)
        more: dict[str, float] = {}
        if word in ("affine", "elu", "hardsigmoid", "leakyrelu", "scaledtanh", "thresholdedrelu") and alphas:
            more["alpha"] = alphas.pop(0)
        if word in ("affine", "hardsigmoid", "scaledtanh") and betas:
            more["beta"] = betas.pop(0)
        functions.append(functools.partial(_ACTIVATIONS[word], **more))
    return [functions[i * len(plain) : (i + 1) * len(plain)] for i in range(directions)]


def _directions(node: Node) -> int:
    """How many directions it computes."""
    word = node.get("direction", "forward")
    if word not in ("forward", "reverse", "bidirectional"):
        raise node.refuse("its direction is not known", repr(word))
    return 2 if word == "bidirectional" else 1


def _gates(matrix: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The blocks of a matrix or of a bias, one for a gate, in another order."""
    parts = matrix.chunk(len(order), 0)
    return torch.cat([parts[i] for i in order], 0)


def _lengths(node: Node, lengths: Value, steps: Any) -> torch.Tensor | None:
    """None where every sequence is whole."""
    if lengths is None or (is_known(lengths) and all(int(n) == steps for n in lengths.reshape(-1))):
        return None
    return tensor(lengths).long()


@dataclass(frozen=True)
class _Recurrent:
    """A recurrent operator of ONNX, computed by torch's layer where that is equivalent, otherwise step by step.

    Attributes:
        order: Torch's order of the gates.
        plain: Activations of torch's layer.
        cell: Builds the function of one time step.
        whole: Torch's function for a node, given its activations; None where torch has none.
    """

    order: Sequence[int]
    plain: Sequence[str]
    cell: Callable[..., Any]
    whole: Callable[[Node, Sequence[str]], Any]

    def __call__(
        self,
        node: Node,
        x: Value,
        w: Value,
        r: Value,
        b: Value = None,
        lengths: Value = None,
        hidden: Value = None,
        cells: Value = None,
        peepholes: Value = None,
        stored: Mapping[str, torch.Tensor] | None = None,
    ) -> Any:
        """Y (steps, directions, batch, hidden) and the last states (directions, batch, hidden); layout 1: batch first.

        Args:
            node: The node.
            x: (steps, batch, in).
            w: (directions, gates·hidden, in).
            r: (directions, gates·hidden, hidden).
            b: (directions, 2·gates·hidden).
            lengths: Steps of every sequence, (batch,).
            hidden: Initial hidden state, (directions, batch, hidden).
            cells: Initial cell state of an LSTM, the same shape.
            peepholes: Of an LSTM, (directions, 3·hidden).
            stored: `layer_tensors` of this node, if its weights are stored.
        """
        value = tensor(x)
        batch_first = bool(node.get("layout", 0))
        value = value.transpose(0, 1) if batch_first else value
        directions = _directions(node)
        size = node.get("hidden_size") or tensor(r).shape[-1]
        steps, batch = value.shape[:2]

        def state(given: Value) -> torch.Tensor:
            if given is None or (is_known(given) and given.dtype != object and not given.any()):
                return value.new_zeros(directions, batch, size)
            if is_known(given) and given.dtype != object and given.ndim == 3:
                given = one_row(given, batch_first)
            whole = tensor(given).transpose(0, 1) if batch_first else tensor(given)
            own = whole.shape[1]
            if isinstance(own, int) and own == 1:
                whole = whole.expand(-1, batch, -1)
            elif isinstance(own, int) and isinstance(batch, torch.SymInt):
                raise node.refuse(
                    "its first state is of a fixed batch, and the batch of its input varies",
                    f"a state of batch {own}",
                    remedy="fix the batch to the state's by Task.dynamic: {} fixes all sizes to the example's; or "
                    "store one row, which is repeated for every sample",
                    code="state-batch",
                )
            if len(whole) != directions or whole.shape[2] != size or whole.shape[1] != batch:
                raise node.refuse(  # torch would read past its end
                    "its first state is of another size than its input and its weights",
                    f"{list(whole.shape)} for [{directions}, {batch}, {size}]",
                )
            return whole

        states = state(hidden), state(cells)
        counts = _lengths(node, lengths, steps)
        words = [word.lower() for word in node.get("activations", [])] or list(self.plain) * directions
        function = self.whole(node, words)
        if function is not None and counts is None and peepholes is None and node.get("clip") is None:
            flat = stored or _flat(tensor(w), tensor(r), None if b is None else tensor(b), self.order)
            y, last = _by_layer(node, value, function, states, list(flat.values()))
        else:
            bias = tensor(b) if b is not None else value.new_zeros(directions, 2 * len(self.order) * size)
            weights = (tensor(w), tensor(r), bias, None if peepholes is None else tensor(peepholes))
            y, last = self._by_step(node, value, weights, states, counts)
        if batch_first:
            y, last = y.permute(2, 0, 1, 3), [part.transpose(0, 1) for part in last]
        return (y, *last)

    def _by_step(
        self,
        node: Node,
        x: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
        initial: tuple[torch.Tensor, torch.Tensor],
        counts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Y and the last states, one time step after another; `counts` are the steps of every sequence, (batch,)."""
        inner, outer, bias, peepholes = weights
        directions, steps = len(initial[0]), x.shape[0]
        activations = _activations(node, self.plain, directions)
        outputs, ends = [], []
        for d in range(directions):
            peephole = None if peepholes is None else peepholes[d]
            step = self.cell(node, inner[d], outer[d], bias[d], peephole, activations[d])
            reverse = node.get("direction", "forward") == "reverse" or d == 1
            states, result = (initial[0][d], initial[1][d]), []
            for t in reversed(range(steps)) if reverse else range(steps):
                new = step(x[t], *states)
                if counts is not None:
                    inside = (counts > t).unsqueeze(1)
                    new = tuple(torch.where(inside, a, old) for a, old in zip(new, states, strict=True))
                    result.append(torch.where(inside, new[0], torch.zeros_like(new[0])))
                else:
                    result.append(new[0])
                states = new
            outputs.append(torch.stack(result[::-1] if reverse else result))
            ends.append(states)
        return torch.stack(outputs, 1), [torch.stack(parts) for parts in zip(*ends, strict=True)]


def _by_layer(
    node: Node,
    x: torch.Tensor,
    function: Callable[..., Any],
    initial: tuple[torch.Tensor, torch.Tensor],
    flat: list[torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Y and the last states by torch's function; `flat` holds its parameters in its order."""
    (directions, batch, size), steps = initial[0].shape, x.shape[0]
    backward = node.get("direction", "forward") == "reverse"
    y, *last = function(x.flip(0) if backward else x, initial, flat, len(flat) == 4 * directions, directions == 2)
    y = y.flip(0) if backward else y
    return y.reshape(steps, batch, directions, size).transpose(1, 2), last


def _flat(w: torch.Tensor, r: torch.Tensor, b: torch.Tensor | None, order: Sequence[int]) -> dict[str, torch.Tensor]:
    """The tensors of torch's layer by their names there, in its order."""
    flat: dict[str, torch.Tensor] = {}
    for direction, suffix in zip(range(w.shape[0]), ("", "_reverse"), strict=False):
        flat[f"weight_ih_l0{suffix}"] = _gates(w[direction], order)
        flat[f"weight_hh_l0{suffix}"] = _gates(r[direction], order)
        if b is not None:
            ih, hh = b[direction].chunk(2)
            flat[f"bias_ih_l0{suffix}"], flat[f"bias_hh_l0{suffix}"] = _gates(ih, order), _gates(hh, order)
    return flat


def layer_tensors(node: Node, arrays: Sequence[np.ndarray | None]) -> dict[str, torch.Tensor] | None:
    """The tensors of torch's layer for a node whose weights are stored; None where it is not one of torch's layers.

    Args:
        node: An LSTM, a GRU or an RNN.
        arrays: What its inputs W, R and B hold; None for a B that is left out.
    """
    order, plain, whole = _LAYERS[node.operator]
    directions = _directions(node)
    words = [word.lower() for word in node.get("activations", [])] or list(plain) * directions
    lengths, peepholes = (name for name in (*node.inputs, *[""] * 8)[4:8:3])
    if whole(node, words) is None or node.get("clip") is not None or lengths or peepholes:
        return None
    w, r, b = (None if array is None else from_array(array) for array in arrays)
    assert w is not None and r is not None
    size, gates = node.get("hidden_size") or r.shape[-1], len(order)
    due = [(directions, gates * size, w.shape[-1]), (directions, gates * size, size), (directions, 2 * gates * size)]
    got = [tuple(part.shape) for part in (w, r, b) if part is not None]
    if got != due[: len(got)]:
        raise node.refuse("its weights are not those of such a layer", f"shapes {got} for {due[: len(got)]}")
    return {name: value.contiguous() for name, value in _flat(w, r, b, order).items()}


def _bounded(node: Node, x: torch.Tensor) -> torch.Tensor:
    limit = node.get("clip")
    return x if limit is None else x.clamp(-limit, limit)


def _lstm_cell(node: Node, w: torch.Tensor, r: torch.Tensor, b: torch.Tensor, p: Any, ways: Any) -> Callable[..., Any]:
    f, g, h = ways
    size = r.shape[-1]
    pi, po, pf = p.chunk(3) if p is not None else (0, 0, 0)

    def step(x: torch.Tensor, hidden: torch.Tensor, memory: torch.Tensor) -> Any:
        total = x @ w.t() + hidden @ r.t() + b[: 4 * size] + b[4 * size :]
        i, o, forget, c = total.chunk(4, -1)
        i = f(_bounded(node, i + pi * memory))
        forget = f(_bounded(node, forget + pf * memory)) if not node.get("input_forget", 0) else 1 - i
        new = forget * memory + i * g(_bounded(node, c))
        return f(_bounded(node, o + po * new)) * h(new), new

    return step


def _gru_cell(node: Node, w: torch.Tensor, r: torch.Tensor, b: torch.Tensor, _: Any, ways: Any) -> Callable[..., Any]:
    f, g = ways
    size = r.shape[-1]
    bw, br = b[: 3 * size], b[3 * size :]

    def step(x: torch.Tensor, hidden: torch.Tensor, memory: torch.Tensor) -> Any:
        seen = x @ w.t() + bw
        z = f(_bounded(node, seen[:, :size] + hidden @ r[:size].t() + br[:size]))
        reset = f(_bounded(node, seen[:, size : 2 * size] + hidden @ r[size : 2 * size].t() + br[size : 2 * size]))
        if node.get("linear_before_reset", 0):
            inner = reset * (hidden @ r[2 * size :].t() + br[2 * size :])
        else:
            inner = (reset * hidden) @ r[2 * size :].t() + br[2 * size :]
        new = g(_bounded(node, seen[:, 2 * size :] + inner))
        return (1 - z) * new + z * hidden, memory

    return step


def _rnn_cell(node: Node, w: torch.Tensor, r: torch.Tensor, b: torch.Tensor, _: Any, ways: Any) -> Callable[..., Any]:
    (f,) = ways
    size = r.shape[-1]

    def step(x: torch.Tensor, hidden: torch.Tensor, memory: torch.Tensor) -> Any:
        return f(_bounded(node, x @ w.t() + hidden @ r.t() + b[:size] + b[size:])), memory

    return step


def _lstm_whole(node: Node, words: Sequence[str]) -> Any:
    if set(words[::3]) != {"sigmoid"} or set(words[1::3]) | set(words[2::3]) != {"tanh"}:
        return None
    if node.get("input_forget", 0):
        return None

    def function(x: Any, states: Any, flat: Any, biased: bool, both: bool) -> Any:
        return torch._VF.lstm(x, states, flat, biased, 1, 0.0, False, both, False)

    return function


def _gru_whole(node: Node, words: Sequence[str]) -> Any:
    if not node.get("linear_before_reset", 0) or set(words[::2]) != {"sigmoid"} or set(words[1::2]) != {"tanh"}:
        return None

    def function(x: Any, states: Any, flat: Any, biased: bool, both: bool) -> Any:
        return torch._VF.gru(x, states[0], flat, biased, 1, 0.0, False, both, False)

    return function


def _rnn_whole(node: Node, words: Sequence[str]) -> Any:
    if set(words) not in ({"tanh"}, {"relu"}):
        return None
    layer: Any = torch._VF.rnn_tanh if words[0] == "tanh" else torch._VF.rnn_relu

    def function(x: Any, states: Any, flat: Any, biased: bool, both: bool) -> Any:
        return layer(x, states[0], flat, biased, 1, 0.0, False, both, False)

    return function


_LAYERS: dict[str, tuple[tuple[int, ...], tuple[str, ...], Callable[[Node, Sequence[str]], Any]]] = {
    "GRU": ((1, 0, 2), ("sigmoid", "tanh"), _gru_whole),
    "LSTM": ((0, 2, 3, 1), ("sigmoid", "tanh", "tanh"), _lstm_whole),
    "RNN": ((0,), ("tanh",), _rnn_whole),
}
"""Operator → torch's order of its gates, the activations of torch's layer, and that layer for a node."""

OPERATORS: dict[str, Callable[..., Any]] = {
    name: _Recurrent(order, plain, cell, whole)
    for (name, (order, plain, whole)), cell in zip(_LAYERS.items(), (_gru_cell, _lstm_cell, _rnn_cell), strict=True)
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {}

__all__ = ["KNOWN_INPUTS", "OPERATORS", "layer_tensors"]
