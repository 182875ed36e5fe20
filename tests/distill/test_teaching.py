import copy
import math
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing import distill
from penjing.architectures import build
from penjing.architectures.bert import BERT
from penjing.distill.teaching import Distiller
from penjing.errors import CheckpointError, RecipeError, TaskError, TrainingError
from penjing.network.capture import capture_network
from penjing.recipes.recipe import Recipe
from penjing.steps.step import Context
from penjing.surgery.taps import Tapped
from penjing.tasks.task import Task
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune, train
from tests.raises import raises_case, raises_setting
from tests.students import RESUMED, SHORT, WAYS, Kill, Small, agreement, captured, context, task


@pytest.fixture(scope="module")
def teacher():
    return train(captured(16, seed=1), Context(task=task()), replace(SHORT, epochs=10))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: type(way).__name__)
def test_a_student_without_labels_comes_nearer_to_its_teacher(way, teacher):
    told = []
    settings = replace(SHORT, epochs=4, distill=way, task_loss_weight=0, clip=Clip(threshold=1.0))
    where = replace(
        context(teacher, train=None, loss=None), events=lambda kind, **v: told.append(v["loss"]) if "loss" in v else 0
    )
    student = train(captured(), where, settings)
    assert told[-1] < 0.8 * told[0]
    assert not student.training and [p.shape for p in student.parameters()] == [
        p.shape for p in captured().parameters()
    ]


def test_soft_targets_teach_the_classes(teacher):
    student = train(
        captured(),
        context(teacher, train=None, loss=None),
        replace(SHORT, epochs=8, distill=WAYS[0], task_loss_weight=0),
    )
    assert agreement(student, teacher) > 0.9 > 0.5 > agreement(captured(), teacher)


def test_decoupled_distillation_takes_labels(teacher):
    student = train(captured(), context(teacher), replace(SHORT, epochs=8, distill=distill.DKD()))
    assert agreement(student, teacher) > 0.85 > 0.5 > agreement(captured(), teacher)


class TestTheTeacherStaysWhatItWas:
    def test_its_modes(self, teacher):
        other = copy.deepcopy(teacher)
        other.get_submodule("head").train()
        before = [part.training for part in other.modules()]
        assert any(before)
        train(captured(), context(other), replace(SHORT, epochs=1, distill=distill.Logits()))
        assert [part.training for part in other.modules()] == before
        with raises_case(RecipeError, "no-layer"):
            train(captured(), context(other), replace(SHORT, distill=distill.Hints(features=("conv", "no"))))
        assert [part.training for part in other.modules()] == before

    def test_a_network_that_teaches_itself_is_copied(self):
        network = captured()
        seen = []

        class Seen(nn.Module):
            def forward(self, x):
                seen.append(self.training)
                return x

        network.add_submodule("seen", Seen())
        last = list(network.graph.nodes)[-1]
        with network.graph.inserting_before(last):
            last.args = (network.graph.call_module("seen", (last.args[0],)),)
        network.recompile()
        train(network, context(network), replace(SHORT, steps=1, distill=distill.Logits()))
        assert seen.count(True) == 1 and seen[-2:] in ([True, False], [False, True])

    def test_the_place_where_it_was(self, teacher):
        other = copy.deepcopy(teacher)
        teaching = Distiller(captured(), other, (distill.Logits(),), replace(context(None), device="meta"))
        assert {p.device.type for p in other.parameters()} == {"meta"}
        teaching.homes = ["meta"]  # nothing comes back from there
        teaching.release()
        inside = Tapped(other, ["conv"])
        assert inside.view.conv is other.conv


def test_a_student_in_double_precision_has_adapters_of_its_own_kind(teacher):
    double = task()
    pairs = [(x.double(), y) for x, y in double.train]
    where = Context(
        task=replace(double, example=double.example.double(), train=pairs, calibration=None),
        source=copy.deepcopy(teacher).double(),
    )
    torch.manual_seed(0)
    student = capture_network(Small(), (torch.zeros(2, 1, 8, 8),)).double()
    train(student, where, replace(SHORT, steps=2, distill=distill.Hints(features=("conv",))))
    assert student.get_parameter("conv.weight").dtype == torch.float64


def test_an_operator_with_several_results_is_named_by_them():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    network = capture_network(Reads().eval(), (torch.zeros(2, 6, 4),))
    with raises_case(RecipeError, "no-layer") as caught:
        Tapped(network, ["lstm/lstm#0"])
    assert "lstm/getitem#0" in caught.value.remedy
    tapped = Tapped(network, ["lstm"])
    tapped(torch.zeros(2, 6, 4))
    assert tapped.values()["lstm"].shape == (2, 6, 5)


