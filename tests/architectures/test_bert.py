import pytest
import torch

from penjing.architectures import bert

# Published for the encoder with its pooler: 4.4, 28.8 and 110 million.
ENCODERS = {"tiny": (4_385_920, 128), "small": (28_763_648, 512), "base": (109_482_240, 768)}


def tiny(**settings):
    torch.manual_seed(0)
    return bert.bert_tiny(**{"classes": 3, "vocabulary": 50, "length": 16, "width": 16, "heads": 2, **settings}).eval()


@pytest.mark.parametrize("size", ENCODERS)
def test_the_number_of_parameters_is_the_published_one_and_the_classifier(size):
    with torch.device("meta"):
        network = getattr(bert, f"bert_{size}")(classes=5)
    encoder, width = ENCODERS[size]
    assert sum(p.numel() for p in network.parameters()) == encoder + 5 * width + 5


def test_a_masked_token_does_not_matter_and_a_shown_one_does():
    network = tiny()
    ids = torch.randint(0, 50, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[:, 5:] = 0
    hidden, shown = ids.clone(), ids.clone()
    hidden[:, 6] = (ids[:, 6] + 1) % 50
    shown[:, 3] = (ids[:, 3] + 1) % 50
    with torch.no_grad():
        logits = network(ids, mask)
        assert torch.equal(network(hidden, mask), logits)
        assert not torch.equal(network(shown, mask), logits)
        assert not torch.equal(network(hidden), network(ids))
        assert torch.allclose(network(ids[:, :5]), logits, atol=1e-6)


def test_a_mask_that_hides_nothing_is_no_mask():
    network = tiny()
    ids = torch.randint(0, 50, (2, 8))
    with torch.no_grad():
        assert torch.allclose(network(ids, torch.ones(2, 8, dtype=torch.bool)), network(ids), atol=1e-6)


def test_the_first_segment_is_the_default():
    network = tiny()
    ids = torch.randint(0, 50, (2, 8))
    segments = torch.zeros_like(ids)
    with torch.no_grad():
        assert torch.equal(network(ids, segments=segments), network(ids))
        segments[:, 4:] = 1
        assert not torch.equal(network(ids, segments=segments), network(ids))


@pytest.mark.parametrize(
    "settings",
    [*({word: 0} for word in ("classes", "vocabulary", "length", "width", "heads", "depth")), {"heads": 5}],
)
def test_settings_that_do_not_fit_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        tiny(**settings)
