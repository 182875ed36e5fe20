"""Differences by output and by columns: what hides behind what, and what is no difference at all."""

import numpy as np
import pytest

from penjing.errors import ArtifactError
from penjing.measure.columns import Columns, differences, fault, ranges, split, worst
from penjing.measure.decibels import IDENTICAL_DB
from tests.raises import raises_case

RANDOM = np.random.default_rng(0)


def boxes_and_scores(samples=8, anchors=50):
    """(samples, anchors, 6): four columns in pixels, two scores."""
    boxes = RANDOM.uniform(0, 600, (samples, anchors, 4))
    return np.concatenate([boxes, RANDOM.uniform(0, 1, (samples, anchors, 2))], -1).astype(np.float32)


def by_words(reference, candidate, parts=None):
    return {d.columns.words: d for d in differences([reference], [candidate], parts or split([reference]))}


@pytest.mark.parametrize(("turned", "axis"), [(False, "the last axis"), (True, "axis 1")])
def test_scores_do_not_hide_behind_boxes(turned, axis):
    reference = boxes_and_scores()
    candidate = reference.copy()
    candidate[..., 4:] = RANDOM.uniform(0, 1, candidate[..., 4:].shape)  # the scores are lost altogether
    if turned:
        reference, candidate = reference.transpose(0, 2, 1), candidate.transpose(0, 2, 1)
    by_columns = by_words(reference, candidate)
    assert list(by_columns) == ["", f"0-3 of {axis}", f"4-5 of {axis}"]
    assert by_columns[""].snr_db > 55
    assert by_columns[f"0-3 of {axis}"].snr_db == IDENTICAL_DB
    assert by_columns[f"4-5 of {axis}"].snr_db < 5
    assert not by_columns[f"0-3 of {axis}"].columns.smaller and by_columns[f"4-5 of {axis}"].columns.smaller


def test_columns_of_like_size_are_not_parted():
    logits = RANDOM.normal(0, 1, (32, 10)) * np.linspace(0.2, 2, 10)
    assert split([logits.astype(np.float32)]) == (Columns(0),)
    image = RANDOM.normal(0, 1, (4, 3, 16, 16)).astype(np.float32)
    assert split([image]) == (Columns(0),)


def test_columns_that_are_zero_or_next_to_nothing_are_no_group():
    values = RANDOM.normal(0, 1, (32, 4)).astype(np.float32)
    values[:, 2], values[:, 3] = 0, 1e-8
    assert split([values]) == (Columns(0),)
    assert split([np.zeros((4, 3), np.float32)]) == (Columns(0),)


def test_every_output_is_compared_apart():
    large, small = RANDOM.normal(0, 1000, (8, 4)), RANDOM.normal(0, 1, (8, 4))
    by_output = differences([large, small], [large, -small], split([large, small]))
    assert [d.snr_db for d in by_output] == [IDENTICAL_DB, pytest.approx(10 * np.log10(1 / 4))]


def test_outputs_without_axes_and_with_one():
    by_output = differences(
        [np.float32(2.0), np.ones(3)], [np.float32(1.0), np.ones(3)], split([np.float32(2), np.ones(3)])
    )
    assert by_output[0].snr_db == pytest.approx(10 * np.log10(4)) and by_output[1].snr_db == IDENTICAL_DB


@pytest.mark.parametrize(("dtype", "equal"), [(np.int64, 0.75), (bool, 0.75)])
def test_integers_and_booleans_are_equal_or_not(dtype, equal):
    reference, candidate = np.array([1, 0, 1, 0], dtype), np.array([1, 0, 1, 1], dtype)
    (difference,) = differences([reference], [candidate], split([reference]))
    assert difference.equal == equal and not difference.fault
    (difference,) = differences([np.ones((2, 2), np.float32)], [np.ones((2, 2), np.float32)], split([np.ones((2, 2))]))
    assert difference.equal is None


@pytest.mark.parametrize(
    ("reference", "candidate", "told"),
    [
        ([1.0, 2.0], [1.0, np.nan], "1 of 2 values is NaN"),
        ([1.0, 2.0], [np.inf, -np.inf], "2 of 2 values are infinite, where the torch network's are finite"),
        ([-np.inf, 2.0], [-1e4, 2.0], "1 of 2 values is finite, where the torch network's are infinite"),
        ([np.nan, 2.0], [np.nan, 2.0], "1 of 2 values is NaN, as in the torch network that it is compared with"),
        ([-np.inf, 2.0], [-np.inf, 2.5], ""),
    ],
)
def test_what_is_not_finite_on_one_side_alone_is_told(reference, candidate, told):
    reference, candidate = np.float32([reference]), np.float32([candidate])
    assert fault(reference, candidate) == told
    (difference,) = differences([reference], [candidate], split([reference]))
    assert difference.fault == told
    assert (difference.snr_db == -IDENTICAL_DB) == bool(told)


def test_what_stands_beside_a_mask_is_what_counts():
    """Scores of -1e9 where there is nothing to choose: their size would hide any noise of the others."""
    reference = RANDOM.normal(0, 1, (16, 6)).astype(np.float32)
    masked = RANDOM.random((16, 6)) < 0.3
    reference[masked] = -1e9
    candidate = np.where(masked, reference, reference + 1)
    (difference,) = differences([reference], [candidate], split([reference]))
    assert difference.snr_db < 5 and not difference.fault
    (difference,) = differences([reference], [np.where(masked, -6e4, reference)], split([reference]))
    assert difference.snr_db == IDENTICAL_DB and not difference.fault  # as good a mask
    (difference,) = differences([reference], [np.where(masked, 0, reference)], split([reference]))
    assert "masked values are not" in difference.fault


def test_a_call_of_few_samples_counts_where_it_is_much_worse():
    reference = RANDOM.normal(0, 1, (32, 4))
    noise = RANDOM.normal(0, 0.01, (32, 4))
    parts = split([reference])
    many = differences([reference], [reference + noise], parts, 32)
    scattered = differences([reference[:1]], [reference[:1] + 0.015], parts, 1)
    wrong = differences([reference[:3]], [-reference[:3]], parts, 3)
    assert worst(many, scattered) == many
    (difference,) = worst(many, wrong)
    assert difference.batch == 3 and difference.snr_db < 5
    (difference,) = worst(many, differences([reference[:1]], [np.full((1, 4), np.nan)], parts, 1))
    assert "NaN" in difference.fault and difference.batch == 1


def test_an_output_of_another_size_leaves_out_columns_that_it_has_not():
    parts = split([boxes_and_scores()])
    short = np.ones((2, 50, 3), np.float32)
    assert [d.columns.words for d in differences([short], [short], parts)] == [""]


def test_sides_that_do_not_fit_are_refused():
    one = np.zeros((2, 2), np.float32)
    with raises_case(ArtifactError, "outputs"):
        differences([one], [one, one], split([one]))
    with raises_case(ArtifactError, "shape"):
        differences([one], [one[:1]], split([one]))


def test_ranges():
    assert ranges([3, 1, 2, 9]) == "1-3, 9"
    assert ranges(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10 and 14 more"
