"""Ranges at run time: what torch simulates, what the runtimes execute, and what stays in floating point."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import runtimes
from penjing.analyze import lockstep
from penjing.errors import QuantizationError, RecipeError
from penjing.network.capture import capture_network
from penjing.numerics.grid import integers, measured, on_grid
from penjing.pipeline import building
from penjing.quantize import QAT, BiasCorrection, CoordinateRounding, Dynamic, Static
from penjing.recipes.recipe import Recipe
from penjing.runtimes import isolated, onnxruntime, openvino
from penjing.runtimes.artifact import arrange
from penjing.steps.draft import Draft
from penjing.steps.plan import Entry, Plan, QuantSpec
from penjing.steps.step import Context
from penjing.surgery import freeze, insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.raises import raises_case, raises_setting

VNNI = ("avx", "avx2", "avx512f", "avx512_vnni")
UNSIGNED = QuantSpec(signed=False, symmetric=False, range="dynamic")
GROUPS = QuantSpec(axis=0, group=32, range="dynamic")
PLACES = {"onnxruntime": onnxruntime.capabilities(VNNI), "openvino": openvino.capabilities(VNNI)}
both = pytest.mark.parametrize("runtime", PLACES)


class Tokens(nn.Module):
    """Linear layers on three and on two axes, with and without bias, three that share an input, a convolution."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv1d(64, 64, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=b) for b in (True, True, False))
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.q(x) * torch.sigmoid(self.k(x)) + self.v(x)
        x = x + self.down(F.relu(self.up(x)))
        return self.head(x.mean(1))


LINEAR = ("q", "k", "v", "up", "down", "head")


def quantized(runtime=None, **settings):
    torch.manual_seed(0)
    task = Task(example=torch.randn(2, 6, 64))
    network = capture_network(Tokens().eval(), *task.call())
    context = Context(task=task, capabilities=PLACES.get(runtime))
    return Dynamic(**settings)(Draft(network), context), task


def test_linear_layers_are_planned_without_any_data_and_the_rest_says_why_not():
    draft, _ = quantized()
    assert set(draft.plan.entries) == {f"{name}:{port}" for name in LINEAR for port in ("in0", "weight")}
    for name in LINEAR:
        assert draft.plan.entries[f"{name}:in0"] == Entry(UNSIGNED)
        assert len(draft.plan.entries[f"{name}:weight"].scale) == draft.network.get_submodule(name).out_features
    assert "linear and recurrent layers alone" in draft.plan.floats["mix"]
    assert "/add#0" in draft.plan.floats
    assert Plan.from_json(draft.plan.to_json()) == draft.plan


def test_excluded_layers_and_fewer_bits():
    draft, _ = quantized(exclude=("head", "q"), weight_bits=4, weight_range="minmax")
    assert draft.plan.floats["head"] == "excluded by 'head'" and "q:in0" not in draft.plan.entries
    assert draft.plan.entries["up:weight"].spec.limits == (-7, 7)


