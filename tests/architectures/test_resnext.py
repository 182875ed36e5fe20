import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.analyze.cost import cost, totals
from penjing.architectures import resnext
from penjing.network.capture import capture_network

PUBLISHED = {"resnext50_32x4d": 25_028_904, "resnext101_32x8d": 88_791_336}


def on_meta(name, **settings):
    with torch.device("meta"):
        return getattr(resnext, name)(**settings)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_the_number_of_parameters_is_the_published_one(name, published):
    assert sum(p.numel() for p in on_meta(name).parameters()) == published


def test_multiply_accumulates_are_the_published_ones():
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta("resnext50_32x4d"), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(4.23e9, rel=0.01)


@pytest.mark.parametrize(("name", "depth"), [("resnext50_32x4d", 50), ("resnext101_32x8d", 101)])
def test_the_name_counts_convolutions_and_the_classifier(name, depth):
    network = on_meta(name)
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in n]
    assert len(layers) == depth


@pytest.mark.parametrize(("name", "first"), [("resnext50_32x4d", 4), ("resnext101_32x8d", 8)])
def test_32_groups_are_twice_as_wide_in_every_stage(name, first):
    stages = on_meta(name).stages
    groupings = [{(b.conv2.groups, b.conv2.out_channels // b.conv2.groups) for b in stage} for stage in stages]
    assert groupings == [{(32, first * 2**index)} for index in range(4)]


def test_a_block_is_the_sum_of_its_paths():
    """The paper's figure 3: the grouped block (c) computes what separate paths (a) add up to."""
    torch.manual_seed(0)
    block = resnext.Block(6, 8, 6, 1, 4).eval().double()
    for norm in (block.bn1, block.bn2, block.bn3):
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    inner = F.relu(block.bn1(block.conv1(x)))
    scale = block.bn2.weight / torch.sqrt(block.bn2.running_var + block.bn2.eps)
    total = torch.zeros_like(x)
    for own in torch.arange(8).split(2):
        path = F.conv2d(inner[:, own], block.conv2.weight[own], padding=1)
        path = F.relu(path * scale[own, None, None] + block.bn2.bias[own, None, None])
        total += F.conv2d(path, block.conv3.weight[:, own])
    torch.testing.assert_close(block(x), F.relu(block.bn3(total) + x))


def test_small_pictures_and_other_channels_and_classes():
    network = resnext.resnext50_32x4d(in_channels=1, classes=3, width=8).eval()
    assert network.stages(torch.zeros(2, 8, 16, 16)).shape == (2, 256, 2, 2)
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        resnext.resnext50_32x4d(**settings)
