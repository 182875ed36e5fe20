import copy

import pytest
import torch
import torch.nn.functional as F

from penjing.analyze.cost import cost, totals
from penjing.errors import RecipeError
from penjing.finetune import Finetune
from penjing.prune import Channels, Iterative
from penjing.recipe import Recipe
from penjing.step import Context
from penjing.task import Task
from tests.prune.test_channels import Wide, draft, pictures

TRAIN = [(pictures(16, seed), torch.arange(16) % 5) for seed in range(3)]
TASK = Task(example=pictures(1), calibration=[pictures(8)], train=TRAIN, loss=F.cross_entropy)
STEP = Iterative(
    step=Channels(macs=0.4, criterion="l2", round_to=1, least=0),
    finetune=Finetune(epochs=1, autocast="off"),
    rounds=3,
)


def macs(made):
    return totals(cost(made.network, TASK.call())).macs


def test_rounds_together_keep_what_is_asked_for_and_train_between():
    start = draft(Wide())
    before = copy.deepcopy(start.network.state_dict())
    events = []
    made = STEP(start, Context(task=TASK, events=lambda kind, **v: events.append((kind, v))))
    assert 0.33 < macs(made) / macs(start) <= 0.4
    kinds = [kind for kind, v in events if kind == "pruned" or v.get("label") == "fine-tune"]
    assert kinds.count("pruned") == 3
    assert kinds[1:4] == ["progress"] * 3  # three batches of training, then the next round
    assert all(torch.equal(before[k], v) for k, v in start.network.state_dict().items())


def test_the_same_seed_gives_the_same_bits():
    start = draft(Wide())
    one, two = (STEP(start, Context(task=TASK, seed=5)) for _ in range(2))
    assert one.edits == two.edits
    assert all(torch.equal(v, two.network.state_dict()[k]) for k, v in one.network.state_dict().items())


def test_yaml_holds_the_steps_within():
    recipe = Recipe(STEP)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    text = "- prune.Iterative: {step: {prune.Channels: {macs: 0.5}}, finetune: {Finetune: {epochs: 2}}, rounds: 2}"
    assert Recipe.from_yaml(text).steps[0].step == Channels(macs=0.5)


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"step": Finetune()}, {"finetune": None}])
def test_settings_that_make_no_sense_are_named(settings):
    with pytest.raises(RecipeError, match=f"Iterative\\({next(iter(settings))}"):
        Iterative(**{"step": Channels(macs=0.5), "finetune": Finetune(), **settings})


def test_a_folder_keeps_a_state_for_every_round(tmp_path):
    STEP(draft(Wide()), Context(task=TASK, folder=tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-0", "round-1", "round-2"]
