from dataclasses import replace

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.architectures import build
from penjing.distill import Hints, Logits, Outputs
from penjing.errors import RecipeError, TaskError
from penjing.network.capture import capture_network
from penjing.numerics.grid import on_grid
from penjing.pipeline.request import check_recipe
from penjing.quantize import QAT, Static
from penjing.quantize.learner import Grid, learned, learner
from penjing.steps.draft import Draft
from penjing.steps.plan import Plan, QuantSpec
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.task import Task
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune
from tests.raises import raises_case, raises_setting

SPECS = [
    QuantSpec(bits=3, signed=False, symmetric=False),
    QuantSpec(bits=4, axis=0),
    QuantSpec(bits=4, axis=0, group=6),
    QuantSpec(bits=4, axis=0, grid="additive_powers_of_two"),
]


def task_of(count=96):
    torch.manual_seed(5)
    x = torch.randn(count, 3, 12, 12)
    y = (x.mean((2, 3)) @ torch.randn(3, 4)).argmax(1)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, count, 16)]
    return Task(example=x[:2], calibration=[b for b, _ in batches], train=batches, loss=nn.functional.cross_entropy)


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    model = build("resnet20", width=4, classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)  # negative factors turn the sign of a folded channel
    task = task_of()
    source = capture_network(model.eval(), *task.call())
    context = Context(task=task, source=source)
    return Static(weight_bits=4, activation_bits=4)(Draft(source), context), context


@pytest.fixture(scope="module")
def weights_alone(prepared):
    """Rounded activations would jump where two orders of summation differ in the last bit."""
    draft, context = prepared
    entries = {edge: entry for edge, entry in draft.plan.entries.items() if edge.endswith(":weight")}
    return replace(draft, plan=Plan(entries)), context


def noise(draft, context):
    x = torch.cat([x for x in context.task.calibration])
    with torch.no_grad():
        reference, simulated = context.source(x), insert(draft.network, draft.plan)(x)
    return float((simulated - reference).square().sum() / reference.square().sum())


class TestTheGradient:
    @pytest.mark.parametrize("spec", SPECS)
    def test_equals_a_loop_over_the_formula(self, spec):
        torch.manual_seed(1)
        x = torch.randn(4, 12).requires_grad_()
        scales = 1 if spec.axis is None else 4 * (12 // spec.group if spec.group else 1)
        scale = (torch.rand(scales) * 0.2 + 0.05).requires_grad_()
        zero = torch.full((scales,), 0 if spec.signed else 3, dtype=torch.int32)
        weight = torch.randn(4, 12)
        y = Grid.apply(x, scale, zero, spec, "lsq")
        assert torch.equal(y, on_grid(x.detach(), scale.detach(), zero, spec))
        (y * weight).sum().backward()
        low, high = spec.limits
        of_x, of_scale = torch.zeros(4, 12), torch.zeros(scales)
        for i in range(4):
            for j in range(12):
                k = 0 if scales == 1 else i if spec.group is None else (i * 12 + j) // spec.group
                s, z = float(scale[k]), int(zero[k])
                steps = float(x[i, j]) / s
                inside = low - z - 0.5 <= steps <= high - z + 0.5
                of_x[i, j] = weight[i, j] * inside
                of_scale[k] += float(weight[i, j]) * ((float(y[i, j]) / s) - (steps if inside else 0))
        values = 48 / scales / (4 if spec.axis is None else 1)
        torch.testing.assert_close(x.grad, of_x)
        torch.testing.assert_close(scale.grad, of_scale / (values * high) ** 0.5, rtol=1e-3, atol=1e-4)

    def test_clipping_moves_the_upper_end_alone(self):
        spec = QuantSpec(bits=2, signed=False, symmetric=False)
        x = torch.tensor([[-1.0, 0.2, 0.9, 5.0, 7.0]], requires_grad=True)
        scale = torch.tensor([0.5], requires_grad=True)
        Grid.apply(x, scale, torch.zeros(1, dtype=torch.int32), spec, "pact").sum().backward()
        assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0]]
        assert float(scale.grad) == pytest.approx(2 * 3 / (5 * 3) ** 0.5)  # two values, each moves by `high` steps


