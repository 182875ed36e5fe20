from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penjing.numerics import operators
from penjing.numerics.grid import on_grid
from penjing.numerics.operators import dequantize, integer_dtype, quantize
from penjing.steps.plan import QuantSpec

FORMATS = ((8, False, False), (8, True, False), (8, True, True), (4, False, False), (4, True, True))
SPECS = [QuantSpec(bits=bits, signed=signed, symmetric=symmetric) for bits, signed, symmetric in FORMATS]


def one_by_one(x, scale, zero_point, axis, low, high):
    """Every number for itself, in plain Python; halves round to even, as Python rounds them."""
    integers = torch.empty(x.shape, dtype=torch.int64)
    for place in torch.cartesian_prod(*[torch.arange(n) for n in x.shape]).reshape(-1, x.dim()).tolist():
        channel = place[axis] if len(scale) > 1 else 0
        # The quotient is one float32 division, as in the operator.
        steps = round(float(x[tuple(place)] / scale[channel])) + int(zero_point[channel])
        integers[tuple(place)] = min(max(steps, low), high)
    return integers


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-40, 40, width=32), min_size=12, max_size=12),
    st.sampled_from(SPECS),
    st.sampled_from([None, 0, 1, 2]),
    st.integers(0, 9),
)
def test_quantize_equals_a_loop_over_every_number(values, spec, axis, seed):
    spec = replace(spec, axis=axis)
    limits = spec.limits
    x = torch.tensor(values).reshape(2, 3, 2)
    generator = torch.Generator().manual_seed(seed)
    channels = 1 if axis is None else x.shape[axis]
    scale = torch.rand(channels, generator=generator) + 0.05
    zero = torch.randint(limits[0], limits[1] + 1, (channels,), generator=generator, dtype=torch.int32)
    q = quantize(x, scale, zero, axis or 0, *limits)
    expected = one_by_one(x, scale, zero, axis or 0, *limits)
    assert torch.equal(q.long(), expected)
    assert q.dtype == integer_dtype(*limits)
    back = dequantize(q, scale, zero, axis or 0)
    shape = [1] * 3
    shape[axis or 0] = channels
    assert torch.equal(back, (expected - zero.reshape(shape)).float() * scale.reshape(shape))
    assert torch.equal(back, on_grid(x, scale, zero, spec))


def test_halves_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    q = quantize(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, -127, 127)
    assert q.tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize(
    ("limits", "dtype"),
    [
        ((0, 255), torch.uint8),
        ((0, 15), torch.uint8),
        ((-128, 127), torch.int8),
        ((-7, 7), torch.int8),
        ((0, 256), torch.int32),
        ((-(2**31) + 1, 2**31 - 1), torch.int32),
    ],
)
def test_integers_take_the_smallest_type(limits, dtype):
    assert integer_dtype(*limits) == dtype


def test_a_scale_without_an_axis_may_be_a_single_number():
    x = torch.randn(3, 4)
    vector = quantize(x, torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32), 1, 0, 255)
    number = quantize(x, torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), 1, 0, 255)
    assert torch.equal(vector, number)


class Rounds(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.1, 0.2, 0.3]))
        self.register_buffer("zero", torch.tensor([0, 1, 2], dtype=torch.int32))

    def forward(self, x):
        q = torch.ops.penjing.quantize(x, self.scale, self.zero, 1, 0, 255)
        return torch.ops.penjing.dequantize(q, self.scale, self.zero, 1)


def test_operators_pass_the_checks_of_torch_and_survive_an_export():
    x = torch.rand(2, 3, 4)
    module = Rounds()
    torch.library.opcheck(operators.quantize, (x, module.scale, module.zero, 1, 0, 255))
    q = operators.quantize(x, module.scale, module.zero, 1, 0, 255)
    torch.library.opcheck(operators.dequantize, (q, module.scale, module.zero, 1))
    program = torch.export.export(module, (x,))
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert names == ["penjing.quantize.default", "penjing.dequantize.default"]
    assert torch.equal(program.module()(x), module(x))
