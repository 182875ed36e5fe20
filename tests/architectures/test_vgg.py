import pytest
import torch
from torch import nn

from penjing.analyze.cost import cost, totals
from penjing.architectures import vgg
from penjing.network.capture import capture_network

# Without and with batch norm.
PUBLISHED = {
    11: (132_863_336, 132_868_840),
    13: (133_047_848, 133_053_736),
    16: (138_357_544, 138_365_992),
    19: (143_667_240, 143_678_248),
}


def on_meta(name, **settings):
    with torch.device("meta"):
        return getattr(vgg, name)(**settings)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("depth", "published"), PUBLISHED.items())
def test_the_number_of_parameters_is_the_published_one(depth, published):
    assert tuple(parameters(on_meta(f"vgg{depth}", norm=norm)) for norm in (False, True)) == published


def test_the_small_form_has_the_parameters_of_a_count_by_hand():
    channels = [3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    convolutions = sum(9 * a * b + 2 * b for a, b in zip(channels, channels[1:], strict=False))
    assert parameters(on_meta("vgg16_small")) == convolutions + 512 * 10 + 10 == 14_724_042


def test_multiply_accumulates_are_the_published_ones():
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta("vgg16"), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(15.47e9, rel=0.01)


@pytest.mark.parametrize("depth", PUBLISHED)
def test_the_name_counts_convolutions_and_linear_layers(depth):
    layers = [m for m in on_meta(f"vgg{depth}").modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth and sum(isinstance(m, nn.Linear) for m in layers) == 3
    assert {m.kernel_size for m in layers if isinstance(m, nn.Conv2d)} == {(3, 3)}


def test_batch_norm_stands_behind_every_convolution():
    layers = list(on_meta("vgg16", norm=True).features)
    behind = [after for layer, after in zip(layers, layers[1:], strict=False) if isinstance(layer, nn.Conv2d)]
    assert len(behind) == 13 and all(isinstance(layer, nn.BatchNorm2d) for layer in behind)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in on_meta("vgg16").modules())


@pytest.mark.parametrize("side", [32, 96, 224])
def test_any_resolution_reaches_the_linear_layers_as_7_by_7(side):
    network = on_meta("vgg11").eval()
    x = torch.zeros(2, 3, side, side, device="meta")
    assert network.average(network.features(x)).shape == (2, 512, 7, 7) and network(x).shape == (2, 1000)


@pytest.mark.parametrize(("side", "left"), [(28, 1), (32, 2)])
def test_the_small_form_takes_small_pictures(side, left):
    network = vgg.vgg16_small(in_channels=1, classes=3, width=4).eval()
    x = torch.zeros(2, 1, side, side)
    assert network.features(x).shape == (2, 32, left, left) and network(x).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0}])
@pytest.mark.parametrize("form", ["vgg11", "vgg16_small"])
def test_settings_that_do_not_fit_are_named(form, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        getattr(vgg, form)(**settings)
