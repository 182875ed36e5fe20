import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.errors import RecipeError
from penjing.quantize.affine import scale_and_zero_point
from penjing.quantize.histogram import Histogram
from penjing.quantize.ranges import ESTIMATORS, PERCENTILE, UNSEEN, estimate
from penjing.steps.plan import QuantSpec
from tests.raises import raises_case

UNSIGNED = {"signed": False, "symmetric": False}


def histogram_of(*batches, bins=256):
    histogram = Histogram(bins)
    for batch in batches:
        histogram.update(torch.as_tensor(batch))
    return histogram


def squared_error(histogram, low, high, spec):
    """Of the histogram's own data, every bin for itself, in plain Python."""
    scale, zero = (v.item() for v in scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), spec))
    smallest, largest = spec.limits
    total = 0.0
    for center, count in zip(histogram.centers.tolist(), histogram.counts.tolist(), strict=True):
        if count:
            q = min(max(round(center / scale) + zero, smallest), largest)
            total += count * ((q - zero) * scale - center) ** 2
    return total


SPECS = st.builds(
    lambda bits, format: QuantSpec(bits=bits, signed=format != "u", symmetric=format == "s"),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["u", "s", "a"]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=30), SPECS)
def test_the_smallest_error_is_never_above_that_of_the_extremes(values, spec):
    histogram = histogram_of(values)
    smallest = squared_error(histogram, *ESTIMATORS["mse"](histogram, spec), spec)
    extremes = squared_error(histogram, *ESTIMATORS["minmax"](histogram, spec), spec)
    assert smallest <= extremes * (1 + 1e-6) + 1e-12


def test_it_cuts_an_outlier_at_four_bits():
    torch.manual_seed(0)
    histogram = histogram_of(torch.cat([torch.randn(20_000), torch.tensor([40.0])]))
    spec = QuantSpec(bits=4)
    low, high = ESTIMATORS["mse"](histogram, spec)
    assert -8 < low < 0 < high < 8
    assert squared_error(histogram, low, high, spec) < 0.2 * squared_error(histogram, -40.0, 40.0, spec)


def test_it_cuts_the_end_that_has_the_outlier():
    torch.manual_seed(0)
    histogram = histogram_of(torch.cat([torch.rand(20_000) * 3 - 1, torch.tensor([60.0])]))
    spec = QuantSpec(bits=4, **UNSIGNED)
    low, high = ESTIMATORS["mse"](histogram, spec)
    best = min(
        squared_error(histogram, -1.0 * a, 60.0 * b, spec)
        for a in torch.linspace(1, 0.1, 8).tolist()
        for b in torch.linspace(1, 0.01, 40).tolist()
    )
    assert squared_error(histogram, low, high, spec) <= 1.1 * best


def test_extremes_are_those_of_all_batches():
    histogram = histogram_of([1.0, 5.0], [-2.0, 3.0])
    assert ESTIMATORS["minmax"](histogram, QuantSpec()) == (-2.0, 5.0)


def test_the_moving_average_forgets_a_first_outlier():
    histogram = histogram_of([0.0, 100.0], *[[0.0, 1.0]] * 60)
    low, high = ESTIMATORS["moving_average"](histogram, QuantSpec())
    assert low == 0.0
    assert high == pytest.approx(1 + 99 * 0.9**60)


@pytest.mark.parametrize("seed", range(3))
def test_a_percentile_agrees_with_sorting_all_values(seed):
    x = torch.randn(60_000, generator=torch.Generator().manual_seed(seed)).exp()
    histogram = histogram_of(x, bins=8192)
    low, high = ESTIMATORS["percentile"](histogram, QuantSpec())
    tail = (1 - PERCENTILE / 100) / 2
    ordered = x.sort().values.tolist()
    width = 2 * histogram.limit / 8192
    assert low == pytest.approx(ordered[int(tail * len(ordered))], abs=2 * width)
    assert high == pytest.approx(ordered[-1 - int(tail * len(ordered))], abs=2 * width)
    assert float((x > high).float().mean()) <= tail + 2e-4
    assert high < float(x.max())


