import io
from dataclasses import replace

import pytest
from rich.console import Console

from penjing.records import LayerRow, Measured, Reference
from penjing.report import html, table, verdict
from tests.report import sample_records


def shown(renderable, width=80, encoding="utf-8", **options):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width, **options).print(renderable)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("name", ["big", "deep", "bare", "hostile"])
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_tables_fit_and_can_be_written(name, width, encoding):
    record = getattr(sample_records, name)()
    rows = record.chosen.layers if record.chosen else record.layers
    for renderable in (table.comparison(record), table.candidates(record), table.layers(rows)):
        text = shown(renderable, width, encoding)
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text


def test_comparison_has_every_figure_on_a_line_of_its_own():
    lines = [words(line) for line in shown(table.comparison(sample_records.big())).splitlines()]
    assert "accuracy 93.41 % 93.34 % 0.07 points worse" in lines
    assert "Latency (median, batch 1, 2 threads) 0.872 ms 0.281 ms 3.1× faster" in lines
    assert "Size on disk 1.15 MB 322 kB 3.6× smaller" in lines
    assert "Multiply-accumulates 31.0 M MACs 31.0 M MACs same" in lines


def test_candidates_mark_the_chosen_one_and_say_why_others_failed():
    text = shown(table.candidates(sample_records.big()), 120)
    lines = [words(line) for line in text.splitlines()]
    assert "openvino-int8 * 93.34 % 0.07 % 0.281 ms 3.1× 322 kB 33.8 99.6 % 30/31 yes" in lines
    assert "onnxruntime-fp32 93.41 % 0.00 % 0.512 ms 1.7× 1.12 MB 118.0 100 % 0/31 yes" in lines
    assert text.count("*") == 1
    assert "openvino-int8-percentile: drop is 0.82 %, the goal allows 0.5 %" in words(text)


def test_integers_that_take_as_much_as_half_precision_are_told():
    record = sample_records.big()
    told = "no smaller than openvino-bf16"
    assert told not in words(shown(table.candidates(record), 120)) and told not in html.render(record)
    sizes = {"openvino-int8": 5_200, "openvino-bf16": 5_100}
    small = [
        replace(c, measured=replace(c.measured, size_bytes=sizes.get(c.name, c.measured.size_bytes)))
        for c in record.candidates
    ]
    record = replace(record, candidates=tuple(small))
    line = "openvino-int8: no smaller than openvino-bf16 (5.20 kB against 5.10 kB): scales and operators"
    assert line in words(shown(table.candidates(record), 120))
    assert line in words(html.render(record))


def test_candidates_are_seen_beside_fp32_in_their_own_runtime():
    text = words(shown(table.candidates(sample_records.big()), 120))
    assert "× is over torch; over fp32 in the same runtime: onnxruntime-int8 1.5×, openvino-bf16 1.6×" in text
    lines = [words(line) for line in shown(table.comparison(sample_records.big())).splitlines()]
    assert "fp32 in the same runtime 0.471 ms 1.7× faster" in lines
    assert "fp32 in the same runtime 1.16 MB 3.6× smaller" in lines


def test_candidates_of_a_busy_machine_have_no_speed_up():
    record = sample_records.big()
    first = record.candidates[0]
    busy = replace(first.measured, latency_ms=replace(first.measured.latency_ms, spread=0.7))
    record = replace(record, candidates=(replace(first, measured=busy), *record.candidates[1:]))
    text = shown(table.candidates(record), 120)
    lines = [words(line) for line in text.splitlines()]
    assert "onnxruntime-fp32 93.41 % 0.00 % 0.512 ms busy 1.12 MB 118.0 100 % 0/31 yes" in lines
    assert "busy machine: onnxruntime-fp32: the middle half of its calls spans 70 % of their median" in words(text)
    assert "onnxruntime-int8 1.5×" not in words(text)  # which is compared with it


def test_candidates_say_where_select_compared_them():
    record = sample_records.big()
    assert "Task.select" not in shown(table.candidates(record))
    text = shown(table.candidates(replace(record, selected=0.9125)), 120)
    assert "accuracy: by Task.select, where the source has 91.25 %" in words(text)


def test_the_usual_names_stay_whole_at_80_columns():
    text = shown(table.candidates(sample_records.big()), 80)
    for name in ("onnxruntime-fp32", "onnxruntime-int8", "openvino-int8 *"):
        assert name in text


