"""Sums that are biases: the layer has the addend, the function is the same, and what is no bias stays a sum."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penjing.network.capture import capture_network


def values(*shape, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


class Sum(nn.Module):
    """A layer of stored tensors, and an addend of a shape."""

    def __init__(self, layer, weight, shape, turned=False):
        super().__init__()
        self.layer, self.turned = layer, turned
        self.kernel, self.shift = values(*weight), values(*shape, seed=1)

    def forward(self, x):
        y = self.layer(x, self.kernel)
        return self.shift + y if self.turned else y + self.shift


CASES = {
    "dense": (Sum(torch.matmul, (4, 6), (6,)), (3, 4), "Linear"),
    "dense of rows": (Sum(torch.matmul, (4, 6), (1, 1, 6), True), (3, 5, 4), "Linear"),
    "one feature": (Sum(torch.matmul, (4, 1), (1,)), (3, 4), "Linear"),
    "convolution": (Sum(F.conv2d, (6, 4, 3, 3), (6, 1, 1)), (3, 4, 6, 6), "Conv2d"),
    "convolution, of four axes": (Sum(F.conv2d, (6, 4, 3, 3), (1, 6, 1, 1), True), (3, 4, 6, 6), "Conv2d"),
    "transposed": (Sum(F.conv_transpose1d, (4, 6, 3), (6, 1)), (3, 4, 6), "ConvTranspose1d"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stored_addend_per_channel_is_the_bias(name):
    network, shape, layer = CASES[name]
    captured = capture_network(network, (torch.zeros(shape),))
    layers = [part for part in captured.modules() if type(part).__name__ == layer]
    assert len(layers) == 1
    assert torch.equal(layers[0].bias, network.shift.reshape(-1))
    assert not any("add" in str(node.target) for node in captured.graph.nodes)
    x = torch.randn(shape[0] + 2, *shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(captured(x), network(x))


class Between(nn.Module):
    """The product is read before the sum, too."""

    def __init__(self):
        super().__init__()
        self.kernel, self.shift = values(4, 6), values(6, seed=1)

    def forward(self, x):
        y = x @ self.kernel
        return y.sigmoid() * (y + self.shift)


class Shared(nn.Module):
    """The addend is read in another shape, too."""

    def __init__(self):
        super().__init__()
        self.kernel, self.shift = values(6, 4, 3, 3), values(6, 1, 1, seed=1)

    def forward(self, x):
        return (F.conv2d(x, self.kernel) + self.shift) * self.shift


OTHERS = {
    "as wide as the image is": (Sum(F.conv2d, (6, 4, 1, 1), (6,)), (3, 4, 6, 6)),
    "per row": (Sum(torch.matmul, (4, 5), (5, 1)), (3, 5, 4)),
    "per place": (Sum(torch.matmul, (4, 6), (5, 6)), (3, 5, 4)),
    "one number": (Sum(torch.matmul, (4, 6), (1,)), (3, 5, 4)),
    "another layer has it": (Sum(lambda x, w: F.linear(x, w, torch.ones(6)), (6, 4), (6,)), (3, 4)),
    "read between": (Between(), (3, 4)),
    "read twice": (Shared(), (3, 4, 6, 6)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_bias_stays_a_sum(name):
    network, shape = OTHERS[name]
    captured = capture_network(network, (torch.zeros(shape),))
    assert any("add" in str(node.target) for node in captured.graph.nodes)
    assert any(isinstance(part, nn.Linear | nn.Conv2d) for part in captured.modules())
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(captured(x), network(x))
