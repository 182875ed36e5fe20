import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from penjing import records
from penjing.errors import OutputError
from penjing.report import html
from tests.raises import raises_case
from tests.report import sample_records

VOID = {"meta", "br", "wbr", "img", "input", "link", "hr"}
RECORDS = ("big", "deep", "bare", "hostile", "judged", "nothing_left")


class Page(HTMLParser):
    """Elements with their attributes and text; asserts that every element is closed in its order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        assert self.stack.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.stack:
            element["text"] += data
        if not any(e["tag"] in ("style", "title") for e in self.stack):
            self.words.append(data)

    def all(self, tag, **attributes):
        tagged = [e for e in self.elements if e["tag"] == tag]
        return [e for e in tagged if all(v in (e.get(k) or "").split() for k, v in attributes.items())]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page(name):
    return Page(html.render(getattr(sample_records, name)()))


def test_a_line_never_ends_between_a_number_and_its_unit():
    words = " ".join(page("big").words)
    assert "93.41\N{NO-BREAK SPACE}%" in words and "0.281\N{NO-BREAK SPACE}ms" in words
    assert re.findall(r"\d (?:%|ms|kB|MB|dB|k|M)(?!\w).{0,9}", words) == []


@pytest.mark.parametrize("name", RECORDS)
def test_nothing_comes_from_elsewhere_and_nothing_runs(name):
    text = html.render(getattr(sample_records, name)())
    document = Page(text)
    assert not {e["tag"] for e in document.elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "img",
        "base",
        "form",
    }
    for element in document.elements:
        assert not {k for k in element if k.startswith("on") or k in ("src", "srcset", "action", "xlink:href")}
        assert element.get("href", "#").startswith("#")
    style = document.all("style")[0]["text"]
    assert not re.search(r"url\(|@import|@font-face|http", style)
    policy = next(e["content"] for e in document.all("meta") if e.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_can_be_read_by_everyone(name):
    document = page(name)
    assert document.all("html")[0]["lang"] == "en" and len(document.all("h1")) == 1
    assert len(document.all("caption")) == len(document.all("table"))
    ids = [e["id"] for e in document.elements if "id" in e]
    assert len(ids) == len(set(ids))
    for element in document.all("svg"):
        assert element["role"] == "img" and element["aria-labelledby"] in ids
    for element in document.all("section"):
        assert element["aria-labelledby"] in ids
    assert all(e.get("scope") in ("row", "col") for e in document.all("th"))


def test_the_head_says_the_verdict():
    met = page("big")
    assert " ".join(met.all("h1")[0]["text"].split()) == verdict_of("big")
    assert "Goal met" in met.all("span", **{"class": "stamp"})[0]["text"]
    unmet = page("deep")
    assert "Goal not met" in unmet.all("span", **{"class": "unmet"})[0]["text"]
    assert sample_records.deep().goal.reason in unmet.text


def verdict_of(name):
    return html.verdict.of(getattr(sample_records, name)()).headline


def test_a_busy_machine_is_told_in_the_place_of_a_speed_up():
    record = sample_records.big()
    busy = replace(record.source, latency_ms=replace(record.source.latency_ms, spread=0.8))
    text = " ".join(re.sub(r"<[^>]+>", " ", html.render(replace(record, source=busy))).split())
    assert "busy machine: about 3.1× as fast as torch" in text and "faster than torch" not in text
    assert "the middle half of the calls that it is compared with spans 80 % of their median" in text
    assert "1.7× faster than fp32 in the same runtime" in text


def test_figures_are_those_of_the_record():
    document, record = page("big"), sample_records.big()
    entries = {e["data-key"]: " ".join(e["text"].split()) for e in document.all("article")}
    assert (
        "0.281 ms" in entries["latency_ms"]
        and "0.872 ms" in entries["latency_ms"]
        and "3.1× faster" in entries["latency_ms"]
    )
    assert "p95 1.03 ms, spread 4.1 %" in entries["latency_ms"] and "batch 1, 2 threads" in entries["latency_ms"]
    assert "93.41 %" in entries["metric"] and "93.34 %" in entries["metric"]
    assert "1.15 MB" in entries["size_bytes"] and "322 kB" in entries["size_bytes"]
    assert (
        "268 MB" in entries["peak_memory_bytes"]
        and "31.0 M MACs" in entries["macs"]
        and "272 k" in entries["parameters"]
    )
    for c in record.candidates:
        assert c.name in document.text and c.reason in document.text
    for row in record.chosen.layers:
        assert row.name in document.text.replace(" ", "").replace("\n", "") and (row.reason or "") in document.text
    for text in (record.machine.processor, "avx512_vnni", "8.20 GB", "2026.4.1", record.created, *record.warnings):
        assert text in document.text
    for sha in (*record.data.values(), *record.chosen.sha256.values()):
        assert sha in document.text
    for step in record.steps:
        assert step.name in document.text
    assert "1 min 15 s" in document.text and "802 MB" in document.text
    assert "quantize.Static" in document.text and "weight_bits 8" in document.text


def test_bars_are_proportional():
    latency = next(e for e in page("big").elements if e.get("data-key") == "latency_ms")
    widths = re.findall(r'data-key="latency_ms".*?</article>', html.render(sample_records.big()), re.DOTALL)
    bars = [float(w) for w in re.findall(r"--w:([\d.]+)%", widths[0])]
    assert latency["tag"] == "article"
    assert bars == pytest.approx([100.0, 100 * 0.471 / 0.872, 100 * 0.281 / 0.872], abs=0.01)


def test_the_trees_have_areas_as_the_sizes():
    source, artifact = html.trees(sample_records.big())
    assert (artifact / source) ** 2 == pytest.approx(321_750 / 1_147_811)
    assert html.trees(sample_records.bare()) is None
    larger = replace(sample_records.big(), artifact=records.Measured(size_bytes=4_591_244))
    assert html.trees(larger) == (0.5, 1.0)


def test_the_chosen_candidate_stands_out_and_operators_are_counted():
    chosen = page("big").all("tr", **{"class": "chosen"})
    assert len(chosen) == 1
    text = " ".join(chosen[0]["text"].split())
    assert "openvino-int8 chosen" in text and "30 integer, 1 float" in text and "33.8 dB" in text and "99.6 %" in text


def test_a_plot_has_a_tooltip_for_every_point():
    record = sample_records.big()
    titles = [e["text"] for e in page("big").all("title")]
    for c in record.candidates:
        # once in the wide and once in the narrow drawing
        assert sum(t.startswith(f"{c.name}\n") for t in titles) == 2


def test_many_layers_become_a_skyline_with_the_costliest_and_all_in_a_table():
    document = page("deep")
    wide = [e for e in document.all("svg", **{"class": "wide"}) if "skyline-wide" in e["aria-labelledby"]]
    assert len(wide) == 1 and len(document.all("g", **{"class": "column"})) > 3 * 150
    assert "The 20 costliest" in document.text and "All 150 layers" in document.text
    assert page("big").all("g", **{"class": "column"}) == []


def test_layers_that_stayed_float_are_grouped_by_their_reason():
    (chosen, groups), *others = html.stayed_float(sample_records.deep())
    assert chosen.name == "openvino-int8" and not others
    assert [(g.reason, len(g.rows)) for g in groups] == [
        ("both inputs are activations; the runtime has no integer kernel for that", 25),
        ("no reason was recorded", 5),
    ]
    record = sample_records.big()
    hidden = tuple(replace(c, layers=record.layers) for c in record.candidates)
    assert "does not show how it executed" in Page(html.render(replace(record, candidates=hidden))).text
    integer = tuple(replace(r, executed="int8") for r in record.layers)
    whole = tuple(replace(c, layers=integer) for c in record.candidates)
    assert "ran in integers" in Page(html.render(replace(record, candidates=whole))).text


def test_what_is_missing_is_said():
    text = page("bare").text
    assert "not measured" in text and "No recipe was recorded." in text and "No step was recorded." in text
    assert "No plot" in text and "The record holds no layers." in text and "None" not in text
    told = "Their accuracy is by Task.select, where the source has 91.25 %."
    big = sample_records.big()
    assert told in Page(html.render(replace(big, selected=0.9125))).text and told not in Page(html.render(big)).text
    assert "No candidate was built." in Page(html.render(replace(sample_records.bare(), candidates=()))).text


@pytest.mark.parametrize("name", RECORDS)
def test_any_one_figure_may_be_missing(name):
    record = getattr(sample_records, name)()
    for field in records.Measured.__dataclass_fields__:
        gaps = tuple(replace(c, measured=replace(c.measured, **{field: None}), drop=None) for c in record.candidates)
        source = replace(record.source, **{field: None})
        artifact = record.artifact and replace(record.artifact, **{field: None})
        Page(html.render(replace(record, candidates=gaps, source=source, artifact=artifact)))
    plain, out = (
        tuple(replace(c, parity=(), layers=(), integer_operators={}, float_operators={}) for c in several)
        for several in (record.candidates, record.rejected)
    )
    bare = replace(record, candidates=plain, rejected=out, layers=record.layers[:1])
    assert "not counted" in Page(html.render(bare)).text


def test_hostile_text_is_shown_and_stays_text():
    text = html.render(sample_records.hostile())
    assert "<script" not in text and "<img" not in text
    document = Page(text)
    shown = sample_records.ATTACK.replace("\x1b", "?")
    assert "\x1b" not in text and " ".join(shown.split()) in document.text
    assert shown in document.all("title")[0]["text"]


def test_a_rejected_candidate_stands_with_its_reason_and_every_figure_beside_its_limit():
    document = page("judged")
    assert "1 of them is not offered" in document.text and "✗ rejected" in document.text
    assert "the first operator that differs is scores" in document.text
    assert document.all("tr", **{"class": "chosen"})[0]["text"].strip().startswith("onnxruntime-int8")
    table = next(e for e in document.all("table") if "The same by output" in e["text"])["text"]
    rows = [" ".join(row.split()) for row in re.findall(r"openvino-int8.*?(?=openvino-int8|$)", table, re.DOTALL)]
    scores = next(row for row in rows if "columns 4-5 of the last axis" in row)
    assert "1.9 dB" in scores and "26.0 dB" in scores and "the plan itself keeps 20 dB here" in scores


def test_a_rejected_artifact_is_marked_where_no_other_is_left():
    document = page("nothing_left")
    assert "✗ Rejected" in document.all("span", **{"class": "unmet"})[0]["text"]
    assert "no candidate may be offered" in document.text


def test_recipes_in_every_form():
    steps = html.recipe(
        [{"quantize.Static": {"weight_bits": 4}}, {"step": "Finetune", "epochs": 3}, {"prune": None}, "x"]
    )
    assert [(s.name, s.settings) for s in steps] == [
        ("quantize.Static", (("weight_bits", "4"),)),
        ("Finetune", (("epochs", "3"),)),
        ("prune", ()),
        ("x", ()),
    ]


def test_the_same_record_gives_the_same_file(tmp_path):
    for name in ("a.html", "b.html"):
        html.write(sample_records.big(), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert len((tmp_path / "a.html").read_bytes()) < 200_000


def test_a_record_survives_the_way_through_its_file(tmp_path):
    (tmp_path / "record.json").write_text(records.to_json(sample_records.big()), encoding="utf-8")
    assert html.render(records.read(tmp_path)) == html.render(sample_records.big())


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    with raises_case(OutputError, "unwritable"):
        html.write(sample_records.bare(), tmp_path / "missing" / "report.html")


def test_reports_are_written_without_torch():
    code = (
        "import sys; from penjing.report import html, table; import penjing.report.numbers; "
        "heavy = {'torch', 'onnx', 'onnxruntime', 'openvino', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