@pytest.mark.parametrize(
    "settings", [{"weight_bits": 9}, {"weight_bits": True}, {"weight_range": "entropy"}, {"exclude": "head"}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with raises_setting(*settings):
        Dynamic(**settings)


def by_hand(values):
    """DynamicQuantizeLinear of the ONNX standard, one number after the other."""
    low, high = min([0.0, *values]), max([0.0, *values])
    scale = (high - low) / 255 or 1.0
    zero = round(min(max(0 - low / scale, 0), 255))
    return [(min(max(round(v / scale) + zero, 0), 255) - zero) * scale for v in values]


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_a_range_is_that_of_the_values(shift):
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + shift
    rounded = on_grid(x, *measured(x, UNSIGNED), UNSIGNED)
    torch.testing.assert_close(rounded.flatten().tolist(), by_hand(x.flatten().tolist()))
    q = integers(x, *measured(x, UNSIGNED), UNSIGNED)
    assert q.min() == 0 or q.max() == 255


def test_groups_have_a_range_each():
    x = torch.randn(2, 3, 64)
    rounded = on_grid(x, *measured(x, GROUPS), GROUPS).reshape(-1, 32)
    for mine, group in zip(rounded, x.reshape(-1, 32), strict=True):
        step = group.abs().max() / 127
        torch.testing.assert_close(mine, (group / step).round() * step)


@pytest.mark.parametrize("spec", [UNSIGNED, GROUPS])
def test_zeros_stay_zeros(spec):
    x = torch.zeros(2, 64)
    assert torch.equal(on_grid(x, *measured(x, spec), spec), x)


def test_the_operator_multiplies_what_the_simulation_rounds():
    torch.manual_seed(0)
    x, bias = torch.randn(4, 6, 16), torch.randn(8)
    q, scale = torch.randint(-127, 128, (16, 8), dtype=torch.int8), torch.rand(8) + 0.1
    rounded = on_grid(x, *measured(x, UNSIGNED), UNSIGNED)
    for b in (bias, None):
        product = torch.ops.penjing.linear_dynamic(x, q, scale, torch.zeros(8, dtype=torch.int8), b)
        torch.testing.assert_close(product, F.linear(rounded, (q * scale).T, b), atol=1e-3, rtol=1e-5)
    arguments = (x, q, scale, torch.zeros(8, dtype=torch.int8), bias)
    torch.library.opcheck(torch.ops.penjing.linear_dynamic.default, arguments)


def artifact(draft, task, runtime, folder):
    args, kwargs = task.call()
    structure = flatten_outputs(draft.network(*args, **kwargs))[1]
    return building.build(draft, runtime, "int8", task, structure, folder)


def here(runtime):
    from penjing.measure import machine

    return runtimes.get(runtime).capabilities(machine(1).instruction_sets)


@both
def test_the_runtime_answers_as_torch_simulates_at_any_batch(tmp_path, runtime):
    if here(runtime).dynamic is None:
        pytest.skip("this processor multiplies no integers here")
    torch.manual_seed(0)
    task = Task(example=torch.randn(2, 6, 64), dynamic=None)
    draft = Dynamic()(
        Draft(capture_network(Tokens().eval(), *task.call())), Context(task=task, capabilities=here(runtime))
    )
    manifest = artifact(draft, task, runtime, tmp_path)
    session = isolated.open_artifact(tmp_path, 1)
    simulated = insert(draft.network, draft.plan)
    for samples in (1, 5):
        x = torch.randn(samples, 6, 64) * samples  # ranges that no calibration could have known
        (mine,) = session.run(arrange(manifest.programs[0].inputs, (x.numpy(),), {}))
        with torch.no_grad():
            planned, source = simulated(x).numpy(), draft.network(x).numpy()
        noise = np.abs(planned - source).max()
        assert 0 < noise < 0.1 * np.ptp(source)
        assert np.abs(mine - planned).max() <= 0.3 * noise  # a rounding may fall to the other side
        assert np.abs(mine - planned).mean() <= 0.05 * np.abs(planned - source).mean()


@both
def test_every_linear_layer_runs_on_integers_and_is_stored_so(tmp_path, runtime):
    if here(runtime).dynamic is None:
        pytest.skip("this processor multiplies no integers here")
    draft, task = quantized(runtime)
    manifest = artifact(draft, task, runtime, tmp_path)
    formats = {}
    for operator in runtimes.executed(tmp_path, manifest):
        for site in operator.sites:
            formats.setdefault(site, set()).add((operator.precision, operator.type))
    for name in LINEAR:
        assert {precision for precision, _ in formats[name]} == {"int8"}, f"{name}: {formats[name]}"
    assert {precision for precision, _ in formats["mix"]} == {"fp32"}
    weights = sum(draft.network.get_submodule(name).weight.numel() for name in LINEAR)
    others = sum(p.numel() for p in draft.network.parameters()) - weights
    stored = max(path.stat().st_size for path in tmp_path.iterdir() if path.suffix in (".onnx", ".bin"))
    assert stored < weights + 4 * others + 20_000


def test_onnx_holds_the_standards_operators_and_layers_share_what_they_read(tmp_path):
    draft, task = quantized("onnxruntime")
    artifact(draft, task, "onnxruntime", tmp_path)
    types = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert types.count("MatMulInteger") == len(LINEAR)
    assert "Gemm" not in types
    assert set(types) <= {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node if not node.domain}


def test_openvino_leaves_widths_that_no_groups_fill_in_floating_point():
    task = Task(example=torch.randn(2, 40))
    network = capture_network(nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 3)).eval(), *task.call())
    plan = Dynamic()(Draft(network), Context(task=task, capabilities=PLACES["openvino"])).plan
    assert "a multiple of the 32" in plan.floats["0"] and set(plan.entries) == {"1:in0", "1:weight"}
    plan = Dynamic()(Draft(network), Context(task=task, capabilities=openvino.capabilities(("avx2",)))).plan
    assert not plan and "at run time" in plan.floats["1"]


