"""Questions about the metric: its direction, and what it looks at."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.cli import main
from penjing.errors import TaskError
from penjing.pipeline.questions import check_direction, says_higher
from penjing.report import verdict
from penjing.tasks.task import Task
from tests.raises import raises_case

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(64, 8, generator=GENERATOR)
TRUTH = nn.Linear(8, 3)
with torch.no_grad():
    TRUTH.weight.copy_(torch.randn(3, 8, generator=GENERATOR))
    TRUTH.bias.zero_()
TARGETS = TRUTH(INPUTS).detach().argmax(1).numpy()


def network():
    """It knows the truth."""
    classifier = nn.Sequential(nn.Linear(8, 3), nn.Identity())
    classifier[0].load_state_dict(TRUTH.state_dict())
    return classifier


def accuracy(predict):
    return float((predict(INPUTS.numpy()).argmax(1) == TARGETS).mean())


def cross_entropy(predict):
    return float(nn.functional.cross_entropy(torch.from_numpy(predict(INPUTS.numpy())), torch.from_numpy(TARGETS)))


def task(evaluate, **parts):
    return Task(example=INPUTS[:1], calibration=list(INPUTS.split(16)), evaluate=evaluate, **parts)


def compress(given, out, **options):
    settings = {"runtime": "onnxruntime", "seconds": 0.01, "threads": 1, "out": out, **options}
    return pj.compress(network(), given, "minimize size_bytes", **settings)


LOWER = "loss val_loss valLoss test-loss error top1_error WER cer mae MSE rmse perplexity ppl EER fid log_loss".split()
HIGHER = "accuracy top1_acc F1 f1-score AUROC mIoU mAP BLEU rouge psnr SSIM dice recall precision R2".split()


@pytest.mark.parametrize("name", [*LOWER, "word error rate", "mean absolute error", "cross-entropy"])
def test_a_loss_that_is_to_be_higher_draws_a_question(name):
    assert says_higher(name) is False
    with raises_case(TaskError, "direction") as caught:
        check_direction(task(accuracy, metric_name=name))
    assert "Task(higher_is_better=False)" in caught.value.remedy
    assert check_direction(task(accuracy, metric_name=name, higher_is_better=False)) is None
    insisting = f"{name}, higher is better"
    assert insisting in caught.value.remedy
    assert check_direction(task(accuracy, metric_name=insisting)) is None


@pytest.mark.parametrize("name", [*HIGHER, "mean average precision", "cosine similarity"])
def test_an_accuracy_that_is_to_be_lower_draws_one_too(name):
    assert says_higher(name) is True
    with raises_case(TaskError, "direction") as caught:
        check_direction(task(accuracy, metric_name=name, higher_is_better=False))
    assert "Task(higher_is_better=True)" in caught.value.remedy
    assert check_direction(task(accuracy, metric_name=name)) is None


@pytest.mark.parametrize(
    "name", ["metric", "score", "negative loss", "neg_mse", "-WER", "1 - cer", "lossless share", "error reduction"]
)
def test_a_name_that_says_nothing_passes_either_way(name):
    for higher in (True, False):
        assert check_direction(task(lambda predict: 1.0, metric_name=name, higher_is_better=higher)) is None


def test_a_functions_name_is_told_and_does_not_block():
    def mean_squared_error(predict):
        return 1.0

    assert "'mean_squared_error'" in check_direction(task(mean_squared_error)).text
    assert check_direction(task(mean_squared_error, metric_name="score")) is None
    assert check_direction(task(mean_squared_error, higher_is_better=False)) is None


def test_the_question_comes_before_anything_is_run(tmp_path):
    class Untouched(nn.Module):
        def forward(self, x):
            raise AssertionError("it was run")

    with raises_case(TaskError, "direction"):
        pj.compress(Untouched(), task(cross_entropy, metric_name="loss"), out=tmp_path / "run")
    with raises_case(TaskError, "direction"):
        pj.apply(pj.Recipe(pj.quantize.Static()), Untouched(), task(cross_entropy, metric_name="loss"))


def test_the_command_line_asks_too(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom penjing import Task\nnetwork = torch.nn.Linear(4, 2)\n"
        "task = Task(example=torch.zeros(1, 4), evaluate=lambda predict: 1.0, metric_name='loss')\n"
    )
    spec = str(tmp_path / "net.py")
    assert main(["compress", f"{spec}:network", "--task", f"{spec}:task", "--out", str(tmp_path / "run")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "is 'loss' really better when it is higher?" in said and "higher_is_better=False" in said


def test_a_metric_that_destroyed_weights_improve_is_told_and_does_not_block(tmp_path):
    wrong = compress(task(cross_entropy, metric_name="score"), tmp_path / "wrong")
    (told,) = [text for text in wrong.record.warnings if "weights shuffled" in text]
    assert "higher_is_better=False" in told and "'score'" in told
    right = compress(task(cross_entropy, metric_name="score", higher_is_better=False), tmp_path / "right")
    assert right.record.warnings == ()
    assert compress(task(accuracy, metric_name="accuracy"), tmp_path / "plain").record.warnings == ()


def test_a_metric_that_does_not_look_at_the_answers_is_told_and_stands_in_the_verdict(tmp_path):
    def blind(predict):
        predict(INPUTS.numpy())
        return 0.93

    record = compress(task(blind, metric_name="accuracy"), tmp_path / "blind").record
    (told,) = [text for text in record.warnings if "weights shuffled" in text]
    assert "look at what `predict` answers" in told and "93.00 %" in told
    assert "shuffled weights" in record.goal.doubt and record.goal.doubt in record.goal.reason
    assert verdict.of(record).title.endswith("metric in doubt")
    sound = compress(task(accuracy, metric_name="accuracy"), tmp_path / "sound").record
    assert sound.goal.doubt == "" and verdict.of(sound).title == "Goal met"


def test_the_destroyed_network_changes_nothing_of_the_run(tmp_path):
    def drawing(predict):  # a metric that draws random numbers: one evaluation more must not move them
        np.random.rand()
        return cross_entropy(predict)

    results = [
        compress(task(drawing, metric_name="score", higher_is_better=better), tmp_path / str(better))
        for better in (True, False)
    ]
    hashes = [[c.sha256 for c in result.record.candidates] for result in results]
    assert hashes[0] == hashes[1]


def test_a_metric_that_never_calls_predict_is_an_error(tmp_path):
    with raises_case(TaskError, "unread") as caught:
        compress(task(lambda predict: 0.93, metric_name="accuracy"), tmp_path / "run")
    assert caught.value.what.endswith(" the source")


def test_one_that_calls_it_for_the_source_alone_is_an_error_too(tmp_path):
    calls = []

    def once(predict):
        calls.append(1)
        return accuracy(predict) if len(calls) <= 2 else 0.93  # the source, and the source destroyed

    with raises_case(TaskError, "unread") as caught:
        compress(task(once, metric_name="accuracy"), tmp_path / "run")
    assert "onnxruntime-" in caught.value.what


def test_other_data_for_an_artifact_than_for_the_source_is_told(tmp_path):
    def sampling(predict):
        rows = torch.from_numpy(np.random.permutation(64)[:40])
        return float((predict(INPUTS[rows].numpy()).argmax(1) == TARGETS[rows]).mean())

    def shuffling(predict):
        rows = random.sample(range(64), 64)
        parts = [rows[i : i + 10] for i in range(0, 64, 10)]
        right = sum(int((predict(INPUTS[part].numpy()).argmax(1) == TARGETS[part]).sum()) for part in parts)
        return right / 64

    record = compress(task(sampling, metric_name="accuracy"), tmp_path / "sampling").record
    (told,) = [text for text in record.warnings if "other data than the source" in text]
    assert all(c.name in told for c in record.candidates)
    assert "with other values" in told
    assert record.goal.doubt == "evaluate showed it other data than the source"
    assert compress(task(shuffling, metric_name="accuracy"), tmp_path / "shuffling").record.warnings == ()


def test_evaluate_that_shows_the_chosen_one_other_data_than_the_source_is_told(tmp_path):
    seen = []

    def shrinking(predict):
        seen.append(1)
        rows = 64 if len(seen) == 1 else 32
        return float((predict(INPUTS[:rows].numpy()).argmax(1) == TARGETS[:rows]).mean())

    result = compress(task(shrinking, select=accuracy, metric_name="accuracy"), tmp_path / "run")
    (told,) = result.record.warnings
    assert told.startswith(f"evaluate showed {result.record.goal.chosen} other data")
    assert "32 samples, and 64 to the source" in told
    assert result.record.goal.doubt == "evaluate showed it other data than the source"
    assert json.loads((tmp_path / "run" / "record.json").read_text())["warnings"] == [told]
