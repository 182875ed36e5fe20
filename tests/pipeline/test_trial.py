import numpy as np
import pytest
import torch

from penjing import measure
from penjing.network.capture import capture_network
from penjing.pipeline.building import build
from penjing.pipeline.trial import REPEATS, Trial
from penjing.steps.draft import Draft
from penjing.tasks.task import Task


class Timing:
    def __init__(self, rounds):
        self.rounds = rounds


@pytest.fixture
def trial(tmp_path):
    task = Task(example=torch.zeros(2, 4))
    network = capture_network(torch.nn.Sequential(torch.nn.Linear(4, 4)), *task.call())
    build(Draft(network), "torch", "fp32", task, {"kind": "tensor"}, tmp_path)
    return Trial(runtime="torch", source=network, stored=tmp_path, task=task, threads=1, batch=1, seconds=0.01)


def told(monkeypatch, *answers):
    """Each call of `measure.compare` gives the next answer: rounds of the first draft, and of the second."""
    calls = []

    def compare(targets, **settings):
        calls.append(settings)
        return dict(zip([t.name for t in targets], map(Timing, answers[len(calls) - 1]), strict=True))

    monkeypatch.setattr(measure, "compare", compare)
    return calls


def test_what_disturbs_both_drafts_of_a_round_cancels(trial, monkeypatch):
    calls = told(monkeypatch, ([1.0, 1.0, 1.4, 1.4, 1.0], [2.0, 2.0, 2.8, 2.8, 2.0]))
    draft = Draft(trial.source)
    assert trial.latency([draft, draft], "fp32") == pytest.approx([1.0, 2.0])
    assert len(calls) == 1


def test_what_scatters_is_measured_again(trial, monkeypatch):
    wild = ([1.0] * 4, [1.0, 2.0, 3.0, 4.0])
    steady = ([1.0] * 12, [2.0] * 12)
    calls = told(monkeypatch, wild, steady)
    draft = Draft(trial.source)
    assert trial.latency([draft, draft], "fp32") == pytest.approx([1.0, 2.0])
    assert len(calls) == 2
    calls = told(monkeypatch, *[wild] * REPEATS)
    assert trial.latency([draft, draft], "fp32")[1] == pytest.approx(np.median(wild[1]))
    assert len(calls) == REPEATS