class TestTheNetwork:
    def test_before_the_first_step_it_computes_what_the_plan_computes(self, weights_alone):
        draft, context = weights_alone
        network = learner(draft, context, "lsq").eval()
        x = next(iter(context.task.calibration))
        with torch.no_grad():
            torch.testing.assert_close(network(x), insert(draft.network, draft.plan)(x), rtol=1e-3, atol=1e-4)

    def test_every_channel_before_a_batch_norm_begins_with_the_same_size(self, prepared):
        draft, context = prepared
        network = learner(draft, context, "lsq")
        names = [name for name, _ in network.get_submodule("norms").named_children()]
        assert len(names) == 21  # every convolution of ResNet-20
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                sizes = module.weight.detach().flatten(1).norm(dim=1)
                torch.testing.assert_close(sizes, torch.full_like(sizes, 2**0.5))

    def test_what_was_learned_goes_into_scales_and_the_integers_stay(self, weights_alone):
        draft, context = weights_alone
        network = learner(draft, context, "lsq").eval()
        torch.manual_seed(7)
        with torch.no_grad():  # as after a training
            for parameter in network.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            for module in network.get_submodule("norms").children():
                module.weight[::2] *= -1
        after = learned(draft, network)
        x = next(iter(context.task.calibration))
        with torch.no_grad():
            torch.testing.assert_close(network(x), insert(after.network, after.plan)(x), rtol=1e-3, atol=1e-4)
        assert set(after.plan.entries) == set(draft.plan.entries)
        assert any(a.scale != draft.plan.entries[edge].scale for edge, a in after.plan.entries.items())
        assert len(list(network.get_submodule("norms").children())) > 10

    @pytest.mark.parametrize("method", ["lsq", "pact", "ste"])
    def test_training_brings_the_answers_nearer(self, prepared, method):
        draft, context = prepared
        trained = QAT(
            method=method, data="calibration", finetune=Finetune(epochs=6, learning_rate=3e-3, weight_decay=1e-4)
        )(draft, context)
        assert noise(trained, context) < 0.7 * noise(draft, context)
        moved = {e for e, v in trained.plan.entries.items() if v.scale != draft.plan.entries[e].scale}
        activations = {e for e in trained.plan.entries if not e.endswith(":weight")}
        assert bool(moved & activations) == (method != "ste")


