"""Operators in another order: the same function, in the order that was asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.network.capture import capture_network
from penjing.network.graph import site, sites
from penjing.surgery import reorder


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        a, b = x.flatten(1).chunk(2, 1)
        return F.relu(self.left(a)) + self.right(b).reshape(-1, 4)


def captured():
    torch.manual_seed(0)
    return capture_network(Parts().eval(), (torch.zeros(2, 2, 4),))


def test_the_function_stays_and_the_order_is_the_one_asked_for():
    network, x = captured(), torch.randn(3, 2, 4)
    before = network(x)
    reorder(network, ["right", "left", "/relu#0", "/add#0"])
    network.graph.lint()
    assert torch.equal(network(x), before)
    assert [s for s in sites(network) if s in ("left", "right")] == ["right", "left"]
    # a view stands right behind what it reads
    names = [site(node) for node in network.graph.nodes]
    assert names.index("/reshape#0" if "/reshape#0" in names else "/view#0") < names.index("left")


def test_an_order_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="before one that it reads"):
        reorder(captured(), ["/add#0", "left", "right", "/relu#0"])
