"""Weight tensors with few integers: chosen, trained, rounded, exported and packed."""

import json
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import numpy_helper

from penjing import prune, quantize
from penjing.errors import CheckpointError
from penjing.numerics.grid import integers
from penjing.quantize.few_integers import codebook
from penjing.quantize.learner import learned, learner
from penjing.steps.draft import Draft
from penjing.steps.plan import LISTED, Plan, QuantSpec
from penjing.storage import packed
from penjing.surgery import Listed, insert
from penjing.train.finetune import Finetune
from tests import pairs
from tests.raises import raises_case

ENTRIES = 8
SPEC = QuantSpec(bits=8, axis=0, grid=LISTED, values=(-90, -20, 0, 35, 127))


@pytest.fixture(scope="module")
def prepared():
    """A trained network, a third of whose weights are 0, and its plan with few integers."""
    task = pairs.task()
    source = pairs.trained(task)
    context = pairs.context_of(source, task)
    sparse = prune.Magnitude(sparsity=0.33)(Draft(source), context)
    return quantize.Static(weight_entries=ENTRIES)(sparse, context), context


def values_of(draft):
    """Layer → the different integers of its weight."""
    rows = {}
    for edge, entry in draft.plan.entries.items():
        if edge.endswith(":weight"):
            weight = draft.network.get_submodule(edge.removesuffix(":weight")).weight.detach()
            zero = torch.tensor(entry.zero_point, dtype=torch.int32)
            rows[edge] = torch.unique(integers(weight, torch.tensor(entry.scale), zero, entry.spec)).int().tolist()
    return rows


def power(draft, context):
    """Of the noise at the outputs."""
    x = torch.cat(list(context.task.calibration))
    with torch.no_grad():
        return float((insert(draft.network, draft.plan)(x) - context.source(x)).square().sum())


def zeros_stay(before, after, context):
    return all(
        bool((after.network.get_parameter(n)[before.network.get_parameter(n) == 0] == 0).all()) for n in before.sparse
    )


class TestTheChoice:
    def test_each_weight_takes_its_nearest_integer_of_few(self, prepared):
        draft, _ = prepared
        rows = values_of(draft)
        assert len(rows) == 9 and all(0 in values and len(values) <= ENTRIES for values in rows.values())
        assert max(map(len, rows.values())) == ENTRIES
        assert all(set(values) <= set(draft.plan.entries[edge].spec.values) for edge, values in rows.items())

    def test_integers_lie_where_weights_do_in_units_of_each_channel(self):
        cells = torch.tensor([[-97.0, -98.0, 40.0, 41.0, 39.0], [-101.0, 10.0, 11.0, 9.0, 40.0]])
        scale = torch.tensor([0.01, 2.0])  # an error of the second row is 200 times as large
        plain = replace(SPEC, grid="uniform", values=())
        assert codebook(cells * scale[:, None], scale, plain, torch.ones(2, 5), 3) == (-101, 10, 40)

    def test_errors_that_move_outputs_count_more(self):
        weight, scale = torch.tensor([[-60.0, -50.0, 20.0, 100.0]]), torch.ones(1)
        plain = replace(SPEC, grid="uniform", values=())
        strong = torch.tensor([[1.0, 100.0, 1.0, 1.0]])
        assert codebook(weight, scale, plain, torch.ones(1, 4), 3) == (-55, 20, 100)
        assert codebook(weight, scale, plain, strong, 3) == (-50, 20, 100)

    def test_a_tensor_with_few_integers_is_left_alone(self):
        plain = replace(SPEC, grid="uniform", values=())
        assert codebook(torch.tensor([[1.0, 2.0, 0.0]]), torch.ones(1), plain, torch.ones(1, 3), 3) == ()

    def test_layers_are_named_in_settings(self, prepared):
        _, context = prepared
        step = quantize.Static(settings={"blocks.*": {"weight_entries": 4}})
        plan = step(Draft(context.source), context).plan
        few = {edge for edge, entry in plan.entries.items() if entry.spec.grid == LISTED}
        assert few == {f"blocks.{i}.conv{j}:weight" for i in range(3) for j in (1, 2)}


