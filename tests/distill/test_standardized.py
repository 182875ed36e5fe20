"""Standardized logits against a slow reference, and what they do not see."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import penjing as pj
from penjing import distill
from penjing.distill.standardized import standardized
from penjing.distill.teaching import DistillationInputs
from penjing.errors import TaskError
from tests.raises import raises_case, raises_setting

LOSSES = [distill.Logits(temperature=2.0), distill.DKD(temperature=2.0, warmup=0.0)]


def two(seed, samples=5, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in range(2)]


def loss(way, student, teacher, target=None):
    inputs = DistillationInputs(student, teacher, target, {}, {})
    return way.loss(inputs)(inputs)


def softened(row, temperature):
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((z - mean) ** 2 for z in row) / len(row))
    powers = [math.exp((z - mean) / deviation / temperature) for z in row]
    return [p / sum(powers) for p in powers]


@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 8))
def test_soft_targets_of_z_scores(seed, temperature):
    student, teacher = two(seed)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(softened(t, temperature), softened(s, temperature), strict=True)
        total += sum(p * math.log(p / q) for p, q in pairs)
    way = distill.StandardizedLogits(of=distill.Logits(temperature=temperature))
    assert float(loss(way, student, teacher)) == pytest.approx(temperature**2 * total / 5, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("of", LOSSES)
def test_shift_and_scale_of_a_sample_are_not_seen(of):
    student, teacher = two(0)
    target = teacher.argmax(1)
    shift, scale = torch.arange(5.0)[:, None].double(), torch.tensor([0.1, 0.5, 1, 3, 20]).double()[:, None]
    way = distill.StandardizedLogits(of=of)
    expected = loss(way, student, teacher, target)
    assert torch.allclose(loss(way, scale * student + shift, teacher, target), expected, rtol=1e-5)
    assert torch.allclose(loss(way, student, scale * teacher - shift, target), expected, rtol=1e-5)
    assert float(loss(way, scale * teacher + shift, teacher, target)) == pytest.approx(0, abs=1e-9)
    assert float(loss(of, scale * teacher + shift, teacher, target)) > 0.1  # what is seen without it


@pytest.mark.parametrize("of", LOSSES)
def test_the_gradient_is_that_of_small_differences(of):
    student, teacher = two(1)
    target, way = teacher.argmax(1), distill.StandardizedLogits(of=of)
    assert torch.autograd.gradcheck(lambda x: loss(way, x, teacher, target), student.requires_grad_())


def test_equal_logits_of_a_sample_are_zeros_and_have_a_finite_gradient():
    student, teacher = two(2)
    student[1] = 4.0
    assert torch.equal(standardized(student)[1], torch.zeros(4).double())
    student.requires_grad_()
    loss(distill.StandardizedLogits(), student, teacher).backward()
    assert student.grad.isfinite().all() and student.grad[0].any()


@pytest.mark.parametrize("of", LOSSES)
@pytest.mark.parametrize("places", [(), (3,), (3, 3)])
def test_classes_on_another_axis_are_standardized_there(of, places):
    shape = (3, *places, 3)  # as many classes as there are places and samples: labels alone tell which axis is which
    student, teacher = (x.reshape(shape) for x in two(0, 3 ** (1 + len(places)), 3))
    target = teacher.argmax(-1)
    way = distill.StandardizedLogits(of=of)
    flat = loss(way, student.reshape(-1, 3), teacher.reshape(-1, 3), target.reshape(-1))
    axis = 1 if len(places) > 1 else -1
    assert torch.allclose(loss(way, student.movedim(-1, axis), teacher.movedim(-1, axis), target), flat)


def test_yaml_holds_the_loss_inside_it_whose_weight_counts():
    way = distill.StandardizedLogits(of=distill.DKD(temperature=2.0, beta=2.0, weight=0.5))
    recipe = pj.Recipe(pj.Finetune(distill=way))
    assert pj.Recipe.from_yaml(recipe.to_yaml()) == recipe and way.weight == 0.5


def test_what_is_not_a_loss_on_logits_is_refused():
    for wrong in (distill.Hints(features=("a",)), distill.Logits, "Logits"):
        with raises_setting("of"):
            distill.StandardizedLogits(of=wrong)
    with raises_case(TaskError, "outputs"):
        loss(distill.StandardizedLogits(), torch.zeros(2, 3), torch.zeros(2, 4))
