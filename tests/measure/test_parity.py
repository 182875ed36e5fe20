import math
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from penjing.errors import ArtifactError, TaskError
from penjing.measure.parity import IDENTICAL_DB, parity
from penjing.records import to_json
from tests.raises import raises_case

VALUES = st.floats(-1e4, 1e4, width=32)


@st.composite
def runs(draw):
    """Batches of two outputs, (n, classes) and (n, 2, 2), of a reference and of a candidate."""
    classes = draw(st.integers(1, 4))
    sides = ([], [])
    for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        for side in sides:
            side.append([draw(hnp.arrays(np.float32, s, elements=VALUES)) for s in ((n, classes), (n, 2, 2))])
    return sides


def slow(reference, candidate):
    """The same figures by the plainest loop."""
    differences, signal, agreed, samples = [], 0.0, 0, 0
    for outputs_r, outputs_c in zip(reference, candidate, strict=True):
        for r, c in zip(outputs_r, outputs_c, strict=True):
            for x, y in zip(r.ravel().tolist(), c.ravel().tolist(), strict=True):
                differences.append(abs(x - y))
                signal += x * x
        for row_r, row_c in zip(outputs_r[0].tolist(), outputs_c[0].tolist(), strict=True):
            samples += 1
            agreed += row_r.index(max(row_r)) == row_c.index(max(row_c))
    noise = sum(d * d for d in differences)
    if noise == 0:
        snr = IDENTICAL_DB
    elif signal == 0:
        snr = -IDENTICAL_DB
    else:
        snr = min(IDENTICAL_DB, max(-IDENTICAL_DB, 10 * math.log10(signal) - 10 * math.log10(noise)))
    return max(differences), sum(differences) / len(differences), snr, agreed / samples, samples


@settings(max_examples=60, deadline=None)
@given(runs())
def test_figures_equal_those_of_a_slow_loop(sides):
    reference, candidate = sides
    result = parity(iter(reference), iter(candidate), "planned")
    largest, mean, snr, agreement, samples = slow(reference, candidate)
    assert result.against == "planned"
    assert result.largest == largest
    assert result.mean == pytest.approx(mean)
    assert result.snr_db == pytest.approx(snr)
    assert result.samples == samples
    assert result.agreement == (agreement if reference[0][0].shape[1] > 1 else None)


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(np.float32, (12, 3), elements=VALUES), st.integers(1, 11))
def test_batching_does_not_matter(reference, cut):
    candidate = reference + np.linspace(-1, 1, 36, dtype=np.float32).reshape(12, 3)
    whole = parity([[reference]], [[candidate]], "source")
    parts = parity([[reference[:cut]], [reference[cut:]]], [[candidate[:cut]], [candidate[cut:]]], "source")
    assert (parts.largest, parts.agreement, parts.samples) == (whole.largest, whole.agreement, 12)
    assert parts.mean == pytest.approx(whole.mean)
    assert parts.snr_db == pytest.approx(whole.snr_db)


def test_known_figures():
    reference = [[np.float32([[3.0, 4.0], [0.0, 0.0]])]]
    candidate = [[np.float32([[3.0, 4.5], [0.0, 0.0]])]]
    result = parity(reference, candidate, "source")
    assert (result.largest, result.mean, result.agreement) == (0.5, 0.125, 1.0)
    assert result.snr_db == pytest.approx(20.0)  # 25 over 0.25


def test_equal_outputs_give_a_number_that_json_can_hold():
    outputs = [[np.zeros((2, 3), np.float32)]]
    result = parity(outputs, outputs, "planned")
    assert (result.largest, result.mean, result.snr_db, result.agreement) == (0.0, 0.0, IDENTICAL_DB, 1.0)
    assert '"snr_db": 200.0' in to_json(result)
    assert parity(outputs, [[np.ones((2, 3), np.float32)]], "planned").snr_db == -IDENTICAL_DB


def test_integer_outputs_count_only_where_there_is_no_other():
    labels, scores = np.array([1, 2]), np.float32([[0.0, 1.0], [1.0, 0.0]])
    result = parity([[labels, scores]], [[labels + 100, scores]], "planned")
    assert (result.largest, result.agreement, result.samples) == (0.0, 1.0, 2)
    result = parity([[labels]], [[labels + 100]], "planned")
    assert (result.largest, result.agreement, result.samples) == (100.0, None, 2)


@pytest.mark.parametrize("shape", [(), (4,), (4, 1), (2, 3, 5)])
def test_outputs_without_classes_have_no_agreement(shape):
    result = parity([[np.ones(shape, np.float32)]], [[np.ones(shape, np.float32)]], "planned")
    assert result.agreement is None
    assert result.samples == (shape[0] if shape else 1)


def test_half_precision_is_compared_in_full():
    reference = [[np.float32([[60000.0, 1.0]])]]
    candidate = [[np.float16([[60000.0, 1.0]])]]
    assert parity(reference, candidate, "planned").largest == 0.0
    result = parity([[np.float16([[60000.0, -60000.0]])]], [[np.float16([[-60000.0, 60000.0]])]], "planned")
    assert result.largest == 120000.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_on_one_side_alone_leaves_no_signal(bad):
    reference = [np.ones((2, 2), np.float32), np.ones((2, 3), np.float32)]
    candidate = [reference[0], np.float32([[1, 1, 1], [1, bad, 1]])]
    assert parity([reference, reference], [reference, candidate], "planned").snr_db == -IDENTICAL_DB
    assert parity([reference, candidate], [reference, reference], "planned").snr_db == -IDENTICAL_DB


def test_nan_on_both_sides_is_no_agreement():
    both = [np.float32([[np.nan, 1.0, 2.0]])]
    assert parity([both], [both], "planned").snr_db == -IDENTICAL_DB


def test_infinity_that_both_give_is_an_answer():
    reference = np.float32([[-np.inf, 1.0, 3.0]])
    result = parity([[reference]], [[np.float32([[-np.inf, 1.5, 3.0]])]], "planned")
    assert (result.largest, result.mean, result.agreement) == (0.5, 0.25, 1.0)
    assert result.snr_db == pytest.approx(10 * math.log10(10 / 0.25))
    assert parity([[reference]], [[np.float32([[np.inf, 1.0, 3.0]])]], "planned").snr_db == -IDENTICAL_DB


def test_sides_that_do_not_fit_are_refused():
    a = np.zeros((2, 2), np.float32)
    with raises_case(ArtifactError, "batches"):
        parity([[a], [a]], [[a]], "planned")
    with raises_case(ArtifactError, "batches"):
        parity([[a]], [[a], [a]], "planned")
    with raises_case(ArtifactError, "outputs"):
        parity([[a]], [[a, a]], "planned")
    with raises_case(ArtifactError, "shape"):
        parity([[a]], [[a[:1]]], "planned")
    for empty in ([], [[a[:0]]]):
        with raises_case(TaskError, "no-sample"):
            parity(empty, empty, "planned")


def test_one_batch_of_each_side_is_held():
    alive, most = set(), 0

    class Batch(np.ndarray):
        pass

    def batches():
        nonlocal most
        for _ in range(20):
            batch = np.zeros((4, 4), np.float32).view(Batch)
            key = object()
            alive.add(key)
            weakref.finalize(batch, alive.discard, key)
            most = max(most, len(alive))
            yield [batch]
            del batch

    assert parity(batches(), batches(), "planned").samples == 80
    assert most == 2
