"""The joint recipes: pruned, trained and quantized in one run, to a file that its runtime loads."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import penjing as pj
from examples.digits import task as digits
from penjing import prune, quantize, recipes
from penjing.cli import commands
from penjing.errors import RecipeError, UsageError
from tests.raises import raises_case, raises_setting


def test_what_it_is_made_of():
    recipe = recipes.joint(params=0.3, epochs=10, rounds=3, learning_rate=0.1, weight_bits=4, activation_bits=8)
    gone, after, static, qat = recipe.steps
    assert isinstance(gone, prune.Iterative) and gone.rounds == 3 and gone.step == prune.Channels(params=0.3)
    assert gone.finetune.epochs * 3 + after.epochs + qat.finetune.epochs == pytest.approx(10)
    assert (static.weight_bits, static.activation_bits) == (4, 8)
    assert after.learning_rate == 0.1 and qat.finetune.learning_rate == pytest.approx(0.01)
    assert isinstance(qat, quantize.QAT)
    assert gone.finetune.clip == after.clip == qat.finetune.clip == pj.Clip()
    recipe.check()
    assert pj.Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_without_a_target_half_of_the_macs_stay():
    for make in recipes.NAMES.values():
        assert make().steps[0].step.macs == 0.5
    blocks, after, *_ = recipes.joint(blocks=2, epochs=10).steps
    assert blocks == prune.Blocks(blocks=2) and after.epochs == pytest.approx(8)
    blocks, first, rounds, after, _, qat = recipes.joint(blocks=2, macs=0.8, epochs=10).steps
    assert isinstance(blocks, prune.Blocks) and isinstance(rounds, prune.Iterative)
    assert first.epochs == pytest.approx(2)  # channels are chosen in a network that works
    assert first.epochs + 2 * rounds.finetune.epochs + after.epochs + qat.finetune.epochs == pytest.approx(10)
    assert recipes.joint(latency=0.6).steps[0].step == prune.Channels(latency=0.6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"macs": 1.5},
        {"macs": "x"},
        {"epochs": 0},
        {"epochs": "3"},
        {"rounds": 0},
        {"rounds": "2"},
        {"weight_bits": 11},
    ],
)
def test_settings_that_make_no_sense(wrong):
    ((name, _),) = wrong.items()
    with raises_setting(name):
        recipes.joint(**wrong)


def test_two_targets_are_too_many():
    with raises_case(RecipeError, "one-target"):
        recipes.joint(macs=0.5, params=0.5)


def test_the_command_line_takes_them_by_name(tmp_path):
    assert commands._recipe("joint") == recipes.joint() and commands._recipe("label-free") == recipes.label_free()
    (tmp_path / "own.yaml").write_text(recipes.joint(macs=0.3).to_yaml(), encoding="utf-8")
    assert commands._recipe(str(tmp_path / "own.yaml")) == recipes.joint(macs=0.3)
    with raises_case(UsageError, "unreadable") as refusal:
        commands._recipe("joints")
    assert refusal.value.got.startswith("joints: ") and refusal.value.remedy == "did you mean joint?"
    assert all(name in refusal.value.expected for name in ("joint", "label-free"))


def test_the_joint_recipe_gives_integers_that_answer_right(digits_source, tmp_path):
    data = digits.task()
    recipe, goal = recipes.joint(macs=0.5, epochs=20), "minimize size_bytes, drop<=3%"
    run = pj.compress(
        digits_source,
        data,
        goal,
        runtime="onnxruntime",
        recipe=recipe,
        out=tmp_path / "run",
        seconds=0.05,
        threads=1,
    )
    assert run.met, str(run)
    int8 = next(c for c in run.record.candidates if c.name.endswith("int8"))
    assert int8.integer_operators["conv"] == 2 and int8.parity[1].agreement >= 0.95
    assert int8.measured.size_bytes < run.record.source.size_bytes / 3
    assert int8.measured.macs <= 0.5 * run.record.source.macs


def test_the_label_free_recipe_reads_no_label_and_no_training_data(digits_source, tmp_path):
    data = replace(digits.task(), train=None, loss=None, select=None)
    recipe, goal = recipes.label_free(macs=0.6, epochs=30, learning_rate=0.02), "minimize size_bytes"
    run = pj.compress(
        digits_source,
        data,
        goal,
        runtime="onnxruntime",
        recipe=recipe,
        out=tmp_path / "run",
        seconds=0.05,
        threads=1,
    )
    int8 = next(c for c in run.record.candidates if c.name.endswith("int8"))
    assert int8.integer_operators["conv"] == 2
    assert run.record.source.metric - int8.measured.metric <= 0.1


@pytest.mark.parametrize("loader", ["tuples", "tensors", "torch"])
def test_label_free_takes_the_usual_loaders_of_samples_alone(loader):
    torch.manual_seed(0)
    x = torch.rand(24, 1, 8, 8)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    data = {
        "tuples": [(part,) for part in x.split(8)],
        "tensors": list(x.split(8)),
        "torch": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8),
    }[loader]
    unlabelled = pj.Task(example=x[:2], train=data, calibration=data)
    small = pj.apply(recipes.label_free(macs=0.6, epochs=1), nn.Sequential(*layers).eval(), unlabelled)
    assert small(x[:2]).shape == (2, 4)
