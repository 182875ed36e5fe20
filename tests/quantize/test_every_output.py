"""Repairs are judged on every output of a network, not on the sum of all."""

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.network.capture import capture_network
from penjing.quantize import every_output
from penjing.quantize.coordinate_rounding import CoordinateRounding
from penjing.quantize.every_output import without_losses
from penjing.quantize.static import Static
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.sample_axes import size_of

LAYERS = ("body", "large", "small")


class Heads(nn.Module):
    """Two outputs of very different power, such as a state and a score."""

    def __init__(self, both=True):
        super().__init__()
        self.body, self.large, self.small = nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(16, 2)
        self.both = both

    def forward(self, x):
        x = torch.relu(self.body(x))
        return (100 * self.large(x), self.small(x)) if self.both else self.small(x)


def inputs(seed):
    return torch.randn(32, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def quantized():
    def build(model):
        torch.manual_seed(0)
        task = pj.Task(example=inputs(0), calibration=[inputs(1), inputs(2), inputs(3)])
        context = Context(task=task, capabilities=GENERIC)
        return Static()(Draft(capture_network(model.eval(), *task.call())), context), context

    torch.manual_seed(0)
    return build


def changed(draft, **amounts):
    draft = draft.copy()
    with torch.no_grad():
        for name, amount in amounts.items():
            weight = draft.network.get_submodule(name).weight
            weight += amount * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    return draft


def same_layers(a, b):
    pairs = {name: [d.network.get_submodule(name).weight for d in (a, b)] for name in LAYERS}
    return {name for name, (one, other) in pairs.items() if torch.equal(one, other)}


def test_the_layer_that_costs_an_output_most_is_taken_back_and_no_other(quantized):
    before, context = quantized(Heads())
    after = changed(before, small=0.1, large=1e-5)
    result = without_losses(before, after, context, LAYERS)
    assert same_layers(result, before) == {"body", "small"} and same_layers(result, after) == {"body", "large"}


@pytest.mark.parametrize(("held", "piece"), [(0, 1), (200, 70), (every_output.HELD, 1)])
def test_little_memory_changes_no_judgement(quantized, monkeypatch, held, piece):
    before, context = quantized(Heads())
    after = changed(before, small=0.1, large=1e-5)
    whole = every_output._Judge(before, context)
    monkeypatch.setattr(every_output, "HELD", held)
    monkeypatch.setattr(every_output, "PIECE", piece)
    judge = every_output._Judge(before, context)
    assert judge.gain(after) == pytest.approx(whole.gain(after))
    outputs = [output for outputs in judge.references.values() for output in outputs]
    assert sum(output.numel() for output in outputs) <= held
    assert max(size_of(call) for calls in judge.parts for call in calls) == max(1, piece // 10)  # of 8 + 2 outputs
    assert sum(size_of(call) for calls in judge.parts for call in calls) == 96
    assert (len(outputs) > 0) == (held > 0)


def test_a_fixed_batch_is_not_cut():
    call = (torch.zeros(4, 3),), {}
    assert every_output._pieces(call, 1, {}) == [call]
    assert [size_of(piece) for piece in every_output._pieces(call, 3, None)] == [3, 1]


def test_what_no_output_loses_by_is_kept_as_it_is(quantized):
    before, context = quantized(Heads())
    after = changed(before, small=1e-5, large=1e-5)
    assert without_losses(before, after, context, LAYERS) is after


def test_where_every_layer_costs_an_output_nothing_is_left_of_the_repair(quantized):
    before, context = quantized(Heads())
    after = changed(before, body=0.3, small=0.3, large=0.3)
    assert same_layers(without_losses(before, after, context, LAYERS), before) == set(LAYERS)


def test_a_network_of_one_output_is_not_judged_again(quantized):
    before, context = quantized(Heads(both=False))
    after = changed(before, small=0.3)
    assert without_losses(before, after, context, ("body", "small")) is after


def test_the_rounding_search_takes_no_output_more_than_a_decibel(quantized):
    """Of many networks with a score beside a state a hundred times as large."""

    def ratios(draft, reference):
        network, x = insert(draft.network, draft.plan), torch.cat([inputs(1), inputs(2), inputs(3)])
        with torch.no_grad():
            pairs = zip(*(flatten_outputs(n(x))[0] for n in (reference, network)), strict=True)
        return [float(10 * torch.log10(a.square().mean() / (a - b).square().mean())) for a, b in pairs]

    for seed in range(4):
        torch.manual_seed(seed)
        before, context = quantized(Heads())
        rounded = CoordinateRounding()(before, context)
        for plain, now in zip(ratios(before, before.network), ratios(rounded, before.network), strict=True):
            assert now > plain - 1.5