class Tagger(nn.Module):
    """Tokens to classes: an embedding, a recurrent stack in both directions, a linear layer; (batch, 9) to (…, 5)."""

    def __init__(self, cell=nn.LSTM, **settings):
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.cells = cell(16, 24, **{"num_layers": 2, "batch_first": True, "bidirectional": True} | settings)
        self.head = nn.Linear(48 if self.cells.bidirectional else 24, 5)

    def forward(self, ids):
        words = self.words(ids) if self.cells.batch_first else self.words(ids).transpose(0, 1)
        every, last = self.cells(words)
        every = every if self.cells.batch_first else every.transpose(0, 1)
        state = last[0] if isinstance(last, tuple) else last
        return self.head(every), state


def recurrent(runtime=None, cell=nn.LSTM, **settings):
    torch.manual_seed(3)
    model = Tagger(cell, **settings)
    with torch.no_grad():
        for parameter in model.cells.parameters():
            parameter *= 3  # gates that open and close
    task = Task(example=torch.randint(0, 50, (2, 9)))
    network = capture_network(model.eval(), *task.call())
    capabilities = here(runtime) if runtime else None
    return Dynamic()(Draft(network), Context(task=task, capabilities=capabilities)), task


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_layers": 1, "bidirectional": False},
        {"num_layers": 3, "bidirectional": False, "batch_first": False},
        {"bias": False},
    ],
)
def test_an_lstm_computes_in_integers_what_torch_says_it_does(tmp_path, settings):
    draft, task = recurrent("onnxruntime", **settings)
    assert "cells/lstm#0:in0" in draft.plan.entries and "cells/lstm#0" not in draft.plan.floats
    manifest = artifact(draft, task, "onnxruntime", tmp_path)
    simulated = insert(draft.network, draft.plan)
    session = isolated.open_artifact(tmp_path, 1)
    for samples in (1, 5):
        x = torch.randint(0, 50, (samples, 9))
        with torch.no_grad():
            planned, source = simulated(x), draft.network(x)
        for mine, expected, exact in zip(session.run([x.numpy()]), planned, source, strict=True):
            assert mine.shape == expected.shape
            noise = (expected - exact).abs().max()
            assert 1e-4 < noise < 0.1
            np.testing.assert_allclose(mine, expected.numpy(), atol=0.1 * float(noise))
    executed = {name: o.precision for o in runtimes.executed(tmp_path, manifest) for name in o.sites}
    assert executed["cells/lstm#0"] == "int8"
    matrices = sum(p.numel() for n, p in draft.network.named_parameters() if n.startswith("cells.weight"))
    others = sum(p.numel() for p in draft.network.parameters()) - matrices
    assert (tmp_path / "model.onnx").stat().st_size < matrices + 4 * others + 15_000


