import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.analyze.coupling import couple
from penjing.errors import CheckpointError, PruningError, RecipeError, TaskError
from penjing.network.capture import capture_network
from penjing.prune import Channels, Magnitude, Regularized
from penjing.prune.regularized import penalty_for
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.positions import from_text
from penjing.steps.step import Context
from penjing.tasks.task import Task
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune
from tests.analyze.topologies import TOPOLOGIES, Residual
from tests.prune import sparse_trainings
from tests.prune.sparse_trainings import TRAINING, zeros
from tests.raises import raises_case, raises_setting
from tests.trainings import Interrupt, Stop, bits, context_of, digits, same

PENALTIES = ("l1", "l2", "bn_l1", "group_lasso")
SHORT = replace(TRAINING, epochs=1.5, save_every_s=60.0)  # 6 steps
STEP = Regularized(strength=0.02, finetune=SHORT)


@functools.cache  # no step changes the draft that it is given
def draft():
    return sparse_trainings.draft()


def of_topology(name):
    torch.manual_seed(0)
    make, example = TOPOLOGIES[name]
    x = example()
    return capture_network(make().eval(), (x,)), Context(task=Task(example=x))


def units_of(step, network, context):
    """What surgery would cut with every single unit: [(tensor, axis, positions)] for each."""
    coupling = couple(network, context.task.call(), step.keep)
    parameters = dict(network.named_parameters())
    for name, group in coupling.groups.items():
        if group.units > 1 and (step.approximate or not group.statistics):
            for unit in range(group.units):
                cuts = [e for e in coupling.edits({name: [unit]}) if e["edit"] == "slice" and e["tensor"] in parameters]
                yield [(e["tensor"], int(e["axis"]), torch.tensor(from_text(e["removed"]))) for e in cuts]


def formula(penalty, network, units):
    """The plain formula, for autograd."""
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    scales = [m.weight for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    if penalty == "l1":
        return sum(w.abs().sum() for w in weights)
    if penalty == "l2":
        return sum(w.square().sum() / 2 for w in weights)
    if penalty == "bn_l1":
        return sum(w.abs().sum() for w in scales)
    total = torch.zeros((), dtype=weights[0].dtype)
    for cuts in units:
        unit = torch.cat([network.get_parameter(t).index_select(axis, at).flatten() for t, axis, at in cuts])
        total = total + len(unit) ** 0.5 * torch.linalg.vector_norm(unit)
    return total


def beside_autograd(step, network, context):
    """Value and gradients by name: (analytic, reference)."""
    penalty, units = penalty_for(step, network, context), list(units_of(step, network, context))
    network.double()
    expected = formula(step.penalty, network, units)
    expected.backward()
    analytic = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for name, part in penalty.gradients(network):
        analytic[name] += part
    reference = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in network.named_parameters()}
    return analytic | {"value": penalty.value(network)}, reference | {"value": expected.detach()}


def close(analytic, reference):
    assert analytic.keys() == reference.keys()
    return all(torch.allclose(analytic[name], reference[name], rtol=1e-12, atol=1e-12) for name in reference)


@pytest.mark.parametrize(
    "name", ["residual", "concat", "grouped", "shuffle", "fused attention", "tied", "shared", "lstm"]
)
def test_group_lasso_is_that_of_what_would_be_cut(name):
    analytic, reference = beside_autograd(Regularized(approximate=True), *of_topology(name))
    assert close(analytic, reference)
    assert sum(bool(part.any()) for part in reference.values()) > 1  # the value, and a gradient at least


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradients_are_those_of_the_plain_formula(penalty):
    analytic, reference = beside_autograd(Regularized(penalty=penalty), *of_topology("residual"))
    assert close(analytic, reference)
    assert sum(bool(part.any()) for part in reference.values()) > 1


@pytest.mark.parametrize("penalty", PENALTIES)
def test_nothing_pulls_at_what_is_zero(penalty):
    network, context = of_topology("residual")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    parts = list(penalty_for(Regularized(penalty=penalty), network, context).gradients(network))
    assert parts and all(torch.equal(part, torch.zeros_like(part)) for _, part in parts)


def test_layers_that_are_named_are_left_alone():
    def touched(**settings):
        network, context = of_topology("residual")
        penalty = penalty_for(Regularized(**settings), network, context)
        return {name for name, part in penalty.gradients(network) if part.any()}

    assert touched(penalty="l1", keep=("a", "out")) == {"stem.weight", "b.weight"}
    assert touched(keep=("stem",)) == {"a.weight", "norm.weight", "b.weight"}  # not its shift, which is 0
    assert touched(penalty="bn_l1", keep=("b",)) == {"norm.weight"}
    with raises_case(PruningError, "nothing-to-prune") as caught:
        touched(penalty="bn_l1", keep=("a",))
    assert "group_lasso" in caught.value.remedy


