import pytest
import torch

from penjing.analyze.cost import cost, totals
from penjing.architectures import efficientnet
from penjing.network.capture import capture_network

PUBLISHED = {
    "b0": 5_288_548,
    "b1": 7_794_184,
    "b2": 9_109_994,
    "b3": 12_233_232,
    "b4": 19_341_616,
    "lite0": 4_652_008,
    "lite1": 5_416_680,
    "lite2": 6_092_072,
    "lite3": 8_197_096,
    "lite4": 13_006_568,
}


def on_meta(form, **settings):
    with torch.device("meta"):
        return getattr(efficientnet, f"efficientnet_{form}")(**settings)


@pytest.mark.parametrize(("form", "published"), PUBLISHED.items())
def test_the_number_of_parameters_is_the_published_one(form, published):
    assert sum(p.numel() for p in on_meta(form).parameters()) == published


@pytest.mark.parametrize(("form", "published"), [("b0", 0.39e9), ("lite0", 0.386e9)])
def test_multiply_accumulates_are_the_published_ones(form, published):
    x = torch.zeros(1, 3, 224, 224, device="meta")
    macs = totals(cost(capture_network(on_meta(form), (x,)), ((x,), {}))).macs
    assert macs == pytest.approx(published, rel=0.02)


def test_the_lite_form_has_no_gates_and_keeps_its_first_and_last_convolution():
    network = on_meta("lite2")
    kinds = {type(module) for module in network.modules()}
    assert torch.nn.ReLU6 in kinds and not kinds & {torch.nn.SiLU, efficientnet.SqueezeExcite}
    assert network.stem[0].out_channels == 32 and network.head[0].out_channels == 1280
    assert len(network.stages[0]) == 1 and len(network.stages[-1]) == 1 and len(network.stages[1]) == 3


def test_width_rounds_channels_to_multiples_of_8():
    network = on_meta("b0", width=1.1)
    assert [stage[-1].project[0].out_channels for stage in network.stages] == [16, 24, 48, 88, 120, 208, 352]


def test_gates_shrink_and_never_turn_a_value_around():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5)
    gated = efficientnet.SqueezeExcite(8, 2)(x)
    assert torch.all(gated * x >= 0) and torch.all(gated.abs() <= x.abs())


def test_small_pictures_and_other_channels_and_classes():
    network = efficientnet.efficientnet_b0(in_channels=1, classes=3, width=0.25).eval()
    assert network.stages(network.stem(torch.zeros(2, 1, 64, 64))).shape == (2, 80, 2, 2)
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"in_channels": 0}, {"classes": 0}, {"width": 0.0}])
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        efficientnet.efficientnet_b0(**settings)
