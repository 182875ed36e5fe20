"""The space of a search: choices, their recipes, and what is left out for want of data."""

import pytest
import torch

from penjing import decompose, prune, quantize
from penjing.architectures import build
from penjing.network.capture import capture_network
from penjing.recipes.recipe import Recipe
from penjing.search.budget import Clock, OutOfTime, paces
from penjing.search.choice import INTEGERS, Choice, Learning, recipe
from penjing.search.space import EPOCHS, Space, removable_blocks
from penjing.train.finetune import Finetune

WHOLE = Space(
    techniques=("none", "channels", "low rank"),
    blocks=(0, 2),
    epochs=EPOCHS,
    learning=Learning(labels=True),
    integers=INTEGERS,
    weight_bits=(8, 4, 3),
)


@pytest.mark.parametrize("labels", [True, False])
def test_every_choice_is_a_recipe_in_a_valid_order(labels):
    choices = list(WHOLE)
    assert len(set(choices)) == len(choices) > 500
    for choice in choices:
        steps = recipe(choice, Learning(labels=labels))
        assert Recipe.from_yaml(steps.to_yaml()) == steps
        assert steps.quantizes == (choice.integers != "none")


@pytest.mark.parametrize(
    ("choice", "kinds"),
    [
        (Choice(), []),
        (Choice(integers="corrected"), [quantize.Static, quantize.BiasCorrection]),
        (Choice(integers="rounded", weight_bits=4), [quantize.Static, quantize.CoordinateRounding]),
        (Choice(integers="mixed", weight_bits=3), [quantize.MixedPrecision]),
        (Choice(epochs=1.0, integers="trained"), [quantize.Static, quantize.QAT]),
        (Choice(technique="channels", keep=0.5), [prune.Channels]),
        (Choice(technique="low rank", keep=0.5, epochs=2.0), [decompose.LowRank, Finetune]),
        (
            Choice(technique="low rank", keep=0.5, epochs=2.0, integers="trained"),
            [decompose.LowRank, Finetune, quantize.Static, quantize.QAT],
        ),
        (
            Choice(blocks=2, epochs=2.0, integers="rounded"),
            [prune.Blocks, Finetune, quantize.Static, quantize.CoordinateRounding],
        ),
        (
            Choice(technique="channels", keep=0.5, epochs=2.0, integers="trained"),
            [prune.Iterative, Finetune, quantize.Static, quantize.QAT],
        ),
    ],
    ids=lambda value: value.words() if isinstance(value, Choice) else "",
)
def test_the_recipe_of_a_choice(choice, kinds):
    assert [type(step) for step in recipe(choice, Learning(labels=True))] == kinds


@pytest.mark.parametrize("choice", [c for c in WHOLE if c.epochs == 2.0][::17], ids=Choice.words)
def test_trainings_are_as_long_as_the_choice_says(choice):
    def epochs(value):
        if isinstance(value, prune.Iterative):
            return value.rounds * value.finetune.epochs
        if isinstance(value, quantize.QAT):
            return value.finetune.epochs
        return value.epochs if isinstance(value, Finetune) else 0.0

    assert sum(map(epochs, recipe(choice, Learning(labels=True)))) == pytest.approx(2.0)


def test_without_labels_nothing_reads_them():
    for choice in WHOLE:
        for step in recipe(choice, Learning(labels=False)):
            training = step.finetune if isinstance(step, prune.Iterative | quantize.QAT) else step
            if isinstance(step, quantize.QAT):
                assert step.data == "calibration"
            elif isinstance(training, Finetune):
                assert training.task_loss_weight == 0


def test_first_looks_train_nothing():
    looks = list(WHOLE.structures())
    assert looks and all(look.structural and not look.epochs and look.weight_bits == 8 for look in looks)


def test_words():
    assert Choice().words() == "as it is"
    several = Choice(technique="channels", keep=0.5, blocks=2, epochs=1.0, integers="trained", weight_bits=4)
    assert several.words() == "2 blocks less, channels to 50% of the MACs, 1 epoch, INT4 trained"


def test_paces_are_learned_from_what_ended():
    choice = Choice(technique="channels", keep=0.5, integers="corrected")
    trained = Choice(technique="channels", keep=0.5, epochs=4.0, integers="trained")
    guess = paces([(Choice(), 10.0)], 30.0)
    assert guess.seconds(trained) == pytest.approx(10 + 10 + 4 * 30)
    known = paces([(Choice(), 10.0), (choice, 25.0), (trained, 85.0)], 30.0)
    assert known.seconds(choice) == pytest.approx(25.0) and known.seconds(trained) == pytest.approx(85.0)


def test_a_clock_breaks_off_only_what_is_late_and_not_the_first():
    clock = Clock(1.0, reserve=10.0)
    clock.has_result = True
    clock({"kind": "progress"})
    clock.before = 57.0  # 66 s less the reserve are over
    with pytest.raises(OutOfTime):
        clock({"kind": "progress"})
    clock.has_result = False
    clock({"kind": "progress"})
    assert clock.left < 0 and Clock(None).left == float("inf")


def test_blocks_are_counted_as_they_can_be_removed():
    network = build("resnet20", in_channels=1, classes=10, width=8).eval()  # of nine blocks two change the shape
    call = ((torch.zeros(2, 1, 8, 8),), {})
    assert removable_blocks(capture_network(network, *call), call) == 7
