import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import CalibrationError, TaskError
from penjing.tasks.opening import as_task, open_task
from penjing.tasks.task import Task, agreement_task, calibration_calls, numpy_predictor
from tests.raises import raises_case


@pytest.mark.parametrize(
    ("example", "got"),
    [
        (3, "int"),
        ("text", "str"),
        ((), "()"),
        ({}, "{}"),
        ([1, 2], "int, int"),
        ({"flag": True}, "bool"),
        (None, "NoneType"),
    ],
)
def test_an_example_without_tensors_is_refused(example, got):
    with raises_case(TaskError, "no-tensor") as refusal:
        Task(example=example)
    assert refusal.value.got == got and "Task(example=" in refusal.value.remedy


def test_an_array_is_taken_as_a_tensor():
    args, _ = Task(example=np.zeros((1, 3), np.float32)).call()
    assert isinstance(args[0], torch.Tensor)


def test_an_evaluate_that_is_no_function_is_refused():
    with raises_case(TaskError, "not-callable") as refusal:
        Task(example=torch.zeros(1, 2), evaluate=0.9)
    assert refusal.value.got == "float" and "evaluate=" in refusal.value.remedy


def test_dynamic_must_map_axes():
    with raises_case(TaskError, "axes") as refusal:
        Task(example=torch.zeros(1, 2), dynamic={"x": [0]})
    assert refusal.value.got == "[0]" and "dynamic=" in refusal.value.remedy


# --- opening ----------------------------------------------------------------------------------------------------

TASK_FILE = """
    import torch
    import beside
    from penjing.tasks.task import Task

    value = Task(example=torch.zeros(1, beside.WIDTH), name="value")
    number = 3

    def make():
        import lazily
        return Task(example=torch.zeros(1, lazily.WIDTH), name="made")

    def broken():
        return {}["missing"]
"""


@pytest.fixture
def task_file(tmp_path):
    (tmp_path / "task.py").write_text(textwrap.dedent(TASK_FILE))
    (tmp_path / "beside.py").write_text("WIDTH = 4")
    (tmp_path / "lazily.py").write_text("WIDTH = 5")
    return tmp_path / "task.py"


def test_a_task_or_a_function_that_returns_one(task_file):
    assert open_task(f"{task_file}:value").name == "value"
    assert open_task(f"{task_file}:make").call()[0][0].shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "code", "field", "word"),
    [
        ("number", "not-a-task", "got", "int"),
        ("mak", "unknown-name", "remedy", "did you mean make?"),
        ("broken", "raised", "got", "task.py:14 in broken"),
    ],
)
def test_a_file_that_gives_no_task(task_file, name, code, field, word):
    with raises_case(TaskError, code) as caught:
        open_task(f"{task_file}:{name}")
    assert word in getattr(caught.value, field)


def test_a_module_on_the_path(tmp_path, monkeypatch):
    package = tmp_path / "penjing_test_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tasks.py").write_text(
        "import torch\nfrom penjing.tasks.task import Task\ntask = Task(example=torch.zeros(1))"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_task("penjing_test_package.tasks:task"), Task)
    with raises_case(TaskError, "no-module") as refusal:
        open_task("penjing_test_package.nothing:task")
    assert "penjing_test_package.nothing" in refusal.value.got
    assert "penjing_test_package/nothing.py" in refusal.value.remedy


def test_missing_things_are_suggested(task_file):
    with raises_case(TaskError, "missing") as caught:
        open_task(f"{task_file.parent / 'tusk.py'}:make")
    assert "task.py" in caught.value.remedy
    with raises_case(TaskError, "no-name") as caught:
        open_task(str(task_file))
    assert "make, broken" in caught.value.remedy
    with raises_case(TaskError, "missing"):
        open_task(str(task_file.parent / "data.csv"))


# --- agreement --------------------------------------------------------------------------------------------------


def linear(rows=3):
    torch.manual_seed(0)
    return nn.Linear(4, rows)


