import math
from dataclasses import replace

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import share
from penjing.errors import RecipeError, SharingError, TaskError
from penjing.network.capture import capture_network
from penjing.quantize import Static
from penjing.recipes.recipe import Recipe
from penjing.share.layers import grouped
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.storage import checkpoint
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune
from tests import pairs
from tests.raises import raises_case, raises_setting
from tests.trainings import same


class Net(nn.Module):
    """Transformer layers between two linear layers; (batch, 6, 8) to (batch, 5)."""

    def __init__(self, depth=4):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True) for _ in range(depth))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def task():
    torch.manual_seed(0)
    x, y = torch.randn(48, 6, 8), torch.randint(0, 5, (48,))
    batches = list(zip(x.split(16), y.split(16), strict=True))
    return Task(example=x[:2], train=batches, loss=F.cross_entropy, calibration=[x])


TASK = task()


@pytest.fixture(scope="module")
def captured():
    torch.manual_seed(0)
    return capture_network(Net().eval(), *TASK.call())


@pytest.fixture
def draft(captured):
    return Draft(captured).copy()


def run(step, draft, task=TASK):
    return step(draft, pairs.context_of(draft.network, task))


def owners(draft, role="linear1.weight", count=4):
    """Which layers have the same tensor, as the number of the first of them."""
    each = [dict(draft.network.named_parameters(remove_duplicate=False))[f"layers.{i}.{role}"] for i in range(count)]
    return [next(j for j, other in enumerate(each) if other is one) for one in each]


def parameters(draft):
    return sum(p.numel() for p in draft.network.parameters())


def test_neighbours_become_one_with_the_mean_of_their_values(draft):
    tied = run(share.Layers(of="layers", every=2), draft)
    roles = {n.removeprefix("layers.0.") for n, _ in draft.network.named_parameters() if n.startswith("layers.0.")}
    assert len(roles) >= 12
    for role in roles:
        assert owners(tied, role) == [0, 0, 2, 2]
        one, other = (draft.network.get_parameter(f"layers.{i}.{role}") for i in (2, 3))
        torch.testing.assert_close(tied.network.get_parameter(f"layers.3.{role}"), (one + other) / 2)
    assert parameters(draft) - parameters(tied) == 2 * sum(p.numel() for p in Net().layers[0].parameters())


def test_named_parts_and_the_first_value(draft):
    tied = run(share.Layers(groups=(("layers.1", "layers.3"),), value="first"), draft)
    assert owners(tied) == [0, 1, 2, 1]
    before = draft.network.get_parameter("layers.1.linear1.weight")
    assert torch.equal(tied.network.get_parameter("layers.3.linear1.weight"), before)


@pytest.mark.parametrize("similarity", ["outputs", "weights"])
def test_the_most_similar_layers_become_one(draft, similarity):
    near = dict(draft.network.named_parameters())
    with torch.no_grad():
        for name, parameter in near.items():
            if name.startswith("layers.2."):
                parameter.copy_(near[name.replace("layers.2.", "layers.0.")] + 0.001 * torch.randn_like(parameter))
    tied = run(share.Layers(of="layers", count=3, similarity=similarity), draft)
    assert owners(tied) == [0, 1, 0, 3]
    assert owners(run(share.Layers(of="layers", count=1, similarity=similarity), draft)) == [0, 0, 0, 0]


def test_groups_follow_the_distances():
    distances = {(0, 1): 9.0, (0, 2): 1.0, (0, 3): 9.0, (1, 2): 9.0, (1, 3): 2.0, (2, 3): 9.0}
    assert grouped("abcd", distances, 2) == [["a", "c"], ["b", "d"]]
    assert grouped("abcd", distances, 3) == [["a", "c"], ["b"], ["d"]]


def test_the_shared_weights_are_trained_together(draft):
    tied = run(share.Layers(of="layers", count=1), draft)
    trained = run(Finetune(steps=6, learning_rate=0.05, autocast="off"), tied)
    assert owners(trained) == [0, 0, 0, 0]
    weight = "layers.3.linear1.weight"
    assert not torch.equal(trained.network.get_parameter(weight), tied.network.get_parameter(weight))


