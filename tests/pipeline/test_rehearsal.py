"""What a later training would refuse is told before an earlier one begins."""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing import distill
from penjing.errors import RecipeError, TaskError
from tests.raises import raises_case

X = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def task(**fields):
    train = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 24, 8)]
    return pj.Task(**{"example": X[:2], "train": train, "loss": F.cross_entropy} | fields)


@dataclass(frozen=True)
class Noted:
    """A step that notes that it has begun, before it does what another does."""

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    step: Any
    begun: list

    def __call__(self, draft, context):
        self.begun.append(self.step)
        return self.step(draft, context)


def begins(code, training, data=None, before=None, got=""):
    """Whether the step before a training had begun when the training was refused, as that case."""
    begun = []
    first = Noted(before, begun) if before else pj.Finetune(epochs=1, hooks=(lambda moment: begun.append(moment.name),))
    with raises_case(TaskError, code) as caught:
        pj.apply(pj.Recipe(first, training), network(), data or task())
    assert got in str(caught.value.got)
    return bool(begun)


@pytest.mark.parametrize("before", [None, pj.prune.Channels(macs=0.5)])
class TestRefused:
    def test_what_fits_is_not(self, before):
        begun = []
        first = Noted(before or pj.Finetune(epochs=1), begun)
        other = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        pj.apply(pj.Recipe(first, pj.Finetune(epochs=1, teacher=other)), network(), task())
        assert len(begun) == 1

    def test_a_teacher_of_other_classes(self, before):
        other = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
        assert not begins("outputs", pj.Finetune(teacher=other), before=before)

    def test_a_teacher_that_can_not_take_the_example(self, before):
        other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4))
        assert not begins("teacher-raised", pj.Finetune(teacher=other), before=before)

    @pytest.mark.parametrize(
        "settings", [{"label_smoothing": 0.1}, {"distill": distill.DKD()}], ids=["label smoothing", "distillation"]
    )
    def test_labels_that_are_no_classes(self, before, settings):
        data = task(train=[(X[:8], torch.rand(8, 4))])
        assert not begins("not-classes", pj.Finetune(**settings), data, before)

    def test_a_loss_that_can_not_take_the_batch(self, before):
        data = task(train=[(X[:8], torch.full((8,), 9))])
        assert not begins("loss-raised", pj.Finetune(), data, before)


def test_attention_of_what_is_no_picture():
    assert not begins("not-feature-maps", pj.Finetune(distill=distill.AttentionTransfer(features=("5",))))


def test_a_training_within_a_step(tmp_path):
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    rounds = pj.prune.Iterative(step=pj.prune.Channels(macs=0.5), finetune=pj.Finetune(teacher=other))
    told = []
    with raises_case(TaskError, "outputs"):
        pj.run(
            pj.Recipe(rounds),
            network(),
            task(),
            runtime="onnxruntime",
            out=tmp_path / "out",
            listeners=[lambda kind, **values: told.append(kind)],
        )
    assert "pruned" not in told
    assert not (tmp_path / "out" / "record.json").exists()


def test_features_of_what_is_made_later_are_looked_at_then(tmp_path):
    recipe = pj.Recipe(
        pj.distill.Student(architecture="resnet20", settings={"width": 4}),
        pj.Finetune(epochs=1, distill=distill.AttentionTransfer(features=(("stages.1", "2"),))),
    )
    assert pj.apply(recipe, network(), task()) is not None
    with raises_case(RecipeError, "no-layer") as caught:
        pj.apply(
            pj.Recipe(recipe.steps[0], pj.Finetune(distill=distill.Hints(features=(("stages.9", "2"),)))),
            network(),
            task(),
        )
    assert caught.value.got == "stages.9"


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.LSTM(8, 6, 2, dropout=0.5, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rows(x[:, 0])[0][:, -1])


@pytest.mark.parametrize(("step", "trains"), [(pj.Finetune(steps=1), True), (pj.prune.Magnitude(sparsity=0.5), False)])
def test_dropout_that_a_layer_does_within_is_told_where_the_recipe_trains(step, trains):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pj.apply(pj.Recipe(step), Recurrent(), task())
    assert any("the dropout within rows is left out" in str(one.message) for one in told) == trains


def test_nothing_is_asked_for_keeps_and_random_numbers_stand(tmp_path):
    cache = distill.TeacherCache(tmp_path, network())
    torch.manual_seed(5)
    before = torch.rand(1)
    source = network()
    torch.manual_seed(5)
    recipe = pj.Recipe(pj.Finetune(epochs=1), pj.Finetune(epochs=1, teacher=cache, distill=distill.Logits()))
    pj.apply(recipe, source, task())
    assert (tmp_path / "keys.bin").stat().st_size == 24 * 16  # the training's own samples, which the example is of
    assert torch.equal(torch.rand(1), before)


class Noisy:
    """Batches whose samples differ with every seed."""

    def __len__(self):
        return 3

    def __iter__(self):
        for i in range(0, 24, 8):
            yield X[i : i + 8] + 0.01 * torch.randn(8, 1, 8, 8), Y[i : i + 8]


@pytest.mark.parametrize("before", [None, pj.prune.Channels(macs=0.5)])
def test_samples_without_a_kept_answer_are_told_before_any_step(tmp_path, before):
    taught = pj.Finetune(epochs=1, teacher=distill.TeacherCache(tmp_path, network()), distill=distill.Logits())
    data = task(train=Noisy(), calibration=[X[:8]])
    pj.apply(pj.Recipe(taught), network(), data, seed=1)
    read = pj.Finetune(epochs=1, teacher=distill.TeacherCache(tmp_path), distill=distill.Logits())
    assert not begins("missing", read, data, before, got="8 of 8 samples of a batch")
    begun = []
    first = Noted(before or pj.Finetune(epochs=1), begun)
    pj.apply(pj.Recipe(first, read), network(), data, seed=1)
    assert len(begun) == 1


def test_a_loss_that_looks_at_a_network_to_come_is_not_tried_on_another():
    def penalty(batch):
        return batch.network.get_parameter("conv1.weight").square().mean()

    build = pj.distill.Student(architecture="resnet8", settings={"width": 4})
    trained = pj.apply(pj.Recipe(build, pj.Finetune(steps=1, losses=(penalty,))), network(), task())
    assert trained.get_parameter("conv1.weight").shape[0] == 4