def batches(count, size=2):
    return [torch.randn(size, 4, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.mark.parametrize(("count", "places"), [(2, [0]), (3, [0, 1]), (4, [0, 1, 3]), (7, [0, 1, 3, 4, 6])])
def test_every_third_batch_is_held_out(count, places):
    data = batches(count)
    judged = agreement_task(Task(example=data[0], calibration=data), linear())
    remaining = [args[0] for args, _ in calibration_calls(judged)]
    assert len(remaining) == len(places) and all(
        torch.equal(a, data[i]) for a, i in zip(remaining, places, strict=True)
    )
    seen = []
    predict = numpy_predictor(linear())
    judged.evaluate(lambda x: (seen.append(x), predict(x))[1])
    assert len(seen) == count - len(places)
    assert not any(np.array_equal(x, a.numpy()) for x in seen for a in remaining)


def test_a_single_batch_is_split():
    data = batches(1, size=7)
    judged = agreement_task(Task(example=data[0], calibration=data), linear())
    ((args, _),) = calibration_calls(judged)
    assert torch.equal(args[0], data[0][[0, 1, 3, 4, 6]])
    seen = []
    predict = numpy_predictor(linear())
    assert judged.evaluate(lambda x: (seen.append(x), predict(x))[1]) == 1.0
    np.testing.assert_array_equal(seen[0], data[0][[2, 5]].numpy())


@pytest.mark.parametrize(("size", "dynamic"), [(1, None), (6, {})])
def test_too_little_to_hold_out(size, dynamic):
    data = batches(1, size)
    with raises_case(CalibrationError, "too-little"):
        agreement_task(Task(example=data[0], calibration=data, dynamic=dynamic), linear())


def test_agreement_counts_equal_classes():
    data = batches(9, size=10)
    source = linear()
    judged = agreement_task(Task(example=data[0], calibration=data, higher_is_better=False), source)
    assert judged.metric_name == "agreement with the source" and judged.higher_is_better
    held = torch.cat([data[2], data[5], data[8]])
    assert judged.evaluate(numpy_predictor(source)) == 1.0

    def other(x):
        scores = numpy_predictor(source)(x).copy()
        scores[:, 0] += 1
        return scores

    want = (source(held).argmax(1) == torch.from_numpy(other(held.numpy())).argmax(1)).float().mean().item()
    assert 0 < want < 1
    assert judged.evaluate(other) == pytest.approx(want)
    assert judged.evaluate(lambda x: np.full((len(x), 3), np.nan, np.float32)) == 0.0


def test_other_outputs_are_compared_by_their_direction():
    data = batches(3)
    source = linear(rows=1)
    judged = agreement_task(Task(example=data[0], calibration=data), source)
    assert judged.metric_name == "cosine similarity with the source"
    predict = numpy_predictor(source)
    assert judged.evaluate(predict) == pytest.approx(1.0)
    assert judged.evaluate(lambda x: -predict(x)) == pytest.approx(-1.0)


def test_keyword_inputs_and_dict_outputs_agree():
    class Net(nn.Module):
        def forward(self, ids, mask):
            return {"logits": torch.stack([ids.float().sum(1), mask.float().sum(1)], 1), "extra": None}

    data = [{"ids": torch.randint(0, 9, (4, 3)), "mask": torch.ones(4, 3, dtype=torch.bool)} for _ in range(3)]
    judged = agreement_task(Task(example=data[0], calibration=data), Net())
    assert judged.evaluate(numpy_predictor(Net())) == 1.0
    assert all(set(kwargs) == {"ids", "mask"} for _, kwargs in calibration_calls(judged))


def test_no_calibration_no_agreement():
    with raises_case(CalibrationError, "no-calibration") as refusal:
        agreement_task(Task(example=torch.zeros(1, 4)), linear())
    assert refusal.value.got == "Task.calibration is None"


@pytest.mark.parametrize("words", ["x", "nowhere/data.npz", Path("absent.py")])
def test_words_that_name_no_task_are_refused_by_compress(words, tmp_path):
    with raises_case(TaskError, "missing"):
        pj.compress(torch.nn.Linear(2, 2), words, out=tmp_path / "run")


def test_what_is_not_a_task_is_refused_by_compress(tmp_path):
    with raises_case(TaskError, "not-a-task") as caught:
        pj.compress(torch.nn.Linear(2, 2), torch.zeros(1, 2), out=tmp_path / "run")
    assert caught.value.got == "Tensor"
    with raises_case(TaskError, "not-a-task") as caught:
        pj.apply(pj.Recipe(pj.quantize.Static()), torch.nn.Linear(2, 2), None)
    assert caught.value.got == "NoneType"


def test_words_open_a_task_for_compress_too(tmp_path):
    (tmp_path / "mine.py").write_text("import torch, penjing as pj\ntask = pj.Task(example=torch.zeros(1, 2))\n")
    assert as_task(f"{tmp_path}/mine.py:task").example.shape == (1, 2)
    task = pj.Task(example=torch.zeros(1, 2))
    assert as_task(task) is task
