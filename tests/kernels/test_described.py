"""Networks read for a library of kernels: what its layouts can't express is refused, and never computed otherwise."""

import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import ExportError
from penjing.kernels.instruction_sets import named
from penjing.kernels.library import write
from penjing.kernels.network import described
from penjing.kernels.opened import Opened
from penjing.network.capture import capture_network
from tests.raises import raises_case


class Called(nn.Module):
    """A convolution of two channels and a function behind it."""

    def __init__(self, function, *layers):
        super().__init__()
        self.conv, self.layers, self.function = nn.Conv2d(2, 2, 1), nn.ModuleList(layers), function

    def forward(self, x):
        return self.function(self.conv(x), x, *self.layers)


def captured(module):
    return capture_network(module.eval(), (torch.rand(2, 2, 4, 4),), {})


def opened(module, folder, output):
    write(described(captured(module), (2, 4, 4)), folder / "model.so", named("c"))
    return Opened(folder / "model.so", ((2, 4, 4), output))


REFUSED = {
    "weighted": Called(lambda y, x: torch.add(y, x, alpha=2)),
    "along one axis": Called(lambda y, x, linear: linear(y), nn.Linear(4, 3)),
    "statistics of its batch": Called(lambda y, x, norm: norm(y), nn.BatchNorm2d(2, track_running_stats=False)),
    "the shape [2, 16]": Called(lambda y, x: y.flatten(2)),
    "the shape [2, 2, 8]": Called(lambda y, x: y.reshape(-1, 2, 2, 8)),
    "the input": nn.Identity(),
    "adaptive": Called(lambda y, x, pool: pool(y), nn.AdaptiveAvgPool2d(2)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_has_another_meaning_in_torch_is_refused(said):
    with raises_case(ExportError, "operator") as refusal:
        described(captured(REFUSED[said]), (2, 4, 4))
    assert said in refusal.value.got


def test_flattened_values_are_added_and_multiplied_as_in_torch(tmp_path):
    torch.manual_seed(0)
    module = Called(lambda y, x, linear: linear(torch.relu(y.flatten(1)) + x.flatten(1)), nn.Linear(32, 3))
    predict = opened(module, tmp_path, (3,))
    x = torch.randn(3, 2, 4, 4)
    with torch.no_grad():
        np.testing.assert_allclose(predict(x.numpy()), module(x).numpy(), rtol=1e-5, atol=1e-5)


def test_nan_passes_through_relu_and_maximum(tmp_path):
    module = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    predict = opened(module, tmp_path, (2, 2, 2))
    x = torch.randn(1, 2, 4, 4)
    x[0, 0, 0, 1] = x[0, 1, 3, 2] = torch.nan
    answer, expected = predict(x.numpy()), module(x).numpy()
    assert np.isnan(expected).sum() == 2
    np.testing.assert_array_equal(answer, expected)
