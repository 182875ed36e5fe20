import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import CalibrationError, RecipeError
from penjing.network.capture import capture_network
from penjing.prune import Magnitude, Wanda, wanda
from penjing.prune.weights import by_output
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task
from tests.prune.every_layer import COUNT, LAYERS, TASK, draft, total, zeros
from tests.raises import raises_case, raises_setting


def test_scores_are_those_of_the_slowest_loop():
    weight, norms = torch.randn(6, 2, 3), torch.rand(4).double()  # two groups of two channels each
    slow = torch.zeros(6, 2, 3)
    for o in range(6):
        for i in range(2):
            for k in range(3):
                slow[o, i, k] = abs(weight[o, i, k]) * norms[(o // 3) * 2 + i]
    torch.testing.assert_close(wanda.scores(weight, norms), slow)


def test_norms_are_taken_over_all_calibration_data():
    network = draft().network
    norms = wanda.input_norms(network, {n: network.get_submodule(n) for n in LAYERS}, Context(task=TASK), 20)
    x = torch.cat(TASK.calibration)
    with torch.no_grad():
        hidden = F.relu(network.norm(network.stem(x)))
        last = F.relu(network.up(F.relu(network.grouped(hidden)))).mean((2, 3))
    torch.testing.assert_close(norms["stem"], x.double().square().sum((0, 2, 3)).sqrt())
    torch.testing.assert_close(norms["grouped"], hidden.double().square().sum((0, 2, 3)).sqrt())
    torch.testing.assert_close(norms["head"], last.double().square().sum(0).sqrt())


def test_every_output_loses_the_same_number_and_no_hook_stays():
    start = draft()
    pruned = Wanda(sparsity=0.6)(start, Context(task=TASK))
    for name in LAYERS:
        module = pruned.network.get_submodule(name)
        rows = by_output(module, module.weight.detach()).flatten(1)
        assert set((rows == 0).sum(1).tolist()) == {int(0.6 * rows.shape[1])}
    assert not any(m._forward_pre_hooks for d in (start, pruned) for m in d.network.modules())


def test_n_of_m_and_blocks():
    pruned = Wanda(pattern="2:4")(draft(), Context(task=TASK))
    weight = pruned.network.grouped.weight.detach()
    assert (weight.count_nonzero(1) == 2).all()
    assert zeros(pruned, "stem") == 0  # three input channels are no group of four
    assert 0 < total(Wanda(sparsity=0.5, pattern="1x2")(draft(), Context(task=TASK))) <= COUNT // 2


def correlated(count, seed):
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 1, 32)
    return torch.randn(count, 32, generator=g) * scale[torch.randperm(32, generator=torch.Generator().manual_seed(0))]


def test_it_errs_less_than_magnitude_where_inputs_differ_in_size():
    torch.manual_seed(0)
    start = Draft(capture_network(nn.Linear(32, 24), (correlated(2, 0),)))
    task = Task(example=correlated(1, 0), calibration=[correlated(64, seed) for seed in range(4)])
    x = correlated(256, 9)
    errors = {}
    for step in (Wanda(), Magnitude(scope="row")):
        with torch.no_grad():
            errors[type(step)] = float((step(start, Context(task=task)).network(x) - start.network(x)).square().sum())
    assert errors[Wanda] < 0.5 * errors[Magnitude]


def test_a_layer_that_is_called_twice_is_seen_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x):
            return self.body(self.body(x))

    x = torch.randn(8, 4)
    network = capture_network(Twice(), (x,))
    task = Task(example=x[:1], calibration=[x])
    norms = wanda.input_norms(network, {"body": network.body}, Context(task=task), 20)["body"]
    with torch.no_grad():
        slow = (x.double().square().sum(0) + network.body(x).double().square().sum(0)).sqrt()
    torch.testing.assert_close(norms, slow)


def test_bad_input():
    with raises_case(CalibrationError, "no-calibration"):
        Wanda()(draft(), Context(task=Task(example=torch.zeros(1, 3, 6, 6))))
    for settings in ({"sparsity": 1.5}, {"pattern": "4:2"}, {"batches": 0}):
        with raises_setting(*settings):
            Wanda(**settings)
    with raises_case(RecipeError, "contradiction") as caught:
        Wanda(sparsity=0.3, pattern="2:4")
    assert caught.value.field == "sparsity"
    with raises_case(RecipeError, "no-layer") as caught:
        Wanda(keep=("haed",))(draft(), Context(task=TASK))
    assert caught.value.got == "haed" and "head" in caught.value.remedy


def test_yaml_holds_a_pattern_that_looks_like_a_time():
    recipe = Recipe.from_yaml("- prune.Wanda: {pattern: '2:4'}")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe == Recipe(Wanda(pattern="2:4"))
