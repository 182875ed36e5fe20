"""Several runs side by side, as tables, as a page and as a picture."""

import io
import re
import xml.etree.ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from penjing.records import Energy
from penjing.records.comparison import side_by_side
from penjing.records.runs import RunRow
from penjing.report import runs, runs_page, runs_picture, runs_table
from tests.report import sample_records


def beside(**records):
    return side_by_side([RunRow(name=name, folder=name, record=record) for name, record in records.items()])


@pytest.fixture(scope="module")
def two():
    big = sample_records.big()
    artifact = replace(big.artifact, size_bytes=160_000, energy_mj=Energy(value=1.5, method="measured"))
    recipe = [{"quantize.Static": {"weight_bits": 4, "activation_bits": 8, "range": "mse", "exclude": []}}]
    return beside(first=big, second=replace(big, artifact=artifact, recipe=recipe))


@pytest.fixture(scope="module")
def apart():
    big = sample_records.big()
    return beside(here=big, there=replace(big, machine=replace(big.machine, processor="Cortex-A76")))


def shown(tables, width=80, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, color_system=None)
    for table in tables:
        console.print(table)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def cells(comparison, key):
    return next(row for row in runs.rows(comparison) if row.key == key).cells


def test_every_figure_has_a_row_with_its_unit(two):
    assert cells(two, "chosen") == ("openvino-int8", "openvino-int8")
    assert cells(two, "latency_ms") == ("0.281 ms ± 2%", "0.281 ms ± 2%")
    assert cells(two, "size_bytes") == ("322 kB", "160 kB")
    assert cells(two, "energy_mj") == ("not measured", "1.50 mJ (measured)")
    assert cells(two, "over_torch") == ("3.1×", "3.1×") and cells(two, "over_fp32") == ("1.7×", "1.7×")
    assert cells(two, "timing") == ("2, 1", "2, 1")
    assert cells(two, "met") == ("met", "met")


def test_a_star_stands_at_the_best_of_a_row(two):
    text = shown(runs_table.artifacts(two))
    assert re.search(r"Size on disk +322 kB +160 kB \*", text)
    assert re.search(r"accuracy +93.34 % +93.34 %\s", text) and "not ranked" not in text


def test_what_can_not_be_compared_is_said_and_has_no_star(apart):
    text = shown(runs_table.artifacts(apart), width=200)
    assert "Latency and peak memory are not ranked: they were measured on different machines" in text
    assert "there: Cortex-A76" in text and not re.search(r"Latency.*\*", text)


def test_different_metrics_stand_with_their_names():
    big = sample_records.big()
    comparison = beside(a=big, b=replace(big, metric_name="recall"))
    assert cells(comparison, "metric") == ("93.34 % accuracy", "93.34 % recall")
    assert runs.reasons(comparison)[0].startswith("The metric and drop are not ranked: they have different metrics")


def test_a_busy_timing_gives_no_speed_up():
    big = sample_records.big()
    latency = replace(big.artifact.latency_ms, spread=0.9, steady=False, doubt="too many programs")
    comparison = beside(a=big, b=replace(big, artifact=replace(big.artifact, latency_ms=latency)))
    assert cells(comparison, "over_torch") == ("3.1×", "busy")
    assert "b: too many programs" in " ".join(runs.reasons(comparison))


def test_differences_stand_under_their_topic(two):
    text = shown(runs_table.changes(two), width=120)
    assert re.search(r"recipe\s*\n +quantize.Static.weight_bits +8 +4", text)
    assert "The same in all: source network, data, machine, threads, versions, seed." in text


def test_instruction_sets_are_shown_where_they_differ():
    big = sample_records.big()
    machine = replace(big.machine, instruction_sets=("avx2", "avx512f", "sve"))
    rows = runs.changes(beside(a=big, b=replace(big, machine=machine)))
    assert [row.cells for row in rows] == [("avx512_vnni, amx_int8, amx_bf16", "sve")]


def test_many_runs_follow_in_further_tables_that_fit(two):
    many = beside(**{f"run-{i}": sample_records.big() for i in range(9)})
    text = shown(runs_table.artifacts(many))
    assert text.count("Size on disk") == 3 and max(map(len, text.splitlines())) <= 80
    assert all(f"run-{i}" in text for i in range(9))


def test_a_terminal_without_signs_gets_plain_ones(apart):
    assert "0.281 ms" in shown(runs_table.artifacts(apart), encoding="ascii")


