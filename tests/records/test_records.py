import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing import records
from penjing.errors import RecordError
from penjing.records import (
    FORMAT,
    Candidate,
    Energy,
    GoalResult,
    Latency,
    LayerRow,
    Machine,
    Measured,
    Parity,
    ParityRow,
    Record,
    Rejection,
    StepCost,
    Zeros,
    from_dict,
    to_json,
)
from penjing.records.files import write_text
from tests.raises import raises_case

NUMBER = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 10**15)
TEXT = st.text(max_size=8)
NAMES = st.dictionaries(TEXT, TEXT, max_size=2)


def some(strategy, largest=2):
    return st.lists(strategy, max_size=largest).map(tuple)


LATENCY = st.builds(
    Latency,
    median=NUMBER,
    p95=NUMBER,
    spread=NUMBER,
    batch=COUNT,
    threads=COUNT,
    calls=COUNT,
    rounds=some(NUMBER),
    steady=st.booleans(),
    doubt=TEXT,
)
MEASURED = st.builds(
    Measured,
    metric=st.none() | NUMBER,
    latency_ms=st.none() | LATENCY,
    throughput_per_s=st.none() | NUMBER,
    size_bytes=st.none() | COUNT,
    energy_mj=st.none() | st.builds(Energy, value=NUMBER, method=st.sampled_from(["measured", "model"])),
)
LAYERS = some(st.builds(LayerRow, name=TEXT, kind=TEXT, macs=COUNT, executed=st.none() | TEXT, reason=st.none() | TEXT))
ROW = st.builds(
    ParityRow, output=TEXT, columns=TEXT, snr_db=NUMBER, largest=NUMBER, equal=st.none() | NUMBER, fault=TEXT,
    limit_db=st.none() | NUMBER,
)  # fmt: skip
PARITY = st.builds(
    Parity, against=TEXT, largest=NUMBER, mean=NUMBER, snr_db=NUMBER, agreement=st.none() | NUMBER, samples=COUNT,
    rows=some(ROW),
)  # fmt: skip
REJECTION = st.builds(Rejection, reason=TEXT, snr_db=st.none() | NUMBER, operator=st.none() | TEXT)
ZEROS = st.builds(Zeros, count=COUNT, weights=COUNT, speedup=NUMBER, low=NUMBER, high=NUMBER)
CANDIDATE = st.builds(
    Candidate,
    name=TEXT,
    runtime=TEXT,
    precision=TEXT,
    folder=TEXT,
    measured=MEASURED,
    parity=some(PARITY),
    drop=st.none() | NUMBER,
    met=st.booleans(),
    integer_operators=st.dictionaries(TEXT, COUNT, max_size=2),
    layers=LAYERS,
    sha256=NAMES,
    rejection=st.none() | REJECTION,
)
RECORD = st.builds(
    Record,
    penjing=TEXT,
    versions=NAMES,
    machine=st.builds(
        Machine,
        processor=TEXT,
        instruction_sets=some(TEXT),
        cores=COUNT,
        threads=COUNT,
        memory_bytes=COUNT,
        system=TEXT,
        python=TEXT,
    ),
    seed=st.integers(),
    created=TEXT,
    name=TEXT,
    task=TEXT,
    data=NAMES,
    recipe=st.lists(st.dictionaries(TEXT, st.none() | st.booleans() | NUMBER | TEXT | st.lists(TEXT)), max_size=2),
    metric_name=TEXT,
    higher_is_better=st.booleans(),
    source=MEASURED,
    artifact=st.none() | MEASURED,
    candidates=some(CANDIDATE),
    rejected=some(CANDIDATE),
    goal=st.builds(GoalResult, text=TEXT, met=st.booleans(), reason=TEXT, chosen=st.none() | TEXT, pareto=some(TEXT)),
    layers=LAYERS,
    steps=some(st.builds(StepCost, name=TEXT, wall_s=NUMBER, peak_memory_bytes=COUNT)),
    warnings=some(TEXT),
    zeros=st.none() | ZEROS,
    format=st.just(FORMAT),
)


def record(**fields):
    nothing = Measured(metric=0.5)
    machine = Machine(
        processor="p", instruction_sets=("avx2",), cores=2, threads=2, memory_bytes=8, system="s", python="3.11"
    )
    candidates = (
        Candidate(name="a", runtime="openvino", precision="int8", folder="candidates/a", measured=nothing),
        Candidate(name="b", runtime="openvino", precision="fp32", folder="candidates/b", measured=nothing),
    )
    values = dict(
        penjing="0.1.0",
        versions={"torch": "2.13.0"},
        machine=machine,
        seed=0,
        created="2025-01-01T00:00:00+00:00",
        name="net",
        task="task",
        data={},
        recipe=[{"quantize.Static": {"exclude": []}}],
        metric_name="accuracy",
        higher_is_better=True,
        source=nothing,
        artifact=nothing,
        candidates=candidates,
        goal=GoalResult(text="drop<=1%", met=True, reason="b: fine", chosen="b"),
        layers=(),
        steps=(),
    )
    return Record(**{**values, **fields})


class TestRoundTrip:
    @given(RECORD)
    def test_every_bit_comes_back(self, record):
        text = to_json(record)
        again = from_dict(Record, json.loads(text))
        assert again == record
        assert to_json(again) == text

    def test_through_a_file_and_through_its_folder(self, tmp_path):
        original = record(name="盆景")
        write_text(tmp_path / "record.json", to_json(original))
        assert records.read(tmp_path) == original
        assert records.read(str(tmp_path / "record.json")) == original

    def test_the_chosen_candidate_is_found_by_its_name(self):
        assert record().chosen.precision == "fp32"
        assert record(goal=GoalResult(text="", met=False, reason="", chosen=None)).chosen is None

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_json_has_no_word_for_is_refused(self, value):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json(record(source=Measured(metric=value)))

    def test_whole_numbers_are_read_as_floats_where_a_float_belongs(self):
        read = from_dict(Measured, {"metric": 1})
        assert read == Measured(metric=1.0)
        assert isinstance(read.metric, float)


