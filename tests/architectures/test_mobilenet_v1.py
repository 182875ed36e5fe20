import pytest
import torch

from penjing.analyze.cost import cost, totals
from penjing.architectures.mobilenet_v1 import mobilenet_v1
from penjing.network.capture import capture_network


def on_meta(**settings):
    with torch.device("meta"):
        return mobilenet_v1(**settings)


# The paper's table gives 0.5, 1.3, 2.6 and 4.2 million.
@pytest.mark.parametrize(
    ("width", "published"), [(0.25, 470_072), (0.5, 1_331_592), (0.75, 2_585_560), (1.0, 4_231_976)]
)
def test_the_number_of_parameters_is_the_published_one(width, published):
    assert sum(p.numel() for p in on_meta(width=width).parameters()) == published


def test_multiply_accumulates_are_the_published_ones():
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta(), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(569e6, rel=0.02)


def test_behind_the_stem_depthwise_and_1x1_convolutions_take_turns():
    stem, *others = [module for module in on_meta().modules() if isinstance(module, torch.nn.Conv2d)]
    assert stem.groups == 1 and len(others) == 26
    for depthwise, pointwise in zip(others[::2], others[1::2], strict=True):
        assert depthwise.groups == depthwise.in_channels == depthwise.out_channels
        assert depthwise.kernel_size == (3, 3)
        assert pointwise.groups == 1 and pointwise.kernel_size == (1, 1) and pointwise.stride == (1, 1)


def test_small_pictures_and_other_channels_and_classes():
    network = mobilenet_v1(in_channels=1, classes=3, width=0.25).eval()
    assert network.features(torch.zeros(2, 1, 64, 64)).shape == (2, 256, 2, 2)
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0.0}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        mobilenet_v1(**settings)