def test_layers_have_their_share_and_every_reason_once():
    record = sample_records.deep()
    text = shown(table.layers(record.layers), 120)
    share = record.layers[0].macs / sum(r.macs for r in record.layers)
    first = next(words(line) for line in text.splitlines() if "encoder.layers.0.query" in line)
    assert first == f"encoder.layers.0.query linear 591 k 75.5 M {100 * share:.1f} % 98.3 kB int8"
    assert text.count("both inputs are activations") == 1 and text.count("bf16 [1]") == 25


def test_layers_that_no_runtime_has_seen_show_the_plan():
    text = shown(table.layers([LayerRow(name="fc", kind="linear", planned="int8")]))
    assert "planned" in text and "executed" not in text and "int8" in text
    assert "layer" in shown(table.layers([]))


def test_names_are_not_taken_as_markup_and_lose_control_characters():
    text = shown(table.layers([LayerRow(name="[red]a\x1b[31m\nb[/red]", kind="conv")]), 120)
    assert "[red]a?[31m" in text and "b[/red]" in text


def test_an_ascii_terminal_gets_ascii():
    text = shown(table.comparison(sample_records.big()), 80, "ascii")
    assert "3.1x faster" in text and "─" not in text


def test_colours_only_where_there_are_any():
    assert "\x1b[" in shown(table.comparison(sample_records.big()), force_terminal=True, color_system="standard")
    assert "\x1b[" not in shown(table.comparison(sample_records.big()), force_terminal=True, color_system=None)


def test_wide_terminals_get_more_room_and_narrow_ones_still_print():
    record = sample_records.big()
    gap = "accuracy    drop"
    assert gap in shown(table.candidates(record), 120) and gap not in shown(table.candidates(record), 80)
    assert "yes" in shown(table.candidates(record), 40)


def test_chart_draws_the_costliest_layers_first_and_fits_80_columns():
    rows = [LayerRow(name=f"layer{i}", kind="conv", macs=i * 1000, weight_bytes=100 - i) for i in range(40)]
    console = Console(width=80, file=io.StringIO())
    console.print(table.chart(rows, limit=5))
    lines = console.file.getvalue().splitlines()
    named = [line.split()[0] for line in lines if line.startswith("layer")]
    assert named == ["layer39", "layer38", "layer37", "layer36", "layer35"]
    assert max(map(len, lines)) <= 80 and "39.0 k" in console.file.getvalue()


def test_rejected_candidates_stand_last_with_their_reason_and_figures_stand_beside_limits():
    text = " ".join(shown(table.candidates(sample_records.judged()), 80).split())
    assert text.index("openvino-int8") > text.index("onnxruntime-int8 *")
    assert "onnxruntime-fp32 78.0 (60), onnxruntime-int8 31.0 (26), openvino-int8 1.9 (26)" in text
    assert "openvino-int8: rejected: both, columns 4-5 of the last axis" in text


def test_a_reason_that_several_candidates_share_is_said_once():
    record = sample_records.judged()
    (rejected,) = record.rejected
    both = replace(record, rejected=(rejected, replace(rejected, name="other-int8")))
    text = words(shown(table.candidates(both)))
    assert text.count("columns 4-5 of the last axis") == 1 and f"{rejected.name}, other-int8: rejected: both" in text


def test_what_drops_are_against_has_a_column_of_its_own():
    whole = Measured(metric=0.95, size_bytes=4_000_000, parameters=1_000_000, macs=120_000_000)
    record = replace(sample_records.big(), reference=Reference(name="unpruned", weights="0" * 64, measured=whole))
    lines = [words(line) for line in shown(table.comparison(record), 120).splitlines()]
    assert words(lines[0]).startswith("reference source openvino-int8")
    assert "accuracy 95.00 % 93.41 % 93.34 % 1.66 points worse" in lines
    assert "Size on disk 4.00 MB 1.15 MB 322 kB 3.6× smaller" in lines
    assert "Multiply-accumulates 120 M MACs 31.0 M MACs 31.0 M MACs same" in lines
    assert "fp32 in the same runtime 0.471 ms 1.7× faster" in lines
    assert "drop is against the reference unpruned, 95.00 %" in words(shown(table.candidates(record)))
    assert "accuracy 95.0 % of the reference → 93.3 %" in verdict.of(record).headline
    page = html.render(record)
    assert (
        "drop is against the reference unpruned, 95.00 %" in words(page) and page.count("<span>reference</span>") == 4
    )
