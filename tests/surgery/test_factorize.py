import pytest
import torch
from torch import nn

from penjing.errors import CheckpointError
from penjing.network.capture import capture_network
from penjing.steps.draft import Draft
from penjing.storage import checkpoint
from penjing.surgery import factorize, replay
from tests.raises import raises_case

CONVOLUTIONS = {
    "padded": dict(kernel_size=3, padding=1),
    "strided": dict(kernel_size=3, stride=2, padding=1),
    "dilated": dict(kernel_size=3, dilation=2, padding="same"),
    "reflected": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "uneven": dict(kernel_size=(1, 5), padding=(0, 2), stride=(1, 2)),
    "no bias": dict(kernel_size=3, bias=False),
}


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.norm = layer, nn.Identity()

    def forward(self, x):
        return self.layer(x).relu()


def captured(layer, *shape):
    torch.manual_seed(0)
    return capture_network(One(layer), (torch.zeros(2, *shape),)).eval()


def weights_of_ones(network, names):
    torch.manual_seed(1)
    with torch.no_grad():
        for name in names:
            network.get_submodule(name).weight.normal_()


def convolved(network, layer, x, product):
    """The layer as it was, with the product of the factors for its weight."""
    with torch.no_grad():
        return layer._conv_forward(x, product, network.layer.bias).relu()


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_tucker_factors_compute_the_convolution_with_their_product(settings):
    layer = nn.Conv2d(6, 8, **settings)
    network, x = captured(layer, 6, 9, 9), torch.randn(3, 6, 9, 9)
    factorize(network, "layer", "tucker", (2, 3))
    weights_of_ones(network, ("layer_in", "layer_core", "layer"))
    product = torch.einsum(
        "ic,ocab,po->piab",
        network.layer_in.weight.flatten(1).T,
        network.layer_core.weight,
        network.layer.weight.flatten(1),
    )
    torch.testing.assert_close(network(x), convolved(network, layer, x, product), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_cp_factors_compute_the_convolution_with_their_product(settings):
    layer = nn.Conv2d(6, 8, **settings)
    network, x = captured(layer, 6, 9, 9), torch.randn(3, 6, 9, 9)
    factorize(network, "layer", "cp", (4,))
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    weights_of_ones(network, names)
    along = torch.ones(4, 1, 1)
    for name in names:
        if "axis" in name:
            along = along * network.get_submodule(name).weight[:, 0]
    product = torch.einsum(
        "or,ri,rab->oiab", network.layer.weight.flatten(1), network.layer_in.weight.flatten(1), along
    )
    torch.testing.assert_close(network(x), convolved(network, layer, x, product), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ranks", "expected"), [((6, 3), ["layer_core", "layer"]), ((2, 8), ["layer_in", "layer"])])
def test_a_factor_of_full_rank_is_left_out(ranks, expected):
    network = captured(nn.Conv2d(6, 8, 3), 6, 9, 9)
    factorize(network, "layer", "tucker", ranks)
    assert [str(n.target) for n in network.graph.nodes if n.op == "call_module"] == expected
    assert network(torch.randn(3, 6, 9, 9)).shape == (3, 8, 7, 7)


def test_the_last_factor_has_the_name_and_the_bias():
    layer = nn.Linear(6, 5)
    network = captured(layer, 4, 6)
    edit = factorize(network, "layer", "svd", (2,))
    assert edit == {"edit": "factorize", "layer": "layer", "form": "svd", "ranks": [2]}
    assert network.layer_in.weight.shape == (2, 6) and network.layer_in.bias is None
    assert network.layer.weight.shape == (5, 2) and torch.equal(network.layer.bias, layer.bias)


def test_factors_are_factorized_again_under_free_names_and_reload_to_the_bit(tmp_path):
    layer = nn.Linear(16, 12)
    network = captured(layer, 16)
    edits = [factorize(network, "layer", "svd", (8,)), factorize(network, "layer", "svd", (4,))]
    weights_of_ones(network, ("layer_in", "layer_in2", "layer"))
    checkpoint.save(Draft(network, edits=tuple(edits)), tmp_path)
    again = checkpoint.load(tmp_path, captured(nn.Linear(16, 12), 16)).network
    x = torch.randn(3, 16)
    assert torch.equal(again(x), network(x)) and network(x).any()


def test_the_global_generator_stays():
    network = captured(nn.Conv2d(6, 8, 3), 6, 9, 9)
    before = torch.get_rng_state()
    factorize(network, "layer", "tucker", (2, 3))
    assert torch.equal(torch.get_rng_state(), before)


HOSTILE = [
    {"form": "svd", "ranks": [0]},
    {"form": "svd", "ranks": [9]},
    {"form": "tucker", "ranks": [2]},
    {"form": "tucker", "ranks": [7, 3]},
    {"form": "cp", "ranks": [10**12]},
    {"form": "qr", "ranks": [2]},
    {"form": "svd", "ranks": "22"},
    {"form": "svd", "ranks": [2], "layer": "head"},
    {"form": "svd", "ranks": [2], "layer": "norm"},
    {"form": "svd"},
]


@pytest.mark.parametrize("edit", HOSTILE, ids=str)
def test_an_edit_that_does_not_fit_is_refused(edit):
    network = captured(nn.Conv2d(6, 8, 3), 6, 9, 9)
    with raises_case(CheckpointError, "misfit"):
        replay(network, [{"edit": "factorize", "layer": "layer", **edit}])
