import pytest
import torch

from penjing.analyze.cost import cost, totals
from penjing.architectures import densenet
from penjing.network.capture import capture_network


def on_meta(depth):
    with torch.device("meta"):
        return getattr(densenet, f"densenet{depth}")()


@pytest.mark.parametrize(("depth", "published"), [(121, 7_978_856), (169, 14_149_480), (201, 20_013_928)])
def test_the_number_of_parameters_is_the_published_one(depth, published):
    assert sum(p.numel() for p in on_meta(depth).parameters()) == published


@pytest.mark.parametrize("depth", [121, 169, 201])
def test_the_name_counts_convolutions_and_the_classifier(depth):
    layers = [m for m in on_meta(depth).modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


def test_multiply_accumulates_are_the_published_ones():
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta(121), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(2.834e9, rel=0.01)


def test_a_layer_appends_to_what_it_reads():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 5)
    outputs = densenet.DenseLayer(6, 4)(x)
    assert outputs.shape == (2, 10, 5, 5) and torch.equal(outputs[:, :6], x)


def test_small_pictures_and_other_channels_and_classes():
    network = densenet.densenet121(in_channels=1, classes=3, width=4).eval()
    assert network.stages(torch.zeros(2, 8, 16, 16)).shape == (2, 128, 2, 2)
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        densenet.densenet121(**settings)