def entropy_by_hand(histogram, spec, candidates=128):
    """The threshold whose cut histogram, told in as many steps as there are integers, loses least; plain Python."""
    counts = histogram.counts.tolist()
    half = len(counts) // 2
    magnitudes = [counts[half + i] + counts[half - 1 - i] for i in range(half)]
    if magnitudes[0] > sum(magnitudes[1:]):
        magnitudes[0] = magnitudes[1]
    top = max(i for i, count in enumerate(magnitudes) if count) + 1
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    smallest, largest = spec.limits
    both_sides = low < 0 < high
    levels = largest if spec.signed else (largest - smallest) // (2 if both_sides else 1)
    best, threshold = math.inf, max(-low, high)
    for end in sorted({int(e) for e in torch.linspace(max(levels, top // 8), top, candidates).tolist()}):
        steps = {}
        for i in range(end):
            steps.setdefault(i * levels // end, []).append(i)
        p = magnitudes[:end]
        q = [0.0] * end
        for bins in steps.values():
            used = [i for i in bins if p[i]]
            for i in used:
                q[i] = sum(p[j] for j in used) / len(used)
        p[-1] += sum(magnitudes[end:])
        if p[-1] and not q[-1]:
            q[-1] = UNSEEN
        told = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True) if a and b)
        if told < best - 1e-12:
            best, threshold = told, min(max(-low, high), end * histogram.limit / half)
    return max(low, -threshold), min(high, threshold)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kind", ["both sides", "relu", "outlier"])
def test_entropy_agrees_with_a_loop(kind, bits, signed):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(5))
    x = {"both sides": x, "relu": x.relu(), "outlier": torch.cat([x, torch.tensor([9.0])])}[kind]
    histogram = histogram_of(x, bins=512)
    spec = QuantSpec(bits=bits, signed=signed, symmetric=signed)
    before = histogram.counts.clone()
    assert ESTIMATORS["entropy"](histogram, spec) == pytest.approx(entropy_by_hand(histogram, spec))
    assert torch.equal(histogram.counts, before)


def test_entropy_cuts_an_outlier_and_hardly_anything_else():
    torch.manual_seed(0)
    histogram = histogram_of(torch.cat([torch.randn(20_000), torch.tensor([40.0])]), bins=8192)
    low, high = ESTIMATORS["entropy"](histogram, QuantSpec(bits=8, **UNSIGNED))
    assert 2 < high < 8
    assert low == pytest.approx(max(histogram.low, -high))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), SPECS)
def test_entropy_stays_within_the_extremes_and_zero(values, spec):
    histogram = histogram_of(values)
    low, high = ESTIMATORS["entropy"](histogram, spec)
    assert min(histogram.low, 0.0) <= low <= 0 <= high <= max(histogram.high, 0.0)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_value_that_never_changes_is_kept(name, value):
    histogram = histogram_of([value] * 10, [value] * 10)
    spec = QuantSpec(range=name, **UNSIGNED)
    low, high = estimate(histogram, spec)
    scale, zero = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), spec)
    q = torch.clamp(torch.round(value / scale) + zero, 0, 255)
    assert float((q - zero) * scale) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_ranges_lie_within_the_extremes(name):
    torch.manual_seed(1)
    histogram = histogram_of(*[torch.randn(500) for _ in range(4)])
    low, high = estimate(histogram, QuantSpec(range=name, **UNSIGNED))
    assert histogram.low <= low < high <= histogram.high


def test_an_unknown_estimator_is_named_with_those_that_exist():
    with raises_case(RecipeError, "estimator") as caught:
        estimate(histogram_of([1.0]), QuantSpec(range="magic"))
    assert caught.value.got == "magic"
    assert "percentile" in caught.value.expected


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_value_that_is_zero_everywhere_has_a_range_that_runtimes_take(name):
    spec = QuantSpec(bits=8, range=name, **UNSIGNED)
    assert estimate(histogram_of(torch.zeros(10), torch.zeros(10)), spec) == (0.0, 1.0)
