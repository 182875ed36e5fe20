"""Penjing's own operators for integers: ``penjing::quantize``, ``dequantize``, ``linear_dynamic``, ``lstm_dynamic``, …

Runtimes translate them.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018: q = clamp(round(x / scale) + zero_point, low, high), x̂ = (q − zero_point) · scale, rounding half to even.
"""

from __future__ import annotations

import torch

from penjing.numerics.grid import integers, measured
from penjing.steps.plan import QuantSpec

UNSIGNED = QuantSpec(signed=False, symmetric=False, range="dynamic")


def integer_dtype(low: int, high: int) -> torch.dtype:
    """Return the smallest integer dtype for the range low..high that torch and the runtimes share."""
    if low >= 0 and high <= 255:
        return torch.uint8
    return torch.int8 if low >= -128 and high <= 127 else torch.int32


def _spread(values: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """Reshape scales (1,) or (channels,) to broadcast over x along `axis`."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = values.numel()
    return values.reshape(shape)


@torch.library.custom_op("penjing::quantize", mutates_args=())
def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, low: int, high: int
) -> torch.Tensor:
    """Quantize x to integers.

    Args:
        x: Any shape, floating point.
        scale: (1,) or (x.shape[axis],), float32, above 0.
        zero_point: Same shape as `scale`, int32.
        axis: The channel axis; ignored for a single scale.
        low: Smallest integer.
        high: Largest integer; low and high determine the dtype, see `integer_dtype`.
    """
    steps = torch.round(x / _spread(scale, x, axis)) + _spread(zero_point, x, axis)
    return torch.clamp(steps, low, high).to(integer_dtype(low, high))


@quantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, low: int, high: int) -> torch.Tensor:
    return torch.empty_like(x, dtype=integer_dtype(low, high))


@torch.library.custom_op("penjing::dequantize", mutates_args=())
def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    """Dequantize integers to float32; arguments as in `quantize`."""
    return (q.to(torch.float32) - _spread(zero_point, q, axis)) * _spread(scale, q, axis)


@dequantize.register_fake
def _(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@torch.library.custom_op("penjing::linear_dynamic", mutates_args=())
def linear_dynamic(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute x · weight + bias with an integer product; x is quantized per tensor by its own range.

    Args:
        x: (…, in), float32.
        weight: (in, out), int8.
        scale: (out,) or (), float32, of the weight.
        zero_point: Same shape, int8.
        bias: (out,), float32, or None.

    Returns:
        (…, out), float32.
    """
    result = _product(x, weight.double() - zero_point.double(), scale)
    return result if bias is None else result + bias


@linear_dynamic.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("penjing::lstm_dynamic", mutates_args=())
def lstm_dynamic(
    x: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    input_weight: torch.Tensor,
    input_scale: torch.Tensor,
    hidden_weight: torch.Tensor,
    hidden_scale: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute an LSTM layer with integer products and dynamic ranges.

    The input is quantized per tensor, the hidden state at every step, each by its own range. The order of gates is
    input, output, forget, cell; sums and gates are float32.

    Args:
        x: (steps, batch, in), float32.
        hidden: (directions, batch, hidden), float32, the state before the first step.
        cell: The same of the cell.
        input_weight: (directions, in, 4·hidden), int8; the second direction reads from the end.
        input_scale: (directions, 4·hidden), float32.
        hidden_weight: (directions, hidden, 4·hidden), int8.
        hidden_scale: (directions, 4·hidden), float32.
        bias: (directions, 8·hidden), float32: that of the input's product, then that of the state's.

    Returns:
        (steps, batch, directions·hidden), and hidden state and cell after the last step.
    """
    outputs, states, cells = [], [], []
    for d in range(len(input_weight)):
        h, c = hidden[d], cell[d]
        projected = _product(x, input_weight[d], input_scale[d]) + bias[d].reshape(2, -1).sum(0)
        steps: list[torch.Tensor] = []
        for gates in projected.flip(0) if d else projected:
            i, o, f, g = (gates + _product(h, hidden_weight[d], hidden_scale[d])).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        outputs.append(torch.stack(steps[::-1] if d else steps))
        states.append(h)
        cells.append(c)
    return torch.cat(outputs, -1), torch.stack(states), torch.stack(cells)


@lstm_dynamic.register_fake
def _(
    x: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    input_weight: torch.Tensor,
    input_scale: torch.Tensor,
    hidden_weight: torch.Tensor,
    hidden_scale: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = hidden_weight.shape[0] * hidden_weight.shape[1]
    state = (hidden_weight.shape[0], x.shape[1], hidden_weight.shape[1])
    return x.new_empty((x.shape[0], x.shape[1], width)), x.new_empty(state), x.new_empty(state)


STATE_SCALE, STATE_ZERO = 1 / 127, 128
"""The grid of a hidden state between steps, which lies between -1 and 1 and needs no calibration."""


@torch.library.custom_op("penjing::lstm_static", mutates_args=())
def lstm_static(
    x: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    input_weight: torch.Tensor,
    hidden_weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    state_scale: torch.Tensor,
    state_zero: torch.Tensor,
    ratio: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute an LSTM layer with integer products; input and hidden state share one fixed grid.

    The order of gates is input, output, forget, cell; sums and gates are float32.

    Args:
        x: (steps, batch, in), float32.
        hidden: (directions, batch, hidden), float32, the state before the first step.
        cell: The same of the cell.
        input_weight: (directions·4·hidden, in), int8; the second direction reads from the end.
        hidden_weight: (directions·4·hidden, hidden), int8.
        scale: (directions·4·hidden,), float32, per row of both matrices.
        bias: (directions, 8·hidden), float32: that of the input's product, then that of the state's.
        state_scale: (), float32, of the hidden state and of the input times `ratio`.
        state_zero: (), uint8.
        ratio: Factor that the input is multiplied by.

    Returns:
        (steps, batch, directions·hidden), and hidden state and cell after the last step.
    """

    def on_grid(value: torch.Tensor) -> torch.Tensor:
        # In double precision, where every sum of integers is exact.
        return (integers(value, state_scale, state_zero.to(torch.int32), UNSIGNED) - state_zero.float()).double()

    directions = len(hidden)
    quantized, outputs, states, cells = on_grid(x if ratio == 1 else x * ratio), [], [], []
    parts = [t.chunk(directions) for t in (input_weight.double(), hidden_weight.double(), state_scale * scale)]
    for d, (read, own, step) in enumerate(zip(*parts, strict=True)):
        h, c = on_grid(hidden[d]), cell[d]
        offset = bias[d].reshape(2, -1).sum(0)
        steps: list[torch.Tensor] = []
        for now in quantized.flip(0) if d else quantized:
            i, o, f, g = ((now @ read.T + h @ own.T).to(torch.float32) * step + offset).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = on_grid(o.sigmoid() * c.tanh())
            steps.append(h.to(torch.float32) * state_scale)
        outputs.append(torch.stack(steps[::-1] if d else steps))
        states.append(steps[-1])
        cells.append(c)
    return torch.cat(outputs, -1), torch.stack(states), torch.stack(cells)


@lstm_static.register_fake
def _(
    x: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    input_weight: torch.Tensor,
    hidden_weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    state_scale: torch.Tensor,
    state_zero: torch.Tensor,
    ratio: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    directions, width = hidden.shape[0], hidden_weight.shape[1]
    state = (directions, x.shape[1], width)
    return x.new_empty((x.shape[0], x.shape[1], directions * width)), x.new_empty(state), x.new_empty(state)


def _product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Integer product of x (…, in), quantized by its own range, and weight (in, out): (…, out), float32."""
    step, zero = measured(x, UNSIGNED)
    q = integers(x, step, zero, UNSIGNED) - zero
    # In double precision, where every sum of integers is exact.
    return (q.double() @ weight.double()).to(torch.float32) * (step * scale)
