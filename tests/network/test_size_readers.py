"""Sizes are read behind a layer's norm and activation, so that nothing stands between the three."""

import torch
import torch.nn.functional as F
from torch import nn

from penjing.network.capture import capture_network
from penjing.network.graph import kind
from penjing.surgery.fold import fold_batch_norms

VARYING = {"x": {0: "batch", 2: "height", 3: "width"}}


class Skip(nn.Module):
    """Pixels (batch, 3, height, width): two scales, brought together at the size of the first."""

    def __init__(self, activation):
        super().__init__()
        self.fine, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.coarse, self.up, self.activation = nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2), activation

    def forward(self, x):
        fine = self.activation(self.norm(self.fine(x)))
        coarse = self.up(self.coarse(F.max_pool2d(fine, 2))) + fine
        return F.interpolate(coarse[:, :, 1:], size=fine.shape[2:]) + fine


def of_sizes(network):
    """What the sizes are read of."""
    reads = [node.args[0] for node in network.graph.nodes if "sym_size" in str(node.target)]
    return {kind(network, node) for node in reads}


def test_sizes_are_read_behind_the_activation():
    module = Skip(nn.ReLU()).eval()
    network = capture_network(module, (torch.randn(2, 3, 8, 8),), dynamic=VARYING)
    assert of_sizes(network) <= {"relu", "input"}
    for size in ((6, 12), (10, 4)):
        x = torch.randn(3, 3, *size)
        torch.testing.assert_close(network(x), module(x))


def test_a_norm_whose_layer_is_asked_for_its_sizes_is_folded():
    network = capture_network(Skip(nn.Identity()).eval(), (torch.randn(2, 3, 8, 8),), dynamic=VARYING)
    assert [edit["layer"] for edit in fold_batch_norms(network)] == ["fine"]


def test_sizes_stay_where_the_sizes_change_or_several_read():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return F.interpolate(F.max_pool2d(torch.sigmoid(y) * y, 2), size=y.shape[2:]) + self.b(y)

    module = Several().eval()
    network = capture_network(module, (torch.randn(2, 3, 8, 8),), dynamic=VARYING)
    assert of_sizes(network) <= {"conv", "input"}
    x = torch.randn(1, 3, 14, 10)
    torch.testing.assert_close(network(x), module(x))