class TestTraining:
    def test_the_gradient_equals_a_loop(self):
        torch.manual_seed(0)
        x, scale = torch.randn(3, 20), torch.tensor([0.01, 0.02, 0.03])
        entries = (torch.tensor(SPEC.values) / 127).requires_grad_()
        zero, outer = torch.zeros(3, dtype=torch.int32), torch.randn(3, 20)
        y = Listed.apply(x, scale, entries, zero, SPEC, "lsq")
        (y * outer).sum().backward()
        sums, squares = [0.0] * 5, [0.0] * 5
        for i in range(3):
            for j in range(20):
                k = min(range(5), key=lambda k: abs(float(x[i, j] / scale[i]) - SPEC.values[k]))
                assert float(y[i, j]) == pytest.approx(SPEC.values[k] * float(scale[i]), rel=1e-6)
                sums[k] += float(outer[i, j]) * float(scale[i]) * 127
                squares[k] += (float(scale[i]) * 127) ** 2
        torch.testing.assert_close(entries.grad, torch.tensor([a / b for a, b in zip(sums, squares, strict=True)]))

    def test_integers_move_and_stay_few_and_zeros_stay(self, prepared):
        draft, context = prepared
        step = quantize.QAT(finetune=Finetune(epochs=3, learning_rate=0.02, weight_decay=1e-4))
        trained = step(draft, context)
        before, after = values_of(draft), values_of(trained)
        assert any(trained.plan.entries[edge].spec.values != draft.plan.entries[edge].spec.values for edge in before)
        assert all(len(values) <= ENTRIES and 0 in values for values in after.values())
        assert zeros_stay(draft, trained, context)
        assert power(trained, context) < power(draft, context)

    def test_what_was_learned_goes_into_the_plan(self, prepared):
        draft, context = prepared
        weights = {edge: entry for edge, entry in draft.plan.entries.items() if edge.endswith(":weight")}
        draft = replace(draft, plan=Plan(weights))
        network = learner(draft, context, "lsq").eval()
        torch.manual_seed(7)
        with torch.no_grad():  # as after a training
            for name, parameter in network.named_parameters():
                parameter.mul_(1 + (0.3 if name.endswith("entries") else 0.05) * torch.randn_like(parameter))
        after = learned(draft, network)
        x = next(iter(context.task.calibration))
        with torch.no_grad():
            torch.testing.assert_close(network(x), insert(after.network, after.plan)(x), rtol=1e-3, atol=1e-4)

    def test_a_norm_never_turns_the_sign_of_a_channel(self, prepared):
        draft, context = prepared
        smallest = []

        def push(moment):
            norms = list(moment.network.get_submodule("norms").children())
            if moment.name == "gradients":
                for norm in norms:
                    norm.weight.grad += 1e3
            if moment.name == "end":
                smallest.extend(float(norm.weight.min()) for norm in norms)

        settings = Finetune(steps=3, learning_rate=0.5, optimizer="adamw", weight_decay=0.0, hooks=(push,))
        quantize.QAT(finetune=settings)(draft, context)
        assert smallest and min(smallest) == 0.0


def test_rounding_chooses_among_the_few(prepared):
    draft, context = prepared
    rounded = quantize.CoordinateRounding()(draft, context)
    assert all(set(values) <= set(draft.plan.entries[edge].spec.values) for edge, values in values_of(rounded).items())
    assert zeros_stay(draft, rounded, context)
    assert power(rounded, context) < 0.7 * power(draft, context)


def test_the_file_has_few_integers_and_is_small_when_it_is_packed(prepared, tmp_path):
    draft, context = prepared
    every = quantize.Static()(replace(draft, plan=Plan()), context)
    sizes = {}
    for name, one in (("few", draft), ("every", every)):
        (tmp_path / name).mkdir()
        assert pairs.parity_db(one, context.task, tmp_path / name) > pairs.INTEGER_DB
        sizes[name] = {row[0]: row[3] for row in packed.pack(tmp_path / name, tmp_path / f"{name}.pj").tensors}
    model = onnx.load(tmp_path / "few" / "model.onnx")
    weights = [numpy_helper.to_array(t) for t in model.graph.initializer]
    weights = [w for w in weights if w.dtype.name == "int8" and w.ndim > 1]
    assert len(weights) == 9 and all(len(set(w.flatten().tolist())) <= ENTRIES for w in weights)
    assert sum(sizes["few"].values()) < 0.75 * sum(sizes["every"].values())


class TestThePlan:
    def test_it_is_read_back(self, prepared):
        draft, _ = prepared
        assert Plan.from_json(draft.plan.to_json()) == draft.plan

    @pytest.mark.parametrize("values", [[], [5, 3], [1, 1], [0.5], [-128, 0], [0, 1000], "12", [True, 2]])
    def test_integers_that_the_grid_does_not_have_are_refused(self, values):
        spec = {"bits": 8, "grid": "listed", "values": values}
        text = json.dumps({"entries": {"a:weight": {"spec": spec, "scale": [1.0], "zero_point": [0]}}, "floats": {}})
        with raises_case(CheckpointError, "damaged"):
            Plan.from_json(text)