def test_groups_with_statistics_take_part_when_they_are_asked_for():
    network, context = of_topology("fused attention")

    def touched(approximate):
        penalty = penalty_for(Regularized(approximate=approximate), network, context)
        return {name for name, part in penalty.gradients(network) if part.any()}

    assert "norm2.weight" not in touched(False) and "up.weight" in touched(False)
    assert "norm2.weight" in touched(True)


class Term:
    """A penalty as a term of the loss."""

    def __init__(self, step, steps, network, context):
        self.step, self.steps, self.units = step, steps, list(units_of(step, network, context))

    def __call__(self, batch):
        grown = (batch.step + 1) / self.steps if self.step.growing else 1.0
        return self.step.strength * grown * formula(self.step.penalty, batch.network, self.units)


@pytest.mark.parametrize(("growing", "clip"), [(False, ()), (True, Clip(threshold=0.5))])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_it_trains_as_with_a_term_of_the_loss(penalty, growing, clip):
    finetune = replace(SHORT, learning_rate=0.02, clip=clip)
    step = Regularized(penalty=penalty, strength=0.05, growing=growing, finetune=finetune)
    start, context = draft(), context_of()

    term = Term(step, 6, start.network, context)
    slow = dict(replace(finetune, losses=(term,))(start, context).network.named_parameters())
    plain = dict(finetune(start, context).network.named_parameters())
    done = dict(step(start, context).network.named_parameters())
    wrong, moved = (sum(float((slow[n] - p).detach().abs().sum()) for n, p in x.items()) for x in (done, plain))
    assert wrong < 0.01 * moved


def test_the_pull_is_in_32_bits_under_autocast():
    """After one step of SGD the penalty has moved a weight by −(1 + momentum) · rate · strength · its gradient."""
    finetune = replace(TRAINING, epochs=0.25, autocast="bf16", learning_rate=0.1, weight_decay=0.0)
    start = draft()
    step = Regularized(strength=0.01, finetune=finetune)
    pulls = {name: torch.zeros_like(p) for name, p in start.network.named_parameters()}
    for name, part in penalty_for(step, start.network, context_of()).gradients(start.network):
        pulls[name] += part
    one, two = step(start, context_of()), finetune(start, context_of())
    for name, parameter in one.network.named_parameters():
        moved = parameter.detach() - two.network.get_parameter(name).detach()
        torch.testing.assert_close(moved, -1.9 * 0.1 * 0.01 * pulls[name], rtol=0, atol=2e-7)


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(64, 48), nn.Linear(48, 10)

    def forward(self, x):
        return self.out(F.relu(self.hidden(x.flatten(1))))


def removed_share(trained, context):
    """Which part of all squared weights goes with half of the channels."""
    pruned = Channels(channels=0.5, criterion="l2", round_to=1)(trained, context)
    squares = [sum(float(p.detach().square().sum()) for p in d.network.parameters()) for d in (trained, pruned)]
    return 1 - squares[1] / squares[0]


def test_what_is_removed_afterwards_is_small():
    context = context_of(digits(1200, 50))
    finetune = replace(TRAINING, epochs=6, save_every_s=60)
    torch.manual_seed(0)
    start = finetune(Draft(capture_network(Perceptron().eval(), (torch.zeros(2, 1, 8, 8),))), context)
    plain = removed_share(finetune(start, context), context)
    seen = []
    told = replace(context, events=lambda kind, **v: seen.append(v) if kind == "regularized" else None)
    for strength, growing in ((0.004, False), (0.012, True)):
        regularized = Regularized(strength=strength, growing=growing, finetune=finetune)(start, told)
        assert removed_share(regularized, context) < 0.7 * plain
        assert seen[-1]["penalty"] == "group_lasso" and seen[-1]["after"] < seen[-1]["before"]


@pytest.mark.parametrize(
    ("penalty", "optimizer", "at", "growing"),
    [("l1", "sgd", 2, True), ("l2", "adamw", 7, False), ("bn_l1", "sgd", 5, False), ("group_lasso", "adamw", 7, True)],
)
def test_a_resumed_training_ends_in_the_same_bits(tmp_path, penalty, optimizer, at, growing):
    step = replace(STEP, penalty=penalty, growing=growing)

    def run(hook, **fields):
        finetune = replace(TRAINING, epochs=2.5, optimizer=optimizer, hooks=(hook,))
        return replace(step, finetune=finetune)(draft(), context_of(**fields))

    whole = run(Interrupt())
    with pytest.raises(Stop):
        run(Interrupt("step", at), folder=tmp_path)
    assert same(bits(run(Interrupt(), folder=tmp_path).network), bits(whole.network))


