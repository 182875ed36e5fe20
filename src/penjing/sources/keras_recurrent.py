"""Recurrent layers of Keras as those of torch: the same gates, in torch's order.

An LSTM, a GRU or a plain recurrent layer with its usual activations is one operator that runtimes have. With a mask,
with other activations, or where a GRU resets before its product, the steps are written out one by one, because the
operator has none of this. Cells of the user's own run as Keras has them, step by step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from penjing.errors import SourceError
from penjing.sources.keras_parts import Own, Part, Shared, parameter, value

Tensor = torch.Tensor
MOST_STEPS = 128
"""Steps that are written out one by one; a longer sequence makes a graph of tens of thousands of operators."""
_KINDS = {"LSTM": ("lstm", 4), "GRU": ("gru", 3), "SimpleRNN": ("rnn", 1)}


class Recurrent(Part):
    """A recurrent layer, in one direction or in two.

    Args:
        layer: The layer; `Bidirectional` where it has two directions.
        directions: One or two recurrent layers, with their own weights.
    """

    def __init__(self, layer: Any, directions: list[Any]) -> None:
        super().__init__(layer)
        self._cells = [Shared(direction) for direction in directions]
        self.kind, _ = _KINDS[type(directions[0]).__name__]
        self.usual = all(_usual(direction) for direction in directions)
        self.names: list[str] = []
        for direction, ending in zip(directions, ("", "_reverse"), strict=False):
            for role, tensor in _weights(direction).items():
                self.register_parameter(f"{role}_l0{ending}", parameter(tensor, layer.trainable))
                self.names.append(f"{role}_l0{ending}")

    @property
    def _directions(self) -> list[Any]:
        return [shared.value for shared in self._cells]

    def forward(
        self, sequences: Tensor, initial_state: Any = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Any, ...]:
        """What the layer computes: outputs, and the states where it returns them."""
        cell = self._directions[0]
        backwards = len(self._directions) == 1 and cell.go_backwards
        if backwards:
            sequences = sequences.flip(1)
            mask = None if mask is None else mask.flip(1)
        states = self._first_states(sequences, initial_state)
        if mask is None and self.usual:
            outputs, finals = self._whole(sequences, states)
        else:
            outputs, finals = self._by_steps(sequences, states, mask)
        if len(self._directions) == 1:
            result: Any = outputs if cell.return_sequences else self._last(outputs, finals, mask)
        else:
            result = self._merged(outputs, finals, mask)
        if not cell.return_state:
            return result  # type: ignore[no-any-return]
        flat = [state[i] for i in range(len(self._directions)) for state in finals]
        return (*(result if isinstance(result, tuple) else (result,)), *flat)

    def _last(self, outputs: Tensor, finals: list[Tensor], mask: Tensor | None) -> Tensor:
        return finals[0][0] if mask is None else outputs[:, -1]

    def _first_states(self, x: Tensor, given: Any) -> list[Tensor]:
        """Hidden state, and cell state of an LSTM, each (directions, batch, units)."""
        number = 2 if self.kind == "lstm" else 1
        units, directions = self._directions[0].units, len(self._directions)
        if given is None:
            return [x.new_zeros(directions, x.shape[0], units) for _ in range(number)]
        given = list(given) if isinstance(given, list | tuple) else [given]
        return [torch.stack([given[d * number + i] for d in range(directions)]) for i in range(number)]

    def _tensors(self, direction: int | None = None) -> list[Tensor]:
        each = len(self.names) // len(self._directions)
        names = self.names if direction is None else self.names[direction * each : (direction + 1) * each]
        return [self.get_parameter(name) for name in names]

    def _whole(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Outputs (batch, time, directions * units), and the final states, by one operator."""
        cell, both = self._directions[0], len(self._directions) == 2
        settings = (cell.use_bias, 1, 0.0, False, both, True)
        if self.kind == "lstm":
            outputs, hidden, memory = torch._VF.lstm(x, states, self._tensors(), *settings)
            return outputs, [hidden, memory]
        word = "gru" if self.kind == "gru" else f"rnn_{_name(cell.activation)}"
        outputs, hidden = getattr(torch._VF, word)(x, states[0], self._tensors(), *settings)
        return outputs, [hidden]

    def _by_steps(self, x: Tensor, states: list[Tensor], mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The same step by step; where the mask is False, the state stays, and so does the output, or it is zero."""
        check_steps(self, x.shape[1])
        outputs, finals = [], []
        for direction, layer in enumerate(self._directions):
            tensors = self._tensors(direction)
            state = [s[direction] for s in states]
            output = torch.zeros_like(state[0])
            by_step: list[Tensor] = []
            for step in reversed(range(x.shape[1])) if direction else range(x.shape[1]):
                after = self._step(layer, x[:, step], state, tensors)
                if mask is None:
                    state, output = after, after[0]
                else:
                    there = mask[:, step].unsqueeze(-1)
                    state = [torch.where(there, new, old) for new, old in zip(after, state, strict=True)]
                    rest = torch.zeros_like(output) if layer.zero_output_for_mask else output
                    output = torch.where(there, after[0], rest)
                by_step.append(output)
            outputs.append(torch.stack(by_step[::-1] if direction else by_step, 1))
            finals.append(state)
        return torch.cat(outputs, -1), [torch.stack(both) for both in zip(*finals, strict=True)]

    def _step(self, layer: Any, x: Tensor, state: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        if not self.usual:
            return _STEPS[self.kind](layer, x, state, tensors)
        if self.kind == "lstm":
            return list(torch._VF.lstm_cell(x, state, *tensors))
        word = "gru_cell" if self.kind == "gru" else f"rnn_{_name(layer.activation)}_cell"
        return [getattr(torch._VF, word)(x, state[0], *tensors)]

    def _merged(self, outputs: Tensor, finals: list[Tensor], mask: Tensor | None) -> Any:
        one, two = outputs.chunk(2, -1)
        if not self._directions[0].return_sequences:
            one, two = (finals[0][0], finals[0][1]) if mask is None else (one[:, -1], two[:, 0])
        how = self.layer.merge_mode
        if how == "concat":
            return torch.cat([one, two], -1)
        if how is None:
            return one, two
        return {"sum": one + two, "ave": (one + two) / 2, "mul": one * two}[how]


def check_steps(part: Part, steps: Any) -> None:
    """Refuse a sequence that is too long, or of no fixed length, for steps that are written out one by one.

    Raises:
        SourceError: With the name of the layer.
    """
    if isinstance(steps, int) and steps <= MOST_STEPS:
        return
    raise SourceError(
        f"{part.title} runs step by step, and its sequence is too long for that",
        code="unrolled",
        got=f"{steps} steps",
        expected=f"at most {MOST_STEPS} steps of a fixed number, or a layer that runtimes have: an LSTM, or a GRU with "
        "reset_after=True, with its usual activations and without a mask",
        remedy="build the layer so (Embedding(mask_zero=False) gives no mask), or give a shorter example",
    )


def _sums(x: Tensor, state: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The products of the input and of the state: (batch, gates * units) each."""
    w_input, w_state, *biases = tensors
    b_input, b_state = biases or (None, None)
    return F.linear(x, w_input, b_input), F.linear(state, w_state, b_state)


def _rnn_step(layer: Any, x: Tensor, state: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    one, two = _sums(x, state[0], tensors)
    return [layer.activation(one + two)]


def _lstm_step(layer: Any, x: Tensor, state: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    one, two = _sums(x, state[0], tensors)
    input_gate, forget_gate, candidate, output_gate = (one + two).chunk(4, -1)
    gate = layer.recurrent_activation
    memory = gate(forget_gate) * state[1] + gate(input_gate) * layer.activation(candidate)
    return [gate(output_gate) * layer.activation(memory), memory]


def _gru_step(layer: Any, x: Tensor, state: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    gate, units = layer.recurrent_activation, layer.units
    if layer.reset_after:
        one, two = _sums(x, state[0], tensors)
        reset, update = gate(one + two)[:, : 2 * units].chunk(2, -1)
        candidate = layer.activation(one[:, 2 * units :] + reset * two[:, 2 * units :])
    else:  # the state is reset before its product; there is one bias
        one = F.linear(x, tensors[0], tensors[2] if len(tensors) > 2 else None)
        two = F.linear(state[0], tensors[1][: 2 * units])
        reset, update = gate(one[:, : 2 * units] + two).chunk(2, -1)
        candidate = layer.activation(one[:, 2 * units :] + F.linear(reset * state[0], tensors[1][2 * units :]))
    return [update * state[0] + (1 - update) * candidate]


_STEPS = {"rnn": _rnn_step, "lstm": _lstm_step, "gru": _gru_step}


class Stepwise(Own):
    """A recurrent layer as Keras runs it, step by step."""

    def forward(self, sequences: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes."""
        check_steps(self, sequences.shape[1])
        own = self.layer.__dict__
        before = own.get("unroll")
        own["unroll"] = True  # Keras' loop fixes the batch
        try:
            return super().forward(sequences, *args, **kwargs)
        finally:
            own["unroll"] = before


def check_stateless(layer: Any) -> None:
    """Refuse a layer that keeps its state from one batch to the next.

    Raises:
        SourceError: With the name of the layer.
    """
    if getattr(layer, "stateful", False):
        raise SourceError(
            f"the Keras layer {layer.name!r} ({type(layer).__name__}) keeps its state between two calls",
            code="stateful",
            got="stateful=True",
            expected="a network whose outputs follow from its inputs",
            remedy="build it with stateful=False; to go on, take the states as inputs (initial_state) and return them "
            "(return_state=True)",
        )


def recurrent(layer: Any) -> Part | None:
    """The part for an LSTM, GRU or SimpleRNN."""
    check_stateless(layer)
    return Recurrent(layer, [layer])


def bidirectional(layer: Any) -> Part | None:
    """The part for a layer that runs in both directions; None where these are two kinds of layers."""
    check_stateless(layer)
    both = [layer.forward_layer, layer.backward_layer]
    own = all(type(one).__module__.startswith("keras.src.layers.") and type(one).__name__ in _KINDS for one in both)
    if not own or type(both[0]) is not type(both[1]):
        return None
    words = ("units", "return_sequences", "return_state", "use_bias", "zero_output_for_mask", "reset_after")
    alike = all(getattr(both[0], word, None) == getattr(both[1], word, None) for word in words)
    activations = ("activation", "recurrent_activation")
    alike &= all(_name(getattr(both[0], word, None)) == _name(getattr(both[1], word, None)) for word in activations)
    return Recurrent(layer, both) if alike and not both[0].go_backwards and both[1].go_backwards else None


def _usual(layer: Any) -> bool:
    """Whether it is what torch's operator of this kind computes."""
    activation = _name(layer.activation)
    if type(layer).__name__ == "SimpleRNN":
        return activation in ("tanh", "relu")
    usual = activation == "tanh" and _name(layer.recurrent_activation) == "sigmoid"
    return usual and (type(layer).__name__ == "LSTM" or bool(layer.reset_after))


def _name(activation: Any) -> str:
    return str(getattr(activation, "__name__", ""))


def _weights(layer: Any) -> dict[str, Tensor]:
    """Torch's tensors: rows of the gates in its order, a bias for the input and one for the state."""
    cell = layer.cell
    gates = _KINDS[type(layer).__name__][1]

    def ordered(tensor: Tensor) -> Tensor:
        """Keras has a GRU's update gate before its reset gate, torch after it; an LSTM's gates agree."""
        if gates != 3:
            return tensor
        update, reset, candidate = tensor.chunk(3)
        return torch.cat([reset, update, candidate])

    weights = {"weight_ih": ordered(value(cell.kernel).T), "weight_hh": ordered(value(cell.recurrent_kernel).T)}
    if not layer.use_bias:
        return weights
    bias = value(cell.bias)
    both = list(bias) if bias.dim() == 2 else [bias, torch.zeros_like(bias)]
    return {**weights, "bias_ih": ordered(both[0]), "bias_hh": ordered(both[1])}


__all__ = ["MOST_STEPS", "Recurrent", "Stepwise", "bidirectional", "check_stateless", "check_steps", "recurrent"]
