import pytest
import torch

from penjing.architectures.gpt import gpt2, gpt_tiny
from penjing.network.capture import capture_network


def tiny(**settings):
    torch.manual_seed(0)
    return gpt_tiny(**{"vocabulary": 50, "length": 16, "width": 16, "heads": 2, "depth": 2, **settings}).eval()


@pytest.mark.parametrize(("build", "expected"), [(gpt2, 124_439_808), (gpt_tiny, 858_880)])
def test_the_number_of_parameters_is_the_published_one_or_the_documented(build, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == expected


def test_a_later_token_does_not_change_earlier_logits():
    network = tiny()
    ids = torch.randint(0, 50, (2, 8))
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % 50
    with torch.no_grad():
        before, after = network(ids), network(other)
    assert before.shape == (2, 8, 50)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:], atol=0).all(-1).any()


def test_input_and_output_embedding_are_one_tensor_and_stay_one_when_captured():
    network = tiny()
    captured = capture_network(network, (torch.zeros(2, 8, dtype=torch.long),))
    assert network.head.weight is network.tokens.weight
    assert sum(p.numel() for p in captured.parameters()) == sum(p.numel() for p in network.parameters())


def test_maps_into_the_residual_stream_start_smaller_in_a_deeper_network():
    deep, flat = tiny(depth=8), tiny(depth=2)
    ratio = flat.blocks[0].linear2.weight.std() / deep.blocks[0].linear2.weight.std()
    assert ratio.item() == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize(
    "settings", [*({word: 0} for word in ("vocabulary", "length", "width", "heads", "depth")), {"heads": 5}]
)
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        tiny(**settings)
