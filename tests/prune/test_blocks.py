"""Whole blocks and layers are taken out; what is left is the network in which they give zeros."""

import copy
import functools
import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analyze.bypasses import bypasses
from penjing.architectures import build
from penjing.errors import PruningError, RecipeError
from penjing.network.capture import capture_network
from penjing.prune import Blocks, Channels
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.storage import checkpoint
from penjing.surgery import replay
from penjing.tasks.task import Task
from tests.pairs import Block
from tests.raises import raises_case, raises_setting


def captured(model, x):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    model.eval()
    return capture_network(model, (x,)), Task(example=x[:2], calibration=[x])


@functools.cache  # no step changes the draft that it is given
def resnet():
    torch.manual_seed(0)
    model = build("resnet20", in_channels=1, classes=4, width=4)
    return model, *captured(model, torch.randn(8, 1, 16, 16))


@functools.cache
def two_blocks():
    torch.manual_seed(0)
    parts = OrderedDict(stem=nn.Conv2d(1, 4, 3, padding=1), first=Block(4), second=Block(4))
    return captured(nn.Sequential(parts), torch.randn(8, 1, 8, 8))


def test_the_blocks_of_a_residual_network_are_those_with_a_plain_shortcut():
    _, network, task = resnet()
    blocks = [b for b in bypasses(network, task.call()) if b.kind == "block"]
    assert len(blocks) == 7  # three stages of three, the first of the second and third stage changes the shape
    assert all(len(b.layers) == 4 for b in blocks)


def test_what_is_left_is_the_network_whose_block_gives_zeros():
    model, network, task = resnet()
    draft = Blocks(blocks=1)(Draft(network), Context(task=task))
    (edit,) = draft.edits
    gone = next(b for b in bypasses(network, task.call()) if b.last == edit["last"])
    zeroed = copy.deepcopy(network)
    with torch.no_grad():  # the last norm of the block gives zeros
        norm = zeroed.get_submodule(gone.layers[-1])
        norm.weight.zero_()
        norm.bias.zero_()
    x = torch.randn(3, 1, 16, 16)
    assert torch.equal(zeroed(x), draft.network(x))
    names = {name.rpartition(".")[0] for name, _ in draft.network.named_parameters()}
    assert names == {name.rpartition(".")[0] for name, _ in network.named_parameters()} - set(gone.layers)
    assert not [name for name in draft.network.state_dict() if name.startswith(gone.layers)]


def test_the_first_block_is_the_one_whose_loss_costs_least():
    _, network, task = resnet()
    x = task.calibration[0]
    reference = network(x).double()
    noise = {}
    for part in (b for b in bypasses(network, task.call()) if b.kind == "block"):
        other = replay(network, [{"edit": "skip", "last": part.last, "by": part.by}])
        noise[part.last] = float((other(x).double() - reference).square().sum().detach())
    draft = Blocks(blocks=1)(Draft(network), Context(task=task))
    assert draft.edits[0]["last"] == min(noise, key=noise.get)


@pytest.mark.parametrize("target", [{"macs": 0.6}, {"params": 0.7}, {"size": 0.7}])
def test_a_target_is_met_and_no_block_more_goes(target):
    _, network, task = resnet()
    told = []
    context = Context(task=task, events=lambda kind, **values: told.append((kind, values)))
    draft = Blocks(**target)(Draft(network), context)
    left = Blocks(**target)._meter(Draft(network), context)
    (limit,) = target.values()
    one_less = Draft(replay(network, draft.edits[:-1]))
    assert left(draft) <= limit < left(one_less)
    assert [values["snr_db"] for kind, values in told if kind == "block"]


def test_blocks_of_a_transformer_go_one_after_the_other_and_reload(tmp_path):
    torch.manual_seed(0)
    model = build("vit_tiny", in_channels=1, classes=3, resolution=16, depth=3, patch=4, heads=2, width=16)
    network, task = captured(model, torch.randn(4, 1, 16, 16))
    draft = Blocks(blocks=4)(Draft(network), Context(task=task))
    assert len(draft.edits) == 4
    assert len([b for b in bypasses(draft.network, task.call()) if b.kind == "block"]) == 2
    checkpoint.save(draft, tmp_path)
    again = checkpoint.restore(tmp_path, copy.deepcopy(model), task)
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(again.network(x), draft.network(x))


