import pytest
import torch

from penjing.analyze.cost import cost, totals
from penjing.architectures import mnasnet
from penjing.network.capture import capture_network


def on_meta(form, **settings):
    with torch.device("meta"):
        return getattr(mnasnet, f"mnasnet{form}")(**settings)


@pytest.mark.parametrize(
    ("form", "settings", "published"),
    [
        ("0_5", {}, 2_218_512),
        ("1_0", {}, 4_383_312),
        ("1_0", {"width": 0.75}, 3_170_208),
        ("1_0", {"width": 1.3}, 6_282_256),
    ],
)
def test_the_number_of_parameters_is_the_published_one(form, settings, published):
    assert sum(p.numel() for p in on_meta(form, **settings).parameters()) == published


def test_multiply_accumulates_are_the_published_ones():
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta("1_0"), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(314e6, rel=0.02)


@pytest.mark.parametrize(("outputs", "stride", "adds"), [(8, 1, True), (16, 1, False), (8, 2, False)])
def test_the_input_is_added_only_where_shapes_agree(outputs, stride, adds):
    torch.manual_seed(0)
    block = mnasnet.Block(8, outputs, 5, 3, stride).eval()
    x = torch.randn(2, 8, 6, 6)
    branch = block.project(torch.relu(block.depthwise(torch.relu(block.expand(x)))))
    assert branch.shape == (2, outputs, 6 // stride, 6 // stride)
    assert torch.equal(block(x), branch + x if adds else branch)


def test_kernels_and_expansions_are_those_of_the_paper():
    blocks = on_meta("1_0").blocks
    kernels = [block.depthwise[0].kernel_size[0] for block in blocks]
    assert kernels == [3] * 3 + [5] * 3 + [5] * 3 + [3] * 2 + [5] * 4 + [3]
    expansions = [block.expand[0].out_channels // block.expand[0].in_channels for block in blocks]
    assert expansions == [3] * 6 + [6] * 10


def test_a_narrow_network_keeps_its_head():
    network = mnasnet.mnasnet1_0(in_channels=1, classes=3, width=0.25).eval()
    assert network.stem[0].out_channels == 8 and network.classifier.in_features == 1280
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0.0}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        mnasnet.mnasnet1_0(**settings)
