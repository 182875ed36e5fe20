import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.numerics.grid import broadcast, integers, levels, on_grid, rows
from penjing.quantize.affine import scale_and_zero_point, weight_range
from penjing.steps.plan import LARGEST, QuantSpec, magnitudes


def additive(bits):
    """Li et al. 2020, equation 4 with k = 2, term by term: p_i is 0 or one of 2^-i, 2^-(i+n), 2^-(i+2n)."""
    n = bits // 2
    terms = [[0.0, *(2.0 ** -(i + j * n) for j in range(3))] for i in range(n)]
    return sorted({sum(picked) for picked in itertools.product(*terms)})


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_additive_powers_of_two_are_those_of_the_paper(bits):
    values = additive(bits)
    smallest = values[1]
    assert list(magnitudes("additive_powers_of_two", bits)) == [v / smallest for v in values]
    assert len(values) == 2**bits  # every code is a value of its own


@pytest.mark.parametrize(("bits", "terms"), [(3, [[0, 1, 3], [2]]), (5, [[0, 2, 5], [1, 3, 6], [4]])])
def test_with_an_odd_number_of_bits_the_last_term_has_one_bit(bits, terms):
    values = sorted({sum(p) for p in itertools.product(*([0.0, *(2.0**-e for e in term)] for term in terms))})
    assert list(magnitudes("additive_powers_of_two", bits)) == [v / values[1] for v in values]
    assert len(values) == 2**bits


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_powers_of_two_are_zero_and_every_power(bits):
    assert list(magnitudes("powers_of_two", bits)) == [0] + [2**i for i in range(2**bits - 1)]


SPECS = {
    "uniform": QuantSpec(bits=4),
    "unsigned": QuantSpec(bits=3, signed=False, symmetric=False),
    "powers": QuantSpec(bits=4, grid="powers_of_two"),
    "additive": QuantSpec(bits=4, grid="additive_powers_of_two"),
    "additive, five bits": QuantSpec(bits=5, grid="additive_powers_of_two"),
    "additive, unsigned": QuantSpec(bits=4, signed=False, grid="additive_powers_of_two"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_levels_rise_from_limit_to_limit_and_fit_eight_bits(spec):
    held = levels(spec).tolist()
    assert held == sorted(set(held)) and 0 in held
    assert (held[0], held[-1]) == spec.limits
    assert max(abs(v) for v in held) <= (LARGEST if spec.signed else 255)
    if spec.signed:
        assert held == [-v for v in reversed(held)]
    assert len(held) <= 2**spec.bits


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_value_goes_to_the_nearest_level(spec):
    zero = 2 if not spec.signed and spec.grid == "uniform" else 0
    held, scale = levels(spec).tolist(), 0.25
    x = torch.linspace(-40, 40, 4001)
    rounded = integers(x, torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32), spec).tolist()
    for value, q in zip(x.tolist(), rounded, strict=True):
        assert q in held
        exact = value / scale + zero
        assert abs(q - exact) == min(abs(h - exact) for h in held)


def groups_of(weight, axis, group):
    """Every group by itself, channel by channel, in plain Python."""
    channels = weight.movedim(axis, 0).flatten(1).tolist()
    return [c[first : first + group] for c in channels for first in range(0, len(c), group)]


@pytest.mark.parametrize(("shape", "axis", "group"), [((4, 6), 0, 3), ((4, 6), 1, 2), ((3, 4, 2, 2), 0, 8)])
def test_groups_equal_a_loop(shape, axis, group):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    spec = QuantSpec(bits=4, axis=axis, group=group)
    loop = groups_of(weight, axis, group)
    assert rows(weight, spec).tolist() == loop
    scale, zero = scale_and_zero_point(*weight_range(weight, spec), spec)
    assert len(scale) == len(loop)
    rounded = on_grid(weight, scale, zero, spec)
    assert rounded.shape == weight.shape
    by_hand = []
    for row, step in zip(loop, scale.tolist(), strict=True):
        assert step == pytest.approx(max(abs(v) for v in row) / 7, rel=1e-6)
        by_hand.append([min(max(round(v / step), -7), 7) * step for v in row])
    torch.testing.assert_close(torch.tensor(groups_of(rounded, axis, group)), torch.tensor(by_hand))


def test_finer_groups_never_round_worse():
    torch.manual_seed(1)
    weight = torch.randn(8, 32) * torch.logspace(-1, 1, 32)
    errors = []
    for group in (None, 16, 8, 4):
        spec = QuantSpec(bits=4, axis=0, group=group)
        errors.append(
            float(
                (on_grid(weight, *scale_and_zero_point(*weight_range(weight, spec), spec), spec) - weight)
                .square()
                .sum()
            )
        )
    assert errors == sorted(errors, reverse=True)


def test_one_scale_has_no_axis_and_many_stand_on_theirs():
    x = torch.zeros(2, 3, 4)
    assert broadcast(torch.ones(1), x, QuantSpec(axis=1)).shape == ()
    assert broadcast(torch.ones(3), x, QuantSpec(axis=1)).shape == (1, 3, 1)
    assert broadcast(torch.ones(4), x, QuantSpec(axis=2)).shape == (1, 1, 4)
    spread = broadcast(torch.tensor([1.0, 2, 3, 4]), torch.zeros(2, 6), QuantSpec(axis=0, group=3))
    assert spread.tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]


ANY = st.builds(
    lambda bits, format, grid, group, axis: QuantSpec(
        bits=bits, signed=format != "u", symmetric=format == "s", grid=grid, group=group, axis=axis
    ),
    st.integers(2, 8),
    st.sampled_from(["u", "s", "a"]),
    st.just("uniform"),
    st.sampled_from([None, 2]),
    st.sampled_from([0, 1]),
) | st.builds(
    lambda bits, grid, group: QuantSpec(bits=bits, grid=grid, group=group, axis=0),
    st.integers(2, 4),
    st.sampled_from(["powers_of_two", "additive_powers_of_two"]),
    st.sampled_from([None, 2]),
)


@settings(max_examples=150, deadline=None)
@given(ANY, st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_on_grid_is_what_integers_mean_to_the_bit(spec, seed, size):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) * size
    given_ = x.clone()
    values = rows(x, spec)
    scale, zero = scale_and_zero_point(values.amin(1), values.amax(1), spec)
    q = integers(x, scale, zero, spec)
    assert torch.equal(q, q.round()) and spec.limits[0] <= q.min() and q.max() <= spec.limits[1]
    meant = (q - broadcast(zero, x, spec)) * broadcast(scale, x, spec)
    assert torch.equal(on_grid(x, scale, zero, spec), meant)
    assert torch.equal(integers(meant, scale, zero, spec), q)  # what is rounded stays
    assert torch.equal(x, given_)


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e3, 0), st.floats(1e-3, 1e3), st.booleans(), st.integers(2, 8))
def test_scales_that_a_shift_multiplies_by_are_the_next_power_of_two(low, high, signed, bits):
    spec = QuantSpec(bits=bits, signed=signed, symmetric=signed, scale="power_of_two")
    free = QuantSpec(bits=bits, signed=signed, symmetric=signed)
    ends = torch.tensor([low]), torch.tensor([high])
    (scale,) = scale_and_zero_point(*ends, spec)[0].tolist()
    (smallest,) = scale_and_zero_point(*ends, free)[0].tolist()
    assert math.frexp(scale)[0] == 0.5  # a power of two
    assert smallest * (1 - 1e-5) <= scale < 2 * smallest
