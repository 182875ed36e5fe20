import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analyze import noise
from penjing.analyze.samples import split
from penjing.errors import CalibrationError, RecipeError, TaskError
from penjing.network.capture import capture_network
from penjing.quantize import Best, Rollback, Static
from penjing.quantize.explanation import explain
from penjing.steps.draft import Draft
from penjing.steps.plan import Plan
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.task import Task
from tests.raises import raises_case, raises_setting


class Delicate(nn.Module):
    """Its second layer takes differences of nearly equal numbers, which rounding does not survive."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.delicate = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.two = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            self.delicate.weight -= self.delicate.weight.mean((2, 3), keepdim=True)
            self.delicate.weight *= 30

    def forward(self, x):
        y = torch.relu(self.one(x) + 4)
        y = torch.relu(self.delicate(nn.functional.pad(y, [0, 0, 0, 0])))
        return self.head((y + torch.relu(self.two(y))).mean((2, 3)))


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    model = Delicate().eval()
    task = Task(example=torch.zeros(2, 3, 12, 12), calibration=[torch.rand(8, 3, 12, 12) for _ in range(9)])
    network = capture_network(model, *task.call())
    context = Context(task=task, source=network)
    return Static(weight_bits=4, activation_bits=6)(Draft(network), context), context


def snr(draft, quantized, context):
    return noise.signal_to_noise(draft.network, insert(quantized.network, quantized.plan), split(context)[1])


class TestNoise:
    def test_an_operator_alone_is_a_plan_with_its_edges_alone(self, prepared):
        draft, context = prepared
        calls = split(context)[1]
        by_operator = noise.isolated(draft.network, draft.plan, calls)
        for name, alone in by_operator.items():
            for value, role in ((alone.weights, "weight"), (alone.activations, "in")):
                edges = {
                    e: v for e, v in draft.plan.entries.items()
                    if e.rpartition(":")[0] == name and e.rpartition(":")[2].startswith(role)
                }  # fmt: skip
                if not edges:
                    assert value == 0
                    continue
                if role == "weight":  # without the bias's own grid, which a weight alone does not bring
                    edges = {f"{name}:weight": edges[f"{name}:weight"]}
                measured = noise.signal_to_noise(draft.network, insert(draft.network, Plan(edges)), calls)
                assert noise.decibels(value) == pytest.approx(measured, abs=0.05)

    def test_agreement_counts_equal_first_answers(self):
        one, two = nn.Linear(3, 4), nn.Linear(3, 4)
        x = torch.randn(50, 3)
        expected = float((one(x).argmax(1) == two(x).argmax(1)).double().mean())
        assert noise.agreement(one, two, [((x[:20],), {}), ((x[20:],), {})]) == pytest.approx(expected)

    def test_the_explanation_names_the_delicate_layer(self, prepared):
        draft, context = prepared
        rows = explain(Draft(draft.network), context, Static(weight_bits=4, activation_bits=6))
        worst = max(rows, key=lambda r: r.share)
        assert worst.name == "delicate" and worst.remedy
        assert sum(r.share for r in rows) == pytest.approx(1)
        row = {r.name: r for r in rows}["delicate"]
        assert row.repaired_db > row.weights_db and 0 <= row.clipped < 0.2 and row.low <= 0 < row.high


class TestRollback:
    def test_the_worst_operators_return_and_no_more_than_needed(self, prepared):
        draft, context = prepared
        before = snr(draft, Rollback(snr_db=0.0)(draft, context), context)
        rolled = Rollback(snr_db=before + 2)(draft, context)
        assert "delicate" in rolled.plan.floats and "of the noise" in rolled.plan.floats["delicate"]
        assert snr(draft, rolled, context) > before + 1
        assert any(edge.startswith("two:") for edge in rolled.plan.entries)
        assert not any(edge.startswith("delicate") for edge in rolled.plan.entries)
        assert draft.plan.entries and "delicate" not in draft.plan.floats  # as it was given

    def test_a_limit_that_holds_returns_nothing(self, prepared):
        draft, context = prepared
        assert Rollback(snr_db=-10)(draft, context).plan.entries.keys() == draft.plan.entries.keys()

    def test_a_limit_out_of_reach_gives_the_best_there_is(self, prepared):
        draft, context = prepared
        events = []
        context = Context(task=context.task, events=lambda kind, **v: events.append((kind, v)))
        rolled = Rollback(snr_db=500, most=2, repair="none")(draft, context)
        trials = [v for kind, v in events if kind == "rollback"]
        assert not any(v["met"] for v in trials)
        best = max(trials, key=lambda v: v["snr_db"])
        assert len([1 for kind, _ in events if kind == "rolled_back"]) == best["returned"]
        assert snr(draft, rolled, context) == pytest.approx(best["snr_db"], abs=0.01)

    def test_a_drop_needs_a_metric_to_look_at(self, prepared):
        draft, context = prepared
        with raises_case(TaskError, "no-metric"):
            Rollback(drop=0.01)(draft, context)

    @pytest.mark.parametrize("settings", [{"repair": "magic"}, {"repair": "adaround"}, {"most": -1}])
    def test_settings_that_make_no_sense_are_refused(self, settings):
        with raises_setting(*settings):
            Rollback(snr_db=20, **settings)

    def test_it_needs_a_limit(self):
        with raises_case(RecipeError, "limits"):
            Rollback()


class TestBest:
    def test_it_keeps_what_helps_and_says_so(self, prepared):
        draft, context = prepared
        events = []
        context = Context(task=context.task, source=context.source, events=lambda k, **v: events.append((k, v)))
        best = Best(weight_bits=4, activation_bits=6, minutes=1)(Draft(context.source), context)
        tried = [v for kind, v in events if kind == "remedy"]
        assert [v["name"] for v in tried[:3]] == ["Static", "BiasCorrection", "CoordinateRounding"]
        assert tried[-1]["before_db"] >= tried[0]["snr_db"]
        assert all(v["kept"] == (v["snr_db"] > v["before_db"] + 0.3) for v in tried[1:])
        assert best.plan.remedy.startswith(("Static", "CrossLayerEqualization", "SmoothQuant"))
        assert snr(draft, best, context) > snr(draft, draft, context) + 1
        assert Plan.from_json(best.plan.to_json()) == best.plan

    def test_it_stops_where_the_answers_are_good_enough(self, prepared):
        _, context = prepared
        events = []
        context = Context(task=context.task, source=context.source, events=lambda k, **v: events.append(k))
        Best(snr_db=5, minutes=1)(Draft(context.source), context)
        assert events.count("remedy") == 1


def test_one_sample_can_not_be_split():
    with raises_case(CalibrationError, "too-little"):
        split(Context(task=Task(example=torch.zeros(1, 3), calibration=[torch.zeros(1, 3)])))


@pytest.mark.parametrize("second", ["BiasCorrection", "CoordinateRounding", "Rollback"])
def test_a_second_repair_of_rounding_is_refused(second):
    step = Rollback(snr_db=20) if second == "Rollback" else getattr(pj.quantize, second)()
    with raises_case(RecipeError, "order"):
        pj.Recipe(Static(), pj.quantize.CoordinateRounding(), step)
    with raises_case(RecipeError, "too-early"):
        pj.Recipe(step, Static())
