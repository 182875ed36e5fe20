import pytest
import torch

from penjing.analyze.cost import cost, totals
from penjing.architectures import shufflenet_v2
from penjing.network.capture import capture_network

PUBLISHED = {"x0_5": 1_366_792, "x1_0": 2_278_604, "x1_5": 3_503_624, "x2_0": 7_393_996}


def on_meta(form, **settings):
    with torch.device("meta"):
        return getattr(shufflenet_v2, f"shufflenet_v2_{form}")(**settings)


@pytest.mark.parametrize(("form", "published"), PUBLISHED.items())
def test_the_number_of_parameters_is_the_published_one(form, published):
    assert sum(p.numel() for p in on_meta(form).parameters()) == published


def test_multiply_accumulates_are_the_published_ones():
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta("x1_0"), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(145e6, rel=0.02)


def test_half_of_the_channels_pass_and_the_two_halves_take_turns():
    torch.manual_seed(0)
    block = shufflenet_v2.Basic(12).eval()
    x = torch.randn(2, 12, 5, 5)
    outputs = block(x)
    assert torch.equal(outputs[:, 0::2], x[:, :6])
    assert torch.equal(outputs[:, 1::2], block.branch(x[:, 6:]))


def test_behind_two_blocks_every_half_was_worked_on():
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(shufflenet_v2.Basic(8), shufflenet_v2.Basic(8)).eval()
    x = torch.randn(1, 8, 4, 4)
    untouched = [c for c in range(8) if any(torch.equal(blocks(x)[:, c], x[:, k]) for k in range(8))]
    assert len(untouched) == 2  # half of the half that passed the first


def test_a_block_of_stride_2_works_on_both_halves():
    torch.manual_seed(0)
    block = shufflenet_v2.Down(6, 10).eval()
    x = torch.randn(2, 6, 8, 8)
    outputs = block(x)
    assert outputs.shape == (2, 10, 4, 4)
    assert torch.equal(outputs[:, 0::2], torch.relu(block.pointwise(block.depthwise(x))))
    assert torch.equal(outputs[:, 1::2], block.branch(x))


@pytest.mark.parametrize("form", PUBLISHED)
@pytest.mark.parametrize("width", [0.01, 0.25, 0.3])
def test_any_width_leaves_two_equal_halves(form, width):
    network = on_meta(form, in_channels=1, classes=3, width=width)
    assert network(torch.zeros(2, 1, 64, 64, device="meta")).shape == (2, 3)
    for stage in network.stages:
        assert stage[0].pointwise[0].out_channels == stage[0].branch.second[0].out_channels


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0.0}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        shufflenet_v2.shufflenet_v2_x1_0(**settings)
