import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import quantize
from penjing.errors import CheckpointError, PruningError, RecipeError, TaskError
from penjing.network.capture import capture_network
from penjing.numerics.grid import integers
from penjing.prune import Magnitude, criteria
from penjing.prune.weights import as_stored, by_output, prunable
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.storage import checkpoint
from penjing.tasks.task import Task
from tests.prune.every_layer import COUNT, LAYERS, TASK, TRAIN, Net, bits, draft, images, total, zeros
from tests.raises import raises_case, raises_setting


@pytest.mark.parametrize("criterion", criteria.OF_WEIGHTS)
@pytest.mark.parametrize("scope", ["global", "per_layer", "row"])
def test_exactly_as_many_weights_as_asked_for_become_zero(criterion, scope):
    start = draft()
    before = bits(start)
    pruned = Magnitude(sparsity=0.7, criterion=criterion, scope=scope)(start, Context(task=TASK, seed=4))
    expected = {
        "global": int(0.7 * COUNT),
        "per_layer": sum(int(0.7 * n) for n in (216, 432, 96, 30)),
        "row": 8 * int(0.7 * 27) + 12 * int(0.7 * 36) + 6 * int(0.7 * 16) + 5 * int(0.7 * 6),
    }[scope]
    assert total(pruned) == expected
    for name, value in pruned.network.state_dict().items():
        if name.rpartition(".")[0] in LAYERS and name.endswith("weight"):
            assert torch.equal(value[value != 0], before[name][value != 0])
        else:
            assert torch.equal(value, before[name])
    assert pruned.sparse == tuple(f"{name}.weight" for name in LAYERS)


def test_the_smallest_of_all_layers_go():
    start = draft()
    pruned = Magnitude(sparsity=0.6)(start, Context(task=TASK))
    sizes = torch.cat([start.network.get_parameter(f"{n}.weight").detach().abs().flatten() for n in LAYERS])
    edge = sizes.sort().values[int(0.6 * COUNT)]
    for name in LAYERS:
        weight = start.network.get_parameter(f"{name}.weight").detach()
        assert torch.equal(pruned.network.get_parameter(f"{name}.weight") == 0, weight.abs() < edge)


def test_a_threshold_removes_what_is_smaller():
    start = draft()
    pruned = Magnitude(threshold=0.1)(start, Context(task=TASK))
    for name in LAYERS:
        weight = start.network.get_parameter(f"{name}.weight").detach()
        assert torch.equal(pruned.network.get_parameter(f"{name}.weight"), torch.where(weight.abs() < 0.1, 0.0, weight))


@pytest.mark.parametrize("name", LAYERS)
def test_n_of_m_holds_along_the_input_channels_of_every_output(name):
    start = draft()
    pruned = Magnitude(pattern="1:2")(start, Context(task=TASK))
    module = pruned.network.get_submodule(name)
    rows = by_output(module, module.weight.detach())
    lines = rows.reshape(*rows.shape[:2], -1).permute(0, 2, 1)
    whole = lines.shape[2] // 2 * 2
    assert (lines[..., :whole].reshape(-1, 2).count_nonzero(1) == 1).all()
    assert (lines[..., whole:] != 0).all()


def test_the_layout_by_output_of_a_transposed_convolution_comes_back():
    module = nn.ConvTranspose2d(12, 6, 2, groups=3)
    rows = by_output(module, module.weight.detach())
    assert rows.shape == (6, 4, 2, 2)
    assert torch.equal(as_stored(module, rows), module.weight)
    assert torch.equal(
        rows[3, 2], module.weight[1 * 4 + 2, 1]
    )  # the second output of the second group, its third input


@pytest.mark.parametrize("criterion", ["gradient", "taylor", "fisher"])
def test_gradients_are_taken_as_a_loop_over_batches_takes_them(criterion):
    network = draft().network
    scores = criteria.score_weights(criterion, network, prunable(network), Context(task=TASK), 2)
    weight, slow = network.head.weight, torch.zeros(5, 6)
    for x, y in TRAIN[:2]:
        (g,) = torch.autograd.grad(F.cross_entropy(network(x), y), weight)
        w = weight.detach()
        slow += {"gradient": g.abs(), "taylor": (w * g).abs(), "fisher": w**2 * g**2}[criterion]
    torch.testing.assert_close(scores["head"], slow / 2)
    assert all(p.grad is None for p in network.parameters())


def test_taylor_keeps_the_loss_better_than_chance():
    start = draft()
    x, y = TRAIN[0]
    losses = {}
    for criterion in ("taylor", "random"):
        pruned = Magnitude(sparsity=0.5, criterion=criterion)(start, Context(task=TASK))
        with torch.no_grad():
            losses[criterion] = abs(float(F.cross_entropy(pruned.network(x), y) - F.cross_entropy(start.network(x), y)))
    assert losses["taylor"] < losses["random"]