def test_labels_and_teacher_are_added(teacher):
    seen = {}

    def note(name):
        def hook(moment):
            if moment.name == "gradients" and moment.step == 0:
                seen[name] = [p.grad.clone() for p in moment.network.parameters()]

        return hook

    ways = {"labels": (), "soft": replace(WAYS[0], weight=0.5), "both": replace(WAYS[0], weight=0.5)}
    for name, way in ways.items():
        weight = {"labels": 2.0, "soft": 0.0, "both": 2.0}[name]
        settings = replace(SHORT, epochs=0.1, distill=way, task_loss_weight=weight, hooks=(note(name),))
        train(captured(), context(teacher), settings)
    for one, two, both in zip(seen["labels"], seen["soft"], seen["both"], strict=True):
        assert torch.allclose(one + two, both, atol=1e-5)


class Two(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.classes, self.box = nn.Linear(64, 4), nn.Linear(64, 2)

    def forward(self, x):
        x = x.flatten(1)
        return {"classes": self.classes(x), "box": self.box(x)}


def test_every_output_of_several_teachers_is_averaged():
    x = torch.cat([a for a, _ in task().train])
    teachers = (Two(1), Two(2))
    averages = [(a + b) / 2 for a, b in zip(*(t(x).values() for t in teachers), strict=True)]
    settings = replace(SHORT, epochs=60, task_loss_weight=0.0, teacher=teachers, weight_decay=0.0)
    outputs = train(Two(0), context(None), settings)(x).values()
    noise = [float((a - b).square().sum() / b.square().sum()) for a, b in zip(outputs, averages, strict=True)]
    assert max(noise) < 0.05


def test_stored_answers_of_a_network_with_two_outputs_are_of_its_first(tmp_path):
    with raises_case(TaskError, "outputs") as caught:
        settings = replace(SHORT, task_loss_weight=0.0, teacher=distill.TeacherCache(tmp_path, Two(1)))
        train(Two(0), context(None), settings)
    assert "distill.Logits" in caught.value.remedy


def test_several_teachers_are_averaged(teacher):
    other = captured(16, seed=5)
    x = torch.cat(task().calibration)[:50]

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = teacher, other

        def forward(self, x):
            return (self.one(x) + self.two(x)) / 2

    settings = replace(SHORT, epochs=0.25, distill=WAYS[0])
    several = train(captured(), context(None), replace(settings, teacher=(teacher, other)))
    mean = train(captured(), context(None), replace(settings, teacher=Mean()))
    assert torch.allclose(several(x), mean(x), atol=1e-4)


def test_the_network_before_the_training_can_teach(teacher):
    student = copy.deepcopy(teacher)
    settings = replace(SHORT, epochs=1, distill=WAYS[0], task_loss_weight=0, teacher="self")
    assert agreement(train(student, context(None, train=None), settings), teacher) > 0.97


def test_features_of_other_widths_have_adapters_that_are_thrown_away(teacher):
    counts = []

    def look(moment):
        counts.append(sum(len(group["params"]) for group in moment.optimizer.param_groups))

    settings = replace(SHORT, epochs=0.25, distill=distill.Hints(features=("conv", "norm")), hooks=(look,))
    student = train(captured(), context(teacher), settings)
    own = len(list(student.parameters()))
    assert counts[0] == own + 2 * 2  # weight and bias of two convolutions
    assert student.state_dict().keys() == captured().state_dict().keys()
    assert [str(n) for n in student.graph.nodes] == [str(n) for n in captured().graph.nodes]


def test_minutes_are_counted_without_training_the_student(teacher):
    settings = replace(SHORT, minutes=10, epochs=0.01, distill=distill.Hints(features=("conv",)))
    limited, plain = (
        train(captured(), context(teacher), s) for s in (settings, replace(settings, minutes=None))
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(limited.parameters(), plain.parameters(), strict=True))


def test_a_recipe_distils_from_its_source(teacher):
    recipe = pj.Recipe(
        pj.prune.Channels(params=0.6, criterion="l2", round_to=1),
        replace(
            SHORT, epochs=8, distill=(pj.distill.Logits(), pj.distill.Hints(features=("norm",))), task_loss_weight=0
        ),
    )
    small = pj.apply(recipe, teacher, task(train=None, loss=None))
    assert sum(p.numel() for p in small.parameters()) < 0.62 * sum(p.numel() for p in teacher.parameters())
    assert agreement(small, teacher) > 0.9


def test_yaml():
    recipe = Recipe(
        Finetune(distill=(distill.Logits(temperature=2), distill.Hints(features=(("a", "b"),))), task_loss_weight=0.5)
    )
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    text = "- Finetune: {distill: {distill.DKD: {beta: 8}}}"
    assert Recipe.from_yaml(text) == Recipe(Finetune(distill=distill.DKD(beta=8)))
    with raises_case(RecipeError, "not-a-step"):
        Recipe.from_yaml("- distill.Logits")


@dataclass(frozen=True)
class Stop:
    step: int

    def __call__(self, moment):
        if moment.name == "step" and moment.step == self.step:
            raise KeyboardInterrupt

    def to_data(self):
        return "Stop"


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


class TestResume:
    def test_adapters_go_on_where_they_were(self, teacher, tmp_path):
        settings = replace(RESUMED, hooks=(Stop(9),))
        with pytest.raises(KeyboardInterrupt):
            train(captured(), replace(context(teacher), folder=tmp_path), settings)
        resumed = train(captured(), replace(context(teacher), folder=tmp_path), replace(settings, hooks=(Stop(99),)))
        whole = train(captured(), context(teacher), RESUMED)
        assert same(resumed, whole)

    def test_another_teacher_is_refused(self, teacher, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            train(captured(), replace(context(teacher), folder=tmp_path), replace(RESUMED, hooks=(Stop(3),)))
        with raises_case(CheckpointError, "settings") as caught:
            train(captured(), replace(context(captured(16)), folder=tmp_path), replace(RESUMED, hooks=(Stop(99),)))
        assert caught.value.field == "teacher"

    def test_killed_in_the_middle(self, tmp_path):
        code = textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
            import torch
            torch.set_num_threads({torch.get_num_threads()})
            from dataclasses import replace
            from pathlib import Path
            from penjing.train.finetune import train
            from tests.students import RESUMED, Kill, captured, context

            where = replace(context(captured(16, seed=1).eval()), folder=Path(sys.argv[1]))
            train(captured(), where, replace(RESUMED, hooks=(Kill(7),)))
            """
        )
        killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
        assert torch.load(tmp_path / "finetune.pt", weights_only=True)["numbers"][0] == 6, killed.stderr
        where, settings = context(captured(16, seed=1).eval()), replace(RESUMED, hooks=(Kill(),))
        resumed = train(captured(), replace(where, folder=tmp_path), settings)
        assert same(resumed, train(captured(), where, settings))


class TestBadInput:
    def test_no_teacher(self):
        with raises_case(TaskError, "no-teacher"):
            train(captured(), context(None), replace(SHORT, distill=distill.Logits()))

    def test_neither_labels_nor_teacher(self):
        with raises_case(RecipeError, "nothing-to-learn"):
            Finetune(task_loss_weight=0, distill=())
        with raises_case(RecipeError, "nothing-to-learn"):
            train(captured(), Context(task=task()), replace(SHORT, task_loss_weight=0))

    def test_what_is_no_distillation(self):
        with raises_setting("distill"):
            Finetune(distill="logits")

    def test_other_classes_say_which_and_how_many(self, teacher):
        student = capture_network(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), (torch.zeros(2, 1, 8, 8),))
        with raises_case(TaskError, "outputs") as caught:
            train(student, context(teacher), replace(SHORT, distill=distill.Logits()))
        assert "7" in caught.value.got and "10" in caught.value.got

    @pytest.mark.parametrize("name", ["conf", "66"])
    def test_a_feature_that_does_not_exist_names_the_nearest(self, teacher, name):
        for pair, whose in ((("conv", name), "teacher"), ((name, "conv"), "student")):
            with raises_case(RecipeError, "no-layer") as caught:
                train(captured(), context(teacher), replace(SHORT, distill=distill.Hints(features=(pair,))))
            assert whose in caught.value.what
            assert caught.value.got == name and "conv" in caught.value.remedy

    def test_teachers_that_differ(self, teacher):
        other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        with raises_case(TaskError, "teachers-differ") as caught:
            train(captured(), context(teacher), replace(SHORT, distill=distill.Logits(), teacher=(teacher, other)))
        assert caught.value.got == "[(2, 10)], [(2, 3)]"

    @pytest.mark.parametrize("wrong", [nn.Conv2d(3, 4, 3), nn.Bilinear(64, 64, 10)])
    def test_a_teacher_that_can_not_take_the_example(self, teacher, wrong):
        with raises_case(TaskError, "teacher-raised") as caught:
            train(captured(), context(teacher), replace(SHORT, distill=distill.Logits(), teacher=wrong))
        assert "Error: " in caught.value.got and caught.value.remedy

    def test_attention_of_vectors(self, teacher):
        with raises_case(TaskError, "not-feature-maps"):
            train(captured(), context(teacher), replace(SHORT, distill=distill.AttentionTransfer(features=("head",))))

    def test_features_of_several_teachers(self, teacher):
        settings = replace(SHORT, distill=distill.Hints(features=("conv",)), teacher=(teacher, captured(16)))
        with raises_case(TaskError, "several-teachers"):
            train(captured(), context(None), settings)

    def test_features_of_a_plain_module(self, teacher):
        with raises_case(TaskError, "not-captured"):
            train(Small(), context(teacher), replace(SHORT, distill=distill.Hints(features=("conv",))))

    @pytest.mark.parametrize("features", [(), "conv", (3,), (("a", "b", "c"),)])
    def test_features_are_names(self, features):
        with raises_case(RecipeError, "settings" if features else "no-features") as caught:
            distill.Hints(features=features)
        assert caught.value.field == "features"

    def test_a_loss_that_is_no_number_says_which_and_when(self, teacher):
        broken = copy.deepcopy(teacher)
        with torch.no_grad():
            broken.head.bias.fill_(math.nan)
        with raises_case(TrainingError, "loss-not-finite") as caught:
            train(captured(), context(broken), replace(SHORT, distill=distill.Logits()))
        assert caught.value.what.endswith(" step 0")
        assert "Logits is nan" in caught.value.got and "labels is" in caught.value.got


class TestTaps:
    def test_layers_operators_and_parts(self):
        torch.manual_seed(0)
        network = capture_network(build("resnet20", width=4), (torch.zeros(2, 3, 16, 16),))
        tapped = Tapped(network, ["conv1", "stages.1", "stages.0.0/add#0"])
        x = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(tapped(x), network(x))
            values = tapped.values()
            assert torch.equal(values["conv1"], network.conv1(x))
        assert {k: tuple(v.shape) for k, v in values.items()} == {
            "conv1": (2, 4, 16, 16), "stages.1": (2, 8, 8, 8), "stages.0.0/add#0": (2, 4, 16, 16)
        }  # fmt: skip
        assert not tapped.values()  # they are told once

    def test_weights_are_those_of_the_network(self):
        network = captured()
        tapped = Tapped(network, ["norm"])
        F.cross_entropy(tapped(torch.randn(4, 1, 8, 8)), torch.zeros(4).long()).backward()
        assert all(p.grad is not None for p in network.parameters())

    @pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
    def test_scores_are_what_the_softmax_gets(self, mask):
        class Attends(nn.Module):
            def __init__(self):
                super().__init__()
                self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x, seen):
                query, key = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.query, self.key))
                given = {"none": None, "bool": seen, "float": torch.where(seen, 0.0, -1e9), "causal": None}[mask]
                return F.scaled_dot_product_attention(query, key, key, given, is_causal=mask == "causal").sum(1)

        torch.manual_seed(0)
        module = Attends().eval()
        x, seen = torch.randn(3, 5, 8), torch.rand(3, 1, 1, 5) > 0.3
        seen[..., 0] = True
        tapped = Tapped(capture_network(module, (x, seen)), ["/scaled_dot_product_attention#0:scores"])
        with torch.no_grad():
            tapped(x, seen)
            query, key = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (module.query, module.key))
        scores = query @ key.transpose(-2, -1) / 2
        hidden = {"none": torch.zeros(5, 5).bool(), "causal": torch.ones(5, 5).triu(1).bool()}.get(mask, ~seen)
        assert torch.allclose(
            tapped.values()["/scaled_dot_product_attention#0:scores"], scores.masked_fill(hidden, 0.0), atol=1e-6
        )

    def test_a_part_without_an_attention_says_where_they_are(self):
        network = captured()
        with raises_case(RecipeError, "no-attention"):
            Tapped(network, ["conv:scores"])


def test_a_transformer_learns_from_the_layers_of_a_wider_one():
    def made(width, depth, seed):
        torch.manual_seed(seed)
        return BERT(width=width, depth=depth, heads=2, vocabulary=50, length=12, classes=3, dropout=0.0).eval()

    tokens = torch.randint(0, 50, (64, 12), generator=torch.Generator().manual_seed(1))
    data = Task(example=tokens[:2], calibration=list(tokens.split(16)))
    teacher = capture_network(made(16, 4, 0), *data.call())
    student = capture_network(made(8, 2, 1), *data.call())
    layers = (("blocks.0", "blocks.1"), ("blocks.1", "blocks.3"))
    told = []
    events = lambda kind, **v: told.append(v["terms"]["TinyBERT"]) if kind == "training" else None  # noqa: E731
    way = distill.TinyBERT(hidden=layers, attention=layers)
    settings = replace(SHORT, epochs=10, distill=way, task_loss_weight=0, optimizer="adamw", learning_rate=0.01)
    train(student, Context(task=data, source=teacher, events=events), settings)
    assert told[-1] < 0.6 * told[0]
    assert "adapters" not in dict(student.named_modules())