@pytest.mark.parametrize("stop", [7, 9, 11])
def test_a_resumed_training_ends_in_the_same_bits_after_norms_and_scales_were_frozen(prepared, tmp_path, stop):
    draft, context = prepared
    learn = Finetune(epochs=2, learning_rate=1e-3, save_every_s=1e-9)
    step = QAT(finetune=learn)  # of 6 batches; norms are frozen from step 9, scales from step 11

    class Stop(Exception):
        pass

    saved = []

    def events(kind, **values):
        if kind == "progress" and values.get("label") == "fine-tune":
            saved.append(values["done"])
            if values["done"] == stop + 1 and len(saved) == stop + 1:
                raise Stop

    whole = step(draft, context)
    with pytest.raises(Stop):
        step(draft, replace(context, folder=tmp_path, events=events))
    resumed = step(draft, replace(context, folder=tmp_path))
    assert resumed.plan == whole.plan
    pairs = zip(resumed.network.state_dict().values(), whole.network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_without_training_data_it_says_what_to_do(prepared):
    draft, context = prepared
    bare = Context(task=Task(example=context.task.example, calibration=context.task.calibration))
    with raises_case(TaskError, "no-training-data") as caught:
        QAT()(draft, bare)
    assert "Task.train" in caught.value.got and "calibration" in caught.value.remedy


@pytest.mark.parametrize(
    "settings",
    [{"method": "magic"}, {"data": "test"}, {"freeze_norms": 2}, {"finetune": 3}, {"finetune": Outputs()}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with raises_setting(*settings):
        QAT(**settings)


def test_a_training_that_it_cannot_do_is_refused():
    with raises_case(RecipeError, "no-loss"):
        QAT(data="calibration", finetune=Finetune(distill=()))
    with raises_case(RecipeError, "workers"):
        QAT(finetune=Finetune(workers=2, cluster="local"))


class TestTheTraining:
    def test_what_is_not_said_is_what_suits_integers(self, prepared):
        _, context = prepared
        training = QAT().training(context.task)
        assert training == Finetune(weight_decay=1e-4, distill=(Outputs(),), clip=Clip())
        assert QAT(data="calibration").training(context.task) == replace(training, task_loss_weight=0.0)
        assert QAT().training(replace(context.task, loss=None)).task_loss_weight == 0

    def test_what_is_said_stays(self, prepared):
        _, context = prepared
        said = Finetune(
            steps=2,
            distill=(Logits(weight=0.5), Hints(features=("stages.0",))),
            clip=Clip(threshold=3.0),
            task_loss_weight=0.25,
        )
        assert QAT(finetune=said).training(context.task) == said
        alone = replace(said, distill=())
        assert QAT(finetune=alone).training(context.task) == alone

    def test_every_way_to_imitate_a_teacher_is_one_here(self, prepared):
        draft, context = prepared
        curves = {}
        ways = {"auto": "auto", "labels": (), "several": (Logits(weight=0.5), Hints(features=("stages.0",)))}
        for name, distill in ways.items():

            def events(kind, name=name, **values):
                if kind == "trained":
                    curves[name] = values["curve"]

            QAT(finetune=Finetune(steps=2, distill=distill))(draft, replace(context, events=events))
        terms = {name: set(curve[-1]["terms"]) for name, curve in curves.items()}
        assert terms["several"] - terms["labels"] == {"Logits", "Hints"}
        assert terms["auto"] - terms["labels"] == {"Outputs"}

    def test_hooks_and_losses_of_the_user_are_called(self, prepared):
        draft, context = prepared
        seen = []
        learn = Finetune(
            steps=2, distill=(), hooks=(lambda event: seen.append(event.name),),
            losses=(lambda batch: (batch.output - 1).square().mean(),),
        )  # fmt: skip
        trained = QAT(finetune=learn, data="calibration")(draft, context)
        assert seen.count("step") == 2 and seen[-1] == "end"
        assert any(not torch.equal(v, draft.network.state_dict()[k]) for k, v in trained.network.state_dict().items())

    def test_a_recipe_holds_it_as_yaml(self):
        recipe = pj.Recipe(Static(), QAT(finetune=Finetune(epochs=0.5, distill=Logits()), method="ste"))
        assert pj.Recipe.from_yaml(recipe.to_yaml()) == recipe

    def test_its_data_and_teacher_are_looked_at_before_any_step_runs(self, prepared):
        _, context = prepared
        small = nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).eval()
        other = nn.Sequential(nn.Flatten(), nn.Linear(432, 5)).eval()
        network = capture_network(small, *context.task.call())
        for step, task, code in (
            (QAT(), replace(context.task, train=None), "no-training-data"),
            (QAT(finetune=Finetune(distill=())), replace(context.task, loss=None), "no-loss"),
            (QAT(finetune=Finetune(teacher=other, distill=Logits())), context.task, "outputs"),
        ):
            with raises_case(TaskError, code):
                check_recipe(pj.Recipe(Static(), step), network, task, seed=0)
        silent = replace(context.task, train=None, loss=None)
        check_recipe(
            pj.Recipe(Static(), QAT(data="calibration")), capture_network(small, *silent.call()), silent, seed=0
        )