def test_layers_are_chosen_by_name_and_left_out_by_name():
    some = Magnitude(layers=("stem", "head"), keep=("head",))(draft(), Context(task=TASK))
    assert (zeros(some, "stem"), total(some)) == (108, 108)
    assert some.sparse == ("stem.weight",)
    with raises_case(RecipeError, "no-layer") as caught:
        Magnitude(keep=("stemm",))(draft(), Context(task=TASK))
    assert caught.value.got == "stemm" and "stem?" in caught.value.remedy
    with raises_case(RecipeError, "no-layer") as caught:
        Magnitude(layers=("groupd",))(draft(), Context(task=TASK))
    assert caught.value.got == "groupd" and "grouped" in caught.value.remedy
    with raises_case(PruningError, "nothing-to-prune"):
        Magnitude(layers=("head",), keep=("head",))(draft(), Context(task=TASK))


def test_more_in_a_second_step_contains_what_went_in_the_first():
    context = Context(task=TASK)
    first = Magnitude(sparsity=0.3)(draft(), context)
    for criterion in ("magnitude", "random", "taylor"):
        second = Magnitude(sparsity=0.6, criterion=criterion)(first, context)
        assert total(second) == int(0.6 * COUNT)
        for name in LAYERS:
            gone = first.network.get_parameter(f"{name}.weight") == 0
            assert (second.network.get_parameter(f"{name}.weight")[gone] == 0).all()
        assert second.edits == first.edits  # the same tensors, logged once


def test_an_embedding_that_is_an_output_layer_too_stays():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body = nn.Embedding(11, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.body(self.table(x)))

    ids = torch.zeros(2, 4, dtype=torch.long)
    start = Draft(capture_network(Tied(), (ids,)))
    pruned = Magnitude()(start, Context(task=Task(example=ids)))
    assert pruned.sparse == ("body.weight",)
    assert torch.equal(pruned.network.head.weight, start.network.head.weight)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    checkpoint.save(Magnitude()(draft(), Context(task=TASK)), tmp_path)

    class Other(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Identity()

    with raises_case(CheckpointError, "misfit"):
        checkpoint.load(tmp_path, capture_network(Other().eval(), (images(2),)))


@pytest.mark.parametrize("settings", [{}, {"weight_symmetric": False, "weight_bits": 4}])
def test_zeros_become_the_integer_of_zero(settings):
    context = Context(task=TASK)
    pruned = Magnitude(sparsity=0.6)(draft(), context)
    quantized = quantize.Static(**settings)(pruned, context)
    for name in ("stem", "grouped", "head"):
        entry = quantized.plan.entries[f"{name}:weight"]
        scale, zero = torch.tensor(entry.scale), torch.tensor(entry.zero_point, dtype=torch.int32)
        weight = quantized.network.get_parameter(f"{name}.weight").detach()
        gone = pruned.network.get_parameter(f"{name}.weight") == 0
        shape = (-1, *[1] * (weight.dim() - 1)) if len(zero) > 1 else ()
        steps = integers(weight, scale, zero, entry.spec) - zero.reshape(shape)
        assert gone.sum() > 0 and (steps[gone] == 0).all()
    assert quantized.sparse == pruned.sparse


def test_how_many_there_are_is_told():
    told = []
    Magnitude()(draft(), Context(task=TASK, events=lambda kind, **values: told.append((kind, values))))
    assert told == [("sparse", {"step": "Magnitude", "layers": 4, "zeros": COUNT // 2, "weights": COUNT})]


def test_labels_that_are_missing_are_asked_for():
    with raises_case(TaskError, "no-training-data") as caught:
        Magnitude(criterion="fisher")(draft(), Context(task=Task(example=images(1))))
    assert "prune.Wanda" in caught.value.remedy


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 1}, {"sparsity": -0.1}, {"pattern": "4:2"}, {"batches": 0}, {"scope": "layer"},
        {"criterion": "l2"}, {"keep": "head"}, {"layers": "head"}, {"threshold": -1}, {"threshold": "small"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings):
    with raises_setting(*settings) as caught:
        Magnitude(**settings)
    assert caught.value.expected is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.5, "pattern": "1:4"}, {"scope": "global", "pattern": "2:4"},
        {"threshold": 0.1, "sparsity": 0.5}, {"threshold": 0.1, "pattern": "2:4"},
        {"threshold": 0.1, "criterion": "random"},
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_named(settings):
    with raises_case(RecipeError, "contradiction") as caught:
        Magnitude(**settings)
    assert caught.value.field == next(iter(settings)) and caught.value.expected is not None


def test_it_comes_before_quantization():
    with raises_case(RecipeError, "order"):
        Recipe(quantize.Static(), Magnitude())
