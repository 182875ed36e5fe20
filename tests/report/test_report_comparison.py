from dataclasses import replace

import pytest
import sample_records

from penjing.records import Measured
from penjing.report import comparison, verdict


def row(record, key):
    return next(r for r in comparison.rows(record) if r.key == key)


def test_ratios_are_source_over_artifact_and_throughput_the_other_way():
    record = sample_records.big()
    assert row(record, "latency").gain == pytest.approx(0.872 / 0.281)
    assert row(record, "size").words == "3.6× smaller"
    assert row(record, "throughput").words == "3.1× more"
    assert row(record, "parameters").words == "same"
    assert row(record, "metric").words == "0.07 points worse"
    assert row(record, "latency").note == "median, batch 1, 2 threads"


def test_a_worse_artifact_is_called_worse():
    record = sample_records.big()
    slow = replace(record.source, latency_ms=sample_records.latency(1.744), size_bytes=2_295_622)
    record = replace(record, artifact=slow)
    assert row(record, "latency").words == "2.0× slower" and row(record, "latency").better is False
    assert row(record, "size").words == "2.0× larger"
    assert verdict.of(record).changes[:2] == ("2.0× slower", "2.0× larger")


def test_a_lower_metric_is_better_where_the_task_says_so():
    assert row(sample_records.deep(), "metric").better is False
    better = replace(sample_records.deep(), artifact=Measured(metric=30.0))
    assert row(better, "metric").better is True and row(better, "metric").words == "1.60 better"


def test_settings_that_differ_are_told_for_each_side():
    record = sample_records.big()
    other = replace(record.artifact, latency_ms=replace(record.artifact.latency_ms, batch=32, threads=1))
    found = row(replace(record, artifact=other), "latency")
    assert "batch 1, 2 threads" in found.source_note and "batch 32, 1 thread" in found.artifact_note


def test_what_was_not_measured_is_said_and_never_compared():
    rows = comparison.rows(sample_records.bare())
    assert {r.source_text for r in rows} == {r.artifact_text for r in rows} == {"not measured"}
    assert all(r.gain is None and r.better is None and not r.words for r in rows)
    assert not {"packed", "energy"} & {r.key for r in rows}


def test_zero_is_no_ratio():
    assert comparison.gain(0, 4) is None and comparison.gain(4, 0) is None


def test_headlines():
    met = verdict.of(sample_records.big())
    assert met.met and met.headline == "openvino-int8: 3.1× faster, 3.6× smaller, accuracy 93.4 % → 93.3 %"
    unmet = verdict.of(sample_records.deep())
    assert unmet.title == "Goal not met" and unmet.reason == sample_records.deep().goal.reason
    assert verdict.of(sample_records.bare()).headline == "No artifact was chosen from 1 candidate"
    assert verdict.of(replace(sample_records.bare(), candidates=())).headline == "No artifact could be built"
