import pytest
import torch

from penjing.architectures.unet import unet

PAPER = 31_030_658  # 1 input channel, 2 classes, biases, no norms


def parameters(**settings):
    with torch.device("meta"):
        return sum(p.numel() for p in unet(**settings).parameters())


def by_hand(in_channels, classes, width, depth, norms):
    """Without norms every 3×3 convolution has a bias, as in the paper."""

    def double(inputs, outputs):
        return 9 * inputs * outputs + 9 * outputs**2 + (4 if norms else 2) * outputs

    total = double(in_channels, width) + width * classes + classes
    for step in range(depth):
        narrow, wide = width * 2**step, width * 2 ** (step + 1)
        total += double(narrow, wide) + double(wide, narrow) + 4 * wide * narrow + narrow
    return total


@pytest.mark.parametrize("settings", [(3, 2, 64, 4), (1, 2, 64, 4), (1, 7, 8, 2)])
def test_parameters_are_those_of_a_count_by_hand(settings):
    in_channels, classes, width, depth = settings
    count = parameters(in_channels=in_channels, classes=classes, width=width, depth=depth)
    assert count == by_hand(*settings, norms=True)


def test_norms_and_input_channels_are_the_only_difference_from_the_papers_count():
    assert by_hand(1, 2, 64, 4, norms=False) == PAPER
    channels = 2 * (64 + 128 + 256 + 512) * 2 + 2 * 1024  # of all 3×3 convolutions: one bias less, two numbers more
    colors = 2 * 9 * 64
    assert parameters() == 31_037_698 == PAPER + channels + colors


@pytest.mark.parametrize(("height", "width"), [(64, 64), (16, 48)])
def test_every_pixel_of_the_input_gets_logits(height, width):
    network = unet(in_channels=1, classes=3, width=4).eval()
    assert network(torch.zeros(2, 1, height, width)).shape == (2, 3, height, width)


def test_a_skip_carries_detail_past_the_way_down():
    torch.manual_seed(0)
    network = unet(in_channels=1, width=4, depth=2).eval()
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        for down in network.downs:
            down.bn2.weight.zero_()  # nothing comes up from below
        assert not torch.equal(network(x), network(2 * x))


@pytest.mark.parametrize("word", ["in_channels", "classes", "width", "depth"])
def test_settings_that_do_not_fit_are_named(word):
    with pytest.raises(ValueError, match=word):
        unet(**{word: 0})
