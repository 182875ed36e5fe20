"""Networks that keep channels on the last axis lose their inner permutations, and compute the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.network.capture import capture_network


def first(x):
    return x.permute(0, 3, 1, 2)


def last(x):
    return x.permute(0, 2, 3, 1)


class Last(nn.Module):
    """A convolution before and after something that is done with channels last."""

    channels_last = True

    def __init__(self, between):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.between = between
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        y = last(self.before(first(x)))
        return last(self.after(first(self.between(self, y))))


BETWEEN = {
    "arithmetic": lambda m, y: torch.subtract(torch.multiply(y, 2.0), F.relu(y)),
    "by a factor of each channel": lambda m, y: y * m.scale + m.scale.reshape(1, 1, 1, 6),
    "by a value of each channel": lambda m, y: y * torch.sigmoid(y.mean((1, 2)))[:, None, None, :],
    "by a mean that keeps axes": lambda m, y: y - y.mean((1, 2), keepdim=True),
    "by a maximum over channels": lambda m, y: y - torch.amax(y, [-1], True),
    "softmax over channels": lambda m, y: torch.softmax(y, -1),
    "joined": lambda m, y: torch.concat([y[..., :4], F.hardswish(y)[..., -2:]], -1),
    "padded": lambda m, y: F.pad(y, (0, 0, 1, 0, 0, 2), value=1.0),
    "copied": lambda m, y: y.to(torch.float32).contiguous().clone(),
    "conditional": lambda m, y: torch.where(y > 0, y, y.exp()),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_permutations_vanish_and_values_stay(between):
    torch.manual_seed(0)
    module = Last(BETWEEN[between]).eval()
    x = torch.randn(3, 5, 4, 3)
    network = capture_network(module, (x[:2],))
    with torch.no_grad():
        torch.testing.assert_close(network(x), module(x), rtol=1e-5, atol=1e-5)
    moves = [node for node in network.graph.nodes if "permute" in str(node.target)]
    values = [node for node in moves if node.all_input_nodes[0].op != "get_attr"]
    assert len(values) == 2  # at the input and at the output


STAY = {
    "a product of the last axis": lambda m, y: F.layer_norm(y, (6,)) @ torch.eye(6),
    "one axis made of two": lambda m, y: y.flatten(2).unflatten(2, y.shape[2:]),
    "other permutations": lambda m, y: y.transpose(1, 2).relu().transpose(1, 2),
    "values of another order": lambda m, y: y + last(torch.ones(1, 6, 1, 1)).exp() + y.flip(1).transpose(1, 1),
}


@pytest.mark.parametrize("between", STAY)
def test_what_needs_the_last_axis_computes_the_same(between):
    torch.manual_seed(0)
    module = Last(STAY[between]).eval()
    x = torch.randn(3, 5, 4, 3)
    network = capture_network(module, (x[:2],))
    with torch.no_grad():
        torch.testing.assert_close(network(x), module(x), rtol=1e-5, atol=1e-5)


def test_other_networks_keep_their_permutations():
    module = Last(BETWEEN["arithmetic"])
    module.channels_last = False
    network = capture_network(module, (torch.randn(2, 5, 4, 3),))
    assert sum("permute" in str(node.target) for node in network.graph.nodes) == 4