def test_an_lstm_in_floating_point_is_found_in_the_runtime(tmp_path):
    draft, task = recurrent("onnxruntime")
    structure = flatten_outputs(draft.network(*task.call()[0]))[1]
    manifest = building.build(draft, "onnxruntime", "fp32", task, structure, tmp_path)
    executed = {name: o.precision for o in runtimes.executed(tmp_path, manifest) for name in o.sites}
    assert executed["cells/lstm#0"] == "fp32"


def test_the_lstm_operator_fulfils_what_torch_asks_of_custom_operators():
    torch.manual_seed(0)
    state = torch.randn(2, 3, 4)
    q = [torch.randint(-127, 128, (2, n, 16), dtype=torch.int8) for n in (5, 4)]
    scales = [torch.rand(2, 16) * 0.01 for _ in q]
    arguments = (torch.randn(6, 3, 5), state, state, q[0], scales[0], q[1], scales[1], torch.randn(2, 32))
    checks = torch.library.opcheck(torch.ops.penjing.lstm_dynamic.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "runtime, cell, settings, why",
    [
        ("openvino", nn.LSTM, {}, "openvino has no integer kernel for lstm"),
        ("onnxruntime", nn.GRU, {}, "onnxruntime has no integer kernel for gru"),
        (None, nn.GRU, {}, "no integer kernel for gru"),
    ],
)
def test_recurrent_layers_without_a_kernel_stay_in_floating_point_and_say_why(runtime, cell, settings, why):
    draft, _ = recurrent(runtime, cell, **settings)
    assert not [edge for edge in draft.plan.entries if edge.startswith("cells")]
    assert [reason for reason in draft.plan.floats.values() if why in reason], draft.plan.floats


@both
@pytest.mark.parametrize(
    "step", [CoordinateRounding(samples=128), BiasCorrection(samples=128)], ids=["coordinate_rounding", "bias"]
)
def test_repairs_come_behind(runtime, step):
    torch.manual_seed(0)
    data = torch.randn(160, 6, 12) @ torch.randn(12, 64)  # channels that depend on each other, as those of networks do
    task = Task(example=data[:2], calibration=[data[:128]])
    network = capture_network(Tokens().eval(), *task.call())
    context = Context(task=task, capabilities=PLACES[runtime])
    plain = Dynamic(weight_bits=4)(Draft(network), context)
    repaired = step(plain, context)
    with torch.no_grad():
        reference = network(data[128:])
        errors = [(insert(d.network, d.plan)(data[128:]) - reference).square().mean() for d in (plain, repaired)]
    assert errors[1] < errors[0] * (1.05 if isinstance(step, BiasCorrection) else 0.8)


def test_lockstep_takes_the_ranges_of_what_it_runs():
    draft, task = quantized()
    x = torch.randn(8, 6, 64)
    _, replica = lockstep.run(draft.network, draft.plan, [((x,), {})], lambda layer: None)
    with torch.no_grad():
        torch.testing.assert_close(
            replica[0][0] if isinstance(replica[0], tuple) else replica[0], insert(draft.network, draft.plan)(x)
        )


def test_a_plan_with_a_range_at_run_time_elsewhere_is_refused():
    task = Task(example=torch.randn(2, 3, 8, 8), calibration=[torch.randn(8, 3, 8, 8)])
    draft = Static()(Draft(capture_network(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), *task.call())), Context(task=task))
    plan = Plan({**draft.plan.entries, "0:in0": Entry(UNSIGNED)})
    for make in (insert, freeze):
        with raises_case(QuantizationError, "dynamic-range") as refusal:
            make(draft.network, plan)
        assert refusal.value.got == "0:in0, of kind conv" and "quantize.Dynamic" in refusal.value.expected


def test_recipes_know_it():
    recipe = Recipe.from_yaml("- quantize.Dynamic: {exclude: [head]}\n- quantize.BiasCorrection\n")
    assert recipe.quantizes and recipe.steps[0] == Dynamic(exclude=("head",))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    with raises_case(RecipeError, "order"):
        Recipe(Static(), Dynamic())
    with raises_case(RecipeError, "order"):
        Recipe(Dynamic(), QAT())
