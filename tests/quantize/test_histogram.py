import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.errors import CalibrationError
from penjing.quantize import histogram as module
from penjing.quantize.histogram import Histogram
from tests.raises import raises_case

NUMBERS = st.floats(-1e5, 1e5, width=32)
BATCHES = st.lists(st.lists(NUMBERS, min_size=1, max_size=8), min_size=1, max_size=6)


def filled(batches, bins=64):
    histogram = Histogram(bins)
    for batch in batches:
        histogram.update(torch.tensor(batch))
    return histogram


def by_hand(values, bins, limit):
    counts = [0] * bins
    for value in values:
        width = 2 * limit / bins
        for place in range(bins):
            if place * width - limit <= value < (place + 1) * width - limit:
                counts[place] += 1
    return counts


@settings(max_examples=150, deadline=None)
@given(BATCHES, st.randoms(use_true_random=False))
def test_the_order_of_the_batches_does_not_matter(batches, random):
    shuffled = list(batches)
    random.shuffle(shuffled)
    one, other = filled(batches), filled(shuffled)
    assert one.limit == other.limit
    assert torch.equal(one.counts, other.counts)
    assert (one.low, one.high) == (other.low, other.high)


@settings(max_examples=150, deadline=None)
@given(BATCHES)
def test_growing_bin_by_bin_equals_counting_all_at_once(batches):
    values = [value for batch in batches for value in batch]
    assert torch.equal(filled(batches).counts, filled([values]).counts)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=10))
def test_counts_equal_a_loop_over_bins(values):
    histogram = filled([values], bins=16)
    assert histogram.counts.tolist() == by_hand(values, 16, histogram.limit)


@settings(max_examples=100, deadline=None)
@given(BATCHES)
def test_every_value_is_counted_and_the_extremes_are_exact(batches):
    histogram = filled(batches)
    values = [value for batch in batches for value in batch]
    assert float(histogram.counts.sum()) == len(values)
    assert (histogram.low, histogram.high) == (min(values), max(values))
    assert histogram.low >= -histogram.limit and histogram.high < histogram.limit


@pytest.mark.parametrize("value", [1.0, -1.0, 0.5, 2.0**-130, -(2.0**60), 0.0, -1e-30, -(2.0**-149)])
def test_a_value_on_the_edge_of_a_bin_stays_in_its_bin_when_the_range_grows(value):
    grown = filled([[value], [3.0], [1e6]])
    assert torch.equal(grown.counts, filled([[value, 3.0, 1e6]]).counts)


def test_zeros_first_do_not_spoil_the_bins():
    assert torch.equal(filled([[0.0] * 3, [1.0, -2.0]]).counts, filled([[0.0] * 3 + [1.0, -2.0]]).counts)


def test_memory_does_not_grow_with_the_samples():
    def footprint(histogram):
        state = vars(histogram).values()
        return sum(v.untyped_storage().nbytes() if isinstance(v, torch.Tensor) else sys.getsizeof(v) for v in state)

    torch.manual_seed(0)
    histogram = Histogram()
    for _ in range(2):
        histogram.update(torch.randn(4, 100))
    before, names = footprint(histogram), set(vars(histogram))
    for _ in range(50):
        histogram.update(torch.randn(4, 100) * 7)
    assert footprint(histogram) <= before + 8  # an integer may take another word
    assert set(vars(histogram)) == names
    assert float(histogram.counts.sum()) == 52 * 400


def test_a_large_batch_is_sampled_evenly_and_weighs_as_much_as_it_holds():
    torch.manual_seed(0)
    x = torch.randn(5 * module.SAMPLES_A_BATCH + 3)
    x[1] = 50.0  # an extreme that sampling may miss
    histogram = Histogram()
    histogram.update(x)
    assert float(histogram.counts.sum()) == pytest.approx(x.numel())
    assert histogram.high == 50.0
    mean = float((histogram.centers * histogram.counts).sum() / histogram.counts.sum())
    spread = float((histogram.centers.square() * histogram.counts).sum() / histogram.counts.sum()) ** 0.5
    assert mean == pytest.approx(0, abs=0.02)
    assert spread == pytest.approx(1, abs=0.02)


def test_sampling_is_not_in_step_with_the_channels():
    x = torch.zeros(4 * module.SAMPLES_A_BATCH // 64, 64)
    x[:, 0] = 1.0  # one channel of 64
    histogram = Histogram()
    histogram.update(x)
    ones = float(histogram.counts[len(histogram.counts) // 2 + 1 :].sum())
    assert ones / x.numel() == pytest.approx(1 / 64, rel=0.05)


def test_moving_extremes_follow_their_formula():
    histogram = Histogram()
    expected = None
    for low, high in ((-1.0, 2.0), (-3.0, 1.0), (0.0, 8.0)):
        histogram.update(torch.tensor([low, high]))
        expected = (low, high) if expected is None else (0.9 * expected[0] + 0.1 * low, 0.9 * expected[1] + 0.1 * high)
    assert (histogram.moving_low, histogram.moving_high) == pytest.approx(expected)


def test_a_batch_in_parts_moves_the_extremes_once_and_counts_as_much():
    torch.manual_seed(0)
    batches = [torch.randn(6, 40) * size for size in (1, 5, 2)]
    whole, parts = Histogram(), Histogram()
    for batch in batches:
        whole.update(batch)
        for i, part in enumerate(batch.split(2)):
            parts.update(part, share=1 / 3, more=i > 0)
    assert (parts.moving_low, parts.moving_high) == pytest.approx((whole.moving_low, whole.moving_high))
    assert torch.equal(parts.counts, whole.counts)


def test_channels_last_counts_the_same_values_and_is_not_in_step_with_the_channels():
    x = torch.zeros(2, 3, 256, 256)
    x[:, 0] = 1.0
    histogram = Histogram()
    histogram.update(x.contiguous(memory_format=torch.channels_last))
    ones = float(histogram.counts[len(histogram.counts) // 2 + 1 :].sum())
    assert ones / x.numel() == pytest.approx(1 / 3, rel=0.05)
    few = torch.randn(2, 3, 8, 8)
    one, other = Histogram(), Histogram()
    one.update(few)
    other.update(few.contiguous(memory_format=torch.channels_last))
    assert torch.equal(one.counts, other.counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_number_types_count_as_well(dtype):
    histogram = Histogram(16)
    histogram.update(torch.tensor([[-2, 0], [1, 3]], dtype=dtype))
    assert histogram.counts.tolist() == by_hand([-2, 0, 1, 3], 16, 4.0)


def test_centers_lie_in_their_bins_and_within_the_extremes():
    histogram = filled([[-1.0, 0.2, 3.0]], bins=8)
    assert histogram.limit == 4.0
    assert histogram.centers.tolist() == [-1.0, -1.0, -1.0, -0.5, 0.5, 1.5, 2.5, 3.0]


def test_an_empty_batch_changes_nothing():
    histogram = filled([[1.0]])
    histogram.update(torch.zeros(0, 3))
    assert histogram.batch == (1.0, 1.0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_are_refused(bad):
    with raises_case(CalibrationError, "not-finite") as caught:
        Histogram().update(torch.tensor([1.0, bad]))
    assert "exclude" in caught.value.remedy
