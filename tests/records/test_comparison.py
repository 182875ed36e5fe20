"""Several runs side by side: what is compared, what is not and why, and what differs."""

import json
from dataclasses import replace

import pytest

from penjing import records
from penjing.errors import RecordError, UsageError
from penjing.records import Energy, Reference, to_json
from penjing.records.comparison import PACE, side_by_side, value
from penjing.records.runs import RunRow
from penjing.records.search import SearchRow
from tests.raises import raises_case
from tests.report import sample_records

TIMED = {"latency_ms", "throughput_per_s", "load_ms", "peak_memory_bytes", "energy_mj"}


def rows(**runs):
    return [RunRow(name=name, folder=f"runs/{name}", record=record) for name, record in runs.items()]


def beside(**runs):
    return side_by_side(rows(**runs))


def with_artifact(record, **figures):
    """The record with other figures of its artifact."""
    return replace(record, artifact=replace(record.artifact, **figures))


def slower(record, factor, **more):
    latency = record.artifact.latency_ms
    return with_artifact(record, latency_ms=replace(latency, median=factor * latency.median, **more))


@pytest.fixture(scope="module")
def big():
    return sample_records.big()


@pytest.fixture
def folders(tmp_path, big):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(to_json(big), encoding="utf-8")
    return tmp_path


def codes(comparison):
    return {conflict.code: set(conflict.figures) for conflict in comparison.conflicts}


def test_runs_of_one_machine_are_ranked_figure_by_figure(big):
    smaller = slower(with_artifact(big, size_bytes=1000, metric=0.93), 2)
    comparison = beside(first=big, second=smaller)
    assert comparison.conflicts == () and comparison.differences == ()
    assert comparison.best("latency_ms") == ("first",)
    assert comparison.best("size_bytes") == ("second",)
    assert comparison.best("metric") == comparison.best("drop") == ("first",)
    assert comparison.best("parameters") == ()  # equal in both


def test_where_lower_is_better_the_lower_metric_is_the_best():
    deep = sample_records.deep()
    assert beside(a=deep, b=with_artifact(deep, metric=30.0)).best("metric") == ("b",)


def test_latencies_whose_middle_halves_overlap_are_as_fast(big):
    near, far = slower(big, 1.03), slower(big, 1.5)
    assert beside(a=big, b=near, c=far).best("latency_ms") == ("a", "b")


