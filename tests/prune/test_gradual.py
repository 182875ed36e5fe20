import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from penjing.errors import CheckpointError, RecipeError, TaskError
from penjing.prune import Gradual, Magnitude
from penjing.prune.gradual import sparsity_at
from penjing.recipes.recipe import Recipe
from penjing.steps.step import Context
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune
from tests.prune.sparse_trainings import COUNT, TRAINING, draft, zeros
from tests.raises import raises_case, raises_setting
from tests.trainings import Interrupt, Stop, bits, context_of, digits, same

STEP = Gradual(step=Magnitude(sparsity=0.9), finetune=TRAINING, every=3)


class Watch:
    def __init__(self):
        self.seen = []

    def __call__(self, moment):
        if moment.name == "gradients":
            self.seen.append(zeros(moment.network))


def test_the_sparsity_rises_by_the_cube_and_then_stays():
    watch = Watch()
    done = replace(STEP, finetune=replace(TRAINING, hooks=(watch,)))(draft(), context_of())
    assert zeros(done.network) == int(0.9 * COUNT)
    assert watch.seen == sorted(watch.seen)
    expected = [0] + [int(sparsity_at(min(t // 3 * 3, 15) / 15, 0.9) * COUNT + 1e-6) for t in range(1, 20)]
    assert watch.seen == expected  # seen at the gradients of step t: after t updates
    assert set(watch.seen[15:]) == {int(0.9 * COUNT)}
    assert done.sparse == ("conv.weight", "head.weight")


def test_it_starts_and_ends_when_told():
    watch = Watch()
    step = replace(STEP, begin=0.25, end=0.5, every=1, finetune=replace(TRAINING, hooks=(watch,)))
    step(draft(), context_of())
    assert watch.seen[:6] == [0] * 6 and 0 < watch.seen[6] < int(0.9 * COUNT)
    assert watch.seen[10:] == [int(0.9 * COUNT)] * 10


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_is_removed_stays_removed(optimizer):
    """Momentum from the time before would move it again."""
    masks = []

    def watch(moment):
        if moment.name == "gradients":
            masks.append(moment.network.head.weight.detach() == 0)

    rate = 0.05 if optimizer == "sgd" else 0.005
    finetune = replace(TRAINING, optimizer=optimizer, learning_rate=rate, hooks=(watch,))
    done = replace(STEP, finetune=finetune)(draft(), context_of())
    masks.append(done.network.head.weight.detach() == 0)
    assert all((b[a]).all() for a, b in itertools.pairwise(masks))
    assert masks[0].sum() == 0 < masks[-1].sum()


@pytest.mark.parametrize("pattern", ["unstructured", "1x4"])
@pytest.mark.parametrize(("optimizer", "at"), [("sgd", 2), ("sgd", 7), ("adamw", 10), ("sgd", 17)])
def test_a_resumed_training_ends_in_the_same_bits(tmp_path, pattern, optimizer, at):
    step = replace(STEP, step=Magnitude(sparsity=0.8, pattern=pattern))

    def run(hook, **fields):
        return replace(step, finetune=replace(TRAINING, optimizer=optimizer, hooks=(hook,)))(
            draft(), context_of(**fields)
        )

    whole = run(Interrupt())
    with pytest.raises(Stop):
        run(Interrupt("step", at), folder=tmp_path)
    assert same(bits(run(Interrupt(), folder=tmp_path).network), bits(whole.network))


def test_another_schedule_does_not_continue_it(tmp_path):
    with pytest.raises(Stop):
        replace(STEP, finetune=replace(TRAINING, hooks=(Interrupt("step", 7),)))(draft(), context_of(folder=tmp_path))
    other = replace(STEP, every=4, finetune=replace(TRAINING, hooks=(Interrupt(),)))
    with raises_case(CheckpointError, "settings") as caught:
        other(draft(), context_of(folder=tmp_path))
    assert caught.value.field == "hooks"


def test_zeros_of_a_step_before_go_first_and_stay():
    first = Magnitude(sparsity=0.3, criterion="random")(draft(), context_of())
    done = STEP(first, context_of())
    for name in first.sparse:
        assert (done.network.get_parameter(name)[first.network.get_parameter(name) == 0] == 0).all()
    assert zeros(done.network) == int(0.9 * COUNT)


def test_the_last_mask_comes_with_the_shortest_training():
    done = replace(STEP, end=1.0, finetune=replace(TRAINING, epochs=0.25))(draft(), context_of())
    assert zeros(done.network) == int(0.9 * COUNT)


def test_layers_that_are_named_stay_whole():
    done = replace(STEP, step=Magnitude(sparsity=0.5, keep=("conv",)))(draft(), context_of())
    assert done.network.conv.weight.all() and done.sparse == ("head.weight",)


def test_it_learns():
    done = replace(STEP, finetune=replace(TRAINING, epochs=20))(draft(), context_of())
    x, y = next(iter(digits(400, 400)))
    with torch.no_grad():
        assert float(F.cross_entropy(done.network(x), y)) < 1.2


@pytest.mark.parametrize(
    "settings",
    [
        {"begin": -0.1}, {"end": 1.1}, {"every": 0}, {"step": Finetune()}, {"finetune": Magnitude()},
        {"step": Magnitude(threshold=0.1)}, {"step": Magnitude(pattern="2:4")}, {"step": Magnitude(criterion="taylor")},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings):
    with raises_setting(*settings) as caught:
        Gradual(**settings)
    assert caught.value.expected


@pytest.mark.parametrize("settings", [{"begin": 0.8}, {"end": 0.0}])
def test_it_begins_before_it_ends(settings):
    with raises_case(RecipeError, "contradiction") as caught:
        Gradual(**settings)
    assert caught.value.field == "begin" and caught.value.expected


def test_data_that_is_missing_is_asked_for():
    with raises_case(TaskError, "no-training-data"):
        STEP(draft(), Context(task=Task(example=torch.zeros(1, 1, 8, 8))))


def test_recipes_hold_both_steps_in_yaml():
    text = "- prune.Gradual: {step: {prune.Magnitude: {sparsity: 0.9}}, finetune: {Finetune: {epochs: 3}}, end: 0.5}"
    recipe = Recipe.from_yaml(text)
    assert recipe.steps[0] == Gradual(step=Magnitude(sparsity=0.9), finetune=Finetune(epochs=3), end=0.5)
