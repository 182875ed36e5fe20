"""What is told of a request before anything is computed."""

import pytest

from penjing.goals.goal import Goal
from penjing.pipeline.request import small_drop


@pytest.mark.parametrize("metric", [93.1, -40.0])
def test_a_drop_in_hundredths_of_a_metric_in_points_is_told_and_the_remedies_parse(metric):
    text = small_drop(Goal.parse("drop<=1%"), metric)
    assert "0.01" in text
    assert "relative_drop<=1%" in text and Goal.parse("relative_drop<=1%").max_relative_drop == 0.01
    assert "drop<=1 " in text and Goal.parse("drop<=1").max_drop == 1.0
    assert small_drop(Goal.parse("relative_drop<=1%"), metric) is None
    assert small_drop(Goal.parse("drop<=1"), metric) is None


@pytest.mark.parametrize("metric", [0.93, 1.2, None])
def test_of_a_fraction_nothing_is_said(metric):
    assert small_drop(Goal.parse("drop<=1%"), metric) is None