class TestReading:
    def write(self, folder, change):
        data = json.loads(to_json(record()))
        change(data)
        (folder / "record.json").write_text(json.dumps(data))
        return folder

    def refusal(self, folder, code):
        with raises_case(RecordError, code) as caught:
            records.read(folder)
        return caught.value

    @pytest.mark.parametrize("name", ["seed", "machine", "goal", "candidates", "metric_name"])
    def test_a_missing_field_is_named(self, tmp_path, name):
        error = self.refusal(self.write(tmp_path, lambda data: data.pop(name)), "no-field")
        assert (error.field, error.expected) == ("Record", name)

    def test_a_missing_field_deep_inside_is_named_with_its_place(self, tmp_path):
        folder = self.write(tmp_path, lambda data: data["candidates"][1].pop("runtime"))
        error = self.refusal(folder, "no-field")
        assert (error.field, error.expected) == ("Record.candidates[1]", "runtime")

    @pytest.mark.parametrize(
        ("place", "value", "field", "got", "expected"),
        [
            ("seed", "0", "Record.seed", "'0'", "int"),
            ("seed", True, "Record.seed", "True", "int"),
            ("seed", 0.5, "Record.seed", "0.5", "int"),
            ("name", 3, "Record.name", "3", "str"),
            ("higher_is_better", 1, "Record.higher_is_better", "1", "bool"),
            ("machine", [], "Record.machine", "list", "a JSON object"),
            ("recipe", 5, "Record.recipe", "int", "a JSON list"),
            ("format", "2", "Record.format", "'2'", "int"),
            ("candidates", {}, "Record.candidates", "dict", "a JSON list"),
            ("versions", [], "Record.versions", "list", "a JSON object"),
            ("versions", {"torch": 2}, "Record.versions.torch", "2", "str"),
            ("source", {"metric": "good"}, "Record.source.metric", "'good'", "float"),
            ("source", {"metric": True}, "Record.source.metric", "True", "float"),
        ],
    )
    def test_a_value_of_another_type_is_named_with_its_place(self, tmp_path, place, value, field, got, expected):
        error = self.refusal(self.write(tmp_path, lambda data: data.update({place: value})), "type")
        assert (error.field, error.got, error.expected) == (field, got, expected)

    def test_fields_of_the_future_are_passed_over(self, tmp_path):
        folder = self.write(tmp_path, lambda data: data.update(weather="fine") or data["machine"].update(colour="red"))
        assert records.read(folder) == record()

    def test_fields_with_a_default_may_be_missing(self, tmp_path):
        folder = self.write(tmp_path, lambda data: data.pop("warnings") or data["candidates"][0].pop("sha256"))
        assert records.read(folder) == record()

    def test_a_newer_format_is_refused(self, tmp_path):
        error = self.refusal(self.write(tmp_path, lambda data: data.update(format=FORMAT + 1)), "newer")
        assert "pip install --upgrade penjing" in error.remedy

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe{}", b"\x80\x04."])
    def test_what_is_no_record_is_refused(self, tmp_path, content):
        (tmp_path / "record.json").write_bytes(content)
        code = "type" if content in (b"[]", b"3", b"null") else "unreadable"
        assert self.refusal(tmp_path, code).code == code

    def test_a_missing_record_says_where_one_is(self, tmp_path):
        assert "--resume" in self.refusal(tmp_path, "missing").remedy


class TestPlainData:
    @dataclass(frozen=True)
    class Some:
        number: float | None
        words: tuple[str, ...] = ()
        anything: dict[str, Any] = field(default_factory=dict)

    @pytest.mark.parametrize("data", [{"number": None}, {"number": 1.5, "words": ["a"], "anything": {"b": [1, None]}}])
    def test_any_frozen_dataclass_is_read(self, data):
        instance = from_dict(self.Some, data)
        assert from_dict(self.Some, json.loads(to_json(instance))) == instance
        assert instance.words == tuple(data.get("words", ()))

    def test_plain_values_are_written_as_they_are(self):
        assert json.loads(to_json({"a": [1, "é"]})) == {"a": [1, "é"]}
        assert "é" in to_json({"a": "é"})

    def test_keys_stand_in_the_order_of_the_fields(self):
        assert list(json.loads(to_json(self.Some(1.0)))) == ["number", "words", "anything"]


def test_a_record_cannot_be_changed():
    frozen = record()
    with pytest.raises(AttributeError):
        frozen.seed = 1
    assert replace(frozen, seed=1) != frozen


def test_a_record_from_before_parity_was_judged_is_read():
    whole = record()
    plain = json.loads(to_json(whole))
    del plain["rejected"]
    for candidate in plain["candidates"]:
        del candidate["rejection"], candidate["doubts"]
    assert from_dict(Record, plain) == whole and whole.rejected == ()
    old = {"against": "source", "largest": 1.0, "mean": 0.1, "snr_db": 30.0, "agreement": None, "samples": 4}
    assert from_dict(Parity, old).rows == () and from_dict(Parity, old).worst is None


def test_a_rejected_candidate_is_found_where_it_was_chosen():
    candidates = record().candidates
    left = replace(candidates[0], rejection=Rejection(reason="far away"))
    whole = record(candidates=(), rejected=(left,), goal=GoalResult(text="", met=False, reason="", chosen="a"))
    assert whole.chosen == left
