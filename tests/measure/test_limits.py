"""The judgement of differences: what is rejected, what is told, and what no artifact can do better."""

import dataclasses

import numpy as np
import pytest

from penjing.measure import differences, limits, split
from penjing.records import Parity

RANDOM = np.random.default_rng(1)
REFERENCE = RANDOM.normal(0, 1, (32, 6))


def at(snr_db, reference=REFERENCE):
    """The reference with noise of so many dB."""
    noise = RANDOM.normal(0, 1, reference.shape)
    return reference + noise * np.sqrt((reference**2).sum() / (noise**2).sum()) * 10 ** (-snr_db / 20)


def judged(precision, candidate, reference=REFERENCE, itself=None):
    """`itself`: what the torch network answers where its values are off by rounding."""

    def elsewhere(rounding):
        assert rounding == limits.LIMITS[precision].rounding
        return [differences([reference], [itself], split([reference]))]

    measured = differences([reference], [candidate], split([reference]), 32)
    rows = limits.judged(measured, ["logits"], precision, None if itself is None else elsewhere)
    parity = Parity(against="planned", largest=1, mean=1, snr_db=1, agreement=None, samples=32, rows=rows)
    return rows, limits.rejection([parity])


@pytest.mark.parametrize("precision", list(limits.LIMITS))
def test_every_precision_has_a_limit_that_is_shown_beside_the_figure(precision):
    limit = limits.LIMITS[precision].snr_db
    rows, rejection = judged(precision, at(limit + 1))
    assert rejection is None and rows[0].limit_db == limit and rows[0].holds
    rows, rejection = judged(precision, at(limit - 1))
    assert rejection.output == "logits" and rejection.limit_db == limit
    assert rejection.snr_db == pytest.approx(limit - 1)
    assert f"{limit - 1:.1f} dB is below the limit of {limit:.0f} dB" in rejection.reason


def test_the_limits_are_those_that_were_agreed():
    assert limits.of("fp32").snr_db == 60
    assert (limits.of("int8").snr_db, limits.of("int8").told_db) == (30, 40)
    assert limits.SOURCE_TOLD_DB == 15
    assert limits.of("int8-bf16").snr_db == limits.of("bf16").snr_db


def test_a_runtime_that_rounds_more_is_judged_beside_that():
    asked = []

    def elsewhere(rounding):
        asked.append(rounding)
        return [differences([REFERENCE], [at(20)], split([REFERENCE]))]

    measured = differences([REFERENCE], [at(25)], split([REFERENCE]), 32)
    for rounding, expected in ((2.0**-18, 2.0**-18), (2.0**-30, limits.of("int8").rounding)):
        [row] = limits.judged(measured, ["y"], "int8", elsewhere, rounding=rounding)
        assert row.holds and row.why and asked[-1] == expected


def test_a_comparison_with_the_source_is_told_alone():
    measured = differences([REFERENCE], [-REFERENCE], split([REFERENCE]), 32)
    rows = limits.told(measured, ["logits"])
    parity = Parity(against="source", largest=1, mean=1, snr_db=1, agreement=None, samples=32, rows=rows)
    assert limits.rejection([parity]) is None and rows[0].limit_db is None
    infinite = np.full_like(REFERENCE, np.inf)  # which the plan gives too
    rows = limits.told(differences([REFERENCE], [infinite], split([REFERENCE]), 32), ["logits"])
    rejection = limits.rejection([dataclasses.replace(parity, rows=rows)])
    assert "infinite, where the torch network's are finite against the source network" in rejection.reason


def test_nan_is_a_reason_in_every_precision():
    candidate = REFERENCE.copy()
    candidate[3, 2] = np.nan
    _, rejection = judged("bf16", candidate)
    assert "1 of 192 values is NaN" in rejection.reason and rejection.snr_db is None


def test_integers_that_differ_are_a_reason():
    labels = np.arange(100)
    _, rejection = judged("fp32", np.where(labels < 5, labels + 1, labels), labels)
    assert "95.0% of the values are equal, at least 99% have to be" in rejection.reason
    rows, rejection = judged("int8", np.where(labels < 5, labels + 1, labels), labels)
    assert rejection is None and rows[0].equal == 0.95


@pytest.mark.parametrize("precision", list(limits.LIMITS))
def test_what_the_network_does_not_keep_of_itself_is_asked_of_no_artifact(precision):
    strict = limits.LIMITS[precision].snr_db
    rows, rejection = judged(precision, at(strict - 9), itself=at(strict - 7))  # 3 dB are spare
    assert rejection is None and rows[0].limit_db == pytest.approx(strict - 10, abs=0.02)
    assert f"torch itself keeps {strict - 7:.0f} dB here" in rows[0].why
    _, rejection = judged(precision, at(strict - 11), itself=at(strict - 7))
    assert rejection.limit_db == pytest.approx(strict - 10, abs=0.02)
    _, rejection = judged(precision, at(strict - 1), itself=at(strict + 9))
    assert rejection.limit_db == strict


