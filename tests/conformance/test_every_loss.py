"""What every loss of a distillation promises. A loss joins by its line in `LOSSES`."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from penjing import distill
from penjing.distill.teaching import DistillationInputs
from penjing.recipes.catalogue import SETTINGS
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.train.finetune import Finetune
from tests.students import SHORT, captured, context

FEATURE = "norm"  # of the network of tests/students.py


@dataclass(frozen=True)
class Row:
    """A loss; what it is worth where student and teacher say the same: nothing, less than elsewhere, or unknown."""

    way: Any
    alike: str = "nothing"


LOSSES = {
    "distill.Logits": Row(distill.Logits()),
    "distill.HardLabels": Row(distill.HardLabels(), alike="less"),  # only the teacher's first class counts
    "distill.DKD": Row(distill.DKD()),
    "distill.StandardizedLogits": Row(distill.StandardizedLogits()),
    "distill.DIST": Row(distill.DIST()),
    "distill.Hints": Row(distill.Hints(features=(FEATURE,))),
    "distill.AttentionTransfer": Row(distill.AttentionTransfer(features=(FEATURE,))),
    "distill.RKD": Row(distill.RKD()),
    "distill.SimilarityPreserving": Row(distill.SimilarityPreserving()),
    "distill.CRD": Row(distill.CRD(negatives=64), alike="unknown"),  # each side has an embedding of its own
    "distill.Outputs": Row(distill.Outputs()),
    "distill.TinyBERT": Row(distill.TinyBERT(hidden=(FEATURE,))),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def drawn(seed):
    """Logits of 8 samples and 5 classes, and a value inside the network, with gradients."""
    random = torch.Generator().manual_seed(seed)
    shapes = (8, 5), (8, 6, 4, 4)
    return [(3 * torch.randn(shape, generator=random)).requires_grad_() for shape in shapes]


def inputs_of(student, teacher):
    (logits, feature), (taught, told) = student, (x.detach().clone() for x in teacher)
    return DistillationInputs(logits, taught, taught.argmax(1), {FEATURE: feature}, {FEATURE: told})


def value(way, student, teacher):
    inputs = inputs_of(student, teacher)
    torch.manual_seed(0)  # of adapters
    return way.loss(inputs)(inputs)


@pytest.mark.parametrize("name", [name for name, kind in SETTINGS.items() if hasattr(kind, "loss")])
def test_every_loss_has_a_row(name):
    assert name in LOSSES and type(LOSSES[name].way) is SETTINGS[name], f"{name} has no line in LOSSES"


@every_loss
def test_it_is_a_finite_scalar_that_is_not_negative_and_is_repeated(name):
    one, two = (value(LOSSES[name].way, drawn(0), drawn(1)) for _ in range(2))
    assert one.shape == () and one.isfinite() and one >= 0 and torch.equal(one, two)


@every_loss
def test_what_it_looks_at_of_the_student_gets_finite_gradients(name):
    way, student = LOSSES[name].way, drawn(0)
    value(way, student, drawn(1)).backward()
    gradient = student[1 if way.features else 0].grad
    assert gradient is not None and gradient.isfinite().all() and gradient.any()
    assert student[0 if way.features else 1].grad is None


@every_loss
def test_there_is_less_to_learn_where_student_and_teacher_say_the_same(name):
    row, teacher = LOSSES[name], drawn(1)
    alike, apart = (float(value(row.way, student, teacher).detach()) for student in (drawn(1), drawn(0)))
    if row.alike == "nothing":
        assert alike == pytest.approx(0, abs=1e-3 * apart) and apart > 0
    elif row.alike == "less":
        assert alike < apart
    else:
        assert row.alike == "unknown"


@every_loss
def test_the_student_alone_is_trained(name):
    teacher = captured(seed=1)
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    student = captured()
    step = replace(SHORT, steps=2, epochs=1, distill=LOSSES[name].way, task_loss_weight=0)
    where = replace(context(teacher), seed=2**70)  # more than a generator of torch takes
    trained = step(Draft(student), where).network
    after = teacher.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert not teacher.training and all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert not torch.equal(trained.conv.weight, student.conv.weight)
    assert trained.state_dict().keys() == student.state_dict().keys()


@every_loss
def test_yaml_holds_it(name):
    recipe = Recipe(Finetune(distill=LOSSES[name].way))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert name in recipe.to_yaml()