def test_another_penalty_does_not_continue_it(tmp_path):
    with pytest.raises(Stop):
        replace(STEP, finetune=replace(TRAINING, hooks=(Interrupt("step", 7),)))(draft(), context_of(folder=tmp_path))
    other = replace(STEP, strength=0.03, finetune=replace(TRAINING, hooks=(Interrupt(),)))
    with raises_case(CheckpointError, "settings") as caught:
        other(draft(), context_of(folder=tmp_path))
    assert caught.value.field == "hooks"


@pytest.mark.parametrize("penalty", ["l1", "group_lasso"])
def test_zeros_of_a_step_before_stay(penalty):
    first = Magnitude(sparsity=0.5, criterion="random")(draft(), context_of())
    done = replace(STEP, penalty=penalty)(first, context_of())
    assert zeros(done.network) == zeros(first.network)
    assert done.edits == first.edits


class Twice(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.out = nn.Linear(16, 10)

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(F.relu(self.stem(x.flatten(1))))))))


@pytest.mark.parametrize("penalty", ["l1", "group_lasso"])
def test_a_shared_weight_is_pulled_once_and_stays_shared(penalty):
    torch.manual_seed(0)
    start = Draft(capture_network(Twice().eval(), (torch.zeros(2, 1, 8, 8),)))
    done = replace(STEP, penalty=penalty)(start, context_of())
    assert done.network.a.weight is done.network.b.weight
    parts = list(penalty_for(replace(STEP, penalty=penalty), start.network, context_of()).gradients(start.network))
    names = [name for name, _ in parts]
    assert "a.weight" in names and "b.weight" not in names
    assert names.count("a.weight") == (2 if penalty == "group_lasso" else 1)  # of two axes, or of one weight


def test_frozen_weights_stay():
    start = draft().copy()
    start.network.conv.weight.requires_grad_(False)
    done = STEP(start, context_of())
    assert torch.equal(done.network.conv.weight, start.network.conv.weight)
    assert not torch.equal(done.network.norm.weight, start.network.norm.weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"penalty": "l0"}, {"strength": 0}, {"strength": -1.0}, {"strength": float("nan")}, {"strength": "0.1"},
        {"finetune": None}, {"finetune": Magnitude()}, {"growing": 1}, {"keep": "conv"}, {"approximate": None},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings):
    with raises_setting(*settings) as caught:
        Regularized(**settings)
    assert caught.value.expected


def test_what_can_not_be_done_is_said():
    with raises_case(TaskError, "no-training-data"):
        STEP(draft(), Context(task=Task(example=torch.zeros(1, 1, 8, 8))))
    with raises_case(RecipeError, "no-layer") as unknown:
        replace(STEP, keep=("cnv",))(draft(), context_of())
    assert unknown.value.got == "cnv"
    x = torch.randn(2, 6)
    alone = Draft(capture_network(nn.Linear(6, 4).eval(), (x,)))
    with raises_case(PruningError, "nothing-to-prune") as caught:
        STEP(alone, Context(task=Task(example=x)))
    assert all(
        f"{name}: {why}" in caught.value.got for name, why in couple(alone.network, ((x,), {})).not_prunable.items()
    )


def test_recipes_name_the_training_in_yaml():
    text = "- prune.Regularized: {penalty: bn_l1, growing: true, keep: [stem], finetune: {Finetune: {epochs: 2}}}"
    recipe = Recipe.from_yaml(text)
    assert recipe.steps[0] == Regularized(penalty="bn_l1", growing=True, keep=("stem",), finetune=Finetune(epochs=2))


def test_the_recipe_of_sparse_training_prunes():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 6, 6)
    task = Task(example=x[:1], train=[(x, torch.arange(16) % 5)], loss=F.cross_entropy)
    current = start = Draft(capture_network(Residual().eval(), (x[:2],)))
    for step in Recipe(
        Regularized(penalty="group_lasso", finetune=Finetune(epochs=2)),
        Channels(macs=0.5, criterion="l2", round_to=1),
        Finetune(epochs=1),
    ):
        current = step(current, Context(task=task))
    count, before = (sum(p.numel() for p in d.network.parameters()) for d in (current, start))
    assert count < 0.7 * before
