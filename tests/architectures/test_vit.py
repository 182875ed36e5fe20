import pytest
import torch

from penjing.analyze.cost import cost, totals
from penjing.architectures import vit
from penjing.network.capture import capture_network


def on_meta(size):
    with torch.device("meta"):
        return getattr(vit, f"vit_{size}")()


@pytest.mark.parametrize(("size", "published"), [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)])
def test_the_number_of_parameters_is_the_published_one(size, published):
    assert sum(p.numel() for p in on_meta(size).parameters()) == published


@pytest.mark.parametrize(("size", "heads"), [("tiny", 3), ("small", 6), ("base", 12)])
def test_heads_are_64_wide(size, heads):
    assert on_meta(size).blocks[0].attention.heads == heads


def test_multiply_accumulates_are_the_published_ones():
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta("base"), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(17.56e9, rel=0.01)


def test_without_positions_patches_may_change_places():
    torch.manual_seed(0)
    network = vit.vit_tiny(classes=3, width=16, heads=2, depth=2, patch=4, resolution=8).eval()
    x = torch.randn(2, 3, 8, 8)
    turned = x.roll(4, -1)  # left and right patches swapped
    with torch.no_grad():
        assert not torch.allclose(network(x), network(turned), atol=1e-6)
        network.positions.zero_()
        assert torch.allclose(network(x), network(turned), atol=1e-6)


def test_patch_and_resolution_give_the_number_of_tokens():
    network = vit.vit_tiny(in_channels=1, classes=3, width=8, depth=1, patch=8, resolution=64).eval()
    assert network.positions.shape == (1, 65, 8)
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    "settings",
    [
        *({word: 0} for word in ("in_channels", "classes", "width", "heads", "depth", "patch", "resolution")),
        *({"heads": 5}, {"resolution": 100}),
    ],
)
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        vit.vit_tiny(**settings)
