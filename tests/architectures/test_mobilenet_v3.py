import pytest
import torch

from penjing.analyze.cost import cost, totals
from penjing.architectures import mobilenet_v3
from penjing.network.capture import capture_network


def on_meta(form, **settings):
    with torch.device("meta"):
        return getattr(mobilenet_v3, f"mobilenet_v3_{form}")(**settings)


@pytest.mark.parametrize(("form", "published"), [("large", 5_483_032), ("small", 2_542_856)])
def test_the_number_of_parameters_is_the_published_one(form, published):
    assert sum(p.numel() for p in on_meta(form).parameters()) == published


def test_multiply_accumulates_are_the_published_ones():
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta("large"), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(216.6e6, rel=0.02)


def test_gates_are_the_same_everywhere_in_a_channel_and_between_0_and_1():
    torch.manual_seed(0)
    gate = mobilenet_v3.Gate(16)
    x = torch.rand(2, 16, 5, 5) + 0.5
    ratio = gate(x) / x
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio), atol=1e-6)
    assert torch.all(ratio >= 0) and torch.all(ratio <= 1)
    torch.nn.init.constant_(gate.expand.bias, -9.0)  # hard: below -3 a gate is shut, not only small
    assert not gate(x).any()


@pytest.mark.parametrize(("outputs", "stride", "adds"), [(8, 1, True), (16, 1, False), (8, 2, False)])
@pytest.mark.parametrize("gates", [False, True])
def test_the_input_is_added_only_where_shapes_agree(outputs, stride, adds, gates):
    torch.manual_seed(0)
    block = mobilenet_v3.Block(8, 24, outputs, kernel=5, gates=gates, swish=True, stride=stride).eval()
    x = torch.randn(2, 8, 6, 6)
    wide = block.activate(block.depthwise(block.activate(block.expand(x))))
    branch = block.project(block.gate(wide) if gates else wide)
    assert branch.shape == (2, outputs, 6 // stride, 6 // stride)
    assert torch.equal(block(x), branch + x if adds else branch)


@pytest.mark.parametrize(("form", "gates", "swishes"), [("large", 8, 9), ("small", 9, 8)])
def test_gates_and_hard_swishes_stand_in_as_many_blocks_as_in_the_paper(form, gates, swishes):
    blocks = on_meta(form).blocks
    assert sum(block.gate is not None for block in blocks) == gates
    assert sum(isinstance(block.activate, torch.nn.Hardswish) for block in blocks) == swishes


@pytest.mark.parametrize("form", ["large", "small"])
def test_small_pictures_and_other_channels_and_classes(form):
    network = getattr(mobilenet_v3, f"mobilenet_v3_{form}")(in_channels=1, classes=3, width=0.25).eval()
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0.0}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        mobilenet_v3.mobilenet_v3_small(**settings)