def test_layers_without_a_shortcut_go_with_their_norm_and_activation():
    torch.manual_seed(0)
    model = build("vgg16_small", in_channels=1, classes=3, width=4)
    network, task = captured(model, torch.randn(4, 1, 32, 32))
    context = Context(task=task)
    with raises_case(PruningError, "nothing-to-prune"):
        Blocks(blocks=1)(Draft(network), context)
    draft = Blocks(blocks=2, layers=True)(Draft(network), context)
    count = lambda n: sum(isinstance(m, nn.Conv2d) for m in n.modules())  # noqa: E731
    norms = lambda n: sum(isinstance(m, nn.BatchNorm2d) for m in n.modules())  # noqa: E731
    assert count(draft.network) == norms(draft.network) == 11
    assert draft.network(task.example).shape == (2, 3)


def test_channels_of_what_is_left_can_be_pruned_too():
    model, network, task = resnet()
    recipe = pj.Recipe(Blocks(blocks=2), Channels(macs=0.6, criterion="l2"))
    small = pj.apply(recipe, model, task)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in network.parameters())


def test_what_shall_stay_stays():
    network, task = two_blocks()
    for protected, other in (("first", "second"), ("second", "first")):
        modules = dict(Blocks(blocks=1, keep=(protected,))(Draft(network), Context(task=task)).network.named_modules())
        assert f"{protected}.conv1" in modules and f"{other}.conv1" not in modules
    with raises_case(RecipeError, "no-layer") as caught:
        Blocks(blocks=1, keep=("stages.9",))(Draft(network), Context(task=task))
    assert caught.value.got == "stages.9"


def test_a_target_out_of_reach_says_how_far_it_got():
    network, task = two_blocks()
    context = Context(task=task)
    left = Blocks(macs=0.01)._meter(Draft(network), context)(Blocks(blocks=2)(Draft(network), context))
    with raises_case(PruningError, "unreachable") as caught:
        Blocks(macs=0.01)(Draft(network), context)
    assert all(part in caught.value.got for part in ("macs=0.01", "first", "second", f"{left:.3g}"))
    assert "prune.Channels" in caught.value.remedy
    with raises_case(PruningError, "unreachable") as caught:
        Blocks(blocks=3)(Draft(network), context)
    assert "2" in caught.value.expected


@pytest.mark.parametrize(
    ("settings", "name"), [({"blocks": -1}, "blocks"), ({"blocks": 1.5}, "blocks"), ({"macs": 0}, "macs"),
                           ({"macs": 1.2}, "macs"), ({"blocks": 1, "batches": 0}, "batches"),
                           ({"blocks": 1, "keep": "a"}, "keep")]
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings, name):
    with raises_setting(name):
        Blocks(**settings)


@pytest.mark.parametrize("targets", [{}, {"blocks": 1, "macs": 0.5}])
def test_there_is_one_target(targets):
    with raises_case(RecipeError, "one-target"):
        Blocks(**targets)


def test_a_latency_needs_a_runtime():
    network, task = two_blocks()
    with raises_case(PruningError, "no-runtime"):
        Blocks(latency=0.5)(Draft(network), Context(task=task))
    costs = iter([1.0, 0.9, 1.0, 0.6])
    context = Context(task=task, latency=lambda drafts, precision: [next(costs) for _ in drafts])
    assert len(Blocks(latency=0.7)(Draft(network), context).edits) == 2


def test_noise_is_told_in_decibels():
    network, task = two_blocks()
    told = []
    Blocks(blocks=1)(Draft(network), Context(task=task, events=lambda kind, **v: told.append((kind, v))))
    (values,) = [v for kind, v in told if kind == "block"]
    assert math.isfinite(values["snr_db"]) and values["name"]
