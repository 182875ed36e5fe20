from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.records import GoalResult, Parity
from penjing.report import labels, scatter
from penjing.report.axis import Axis
from tests.report import sample_records


def bubble(plot, name):
    return next(b for b in plot.bubbles if b.name == name)


def no_overlaps(plot):
    named = [b for b in plot.bubbles if b.label]
    boxes = [b.label.box for b in named] + [limit.label.box for limit in plot.limits]
    assert not any(labels.overlap(a, b) for a, b in combinations(boxes, 2))
    for box in boxes[: len(named)]:
        assert plot.left <= box[0] and box[2] <= plot.right and 0 <= box[1] and box[3] <= plot.bottom


@pytest.mark.parametrize("size", [(1000, 460), (350, 400)])
def test_faster_is_further_left_and_better_further_up(size):
    plot = scatter.plot(sample_records.big(), *size)
    assert bubble(plot, "openvino-int8").x < bubble(plot, "onnxruntime-fp32").x < bubble(plot, "source").x
    assert (
        bubble(plot, "openvino-fp32").y < bubble(plot, "openvino-int8").y < bubble(plot, "openvino-int8-percentile").y
    )
    no_overlaps(plot)
    lower_is_better = scatter.plot(sample_records.deep(), *size)
    assert bubble(lower_is_better, "onnxruntime-fp32").y < bubble(lower_is_better, "openvino-int8").y
    assert lower_is_better.x.log


def test_area_is_proportional_to_size():
    plot = scatter.plot(sample_records.deep())
    small, large = bubble(plot, "openvino-int8"), bubble(plot, "openvino-bf16")
    assert (large.radius / small.radius) ** 2 == pytest.approx(352_000_000 / 91_000_000, rel=0.02)


def test_the_front_only_falls_and_joins_only_pareto_members():
    plot = scatter.plot(sample_records.big())
    members = {(b.x, b.y) for b in plot.bubbles if b.pareto}
    assert set(plot.front) <= members and len(plot.front) == 4
    assert all(a[0] <= b[0] and a[1] > b[1] for a, b in zip(plot.front, plot.front[1:], strict=False))


def test_the_source_and_its_limits_stand_where_the_candidates_were_compared():
    plot = scatter.plot(replace(sample_records.big(), selected=0.91))
    assert bubble(plot, "source").y == pytest.approx(plot.y.at(0.91), abs=0.1)
    assert plot.limits[0].text == "drop ≤ 0.5 %"
    assert plot.limits[0].at == pytest.approx(plot.y.at(0.91 - 0.005), abs=0.1)


def test_limits_of_the_goal_stand_where_their_values_are():
    plot = scatter.plot(sample_records.deep())
    across = {limit.text: limit for limit in plot.limits}
    assert across["latency_ms ≤ 50"].at == pytest.approx(plot.x.at(50), abs=0.1)
    assert across["drop ≤ 50 %"].at == pytest.approx(plot.y.at(31.6 + 0.5), abs=0.1)
    percent = scatter.plot(sample_records.big()).limits[0]
    assert not percent.vertical and percent.text == "drop ≤ 0.5 %"
    assert percent.at == pytest.approx(scatter.plot(sample_records.big()).y.at(0.9341 - 0.005), abs=0.1)


def test_a_limit_that_is_far_away_is_told_and_not_drawn():
    record = sample_records.big()
    plot = scatter.plot(replace(record, goal=replace(record.goal, limits=sample_records.limits("latency_ms<=500"))))
    assert plot.limits == () and plot.beyond == ("latency_ms ≤ 500",)


def test_without_a_metric_agreement_and_then_signal_to_noise_stand_on_the_axis():
    record = sample_records.big()
    bare = [replace(c, measured=replace(c.measured, metric=None)) for c in record.candidates]
    record = replace(record, source=replace(record.source, metric=None), candidates=tuple(bare))
    assert scatter.plot(record).y_title == "agreement with the source, %"
    no_classes = tuple(replace(c, parity=tuple(replace(p, agreement=None) for p in c.parity)) for c in bare)
    plot = scatter.plot(replace(record, candidates=no_classes))
    assert plot.y_title == "signal-to-noise, dB" and "source" not in {b.name for b in plot.bubbles}


def test_what_lacks_a_figure_is_named_and_no_point_means_no_plot():
    record = sample_records.big()
    lame = replace(record.candidates[0], measured=replace(record.candidates[0].measured, latency_ms=None))
    assert scatter.plot(replace(record, candidates=(lame, *record.candidates[1:]))).left_out == (lame.name,)
    assert scatter.plot(sample_records.bare()) is None


def test_one_candidate_alone_stands_in_the_middle():
    record = sample_records.big()
    only = replace(record, candidates=record.candidates[:1], source=replace(record.source, latency_ms=None))
    plot = scatter.plot(replace(only, goal=GoalResult(text="", met=True, reason="", chosen=None)))
    assert plot.bubbles[0].x == pytest.approx((plot.left + plot.right) / 2, abs=0.2)


@settings(max_examples=40, deadline=None)
@given(
    points=st.lists(st.tuples(st.floats(0.01, 500), st.floats(0, 1), st.integers(0, 10**9)), min_size=1, max_size=25),
    narrow=st.booleans(),
)
def test_names_never_overlap_however_many_points_there_are(points, narrow):
    record = sample_records.big()
    candidates = tuple(
        replace(sample_records.candidate("openvino-int8", metric, ms, size), name=f"openvino-int8-{i}")
        for i, (ms, metric, size) in enumerate(points)
    )
    goal = replace(record.goal, chosen=candidates[0].name, pareto=(candidates[0].name,))
    plot = scatter.plot(replace(record, candidates=candidates, goal=goal), *((350, 400) if narrow else (1000, 460)))
    no_overlaps(plot)
    assert plot.unlabelled == sum(b.label is None for b in plot.bubbles)
    for b in plot.bubbles:
        assert plot.left <= b.x - b.radius and b.x + b.radius <= plot.right
        assert 0 <= b.y - b.radius and b.y + b.radius <= plot.bottom


@given(low=st.floats(1e-3, 1e4), width=st.floats(1e-6, 1e4))
def test_ticks_are_round_inside_and_in_order(low, width):
    axis = Axis.spanning([low, low + width], 0, 600, 20, may_log=True)
    places = [t.at for t in axis.ticks]
    assert places == sorted(places) and len(places) >= 2
    assert all(-0.1 <= p <= 600.1 for p in places)
    assert len({t.text for t in axis.ticks}) == len(places)
    for tick in axis.ticks:
        assert axis.at(float(tick.text)) == pytest.approx(tick.at, abs=0.2)


def test_parity_prefers_the_source():
    c = sample_records.candidate("openvino-int8", 0.9, 1.0, 1)
    assert scatter.parity(c).against == "source"
    planned = Parity(against="planned", largest=0.0, mean=0.0, snr_db=60.0, agreement=None, samples=1)
    assert scatter.parity(replace(c, parity=(planned,))) is planned
    assert scatter.parity(replace(c, parity=())) is None