def test_one_tensor_is_saved_and_reloads_to_the_bit(draft, captured, tmp_path):
    tied = run(share.Layers(of="layers", count=1), draft)
    checkpoint.save(draft, tmp_path)
    whole = (tmp_path / "weights.safetensors").stat().st_size
    checkpoint.save(tied, tmp_path)
    assert (tmp_path / "weights.safetensors").stat().st_size < 0.45 * whole
    again = checkpoint.load(tmp_path, captured)
    assert same(again.network, tied.network) and owners(again) == [0, 0, 0, 0] and again.edits == tied.edits
    step = Finetune(steps=3, learning_rate=0.05, autocast="off")
    assert same(run(step, again).network, run(step, tied).network)


@pytest.mark.parametrize("steps", [(share.Codebook(bits=4),), (Static(),)], ids=["codebook", "integers"])
def test_the_file_holds_it_once(tmp_path, steps):
    pytest.importorskip("onnxruntime")
    draft = Draft(capture_network(Net(depth=2).eval(), *TASK.call()))
    for step in (share.Layers(of="layers", count=1), *steps):
        draft = run(step, draft)
    limit = pairs.INTEGER_DB if draft.plan else pairs.FLOAT_DB
    assert pairs.parity_db(draft, TASK, tmp_path) >= limit
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert sum(math.prod(tensor.dims) in (16 * 24, 48 * 16, 16 * 16) for tensor in graph.initializer) == 4


def test_what_can_not_become_one_is_refused(draft):
    with raises_case(SharingError, "different-shapes") as caught:
        run(share.Layers(groups=(("first", "head"),)), draft)
    assert "(16, 8)" in caught.value.got and "(5, 16)" in caught.value.got and caught.value.remedy
    with raises_case(SharingError, "different-shapes") as caught:
        run(share.Layers(groups=(("layers.0", "layers.1.norm1"),)), draft)
    with raises_case(RecipeError, "no-layer") as caught:
        run(share.Layers(groups=(("layers.0", "layers.9"),)), draft)
    with raises_case(RecipeError, "no-stack") as caught:
        run(share.Layers(of="layer", every=2), draft)
    assert "layers" in caught.value.remedy
    with raises_case(RecipeError, "no-layer"):
        run(share.Layers(of="layers", count=4), draft)
    for settings in ({}, {"of": "layers"}, {"every": 2}, {"of": "layers", "every": 2, "count": 2}):
        with raises_case(RecipeError, "contradiction"):
            share.Layers(**settings)
    for groups in ((("a",),), (("a", "b"), ("b", "c")), ("a", "b")):
        with raises_setting("groups"):
            share.Layers(groups=groups)


def test_without_calibration_data_weights_are_compared(draft):
    blind = replace(TASK, calibration=None)
    auto = share.Layers(of="layers", count=2)(draft, Context(task=blind))
    named = run(share.Layers(of="layers", count=2, similarity="weights"), draft)
    assert owners(auto) == owners(named)


class Classes(Net):
    def forward(self, x):
        return super().forward(x).argmax(1)


def test_outputs_that_are_classes_tell_nothing_of_weights():
    task = replace(TASK, train=None, loss=None)
    draft = Draft(capture_network(Classes(depth=2).eval(), *task.call()))
    for step in (share.Layers(of="layers", count=1), share.Codebook(bits=4), share.ProductCodebook(bits=4)):
        with raises_case(TaskError, "integer-outputs") as refusal:
            run(step, draft, task)
        assert refusal.value.got == "int64"
    assert owners(run(share.Layers(of="layers", count=1, similarity="weights"), draft, task), count=2) == [0, 0]
    assert run(share.Codebook(bits=4, sensitivity="none"), draft, task).codebooks


def test_yaml_holds_groups():
    recipe = Recipe.from_yaml("- share.Layers: {groups: [[layers.0, layers.1], [layers.2, layers.3]]}")
    assert recipe == Recipe(share.Layers(groups=(("layers.0", "layers.1"), ("layers.2", "layers.3"))))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
