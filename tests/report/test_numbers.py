import math

import pytest

from penjing.report import numbers
from penjing.report.arithmetic import family


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.2814, "ms", "0.281 ms"),
        (0.0042, "ms", "4.20 µs"),
        (0, "ms", "0 ms"),
        (402.0, "ms", "402 ms"),
        (12_345.0, "ms", "12.3 s"),
        (0, "bytes", "0 B"),
        (999, "bytes", "999 B"),
        (999_960, "bytes", "1.00 MB"),
        (1_121_400, "bytes", "1.12 MB"),
        (8_203_014_144, "bytes", "8.20 GB"),
        (650, "count", "650"),
        (272_186, "count", "272 k"),
        (40_813_184, "MACs", "40.8 M MACs"),
        (3559.2, "/s", "3559/s"),
        (123_456.0, "/s", "123 k/s"),
        (0.9341, "%", "93.41 %"),
        (-0.000001, "%", "0.00 %"),
        (33.84, "dB", "33.8 dB"),
        (3.14, "×", "3.1×"),
        (21.4, "×", "21×"),
        (None, "bytes", "not measured"),
        (math.inf, "dB", "infinite"),
    ],
)
def test_figure(value, unit, text):
    assert numbers.figure(value, unit) == text


def test_three_digits_are_never_further_off_than_half_a_percent():
    for exponent in range(-7, 14):
        for digits in (1.0, 1.005, 4.321, 9.9949, 9.9951, 9.999):
            value = digits * 10.0**exponent
            assert float(numbers.significant(value)) == pytest.approx(value, rel=0.005)


@pytest.mark.parametrize("name", ["accuracy", "Top-1 accuracy", "agreement with source", "F1", "mIoU", "mAP"])
def test_fractions_are_written_as_percentages(name):
    assert numbers.metric(0.934, name) == "93.40 %"
    assert numbers.drop(0.005, name) == "0.50 %"


@pytest.mark.parametrize(("name", "value"), [("perplexity", 0.934), ("mapping error", 0.934), ("accuracy", 93.4)])
def test_other_metrics_are_plain_numbers(name, value):
    assert "%" not in numbers.metric(value, name)


def test_a_headline_shows_a_difference_where_there_is_one():
    for drop in (0.0, 0.0001, 0.0004, 0.01):
        old, new = numbers.metric_pair(0.9341, 0.9341 - drop, "accuracy")
        assert (old == new) == (drop == 0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("int8", "integer"),
        ("int8-percentile", "integer"),
        ("u8", "integer"),
        ("w4a4", "integer"),
        ("bf16", "half"),
        ("f16", "half"),
        ("fp32", "float"),
        ("f32", "float"),
        ("float", "float"),
        ("fused into conv1", "unseen"),
        ("", "unseen"),
        (None, "unseen"),
    ],
)
def test_family_of_a_precision(name, kind):
    assert family(name) == kind
