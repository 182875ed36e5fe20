import pytest
import torch

from penjing.architectures import build
from penjing.errors import SourceError
from tests.raises import raises_case


def parameters(name, **settings):
    return sum(parameter.numel() for parameter in build(name, **settings).parameters())


def by_hand(depth, in_channels, classes, width):
    blocks = (depth - 2) // 6
    total = 9 * in_channels * width + 2 * width
    channels = width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            total += 9 * channels * outputs + 9 * outputs**2 + 4 * outputs
            total += channels * outputs + 2 * outputs if channels != outputs else 0
            channels = outputs
    return total + channels * classes + classes


@pytest.mark.parametrize(("name", "published"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_the_imagenet_form_has_the_published_number_of_parameters(name, published):
    assert parameters(name) == published


@pytest.mark.parametrize("depth", [20, 32, 56])
@pytest.mark.parametrize("settings", [(3, 10, 16), (1, 7, 8)])
def test_the_small_form_has_the_parameters_of_a_count_by_hand(depth, settings):
    in_channels, classes, width = settings
    count = parameters(f"resnet{depth}", in_channels=in_channels, classes=classes, width=width)
    assert count == by_hand(depth, in_channels, classes, width)


@pytest.mark.parametrize("settings", [(3, 10, 32), (1, 7, 8)])
def test_the_short_form_has_the_parameters_of_a_count_by_hand(settings):
    in_channels, classes, width = settings
    total = 9 * in_channels * width + 2 * width
    for inputs in (width, 2 * width):
        outputs = 2 * inputs
        total += 9 * inputs * outputs + 2 * 9 * outputs**2 + 3 * 2 * outputs
    count = parameters("resnet8", in_channels=in_channels, classes=classes, width=width)
    assert count == total + 4 * width * classes + classes


def test_the_short_form_halves_the_resolution_twice():
    network = build("resnet8", width=4).eval()
    assert network.stages(torch.zeros(1, 4, 32, 32)).shape == (1, 16, 8, 8)
    with raises_case(SourceError, "settings") as caught:
        build("resnet8", width=0)
    assert "width" in str(caught.value.__cause__)


def test_projection_shortcuts_are_the_only_difference_from_the_papers_resnet20():
    projections = sum(16 * 2**i * 16 * 2 ** (i + 1) + 2 * 16 * 2 ** (i + 1) for i in range(2))
    assert parameters("resnet20") - projections == 269_722  # option A, 3 channels, 10 classes: "0.27 M"


def test_strides_halve_the_resolution_twice():
    network = build("resnet20").eval()
    assert network.stages(torch.zeros(1, 16, 32, 32)).shape == (1, 64, 8, 8)


def test_same_seed_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build("resnet20", width=4).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_an_unknown_name_offers_the_nearest():
    with raises_case(SourceError, "unknown-architecture") as caught:
        build("resnet51")
    assert "resnet51" in caught.value.got and "resnet50" in caught.value.remedy
    assert "resnet20" in caught.value.expected


@pytest.mark.parametrize("settings", [{"depth": 3}, {"width": 0}, {"classes": -1}])
def test_settings_that_do_not_fit_are_named(settings):
    (name,) = settings
    with raises_case(SourceError, "settings") as caught:
        build("resnet20", **settings)
    assert name in str(caught.value.__cause__)