class Reader(HTMLParser):
    """Tags that are still open, those of scripts and links, and the text."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_one_file_with_table_picture_and_differences(two):
    text = runs_page.render(two)
    page = Reader(text)
    words = " ".join(page.words)
    assert (
        "2 runs side by side" in words and "quantize.Static.weight_bits" in words and "160\N{NO-BREAK SPACE}kB" in words
    )
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.seen}
    assert not any(name in ("src", "href") for _, attributes in page.seen for name in attributes)
    assert "Not everything can be compared" not in words
    assert text == runs_page.render(two)


def test_the_page_says_what_can_not_be_compared(apart):
    words = " ".join(Reader(runs_page.render(apart)).words)
    assert "Not everything can be compared" in words and "Cortex-A76" in words


def test_names_from_outside_stay_text():
    hostile = sample_records.hostile()
    comparison = beside(**{sample_records.ATTACK: hostile, "b": sample_records.big()})
    text = runs_page.render(comparison)
    clean = Reader(runs_page.render(beside(a=sample_records.big(), b=sample_records.big())))
    tags = {tag for tag, _ in Reader(text).seen}
    assert tags <= {tag for tag, _ in clean.seen} | {"aside", "ul", "li", "code", "table", "caption"}
    drawn = runs_picture.picture(comparison)
    assert drawn is not None
    xml.etree.ElementTree.fromstring(runs_picture.svg(drawn))
    shown([*runs_table.artifacts(comparison), *runs_table.changes(comparison)])


def test_the_picture_has_every_candidate_in_its_runs_colour(two):
    drawn = runs_picture.picture(two)
    assert drawn.legend == (("run1", "first"), ("run2", "second"))
    assert len(drawn.wide.bubbles) == 12
    assert {b.name for b in drawn.wide.bubbles if b.chosen} == {"first", "second"}
    assert {b.family for b in drawn.wide.bubbles} == {"run1", "run2"}
    assert drawn.wide.x_title == "latency, ms" and drawn.notes == ()


def test_the_line_joins_what_no_candidate_of_any_run_beats():
    big = sample_records.big()
    slow = tuple(
        replace(c, measured=replace(c.measured, latency_ms=sample_records.latency(2 * c.measured.latency_ms.median)))
        for c in big.candidates
    )
    slow_record = replace(big, candidates=slow, artifact=slow[4].measured)
    drawn = runs_picture.picture(beside(fast=big, slow=slow_record))
    assert {b.family for b in drawn.wide.bubbles if b.pareto} == {"run1"}
    assert len(drawn.wide.front) == 4


def test_where_latencies_can_not_be_compared_size_is_drawn(apart):
    drawn = runs_picture.picture(apart)
    assert drawn.by_size and drawn.wide.x_title == "size on disk, MB"
    assert drawn.notes == ("x is the size on disk, since latencies can't be compared",)
    svg = runs_picture.svg(drawn)
    assert "since latencies can" in svg and "area: size" not in svg


def test_where_metrics_can_not_be_compared_each_is_seen_against_its_own_source():
    big = sample_records.big()
    other = replace(big, metric_name="recall", files={"source/model.pt2": "beef" * 16})
    drawn = runs_picture.picture(beside(a=big, b=other))
    assert drawn.wide.y_title == "signal-to-noise against its own source, dB"
    assert drawn.wide.front == () and "no line joins the best" in drawn.notes[0]
    same = runs_picture.picture(beside(a=big, b=replace(big, metric_name="recall")))
    assert same.wide.y_title == "signal-to-noise against the source, dB" and same.wide.front


def test_sizes_have_the_unit_that_suits_them(apart):
    big = sample_records.big()
    small = [replace(c, measured=replace(c.measured, size_bytes=3000)) for c in big.candidates]
    record = replace(big, candidates=tuple(small), artifact=small[4].measured, metric_name="recall")
    other = replace(record, machine=replace(big.machine, processor="Cortex-A76"))
    assert runs_picture.picture(beside(a=record, b=other)).wide.x_title == "size on disk, kB"


def test_with_select_the_chosen_artifact_alone_is_drawn(two):
    big = sample_records.big()
    drawn = runs_picture.picture(beside(a=big, b=replace(big, selected=0.9)))
    assert len([b for b in drawn.wide.bubbles if b.family == "run2"]) == 1
    assert "Task.select: b" in drawn.notes[0]


def test_a_run_without_figures_is_named_and_one_alone_is_no_picture():
    big = sample_records.big()
    assert runs_picture.picture(beside(a=big, b=sample_records.bare())) is None
    page = runs_page.render(beside(a=big, b=sample_records.bare()))
    assert "fewer than two runs have figures" in page
    three = runs_picture.picture(beside(a=big, b=big, c=replace(big, candidates=(), artifact=None)))
    assert three.notes == ("not drawn, for lack of figures: c",)


def test_the_picture_is_a_file_of_its_own(two):
    root = xml.etree.ElementTree.fromstring(runs_picture.svg(runs_picture.picture(two)))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = " ".join(root.itertext())
    assert "first" in words and "second" in words and "var(" not in words
