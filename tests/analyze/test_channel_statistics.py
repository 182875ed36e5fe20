"""Statistics of input channels are those of the channels, whatever layer reads them and however data come in calls."""

import pytest
import torch
from torch import nn

from penjing.analyze.channel_statistics import LARGEST, MEAN_SIZES, SQUARES, collect
from penjing.network.capture import capture_network

CASES = {
    "linear": (nn.Linear(5, 3), (4, 5), -1),
    "tokens": (nn.Linear(5, 3), (4, 7, 5), -1),
    "conv1d": (nn.Conv1d(5, 3, 2), (4, 5, 9), 1),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (4, 6, 9, 8), 1),
    "transposed": (nn.ConvTranspose2d(6, 4, 3), (4, 6, 5, 5), 1),
}


@pytest.mark.parametrize(("layer", "shape", "axis"), CASES.values(), ids=CASES)
def test_statistics_are_those_of_all_values_of_a_channel(layer, shape, axis):
    network = capture_network(nn.Sequential(nn.Tanh(), layer).eval(), (torch.zeros(shape),))
    data = [3 * torch.randn(shape) for _ in range(3)]
    layers = {"1": network.get_submodule("1")}
    values = torch.cat([x.tanh().movedim(axis, 0).flatten(1) for x in data], dim=1).double()
    calls = [((x,), {}) for x in data]
    assert torch.allclose(collect(network, layers, calls, SQUARES)["1"], values.square().sum(1))
    assert torch.allclose(collect(network, layers, calls, MEAN_SIZES)["1"] / 3, values.abs().mean(1))
    assert torch.equal(collect(network, layers, calls, LARGEST)["1"].double(), values.abs().amax(1))


def test_a_layer_that_is_called_twice_sees_both_and_hooks_are_gone_afterwards():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(10 * x) + self.fc(x)

    network = capture_network(Twice().eval(), (torch.zeros(2, 3),))
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.25]])
    layers = {"fc": network.get_submodule("fc")}
    assert collect(network, layers, [((x,), {})], LARGEST)["fc"].tolist() == [10, 20, 5]

    def broken():
        yield (x,), {}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect(network, layers, broken(), SQUARES)
    assert not layers["fc"]._forward_pre_hooks
