from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import RecipeError, TaskError
from penjing.network.capture import capture_network
from penjing.prune import Magnitude, Movement
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune
from tests.prune.sparse_trainings import COUNT, TRAINING, draft, zeros
from tests.raises import raises_case, raises_setting
from tests.trainings import Interrupt, Stop, bits, context_of, digits, same

STEP = Movement(sparsity=0.8, finetune=TRAINING, every=3)


class Watch:
    def __init__(self):
        self.masks, self.values = [], []

    def __call__(self, moment):
        if moment.name == "gradients":
            layer = moment.network.head
            self.masks.append(layer.parametrizations.weight[0].mask.clone())
            self.values.append(layer.parametrizations.weight.original.detach().clone())


@pytest.mark.parametrize(
    ("scope", "count"), [("per_layer", int(0.8 * 72) + 1024), ("global", int(0.8 * COUNT)), ("row", 8 * 7 + 10 * 102)]
)
def test_exactly_as_many_weights_as_asked_for_become_zero(scope, count):
    done = replace(STEP, scope=scope)(draft(), context_of())
    assert zeros(done.network) == count
    assert done.sparse == ("conv.weight", "head.weight")
    assert type(done.network.head) is nn.Linear


def test_scores_are_the_sum_of_minus_gradient_times_weight():
    """Against a loop of plain gradient descent on the weights, with the gradient of the masked ones too."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.randn(12, 4)
    start = Draft(capture_network(nn.Linear(6, 4), (x,)))
    task = Task(example=x[:1], train=[(x, y)], loss=F.mse_loss)
    finetune = Finetune(epochs=6, learning_rate=0.1, weight_decay=0.0, warmup=0.0, autocast="off")
    scores = []

    def look(moment):
        if moment.name == "end":
            (layer,) = (m for m in moment.network.modules() if hasattr(m, "parametrizations"))
            scores.append(layer.parametrizations.weight[0].scores.clone())

    step = Movement(sparsity=0.5, finetune=replace(finetune, hooks=(look,)), begin=0.0, end=0.5, every=1)
    done = step(start, Context(task=task))

    weight, bias = (p.detach().clone().requires_grad_() for p in start.network.parameters())
    optimizer = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9, nesterov=True)
    slow, mask = torch.zeros(4, 6), torch.ones(4, 6, dtype=torch.bool)
    for t in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 if t < 1 else 0.05 * (1 + torch.cos(torch.tensor((t - 1) / 5 * torch.pi)))
        used = (weight * mask).detach().requires_grad_()
        F.mse_loss(x @ used.T + bias, y).backward()
        slow -= used.grad * weight.detach()
        weight.grad = used.grad * mask
        optimizer.step()
        optimizer.zero_grad()
        if t < 3:
            count = int((0.5 - 0.5 * (1 - (t + 1) / 3) ** 3) * 24 + 1e-6)
            mask = torch.ones(24, dtype=torch.bool)
            mask[slow.flatten().argsort(stable=True)[:count]] = False
            mask = mask.reshape(4, 6)
    torch.testing.assert_close(scores[0], slow)
    (name,) = done.sparse
    torch.testing.assert_close(done.network.get_parameter(name).detach(), (weight * mask).detach())


def test_removed_weights_may_come_back_with_their_values():
    watch = Watch()
    replace(STEP, every=1, finetune=replace(TRAINING, epochs=10, hooks=(watch,)))(draft(), context_of())
    back = [b & ~a for a, b in zip(watch.masks, watch.masks[1:], strict=False)]
    returned = [(i, mask) for i, mask in enumerate(back) if mask.any()]
    assert returned
    i, mask = returned[0]
    assert (watch.values[i + 1][mask] != 0).all()
    assert all(torch.equal(m, watch.masks[-1]) for m in watch.masks[31:])  # of 40 steps the last quarter


def test_movement_and_size_choose_differently():
    done = STEP(draft(), context_of())
    other = Magnitude(sparsity=0.8, scope="per_layer")(TRAINING(draft(), context_of()), context_of())
    gone = [pruned.network.head.weight == 0 for pruned in (done, other)]
    assert not torch.equal(*gone)


@pytest.mark.parametrize("scope", ["per_layer", "global"])
@pytest.mark.parametrize(("optimizer", "at"), [("sgd", 2), ("sgd", 8), ("adamw", 11), ("sgd", 17)])
def test_a_resumed_training_ends_in_the_same_bits(tmp_path, scope, optimizer, at):
    def run(hook, **fields):
        finetune = replace(TRAINING, optimizer=optimizer, hooks=(hook,))
        return replace(STEP, scope=scope, finetune=finetune)(draft(), context_of(**fields))

    whole = run(Interrupt())
    with pytest.raises(Stop):
        run(Interrupt("step", at), folder=tmp_path)
    assert same(bits(run(Interrupt(), folder=tmp_path).network), bits(whole.network))


def test_minutes_leave_no_trace():
    one = STEP(draft(), context_of(seed=3))
    two = replace(STEP, finetune=replace(TRAINING, minutes=1e9))(draft(), context_of(seed=3))
    assert same(bits(one.network), bits(two.network))


def test_n_of_m_and_blocks():
    done = replace(STEP, sparsity=None, pattern="2:4", keep=("conv",))(draft(), context_of())
    assert (done.network.head.weight.reshape(10, -1, 4).count_nonzero(2) == 2).all()
    assert done.network.conv.weight.all()
    done = replace(STEP, sparsity=0.5, pattern="1x4")(draft(), context_of())
    assert set((done.network.head.weight.reshape(10, -1, 4) != 0).sum(2).flatten().tolist()) == {0, 4}


def test_zeros_of_a_step_before_stay():
    first = Magnitude(sparsity=0.3, criterion="random")(draft(), context_of())
    for step in (STEP, replace(STEP, keep=("conv",))):
        done = step(first, context_of())
        for name in first.sparse:
            assert (done.network.get_parameter(name)[first.network.get_parameter(name) == 0] == 0).all()


def test_layers_that_share_a_weight_still_do():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight
            self.out = nn.Linear(64, 10)

        def forward(self, x):
            return self.out(F.relu(self.b(F.relu(self.a(x.flatten(1))))))

    torch.manual_seed(0)
    start = Draft(capture_network(Shared().eval(), (torch.zeros(1, 1, 8, 8),)))
    done = STEP(start, context_of())
    assert done.network.a.weight is done.network.b.weight
    assert int((done.network.a.weight == 0).sum()) == int(0.8 * 4096)


def test_a_training_after_it_keeps_the_zeros():
    done = STEP(draft(), context_of())
    more = replace(TRAINING, epochs=1)(done, context_of())
    assert zeros(more.network) == zeros(done.network)


def test_it_learns():
    done = replace(STEP, finetune=replace(TRAINING, epochs=20))(draft(), context_of())
    x, y = next(iter(digits(400, 400)))
    with torch.no_grad():
        assert float(F.cross_entropy(done.network(x), y)) < 1.2


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 1}, {"pattern": "4:2"}, {"scope": "layer"}, {"every": 0}, {"finetune": Magnitude()},
        {"finetune": None}, {"finetune": Finetune(workers=2, cluster="local")},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings):
    with raises_setting(*settings) as caught:
        Movement(**settings)
    assert caught.value.expected


@pytest.mark.parametrize("settings", [{"scope": "global", "pattern": "2:4"}, {"begin": 0.9}])
def test_settings_that_contradict_each_other_are_named(settings):
    with raises_case(RecipeError, "contradiction") as caught:
        Movement(**settings)
    assert caught.value.field == next(iter(settings)) and caught.value.expected


def test_data_that_is_missing_is_asked_for():
    with raises_case(TaskError, "no-training-data"):
        STEP(draft(), Context(task=Task(example=torch.zeros(1, 1, 8, 8))))


def test_recipes_name_the_training_in_yaml():
    recipe = Recipe.from_yaml("- prune.Movement: {sparsity: 0.9, finetune: {Finetune: {epochs: 3}}}")
    assert recipe.steps[0] == Movement(sparsity=0.9, finetune=Finetune(epochs=3))
