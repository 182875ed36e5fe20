import xml.etree.ElementTree as ElementTree
from dataclasses import replace

from penjing.records import CurvePoint, Training
from penjing.report import curves, html
from tests.report import sample_records


def training(name="Finetune", steps=10, terms=("labels", "Logits")):
    points = [
        CurvePoint(step=i + 1, loss=4 / (i + 1), rate=0.1, terms={t: (k + 1) / (i + 1) for k, t in enumerate(terms)})
        for i in range(steps)
    ]
    return Training(name=name, curve=tuple(points))


def test_lines_fall_as_the_losses_do_and_stay_in_the_frame():
    (chart,) = curves.charts([training()])
    assert [line.name for line in chart.lines] == ["loss", "labels", "Logits"]
    for line in chart.lines:
        assert len(line.points) == 10
        assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in line.points)
        assert all(b[1] > a[1] and b[0] > a[0] for a, b in zip(line.points, line.points[1:], strict=False))
    assert chart.y.log and chart.note == "10 steps, learning rate up to 0.1, loss at the end 0.400"


def test_names_at_the_ends_do_not_stand_on_each_other():
    same = Training(name="QAT", curve=(CurvePoint(step=1, loss=1.0, rate=0.1, terms=dict.fromkeys("abcd", 1.0)),))
    (chart,) = curves.charts([same])
    places = sorted(line.label_y for line in chart.lines)
    assert all(b - a >= 13.9 for a, b in zip(places, places[1:], strict=False))
    assert chart.top <= places[0] and places[-1] <= chart.bottom


def test_one_term_is_the_loss_and_is_not_drawn_twice():
    (chart,) = curves.charts([training(terms=("labels",))])
    assert [line.name for line in chart.lines] == ["loss"]


def test_several_trainings_of_a_step_are_numbered():
    rounds = [training("Iterative"), training("Finetune"), training("Iterative")]
    assert [c.name for c in curves.charts(rounds)] == ["Iterative, 1 of 2", "Finetune", "Iterative, 2 of 2"]


def test_the_report_draws_every_training_and_escapes_its_names():
    record = replace(sample_records.deep(), trainings=(training("<b>x</b>"), training()))
    page = html.render(record)
    assert "<b>x</b>" not in page and page.count('class="curve loss"') == 2
    start = page.index('<svg viewBox="0 0 480')
    ElementTree.fromstring(page[start : page.index("</svg>", start) + 6])
    assert "curve loss" not in html.render(sample_records.deep())
