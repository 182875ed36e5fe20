import copy

import torch
from torch import nn

from penjing.analyze.coupling import couple
from penjing.analyze.masked import masked
from penjing.network.capture import capture_network
from tests.analyze.topologies import Residual, scattered


def test_zeroed_by_hand_is_the_same():
    """The reference of a convolutional network, written down without groups: weights of what goes are 0."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model = scattered(Residual())
    network = capture_network(model, (x,))
    coupling = couple(network, ((x,), {}))
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for gone in (1, 4):
            by_hand.a.weight[gone] = 0
            by_hand.norm.weight[gone] = by_hand.norm.bias[gone] = 0
            by_hand.b.weight[:, gone] = 0  # a sigmoid makes 0.5 of 0
    torch.testing.assert_close(masked(network, coupling, {"a": [1, 4]})(x), by_hand(x))


def test_masking_nothing_changes_nothing():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    network = capture_network(scattered(Residual()), (x,))
    coupling = couple(network, ((x,), {}))
    with torch.no_grad():
        assert torch.equal(masked(network, coupling, {})(x), network(x))


def test_a_layer_norm_looks_at_the_kept_channels_alone():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.norm(self.a(x)))

    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = scattered(Norm())
    network = capture_network(model, (x,))
    coupling = couple(network, ((x,), {}))
    remaining = [0, 1, 3, 4]
    with torch.no_grad():
        h = model.a(x)[:, remaining]
        h = nn.functional.layer_norm(h, (4,), model.norm.weight[remaining], model.norm.bias[remaining])
        expected = h @ model.b.weight[:, remaining].T + model.b.bias
    torch.testing.assert_close(masked(network, coupling, {"a": [2, 5]})(x), expected)


def test_the_network_stays_as_it_is():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    network = capture_network(scattered(Residual()), (x,))
    before = copy.deepcopy(network.state_dict())
    coupling = couple(network, ((x,), {}))
    masked(network, coupling, {"a": [1], "stem": [0, 2]})(x)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_a_maximum_over_pieces_leaves_a_masked_unit_at_what_its_pieces_are():
    class Maxout(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x).view(-1, 4, 3).amax(2))

    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = scattered(Maxout())
    network = capture_network(model, (x,))
    coupling = couple(network, ((x,), {}))
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        by_hand.b.weight[:, [0, 2]] = 0
        torch.testing.assert_close(masked(network, coupling, {"a": [0, 2]})(x), by_hand(x))
