import pytest
import torch

from penjing.analyze.cost import cost, totals
from penjing.architectures.ghostnet import GhostModule, ghostnet
from penjing.network.capture import capture_network


def on_meta(**settings):
    with torch.device("meta"):
        return ghostnet(**settings)


@pytest.mark.parametrize(("width", "published"), [(0.5, 2_587_292), (1.0, 5_182_508), (1.3, 7_358_820)])
def test_the_number_of_parameters_is_the_published_one(width, published):
    assert sum(p.numel() for p in on_meta(width=width).parameters()) == published


def test_multiply_accumulates_are_the_published_ones():
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta(), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(0.141e9, rel=0.02)


@pytest.mark.parametrize("outputs", [6, 7])
def test_half_of_the_channels_are_cheap_functions_of_the_other_half(outputs):
    torch.manual_seed(0)
    module = GhostModule(5, outputs, activate=False).eval()
    x = torch.randn(2, 5, 9, 9)
    features = module(x)
    half = (outputs + 1) // 2
    assert features.shape == (2, outputs, 9, 9)
    assert torch.equal(features[:, :half], module.primary(x))
    assert torch.equal(features[:, half:], module.cheap(features[:, :half])[:, : outputs - half])


def test_small_pictures_and_other_channels_and_classes():
    network = ghostnet(in_channels=1, classes=3, width=0.25).eval()
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": -1.0}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ghostnet(**settings)
