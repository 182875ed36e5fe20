import pytest
import torch

from penjing.analyze.cost import cost, totals
from penjing.architectures.mobilenet_v2 import InvertedResidual, mobilenet_v2
from penjing.network.capture import capture_network


def on_meta(**settings):
    with torch.device("meta"):
        return mobilenet_v2(**settings)


def test_the_number_of_parameters_is_the_published_one():
    assert sum(p.numel() for p in on_meta().parameters()) == 3_504_872


def test_multiply_accumulates_are_the_published_ones():
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta(), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(300.8e6, rel=0.01)


@pytest.mark.parametrize(("outputs", "stride", "adds"), [(8, 1, True), (16, 1, False), (8, 2, False), (16, 2, False)])
def test_the_input_is_added_only_where_shapes_agree(outputs, stride, adds):
    torch.manual_seed(0)
    block = InvertedResidual(8, outputs, 6, stride).eval()
    x = torch.randn(2, 8, 6, 6)
    branch = block.project(block.depthwise(block.expand(x)))
    assert branch.shape == (2, outputs, 6 // stride, 6 // stride)
    assert torch.equal(block(x), branch + x if adds else branch)


def test_bottlenecks_are_linear_and_ten_of_them_add():
    network = on_meta()
    assert not any(isinstance(block.project[-1], torch.nn.ReLU6) for block in network.blocks)
    assert sum(block.adds for block in network.blocks) == 10 and len(network.blocks) == 17
    assert network.blocks[0].expand is None  # the first does not widen


def test_a_narrow_network_keeps_its_head_and_a_wide_one_widens_it():
    assert on_meta(width=1.4).head[0].out_channels == 1792
    network = mobilenet_v2(in_channels=1, classes=3, width=0.25).eval()
    assert network.stem[0].out_channels == 8 and network.classifier.in_features == 1280
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0.0}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        mobilenet_v2(**settings)
