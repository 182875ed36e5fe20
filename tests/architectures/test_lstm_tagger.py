import pytest
import torch

from penjing.architectures.lstm_tagger import lstm_tagger
from penjing.network.capture import capture_network


def tiny(**settings):
    torch.manual_seed(0)
    return lstm_tagger(**{"classes": 3, "vocabulary": 50, "embedding": 4, "width": 5, **settings}).eval()


def by_hand(classes, vocabulary, embedding, width, depth, directions):
    total = vocabulary * embedding + (directions * width + 1) * classes
    inputs = embedding
    for _ in range(depth):
        total += directions * (4 * width * (inputs + width) + 8 * width)  # two biases a gate, as torch keeps them
        inputs = directions * width
    return total


def test_the_number_of_parameters_is_the_documented_one():
    assert sum(p.numel() for p in lstm_tagger().parameters()) == 1_350_209 == by_hand(9, 10_000, 50, 300, 1, 2)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_parameters_are_those_of_a_count_by_hand(depth, bidirectional):
    network = tiny(depth=depth, bidirectional=bidirectional)
    assert sum(p.numel() for p in network.parameters()) == by_hand(3, 50, 4, 5, depth, 1 + bidirectional)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_tags_depend_on_later_tokens_only_where_it_reads_both_ways(bidirectional):
    network = tiny(bidirectional=bidirectional)
    ids = torch.randint(0, 50, (2, 8))
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % 50
    with torch.no_grad():
        before, after = network(ids), network(other)
    assert before.shape == (2, 8, 3)
    assert torch.equal(before[:, :5], after[:, :5]) != bidirectional
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_captured_it_computes_the_same():
    network = tiny(depth=2)
    ids = torch.randint(0, 50, (2, 8))
    with torch.no_grad():
        assert torch.equal(capture_network(network, (ids,))(ids), network(ids))


@pytest.mark.parametrize("word", ["classes", "vocabulary", "embedding", "width", "depth"])
def test_settings_that_do_not_fit_are_named(word):
    with pytest.raises(ValueError, match=word):
        tiny(**{word: 0})
