import copy
import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import penjing as pj
from penjing import distill
from penjing.architectures.bert import BERT
from penjing.errors import RecipeError, TaskError
from penjing.network.capture import capture_network
from penjing.pipeline.request import untrained
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task
from tests.raises import raises_case, raises_setting


def draft_of(module, call):
    return Draft(capture_network(module, call))


@pytest.fixture(scope="module")
def text():
    """A module with a stack of six layers, its task and the draft that was captured of it; nobody changes them."""
    torch.manual_seed(0)
    module = BERT(width=8, depth=6, heads=2, vocabulary=40, length=10, classes=3, dropout=0.0).eval()
    task = Task(example=torch.randint(0, 40, (2, 10)))
    return module, task, draft_of(module, task.call()[0])


def with_layers(module, indices):
    """A copy of the module with these of its layers."""
    again = copy.deepcopy(module)
    again.blocks = nn.ModuleList([again.blocks[i] for i in indices])
    return again


class TestFewerLayers:
    def test_every_second_layer_is_what_is_left_of_the_module(self, text):
        module, task, source = text
        small = distill.FewerLayers(of="blocks", keep=3)(source, Context(task=task))
        x = torch.randint(0, 40, (5, 10))
        with torch.no_grad():
            assert torch.equal(small.network(x), with_layers(module, (0, 2, 4))(x))
        assert [e["edit"] for e in small.edits] == ["skip"] * 3
        assert not any(name.startswith("blocks.1.") for name in small.network.state_dict())

    def test_those_that_are_named_stay(self, text):
        module, task, source = text
        small = distill.FewerLayers(of="blocks", keep=(0, 5))(source, Context(task=task))
        x = torch.randint(0, 40, (5, 10))
        with torch.no_grad():
            assert torch.equal(small.network(x), with_layers(module, (0, 5))(x))

    @pytest.mark.parametrize(
        ("settings", "code", "got"),
        [
            ({"of": "block", "keep": 2}, "no-stack", "block"),
            ({"of": "blocks", "keep": 7}, "no-layer", 7),
            ({"of": "blocks", "keep": (0, 6)}, "no-layer", "6"),
        ],
    )
    def test_what_does_not_exist(self, text, settings, code, got):
        _, task, source = text
        with raises_case(RecipeError, code) as error:
            distill.FewerLayers(**settings)(source, Context(task=task))
        assert error.value.got == got
        if code == "no-stack":
            assert "blocks" in error.value.remedy

    @pytest.mark.parametrize("keep", [0, True, (), "2", (1.5,)])
    def test_settings_that_make_no_sense(self, keep):
        with raises_setting("keep"):
            distill.FewerLayers(of="blocks", keep=keep)

    def test_a_layer_that_changes_the_width_stays(self):
        module = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in ((4, 6), (6, 6), (6, 3)))).eval()
        wrapped = nn.Sequential()
        wrapped.add_module("layers", module)
        task = Task(example=torch.rand(2, 4))
        with raises_case(RecipeError, "irremovable") as error:
            distill.FewerLayers(of="layers", keep=(0, 1))(draft_of(wrapped, task.call()[0]), Context(task=task))
        assert "(2, 3)" in error.value.got
        small = distill.FewerLayers(of="layers", keep=(0, 2))(draft_of(wrapped, task.call()[0]), Context(task=task))
        assert torch.equal(small.network(task.example), module[2](module[0](task.example)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, padding=1)
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x):
        return self.head(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))


def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor((x - 4.9) / 6, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y)
    train = list(zip(x[:1200].split(50), y[:1200].split(50), strict=True))
    judged = list(zip(x[1200:].split(100), y[1200:].split(100), strict=True))

    def accuracy(predict):
        return float(np.mean(np.concatenate([predict(a.numpy()).argmax(1) == b.numpy() for a, b in judged])))

    return Task(
        example=x[:2], train=train, loss=F.cross_entropy, evaluate=accuracy, calibration=list(x[:200].split(50))
    )


@pytest.mark.parametrize("wrong", [{"keep": (0, 0)}, {"keep": (3, 0)}, {"of": 5}])
def test_layers_that_can_t_be_named(wrong):
    with raises_setting(next(iter(wrong))):
        distill.FewerLayers(**{"of": "stack", "keep": 1, **wrong})


@pytest.fixture(scope="module")
def source():
    """A task of digits, and the draft of a network for it; nobody changes them."""
    task = digits()
    return task, draft_of(Net().eval(), task.call()[0])


class TestStudent:
    def test_classes_and_channels_are_read_from_the_source_and_the_seed_gives_the_weights(self, source):
        task, draft = source
        one, other = (distill.Student(architecture="resnet8")(draft, Context(task=task, seed=s)) for s in (1, 2**70))
        assert one.edits[0]["settings"] == {"classes": 10, "in_channels": 1}
        states = [draft.network.state_dict() for draft in (one, other)]
        assert not all(torch.equal(states[0][k], states[1][k]) for k in states[0])

    def test_from_the_source_to_a_file_that_the_runtime_loads(self, tmp_path):
        torch.manual_seed(0)
        task, model = digits(), Net().eval()
        recipe = pj.Recipe(
            distill.Student(architecture="resnet8", settings={"width": 4}),
            pj.Finetune(steps=4, learning_rate=0.05),
            pj.quantize.Static(),
        )
        result = pj.run(recipe, model, task, runtime="onnxruntime", out=tmp_path / "run", seconds=0.05, threads=1)
        folder = result.folder / "artifact"
        draft = pj.load_checkpoint(result.folder, Net(), task)
        x = task.call()[0][0]
        session = onnxruntime.InferenceSession(next(folder.glob("*.onnx")))
        logits = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert logits.shape == (2, 10) and np.isfinite(logits).all()
        assert "stages.0.3.conv1.weight" in draft.network.state_dict()
        events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
        assert any("Outputs" in event.get("terms", {}) for event in events)

    def test_other_outputs_are_refused(self, source):
        task, draft = source
        with raises_case(TaskError, "outputs") as error:
            distill.Student(architecture="resnet8", settings={"classes": 7})(draft, Context(task=task))
        assert "(2, 7)" in error.value.got and "(2, 10)" in error.value.got
        assert "{'classes': 10}" in error.value.remedy

    def test_pictures_that_are_too_small_are_the_reason_that_is_told(self, source):
        task, draft = source
        with raises_case(RecipeError, "unbuildable") as error:
            distill.Student(architecture="squeezenet1_1")(draft, Context(task=task))
        assert "too small" in error.value.got

    def test_without_a_training_a_run_warns(self):
        student = distill.Student(architecture="resnet20")
        assert "no step of the recipe trains it" in untrained(pj.Recipe(student))
        assert "no step" in untrained(pj.Recipe(student, pj.prune.Magnitude(sparsity=0.5)))
        assert untrained(pj.Recipe(student, pj.Finetune())) is None
        assert untrained(pj.Recipe(student, pj.prune.Movement(sparsity=0.5))) is None
        assert untrained(pj.Recipe(pj.prune.Magnitude(sparsity=0.5))) is None

    def test_an_unknown_architecture(self, source):
        task, draft = source
        with raises_case(RecipeError, "unbuildable") as error:
            distill.Student(architecture="resnet19")(draft, Context(task=task))
        assert "resnet20" in error.value.got

    def test_it_stands_first(self):
        with raises_case(RecipeError, "order") as error:
            pj.Recipe(pj.prune.Magnitude(sparsity=0.5), distill.Student(architecture="resnet20"))
        assert "Magnitude" in error.value.got and "Student" in error.value.got
