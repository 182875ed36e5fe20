"""What the report shows of a search."""

from dataclasses import replace

from penjing.records import GoalLimit
from penjing.records.search import SearchRow, TrialRow
from penjing.report import html, trials
from tests.report import sample_records
from tests.report.test_html import Page


def row(number, **figures):
    return TrialRow(
        number=number,
        words=f"way {number}",
        recipe=[],
        training=number > 1,
        began_s=10.0 * number,
        seconds=10.0,
        predicted={"size_bytes": 1000.0, "drop": 0.01},
        measured=figures,
        best="onnxruntime-int8",
        met=bool(figures),
        failure="" if figures else "a <b>bold</b> failure",
    )


def searched():
    rows = (
        row(0, size_bytes=4000.0, metric=0.93, drop=0.0),
        row(1),
        row(2, size_bytes=1100.0, metric=0.92, drop=0.01),
    )
    search = SearchRow(
        trials=rows, objective="size_bytes", stopped="3 trials are done", seconds=30.0, study="sqlite:///x", chosen=2
    )
    return replace(sample_records.big(), search=search)


def test_a_trial_stands_where_it_ran():
    shown = trials.of(searched())
    assert [(line.start, line.length) for line in shown.lines] == [(0, 1 / 3), (1 / 3, 1 / 3), (2 / 3, 1 / 3)]
    assert [line.chosen for line in shown.lines] == [False, False, True]


def test_expected_stands_beside_measured():
    shown = trials.of(searched())
    assert shown.titles == ("size on disk",)
    assert shown.lines[2].cells[0] == ("1.10 kB", "1.00 kB") and shown.lines[1].cells[0] == ("", "1.00 kB")
    assert shown.errors == "size on disk 10 %"  # of the one that trained


def test_the_picture_has_every_trial_that_was_measured():
    wide, narrow = trials.of(searched()).plots
    assert {b.name for b in wide.bubbles} == {b.name for b in narrow.bubbles} == {"0", "2"}
    assert [b.name for b in wide.bubbles if b.chosen] == ["2"]


def test_the_figures_of_the_goal_have_columns_and_the_objective_the_picture():
    rows = tuple(row(n, latency_ms=2.0, size_bytes=4000.0, macs=3e6 / (n + 1), metric=0.9, drop=0.0) for n in (0, 2))
    record = searched()
    limits = (GoalLimit(figure="macs", op="<=", value=1e6, text="macs<=1000000"),)
    goal = replace(record.goal, limits=limits)
    shown = trials.of(replace(record, goal=goal, search=replace(record.search, trials=rows, objective="drop")))
    assert shown.titles == ("latency", "size on disk", "multiply-accumulates")
    assert shown.plots[0].x_title.startswith("multiply-accumulates, million")


def test_the_page_tells_failures_as_text():
    page = Page(html.render(searched()))
    assert "a <b>bold</b> failure" in page.text and "3 trials in 30.0 s" in page.text
    assert len(page.all("svg", **{"class": "trials"})) == 2


def test_without_a_search_nothing_is_shown():
    assert trials.of(sample_records.big()) is None
    assert "What was tried" not in Page(html.render(sample_records.big())).text
