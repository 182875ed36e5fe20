"""Operators that OpenVINO computes in integers, or computes right, only where no zero point is in the way."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penjing import measure, runtimes
from penjing.network.capture import capture_network
from penjing.pipeline import building
from penjing.quantize import Static
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.task import Task


def images(seed, n=8):
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def decibels(reference, got):
    reference, got = np.asarray(reference, np.float64), np.asarray(got, np.float64)
    assert reference.shape == got.shape and np.isfinite(got).all()
    return 10 * math.log10((reference**2).sum() / max(((reference - got) ** 2).sum(), 1e-30))


def executed(net, folder):
    """The operators by kind that OpenVINO computes in integers, of an artifact that agrees with source and plan."""
    task = Task(example=images(0), calibration=[images(1 + i) for i in range(3)])
    captured = capture_network(net.eval(), *task.call(), task.dynamic)
    capabilities = runtimes.get("openvino").capabilities(measure.machine(1).instruction_sets)
    draft = Static()(Draft(captured), Context(task=task, capabilities=capabilities, source=captured))
    manifest = building.build(draft, "openvino", "int8", task, {"kind": "tensor"}, folder)
    x = images(9, 5)
    [got] = isolated.open_artifact(folder, 1).run([x.numpy()])
    with torch.no_grad():
        assert decibels(net(x), got) > 28
        assert decibels(insert(draft.network, draft.plan)(x), got) > 45
    return building.executed_rows(draft.network, draft.plan, task.call(), manifest, folder)[1]


class Upsampled(nn.Module):
    def __init__(self, up, activation):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up, self.act, self.last = nn.Conv2d(3, 8, 3), up(), activation, nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.last(self.act(self.up(self.act(self.first(x)))))


UPS = {
    "as wide as the convolution before it": lambda: nn.ConvTranspose2d(8, 8, 3, stride=2),
    "with output padding": lambda: nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1),
    "dilated": lambda: nn.ConvTranspose2d(8, 8, 3, dilation=2),
    "before a batch norm": lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2), nn.BatchNorm2d(8)),
}


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU()], ids=["signed", "unsigned"])
@pytest.mark.parametrize("up", UPS)
def test_a_transposed_convolution_is_integer_and_its_neighbours_stay_so(up, activation, tmp_path):
    assert executed(Upsampled(UPS[up], activation), tmp_path) == {"conv": 2, "conv_transpose": 1}


class Averaged(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.settings = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), settings

    def forward(self, x):
        return self.last(F.avg_pool2d(self.first(x), **self.settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 1, "padding": (0, 1)},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    ],
    ids=str,
)
def test_an_average_over_a_border_of_zeros(settings, tmp_path):
    assert executed(Averaged(**settings), tmp_path)["conv"] == 2


class Patches(nn.Module):
    """A convolution and linear layers of one width, whose zero points the exporter stores once."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.first, self.second = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        hidden = self.patch(x).flatten(2).transpose(1, 2)
        return self.second(F.gelu(self.first(F.layer_norm(hidden, (16,)))))


def test_layers_of_one_width_along_other_axes_are_integer(tmp_path):
    assert executed(Patches(), tmp_path) == {"conv": 1, "linear": 2}


class TwoReadings(nn.Module):
    """One layer called twice with the same values: the exporter computes it once."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        pooled = F.relu(self.first(x)).mean((2, 3))
        return self.head(pooled).softmax(-1) + self.head(pooled).sigmoid()


def test_a_layer_that_the_exporter_merges_is_counted_once(tmp_path):
    integer = executed(TwoReadings(), tmp_path)
    assert integer["conv"] == 1 and integer["linear"] >= 1


def test_a_last_layer_whose_bias_is_the_same_everywhere_is_counted(tmp_path):
    class Classified(Patches):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.second.bias)

        def forward(self, x):
            return self.second(torch.relu(self.patch(x)).mean((2, 3)))

    assert executed(Classified(), tmp_path)["linear"] == 1