def test_a_percent_of_memory_is_no_difference(big):
    memory = big.artifact.peak_memory_bytes
    comparison = beside(
        a=big,
        b=with_artifact(big, peak_memory_bytes=memory + memory // 100),
        c=with_artifact(big, peak_memory_bytes=2 * memory),
    )
    assert comparison.best("peak_memory_bytes") == ("a", "b")


@pytest.mark.parametrize("change", [{"processor": "Cortex-A76"}, {"cores": 64}, {"instruction_sets": ("avx2",)}])
def test_what_another_machine_timed_is_not_ranked_and_its_sizes_are(big, change):
    other = with_artifact(replace(big, machine=replace(big.machine, **change)), size_bytes=7)
    comparison = beside(here=big, there=other)
    assert codes(comparison) == {"machine": TIMED}
    assert "here: Intel" in comparison.conflicts[0].reason and "there: " in comparison.conflicts[0].reason
    assert not any(comparison.best(name) for name in TIMED)
    assert comparison.best("size_bytes") == ("there",)


@pytest.mark.parametrize("name", ["threads", "batch"])
def test_other_threads_or_batches_are_not_ranked(big, name):
    comparison = beside(a=big, b=slower(big, 2, **{name: 8}))
    assert codes(comparison) == {name: TIMED}
    assert comparison.conflicts[0].reason.endswith("(a: 2; b: 8)" if name == "threads" else "(a: 1; b: 8)")
    assert comparison.best("latency_ms") == ()


def test_other_evaluation_data_or_another_metric_are_not_ranked(big):
    data = beside(a=big, b=with_artifact(replace(big, data=big.data | {"evaluate": "beef" * 16}), metric=0.1))
    assert codes(data) == {"data": {"metric", "drop", "relative_drop"}}
    assert data.best("metric") == () and data.best("size_bytes") == ()
    metric = beside(a=big, b=replace(big, metric_name="recall"))
    assert list(codes(metric)) == ["metric"] and "b: recall (higher is better)" in metric.conflicts[0].reason


def test_drops_against_different_networks_are_not_ranked_and_their_metrics_are(big):
    other = with_artifact(replace(big, files={"source/model.pt2": "beef" * 16}), metric=0.9)
    comparison = beside(a=replace(big, files={"source/model.pt2": "cafe" * 16}), b=other)
    assert codes(comparison) == {"network": {"drop", "relative_drop"}}
    assert comparison.best("metric") == ("a",)
    reference = Reference(name="teacher", weights="beef" * 16, measured=replace(big.source, metric=0.95))
    against = replace(big, reference=reference)
    assert "b: teacher beefbeefbeef" in beside(a=big, b=against).conflicts[0].reason
    assert value(against, "drop") == pytest.approx(0.95 - 0.9334)


def test_agreement_with_different_sources_is_not_ranked(big):
    record = replace(big, metric_name="agreement with the source", files={"source/model.pt2": "cafe"})
    comparison = beside(a=record, b=replace(record, files={"source/model.pt2": "beef"}))
    assert "metric" in codes(comparison)["network"]


def test_a_busy_machine_is_told_with_the_run(big):
    busy = slower(big, 2, steady=False, doubt="the middle half of its calls spans 80 % of their median")
    comparison = beside(quiet=big, loud=busy)
    assert codes(comparison) == {"busy": {"latency_ms", "throughput_per_s"}}
    assert "loud: the middle half of its calls spans 80 %" in comparison.conflicts[0].reason
    assert "quiet" not in comparison.conflicts[0].reason


def test_a_source_that_took_longer_in_one_run_tells_that_the_machine_was_slower(big):
    source = replace(big.source, latency_ms=replace(big.source.latency_ms, median=PACE * 1.5 * 0.872))
    comparison = beside(a=big, b=replace(big, source=source))
    assert codes(comparison) == {"pace": {"latency_ms", "throughput_per_s"}}
    assert "1.8 times as long in b as in a" in comparison.conflicts[0].reason


def test_figures_for_a_device_are_not_those_of_this_machine(big):
    row = records.TargetRow(
        name="pi4",
        description="",
        instruction_sets=(),
        storage_bytes=None,
        memory_bytes=None,
        commands=(),
        sha256="ab" * 32,
    )
    comparison = beside(a=big, b=replace(big, target=row))
    assert codes(comparison) == {"target": TIMED} and "b: pi4" in comparison.conflicts[0].reason
    assert {d.topic for d in comparison.differences} == {"target"}


def test_measured_and_modelled_energy_are_not_ranked(big):
    a, b = (with_artifact(big, energy_mj=Energy(value=v, method=m)) for v, m in ((3.0, "measured"), (2.0, "model")))
    assert codes(beside(a=a, b=b)) == {"method": {"energy_mj"}}
    assert beside(a=b, b=with_artifact(big, energy_mj=Energy(value=4.0, method="model"))).best("energy_mj") == ("a",)


def test_a_model_of_the_energy_does_not_depend_on_the_machine(big):
    a = with_artifact(big, energy_mj=Energy(value=3.0, method="model"))
    b = with_artifact(replace(big, machine=replace(big.machine, cores=64)), energy_mj=Energy(value=2.0, method="model"))
    comparison = beside(a=a, b=b)
    assert codes(comparison) == {"machine": TIMED - {"energy_mj"}} and comparison.best("energy_mj") == ("b",)


def test_a_figure_that_one_run_alone_has_is_not_ranked(big):
    comparison = beside(a=big, b=with_artifact(big, packed_bytes=None))
    assert list(comparison.values("packed_bytes")) == ["a"] and comparison.best("packed_bytes") == ()


def test_a_run_without_an_artifact_stands_beside_the_others(big):
    empty = replace(big, artifact=None, candidates=(), goal=replace(big.goal, met=False, chosen=None))
    comparison = beside(a=big, b=empty)
    assert comparison.to_data()["runs"][1]["chosen"] is None
    assert comparison.conflicts == () and comparison.best("metric") == ()


def changed(first, second):
    """What differs, as (topic, name) → values."""
    return {(d.topic, d.name): d.values for d in beside(a=first, b=second).differences}


def test_recipes_differ_step_by_step_and_setting_by_setting(big):
    steps = [
        {"Finetune": {"epochs": 2, "clip": [{"Clip": {"norm": 1.0}}], "teacher": None}},
        {"quantize.Static": {"weight_bits": 4, "activation_bits": 8, "range": "mse", "exclude": []}},
    ]
    fewer = [
        {"Finetune": {"epochs": 3, "clip": [{"Clip": {"norm": 2.0}}]}},
        {"quantize.Static": {"weight_bits": 8, "activation_bits": 8, "range": "mse", "exclude": []}},
        {"quantize.BiasCorrection": {"samples": 48}},
    ]
    assert changed(replace(big, recipe=steps), replace(big, recipe=fewer)) == {
        ("recipe", "Finetune.epochs"): {"a": 2, "b": 3},
        ("recipe", "Finetune.clip[0].Clip.norm"): {"a": 1.0, "b": 2.0},
        ("recipe", "quantize.Static.weight_bits"): {"a": 4, "b": 8},
        ("recipe", "quantize.BiasCorrection"): {"b": "in it"},
    }


def test_a_step_that_stands_twice_is_numbered_and_another_order_is_told(big):
    once = replace(big, recipe=[{"Finetune": {"epochs": 1}}, {"quantize.Static": {}}])
    twice = replace(big, recipe=[{"quantize.Static": {}}, {"Finetune": {"epochs": 1}}, {"Finetune": {"epochs": 5}}])
    assert changed(once, twice) == {
        ("recipe", "Finetune 2"): {"b": "in it"},
        ("recipe", "order of the steps"): {
            "a": ["Finetune 1", "quantize.Static"],
            "b": ["quantize.Static", "Finetune 1"],
        },
    }


def test_data_source_machine_threads_versions_and_seed_are_told(big):
    other = replace(
        big,
        name="resnet56",
        data=big.data | {"calibration": "beef" * 16, "train": "cafe" * 16},
        seed=7,
        machine=replace(big.machine, memory_bytes=1),
        versions=big.versions | {"openvino": "2026.5"},
        source=replace(big.source, latency_ms=replace(big.source.latency_ms, threads=8)),
    )
    assert changed(big, other) == {
        ("source", "name"): {"a": "resnet20", "b": "resnet56"},
        ("data", "calibration"): {"a": "5e1f5e1f5e1f", "b": "beefbeefbeef"},
        ("data", "train"): {"b": "cafecafecafe"},
        ("machine", "memory_bytes"): {"a": 8_203_014_144, "b": 1},
        ("timing", "threads"): {"a": 2, "b": 8},
        ("versions", "openvino"): {"a": "2026.4.1", "b": "2026.5"},
        ("seed", "seed"): {"a": 0, "b": 7},
    }


def test_what_was_searched_is_told(big):
    row = SearchRow(trials=(), objective="latency_ms", stopped="converged", minutes=10)
    assert changed(big, replace(big, search=row)) == {
        ("search", "trials"): {"b": 0},
        ("search", "minutes"): {"b": 10},
        ("search", "stopped"): {"b": "converged"},
    }


def test_recipes_of_any_form_are_compared(big):
    odd = replace(big, recipe=["text", {"a": 1, "b": 2}, {"quantize.Static": None}, {"share.Codebook": {"x": {}}}])
    assert beside(a=big, b=odd).differences and beside(a=odd, b=odd).differences == ()


def test_all_of_it_is_plain_data_for_json(folders):
    comparison = records.compare([folders / "first", folders / "second" / "record.json"])
    data = json.loads(json.dumps(comparison.to_data()))
    assert [run["name"] for run in data["runs"]] == ["first", "second"]
    assert data["runs"][0]["figures"]["latency_ms"] == 0.281
    assert data["best"] == {} and data["conflicts"] == [] and data["differences"] == []


def test_runs_of_the_same_name_are_told_apart_by_more_of_their_paths(folders):
    for old, new in (("first", "x"), ("second", "y")):
        (folders / new).mkdir()
        (folders / old).rename(folders / new / "run")
    comparison = records.compare([folders / "x" / "run", folders / "y" / "run"])
    assert [run.name for run in comparison.runs] == ["x/run", "y/run"]


def test_fewer_than_two_and_the_same_twice_are_refused(folders):
    with raises_case(UsageError, "number"):
        records.compare([])
    with raises_case(UsageError, "number") as caught:
        records.compare([folders / "first"])
    assert "penjing measure" in caught.value.remedy
    with raises_case(UsageError, "twice"):
        records.compare([folders / "first", folders / "second" / ".." / "first"])


def test_what_is_no_finished_run_is_refused_and_named(folders):
    second = folders / "second" / "record.json"
    with raises_case(RecordError, "missing") as caught:
        records.compare([folders / "first", folders])
    assert str(folders) in caught.value.got
    second.write_text(second.read_text().replace('"format": 1', '"format": 99'))
    with raises_case(RecordError, "newer") as caught:
        records.compare([folders / "first", folders / "second"])
    assert str(folders / "second") in caught.value.got and "upgrade" in caught.value.remedy
    second.write_text("{")
    with raises_case(RecordError, "unreadable"):
        records.compare([folders / "first", folders / "second"])
    second.write_text('{"format": 1}')
    with raises_case(RecordError, "no-field") as caught:
        records.compare([folders / "first", folders / "second"])
    assert str(folders / "second") in caught.value.got
    second.unlink()
    (folders / "second" / "state").mkdir()
    with raises_case(RecordError, "unfinished") as caught:
        records.compare([folders / "first", folders / "second"])
    assert "--resume" in caught.value.remedy
