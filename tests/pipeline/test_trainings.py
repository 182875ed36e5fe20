import json

from penjing.pipeline import trainings


def test_what_a_crash_left_is_read_once(tmp_path):
    curve = [{"step": 1, "loss": 2.0, "rate": 0.1, "terms": {"labels": 2.0}}, {"step": 2, "loss": 1, "rate": 0.0}]
    other = [{"step": 5, "loss": 0.5, "rate": 0.2}]
    events = [
        {"kind": "stage", "name": "Finetune"},
        {"kind": "training", "steps": 2, **curve[0]},
        {"kind": "trained", "curve": curve},
        {"kind": "stage", "name": "Finetune"},  # the process ended before the step was kept, and came again
        {"kind": "trained", "curve": curve},
        {"kind": "stage", "name": "QAT for openvino"},
        {"kind": "trained", "curve": other},
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(json.dumps(e) for e in events) + '\n{"kind": "trai', encoding="utf-8")
    found = trainings.read(path)
    assert [(t.name, [p.step for p in t.curve]) for t in found] == [("Finetune", [1, 2]), ("QAT for openvino", [5])]
    assert found[0].curve[0].terms == {"labels": 2.0} and found[0].curve[1].loss == 1.0
