"""Where `select` chooses, `evaluate` has the last word: a choice that misses the goal there makes way for the next."""

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.pipeline.judging import READS

OPTIONS = {"runtime": "onnxruntime", "threads": 1, "seconds": 0.05, "recipe": pj.quantize.Static()}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32)).eval()


def task(network, select, evaluate):
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return pj.Task(example=x[:1], calibration=[x[:32], x[32:]], select=select, evaluate=evaluate)


def near(network, tolerance):
    """1 where the outputs are the network's within a tolerance, else 0.5."""
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = network(x).detach().numpy()

    def metric(predict):
        return 1.0 if np.abs(predict(x.numpy()) - expected).max() < tolerance else 0.5

    return metric


def test_the_next_best_is_chosen_where_the_best_misses_the_goal(network, tmp_path):
    """Integers are too far from the source for `evaluate`, and `select` does not see it."""
    mine = task(network, near(network, 10.0), near(network, 2e-3))
    result = pj.compress(network, mine, "minimize size_bytes, drop<=1%", out=tmp_path, **OPTIONS)
    record = result.record
    smallest = min(record.candidates, key=lambda c: c.measured.size_bytes)
    assert smallest.name == "onnxruntime-int8" and smallest.met
    assert result.met and record.chosen.name == "onnxruntime-fp16" and record.artifact.metric == 1.0
    assert "onnxruntime-int8 met it on Task.select alone: drop 50 % is above 1 %" in record.goal.reason
    assert [cost.name for cost in record.steps if "verdict" in cost.name] == [
        "verdict on onnxruntime-int8",
        "verdict on onnxruntime-fp16",
    ]


def test_where_all_miss_the_nearest_is_kept_and_the_goal_is_missed(network, tmp_path):
    """No more than a few are read: else the test data would choose."""
    values = iter([1.0, 0.5, 0.9, 0.8, *[1.0] * 9])
    mine = task(network, lambda predict: float(predict(np.zeros((1, 1, 8, 8), np.float32)).shape[0]), None)
    x = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)

    def evaluate(predict):
        predict(x)
        return next(values)

    mine = task(network, mine.select, evaluate)
    result = pj.compress(
        network, mine, "minimize size_bytes, drop<=1%", out=tmp_path, **(OPTIONS | {"runtime": "onnxruntime,openvino"})
    )
    record = result.record
    read = [cost.name for cost in record.steps if "verdict" in cost.name]
    assert len(read) == READS and not result.met
    assert record.artifact.metric == 0.9 and f"verdict on {record.goal.chosen}" == read[1]
    assert record.goal.reason.count("on Task.select alone") == READS
