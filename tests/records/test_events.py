import datetime
import json

from penjing.errors import OutputError
from penjing.records.events import Events
from tests.raises import raises_case


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_event_is_a_line_of_json_and_reaches_every_listener(tmp_path):
    heard, also = [], []
    events = Events(tmp_path / "events.jsonl", (heard.append, also.append))
    events("stage", name="capture")
    events("candidate", name="openvino-int8", metric=0.93, size_bytes=12)
    assert lines(tmp_path / "events.jsonl") == heard == also
    assert [event["kind"] for event in heard] == ["stage", "candidate"]
    assert heard[1]["metric"] == 0.93


def test_the_time_is_in_utc_and_does_not_go_back():
    heard = []
    events = Events(listeners=(heard.append,))
    for number in range(3):
        events("stage", name=str(number))
    times = [datetime.datetime.fromisoformat(event["time"]) for event in heard]
    assert all(time.utcoffset() == datetime.timedelta(0) for time in times)
    assert times == sorted(times)


def test_text_of_any_language_stays_one_line(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events("warning", text="盆景 – a\nb")
    assert lines(tmp_path / "events.jsonl")[0]["text"] == "盆景 – a\nb"


def test_progress_is_thinned_but_never_loses_its_end(tmp_path):
    heard = []
    events = Events(tmp_path / "events.jsonl", (heard.append,))
    for done in range(1, 501):
        events("progress", label="calibrate", done=done, total=500)
    assert len(heard) < 250
    assert heard[0]["done"] == 1
    assert heard[-1]["done"] == 500
    assert lines(tmp_path / "events.jsonl") == heard


def test_progress_of_one_label_does_not_thin_another():
    heard = []
    events = Events(listeners=(heard.append,))
    for label in ("a", "b", "c"):
        events("progress", label=label, done=1, total=9)
    assert [event["label"] for event in heard] == ["a", "b", "c"]


def test_other_events_are_never_thinned():
    heard = []
    events = Events(listeners=(heard.append,))
    for number in range(50):
        events("stage", name=number)
    assert len(heard) == 50


def test_a_resumed_run_appends(tmp_path):
    for name in ("first", "second"):
        Events(tmp_path / "events.jsonl")("stage", name=name)
    assert [event["name"] for event in lines(tmp_path / "events.jsonl")] == ["first", "second"]


def test_a_file_that_cannot_be_written_is_an_output_error(tmp_path):
    with raises_case(OutputError, "unwritable") as caught:
        Events(tmp_path / "missing" / "events.jsonl")("stage", name="capture")
    assert "--out" in caught.value.remedy


def test_without_a_file_or_listeners_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Events()("stage", name="capture")
    assert list(tmp_path.iterdir()) == []
