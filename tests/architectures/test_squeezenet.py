import pytest
import torch
from torch import nn

from penjing.analyze.cost import cost, totals
from penjing.architectures import squeezenet
from penjing.network.capture import capture_network

PUBLISHED = {"squeezenet1_0": 1_248_424, "squeezenet1_1": 1_235_496}


def on_meta(name, **settings):
    with torch.device("meta"):
        return getattr(squeezenet, name)(**settings)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_the_number_of_parameters_is_the_published_one(name, published):
    assert sum(p.numel() for p in on_meta(name).parameters()) == published


@pytest.mark.parametrize(("name", "published"), [("squeezenet1_0", 819e6), ("squeezenet1_1", 349e6)])
def test_multiply_accumulates_are_the_published_ones(name, published):
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta(name), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("name", "sides"),
    [("squeezenet1_0", [54, 54, 54, 27, 27, 27, 27, 13]), ("squeezenet1_1", [55, 55, 27, 27, 13, 13, 13, 13])],
)
def test_fires_have_the_published_channels_and_sides(name, sides):
    network, x = on_meta(name).eval(), torch.zeros(1, 3, 224, 224, device="meta")
    sizes = []
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, squeezenet.Fire):
            sizes.append((x.shape[1], x.shape[2]))
    assert sizes == list(zip([128, 128, 256, 256, 384, 384, 512, 512], sides, strict=True))


def test_a_fire_joins_1_by_1_and_3_by_3_of_what_it_squeezed():
    torch.manual_seed(0)
    fire, x = squeezenet.Fire(6, 2), torch.randn(2, 6, 5, 5)
    squeezed = fire.squeeze(x).relu()
    outputs = fire(x)
    assert squeezed.shape == (2, 2, 5, 5) and outputs.shape == (2, 16, 5, 5)
    assert torch.equal(outputs[:, :8], fire.expand1(squeezed).relu())
    assert torch.equal(outputs[:, 8:], fire.expand3(squeezed).relu())


def test_no_layer_is_linear_and_logits_are_averages_of_rectified_maps():
    network = squeezenet.squeezenet1_1(classes=5, width=0.25).eval()
    assert not any(isinstance(m, nn.Linear) for m in network.modules())
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    maps = network.classifier(network.features(x)).relu()
    assert maps.shape == (2, 5, 3, 3)
    torch.testing.assert_close(network(x), maps.mean((2, 3)))


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("side", [28, 64])
def test_small_pictures_and_other_channels_and_classes(name, side):
    network = getattr(squeezenet, name)(in_channels=1, classes=3, width=0.125).eval()
    assert network(torch.zeros(2, 1, side, side)).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0.0}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        squeezenet.squeezenet1_0(**settings)