def test_the_strict_limit_stays_where_it_holds():
    rows = limits.judged(
        differences([REFERENCE], [at(31)], split([REFERENCE])), ["a"], "int8", lambda _: pytest.fail("not asked for")
    )
    assert rows[0].limit_db == 30 and not rows[0].why


@pytest.mark.parametrize(
    ("tries_db", "above_db", "taken", "limit_db"),
    [
        ((25, 20, 23), 23, 1, 22),  # 3 dB are spare, and it exceeds the limit by 1
        ((25, 20, 23), 22.5, 2, 17),  # closer to the first limit: the second try is worse, and far from it
        ((25, 25, 25), 22.5, 3, 22),  # closer to all of them, and holds
        ((28, 27, 26), 20, 3, 23),  # below all of them
    ],
)
def test_further_tries_are_taken_until_the_artifact_is_clear_of_the_limit(tries_db, above_db, taken, limit_db):
    tries = iter([differences([REFERENCE], [at(db)], split([REFERENCE])) for db in tries_db])
    rows = limits.judged(
        differences([REFERENCE], [at(above_db + 0.01)], split([REFERENCE])), ["a"], "int8", lambda _: tries
    )
    assert rows[0].limit_db == pytest.approx(limit_db, abs=0.05)
    assert len(list(tries)) == len(tries_db) - taken


@pytest.mark.parametrize(
    ("few_db", "above_db", "taken", "limit_db"),
    [
        (25, 23, 0, 22),  # clear of the limit of a few samples
        (20, 22.5, 0, 17),  # further away
        (25, 22.5, 1, 19),  # too close to it: the few samples count no more
        (28, 17, 2, 17),
    ],
)
def test_a_few_samples_suffice_where_the_artifact_is_clear_of_their_limit(few_db, above_db, taken, limit_db):
    few, *rest = ([differences([REFERENCE], [at(db)], split([REFERENCE]))][0] for db in (few_db, 22, 20))
    tries = iter(rest)
    rows = limits.judged(
        differences([REFERENCE], [at(above_db + 0.01)], split([REFERENCE])), ["a"], "int8", lambda _: tries,
        few=lambda rounding: few,
    )  # fmt: skip
    assert rows[0].limit_db == pytest.approx(limit_db, abs=0.05)
    assert len(list(tries)) == len(rest) - taken


def test_a_network_that_keeps_nothing_of_itself_is_no_excuse():
    rows, rejection = judged("int8", at(limits.LEAST_DB + 0.5), itself=at(3))
    assert rejection is None and rows[0].limit_db == pytest.approx(limits.LEAST_DB)
    _, rejection = judged("int8", at(limits.LEAST_DB - 0.5), itself=at(3))
    assert rejection.limit_db == pytest.approx(limits.LEAST_DB)


def test_columns_have_their_own_limit():
    reference = np.concatenate([REFERENCE * 1000, REFERENCE[:, :2]], -1)

    def with_scores(snr_db):
        return np.concatenate([reference[:, :6], at(snr_db, reference[:, 6:])], -1)

    rows, rejection = judged("int8", with_scores(20), reference, with_scores(22))
    assert rejection is None and rows[0].limit_db == 30
    assert rows[2].columns == "6-7 of the last axis" and rows[2].limit_db == pytest.approx(19, abs=0.1)
    _, rejection = judged("int8", with_scores(17), reference, with_scores(22))
    assert rejection.output == "logits, columns 6-7 of the last axis"


def test_an_output_that_is_zero_may_be_off_by_nothing_that_counts():
    zero = np.zeros((32, 3))
    parts = split([REFERENCE, zero])

    def rows(off):
        return limits.judged(differences([REFERENCE, zero], [REFERENCE, zero + off], parts), ["a", "b"], "fp32")

    assert all(row.holds for row in rows(0.0)) and all(row.holds for row in rows(1e-8))
    assert not rows(1e-3)[1].holds


def test_the_worst_row_is_the_one_furthest_below_its_limit():
    reference = [REFERENCE, REFERENCE]
    rows = limits.judged(differences(reference, [at(50), at(20)], split(reference), 3), ["a", "b"], "fp32")
    parity = Parity(against="planned", largest=1, mean=1, snr_db=1, agreement=None, samples=32, rows=rows)
    assert parity.worst.output == "b"
    assert limits.rejection([parity]).reason.endswith("computed in torch, in a call of 3")


def test_behind_a_selection_rows_may_trade_places_as_torch_itself_trades_them():
    """A floor of 0 dB in the place of 15: 9 dB pass where torch keeps 9 dB with rounding errors, and 2 dB do not."""
    reference = [REFERENCE]

    def rejected(snr_db, **more):
        measured = differences(reference, [at(snr_db)], split(reference), 32)
        itself = differences(reference, [at(9)], split(reference))
        rows = limits.judged(measured, ["boxes"], "int8", lambda rounding: [itself], **more)
        return not all(row.holds for row in rows)

    assert rejected(9)
    assert not rejected(9, least_db=limits.SELECTED_DB)
    assert rejected(2, least_db=limits.SELECTED_DB)
