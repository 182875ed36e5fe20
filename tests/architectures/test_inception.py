import pytest
import torch
from torch import nn

from penjing.analyze.cost import cost, totals
from penjing.architectures import inception
from penjing.network.capture import capture_network

PUBLISHED = {"googlenet": 6_624_904, "inception_v3": 23_834_568}


def on_meta(name, **settings):
    with torch.device("meta"):
        return getattr(inception, name)(**settings)


def kernels(network):
    return {m.kernel_size for m in network.modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_the_number_of_parameters_is_the_published_one(name, published):
    assert sum(p.numel() for p in on_meta(name).parameters()) == published


@pytest.mark.parametrize(
    ("name", "side", "published"),
    [pytest.param("googlenet", 224, 1.498e9, marks=pytest.mark.slow), ("inception_v3", 299, 5.713e9)],
)
def test_multiply_accumulates_are_the_published_ones(name, side, published):
    x = torch.zeros(1, 3, side, side, device="meta")
    macs = totals(cost(capture_network(on_meta(name), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(published, rel=0.01)


def test_the_joined_blocks_of_googlenet_have_the_papers_channels_and_sides():
    network, x = on_meta("googlenet").eval(), torch.zeros(1, 3, 224, 224, device="meta")
    sizes = []
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, inception.Joined):
            sizes.append((x.shape[1], x.shape[2]))
    assert sizes == [
        *((256, 28), (480, 28)),
        *((512, 14), (512, 14), (512, 14), (528, 14), (832, 14)),
        *((832, 7), (1024, 7)),
    ]


def test_the_joined_blocks_of_inception_v3_have_the_papers_channels_and_sides():
    network, x = on_meta("inception_v3").eval(), torch.zeros(1, 3, 299, 299, device="meta")
    sizes = []
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, inception.Joined):
            sizes.append((x.shape[1], x.shape[2]))
    assert sizes == [(256, 35), (288, 35), (288, 35), *[(768, 17)] * 5, (1280, 8), (2048, 8), (2048, 8)]


def test_only_inception_v3_splits_large_kernels():
    assert kernels(on_meta("googlenet")) == {(7, 7), (1, 1), (3, 3)}
    assert kernels(on_meta("inception_v3")) == {(1, 1), (3, 3), (5, 5), (1, 7), (7, 1), (1, 3), (3, 1)}


def test_branches_read_the_same_input_and_stand_in_their_order():
    x = torch.randn(2, 3, 4, 4)
    joined = inception.Joined(nn.Identity(), nn.ReLU(), nn.MaxPool2d(3, 1, 1))(x)
    assert torch.equal(joined[:, :3], x) and torch.equal(joined[:, 3:6], x.relu()) and joined.shape[1] == 9


@pytest.mark.parametrize(("name", "smallest"), [("googlenet", 32), ("inception_v3", 75)])
def test_the_smallest_picture_and_other_channels_and_classes(name, smallest):
    network = getattr(inception, name)(in_channels=1, classes=3, width=0.125).eval()
    assert network(torch.zeros(2, 1, smallest, smallest)).shape == (2, 3)


def test_inception_v3_takes_no_picture_below_75_by_75():
    with pytest.raises(RuntimeError, match="(?i)output size|kernel size"):
        on_meta("inception_v3").eval()(torch.zeros(2, 3, 74, 74, device="meta"))


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0.0}])
@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_that_do_not_fit_are_named(name, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        getattr(inception, name)(**settings)
