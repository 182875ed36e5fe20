from dataclasses import replace

import pytest

from penjing.records import Measured
from penjing.report import comparison, verdict
from tests.report import sample_records


def row(record, key):
    return next(r for r in comparison.rows(record) if r.key == key)


def test_ratios_are_source_over_artifact_and_throughput_the_other_way():
    record = sample_records.big()
    assert row(record, "latency_ms").gain == pytest.approx(0.872 / 0.281)
    assert row(record, "size_bytes").words == "3.6× smaller"
    assert row(record, "throughput_per_s").words == "3.1× more"
    assert row(record, "parameters").words == "same"
    assert row(record, "metric").words == "0.07 points worse"
    assert row(record, "latency_ms").note == "median, batch 1, 2 threads"


def test_a_worse_artifact_is_called_worse():
    record = sample_records.big()
    slow = replace(record.source, latency_ms=sample_records.latency(1.744), size_bytes=2_295_622)
    record = replace(record, artifact=slow)
    assert row(record, "latency_ms").words == "2.0× slower" and row(record, "latency_ms").better is False
    assert row(record, "size_bytes").words == "2.0× larger"
    changes = verdict.of(record).changes
    assert changes[0] == "2.0× slower than torch"
    assert changes[2] == "2.0× larger than the source and than fp32 in the same runtime"


def test_a_lower_metric_is_better_where_the_task_says_so():
    assert row(sample_records.deep(), "metric").better is False
    better = replace(sample_records.deep(), artifact=Measured(metric=30.0))
    assert row(better, "metric").better is True and row(better, "metric").words == "1.60 better"


def test_settings_that_differ_are_told_for_each_side():
    record = sample_records.big()
    other = replace(record.artifact, latency_ms=replace(record.artifact.latency_ms, batch=32, threads=1))
    latency_row = row(replace(record, artifact=other), "latency_ms")
    assert "batch 1, 2 threads" in latency_row.source_note and "batch 32, 1 thread" in latency_row.artifact_note


def test_what_was_not_measured_is_said_and_never_compared():
    rows = comparison.rows(sample_records.bare())
    assert {r.source_text for r in rows} == {r.artifact_text for r in rows} == {"not measured"}
    assert all(r.gain is None and r.better is None and not r.words for r in rows)
    assert not {"packed_bytes", "energy_mj"} & {r.key for r in rows}


def test_zero_is_no_ratio():
    assert comparison.gain(0, 4) is None and comparison.gain(4, 0) is None


def test_headlines():
    met = verdict.of(sample_records.big())
    assert met.met and met.headline == (
        "openvino-int8: 3.1× faster than torch, 1.7× faster than fp32 in the same runtime, "
        "3.6× smaller than the source and than fp32 in the same runtime, accuracy 93.4 % → 93.3 %"
    )
    unmet = verdict.of(sample_records.deep())
    assert unmet.title == "Goal not met" and unmet.reason == sample_records.deep().goal.reason
    assert verdict.of(sample_records.bare()).headline == "No artifact was chosen from 1 candidate"
    assert verdict.of(replace(sample_records.bare(), candidates=())).headline == "No artifact could be built"


def rounds(record, *of_source, spread=0.04):
    """The record with rounds of the source like these, and of all candidates like their medians."""

    def with_rounds(measured, values, spread=0.04):
        return replace(measured, latency_ms=replace(measured.latency_ms, rounds=tuple(values), spread=spread))

    rows = [
        replace(c, measured=with_rounds(c.measured, [c.measured.latency_ms.median] * len(of_source)))
        for c in record.candidates
    ]
    source = with_rounds(record.source, of_source, spread)
    artifact = next(c.measured for c in rows if c.name == record.goal.chosen)
    return replace(record, source=source, candidates=tuple(rows), artifact=artifact)


def test_a_speed_up_is_that_of_the_rounds_and_not_of_the_medians():
    record = rounds(sample_records.big(), 1.124, 1.124, 1.124)  # whose median would be 0.872
    assert row(record, "latency_ms").gain == pytest.approx(4.0)
    assert comparison.speedup(record, record.chosen) == pytest.approx(4.0)
    assert verdict.of(record).changes[0] == "4.0× faster than torch"


@pytest.mark.parametrize("spread", [0.04, 0.8])
def test_timings_that_can_not_be_trusted_are_no_headline(spread):
    varying = (0.8, 0.9, 1.1, 2.0, 5.0) if spread < 0.4 else (1.124,) * 5
    record = rounds(sample_records.big(), *varying, spread=spread)
    changes = verdict.of(record).changes
    span = "3.2× to 7.1×" if spread < 0.4 else "about 4.0×"
    assert changes[0] == f"busy machine: {span} as fast as torch"
    assert changes[1] == "1.7× faster than fp32 in the same runtime"  # which these rounds say steadily
    latency = row(record, "latency_ms")
    assert latency.words.startswith("busy machine") and latency.gain is None and latency.better is None
    assert row(record, "throughput_per_s").words == row(record, "p95").words == "busy machine"
    assert comparison.speedup(record, record.chosen) is None and comparison.busy(record, record.chosen)


def test_what_the_runtime_gives_is_told_apart_from_what_compression_gives():
    record = sample_records.big()
    latency, size = row(record, "latency_ms"), row(record, "size_bytes")
    assert (latency.floor, latency.floor_words) == (0.471, "1.7× faster")
    assert (size.floor, size.floor_words) == (1_164_000, "3.6× smaller")

    plain = replace(record, goal=replace(record.goal, chosen="onnxruntime-fp32"))
    plain = replace(plain, artifact=plain.chosen.measured)
    assert verdict.of(plain).changes[:2] == (
        "1.7× faster than torch by the runtime alone",
        "1.02× smaller than the source",
    )
    assert row(plain, "latency_ms").floor is None

    alone = replace(record, candidates=(record.chosen,))
    assert verdict.of(alone).changes[1] == "no fp32 in the same runtime to compare with"
    bad = replace(alone, rejected=(record.candidates[2],))
    assert verdict.of(bad).changes[1] == "fp32 in the same runtime was rejected"


def test_beside_a_network_that_was_pruned_too_the_floor_is_the_source_in_that_runtime():
    record = sample_records.big()
    floor = replace(record.source, latency_ms=sample_records.latency(0.562), size_bytes=2_000_000)
    pruned = replace(record, floors={"openvino": floor})
    assert verdict.of(pruned).changes[1] == "2.0× faster than fp32 in the same runtime"
    assert row(pruned, "size_bytes").floor == 2_000_000
    assert comparison.speedup_over_floor(pruned, pruned.candidates[0]) is None  # of onnxruntime: itself
    of_fp32 = comparison.speedup_over_floor(pruned, pruned.candidates[2])
    assert of_fp32 == pytest.approx(0.562 / 0.471)  # what pruning alone gives


def test_a_long_tail_is_no_speed_up_of_the_slowest_calls():
    record = sample_records.big()
    tail = replace(record.source, latency_ms=replace(record.source.latency_ms, p95=28.6))
    p95_row = row(replace(record, source=tail), "p95")
    assert p95_row.words == "busy machine" and p95_row.gain is None and p95_row.source_text == "28.6 ms"
    assert row(replace(record, source=tail), "latency_ms").words == "3.1× faster"
    assert row(record, "p95").words == "3.1× faster"


def test_throughput_gains_what_latency_gains():
    record = rounds(sample_records.big(), 1.124, 1.124, 1.124)
    assert row(record, "throughput_per_s").words == "4.0× more"
