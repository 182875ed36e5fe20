import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from penjing.numerics.grid import on_grid
from penjing.quantize.affine import SMALLEST_SCALE, scale_and_zero_point, weight_range
from penjing.steps.plan import QuantSpec

SPECS = [
    QuantSpec(bits=bits, signed=signed, symmetric=symmetric)
    for bits in (8, 4, 2)
    for signed, symmetric in ((True, True), (True, False), (False, False))
]
NUMBERS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


def rounded(x, low, high, spec):
    scale, zero = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), spec)
    return on_grid(x, scale, zero, spec), float(scale[0]), int(zero[0])


def by_hand(x, scale, zero, low, high):
    """One number, in plain Python."""
    return (min(max(round(x / scale) + zero, low), high) - zero) * scale


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS, st.floats(0, 1), st.sampled_from(SPECS))
def test_the_error_is_at_most_half_a_step_inside_the_range(a, b, part, spec):
    low, high = min(a, b), max(a, b)
    assume(high - low > 1e-3)
    x = torch.tensor([low + part * (high - low)], dtype=torch.float64)
    y, scale, _ = rounded(x, low, high, spec)
    assert abs(float(y - x)) <= scale / 2 * (1 + 1e-5) + 1e-6 * max(abs(low), abs(high))


@settings(max_examples=100, deadline=None)
@given(NUMBERS, NUMBERS, st.sampled_from(SPECS))
def test_zero_is_kept_exactly(a, b, spec):
    y, scale, zero = rounded(torch.zeros(1), min(a, b), max(a, b), spec)
    assert float(y) == 0.0
    assert scale > 0
    assert spec.limits[0] <= zero <= spec.limits[1]


@settings(max_examples=100, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=6), NUMBERS, NUMBERS, st.sampled_from(SPECS))
def test_rounding_equals_a_loop(values, a, b, spec):
    x = torch.tensor(values, dtype=torch.float64)
    scale, zero = scale_and_zero_point(torch.tensor([min(a, b)]), torch.tensor([max(a, b)]), spec)
    y = on_grid(x, scale.double(), zero, spec)
    assert y.tolist() == [by_hand(v, float(scale), int(zero), *spec.limits) for v in x.tolist()]


@pytest.mark.parametrize("spec", SPECS)
def test_what_was_rounded_stays(spec):
    x = torch.linspace(-3, 5, 101)
    once, scale, zero = rounded(x, -3.0, 5.0, spec)
    assert torch.equal(on_grid(once, torch.tensor(scale), torch.tensor(zero), spec), once)
    assert len(once.unique()) <= spec.limits[1] - spec.limits[0] + 1


def test_a_range_that_does_not_hold_zero_is_widened_to_it():
    spec = QuantSpec(signed=False, symmetric=False)
    scale, zero = scale_and_zero_point(torch.tensor([2.0, -4.0]), torch.tensor([5.1, -1.0]), spec)
    assert scale.tolist() == pytest.approx([5.1 / 255, 4.0 / 255])
    assert zero.tolist() == [0, 255]


def test_a_range_of_nothing_but_zero_divides_safely():
    for spec in SPECS:
        y, scale, _ = rounded(torch.zeros(3), 0.0, 0.0, spec)
        assert torch.equal(y, torch.zeros(3))
        assert scale == pytest.approx(SMALLEST_SCALE)


def squared_error(weight, spec):
    scale, zero = scale_and_zero_point(*weight_range(weight, spec), spec)
    return float((on_grid(weight, scale, zero, spec) - weight).square().sum())


@pytest.mark.parametrize("axis", [0, 1])
def test_ranges_per_channel_equal_a_loop_over_channels(axis):
    weight = torch.randn(4, 3, 2, 2)
    low, high = weight_range(weight, QuantSpec(axis=axis))
    channels = [weight.select(axis, c) for c in range(weight.shape[axis])]
    assert low.tolist() == [float(c.min()) for c in channels]
    assert high.tolist() == [float(c.max()) for c in channels]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_best_range_of_a_channel_equals_an_obvious_search(bits):
    torch.manual_seed(bits)
    weight = torch.randn(3, 50) * torch.tensor([[0.1], [1.0], [20.0]])
    spec = QuantSpec(bits=bits, axis=0, range="mse")
    low, high = weight_range(weight, spec)
    smallest = {8: 0.5, 4: 0.2}.get(bits, 0.1)
    for channel in range(3):
        row = weight[channel].tolist()
        best = None
        for ratio in torch.linspace(1, smallest, 32).tolist():
            scale, zero = scale_and_zero_point(weight[channel].min() * ratio, weight[channel].max() * ratio, spec)
            error = sum((by_hand(v, float(scale), int(zero), *spec.limits) - v) ** 2 for v in row)
            best = error if best is None else min(best, error)
        scale, zero = scale_and_zero_point(low[channel], high[channel], spec)
        chosen_error = sum((by_hand(v, float(scale), int(zero), *spec.limits) - v) ** 2 for v in row)
        assert chosen_error == pytest.approx(best, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(SPECS), st.sampled_from([None, 0]))
def test_the_best_range_is_never_worse_than_the_extremes(seed, spec, axis):
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed)) ** 3
    fields = {"bits": spec.bits, "signed": spec.signed, "symmetric": spec.symmetric, "axis": axis}
    best = squared_error(weight, QuantSpec(**fields, range="mse"))
    assert best <= squared_error(weight, QuantSpec(**fields, range="minmax")) * (1 + 1e-6)


@pytest.mark.parametrize("estimator", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_scale_per_channel_loses_less_than_one_for_all(estimator, bits):
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 3, 3) * torch.logspace(-2, 1, 16).reshape(-1, 1, 1, 1)
    each = squared_error(weight, QuantSpec(bits=bits, axis=0, range=estimator))
    assert each < squared_error(weight, QuantSpec(bits=bits, axis=None, range=estimator))


def test_a_dead_channel_keeps_its_zeros():
    weight = torch.randn(3, 10)
    weight[1] = 0
    spec = QuantSpec(axis=0, range="mse")
    scale, zero = scale_and_zero_point(*weight_range(weight, spec), spec)
    y = on_grid(weight, scale, zero, spec)
    assert torch.isfinite(y).all()
    assert torch.equal(y[1], weight[1])
