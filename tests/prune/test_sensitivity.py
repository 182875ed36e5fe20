"""Scans of single groups, and the ratios that follow from them."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from penjing.analyze.coupling import couple
from penjing.network.capture import capture_network
from penjing.prune import Channels
from penjing.prune.channels import remove
from penjing.prune.sensitivity import FILE, Curve, scan
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task


class Uneven(nn.Module):
    """Two hidden layers of one size; of the first all neurons matter, of the second a quarter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        with torch.no_grad():
            self.out.weight[:, 8:] *= 1e-3

    def forward(self, x):
        return self.out(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.fixture
def uneven():
    torch.manual_seed(1)
    x = torch.randn(64, 6)
    network = capture_network(Uneven().eval(), (x[:2],))
    task = Task(example=x[:2], calibration=[x])
    return network, task, couple(network, task.call())


def ranked(coupling):
    return {name: list(range(group.units))[::-1] for name, group in coupling.groups.items()}


def test_a_curve_is_what_the_outputs_of_the_pruned_network_lose(uneven):
    network, task, coupling = uneven
    curves = scan(network, coupling, ranked(coupling), Context(task=task), batches=1, shares=(0.25, 0.5))
    assert {name: curve.removed for name, curve in curves.items()} == {"a": (8, 16), "b": (8, 16)}
    x = task.calibration[0]
    for name, curve in curves.items():
        for count, noise in zip(curve.removed, curve.noise, strict=True):
            pruned = remove(Draft(network), coupling, {name: ranked(coupling)[name][:count]}).network
            with torch.no_grad():
                expected, got = network(x).double(), pruned(x).double()
            assert noise == pytest.approx(float((got - expected).square().sum() / expected.square().sum()), rel=1e-9)
    assert curves["b"].noise[0] < 1e-4 < curves["a"].noise[0]


def test_later_units_never_look_cheaper():
    curve = Curve(10, (2, 5, 8), (0.1, 1.0, 1.1))
    marginal = curve.marginal()
    assert marginal[:2] == pytest.approx(0.05) and marginal[2:] == pytest.approx(0.3)
    assert np.all(np.diff(Curve(4, (1, 2), (0.5, 0.2)).marginal()) >= 0)


def test_ratios_follow_from_it_and_meet_the_target(uneven):
    network, task, _ = uneven
    step = Channels(params=0.6, scope="sensitivity", criterion="l2", round_to=1)
    small = step(Draft(network), Context(task=task)).network
    assert small.b.out_features < 20 and small.a.out_features >= 30
    left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in network.parameters())
    assert 0.55 < left <= 0.6


def test_a_finished_scan_is_read_again_and_another_networks_is_not(uneven, tmp_path):
    network, task, coupling = uneven
    path = tmp_path / FILE
    first = scan(network, coupling, ranked(coupling), Context(task=task), batches=1, file=path)
    told = json.loads(path.read_text())
    told["groups"]["a"]["noise"][0] = 0.125  # so that a value that was read shows
    del told["groups"]["b"]
    path.write_text(json.dumps(told))
    again = scan(network, coupling, ranked(coupling), Context(task=task), batches=1, file=path)
    assert again["a"].noise[0] == 0.125 and again["b"] == first["b"]
    with torch.no_grad():
        network.get_parameter("a.weight").mul_(1.5)
    other = scan(network, coupling, ranked(coupling), Context(task=task), batches=1, file=path)
    assert other["a"].noise[0] != 0.125
    path.write_text("{damaged")
    assert scan(network, coupling, ranked(coupling), Context(task=task), batches=1, file=path) == other


def test_the_step_keeps_its_scan_in_the_folder_of_the_run(uneven, tmp_path):
    network, task, _ = uneven
    step = Channels(params=0.6, scope="sensitivity", criterion="l2")
    step(Draft(network), Context(task=task, folder=tmp_path))
    assert set(json.loads((tmp_path / FILE).read_text())["groups"]) == {"a", "b"}
