import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.architectures import build
from penjing.errors import QuantizationError
from penjing.network.capture import capture_network
from penjing.network.exporting import export
from penjing.network.graph import site, sites
from penjing.quantize import Static
from penjing.steps.draft import Draft
from penjing.steps.plan import BIAS_LIMIT, GENERIC, Entry, Plan, QuantSpec
from penjing.steps.step import Context
from penjing.surgery import FakeQuantize, freeze, insert
from penjing.surgery.functional_layers import bias_entry
from penjing.tasks.task import Task
from tests.raises import raises_case

WEIGHT = QuantSpec(axis=0)
ACTIVATION = QuantSpec(signed=False, symmetric=False)


class Zoo(nn.Module):
    """A concatenation, a residual addition, poolings of both sorts, a depthwise and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, dilation=1, groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu6(self.bn(self.stem(x)))
        x = F.relu(self.depthwise(x) + x)
        x = torch.cat([self.grouped(x), F.max_pool2d(x, 2)], 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Sequence(nn.Module):
    """Convolutions of one axis and linear layers on three."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.wide = nn.Linear(6, 12)
        self.narrow = nn.Linear(12, 6, bias=False)

    def forward(self, x):
        y = F.relu(self.conv(x)).transpose(1, 2)
        return self.narrow(F.relu(self.wide(y))) + y


class Twice(nn.Module):
    """One layer on two inputs of very different scale."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(F.relu(self.conv(x)) * 50)


class Pair(nn.Module):
    """Two inputs and a dictionary of outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x, y):
        total = self.left(x) + self.right(y)
        return {"sum": total, "pooled": total.mean((2, 3))}


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 2)

    def forward(self, x):
        return self.conv(x).flatten(1)


NETWORKS = {
    "resnet20": (lambda: build("resnet20", width=8), [(3, 16, 16)]),
    "zoo": (Zoo, [(3, 8, 8)]),
    "sequence": (Sequence, [(4, 9)]),
    "twice": (Twice, [(3, 8, 8)]),
    "pair": (Pair, [(3, 6, 6), (3, 6, 6)]),
    "volume": (Volume, [(2, 4, 4, 4)]),
}


def quantized(model, shapes, **settings):
    generator = torch.Generator().manual_seed(1)
    batches = [tuple(torch.randn(8, *shape, generator=generator) for shape in shapes) for _ in range(2)]
    task = Task(example=tuple(torch.zeros(1, *shape) for shape in shapes), calibration=batches)
    network = capture_network(model.eval(), *task.call())
    return Static(**settings)(Draft(network), Context(task=task)), batches[0]


@pytest.fixture(params=NETWORKS, scope="module")
def example(request):
    torch.manual_seed(0)
    make, shapes = NETWORKS[request.param]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return quantized(model, shapes)


def leaves(outputs):
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


class TestEveryNetwork:
    def test_inserted_and_frozen_compute_the_same(self, example):
        draft, inputs = example
        with torch.no_grad():
            planned = insert(draft.network, draft.plan)(*inputs)
            frozen = freeze(draft.network, draft.plan)(*inputs)
        for a, b in zip(leaves(frozen), leaves(planned), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    def test_they_are_near_the_floating_network_and_not_the_same(self, example):
        draft, inputs = example
        with torch.no_grad():
            pairs = zip(leaves(draft.network(*inputs)), leaves(insert(draft.network, draft.plan)(*inputs)), strict=True)
        for exact, rounded in pairs:
            assert not torch.equal(exact, rounded)
            noise = float((exact - rounded).square().mean() / exact.square().mean())
            assert noise < 3e-3  # 25 dB

    def test_no_float_weight_of_a_quantized_layer_is_left(self, example):
        draft, _ = example
        state = freeze(draft.network, draft.plan).state_dict()
        for edge, entry in draft.plan.entries.items():
            name, _, port = edge.rpartition(":")
            layer = name.split("@")[0]
            if port == "weight":
                assert not any(key.startswith(f"{layer}.") for key in state)
                stored = state[f"integers.{layer}.weight"]
                assert stored.dtype == torch.int8
                assert int(stored.max()) <= entry.spec.limits[1] and int(stored.min()) >= entry.spec.limits[0]
        floats = {key.split(".")[-1] for key, value in state.items() if value.is_floating_point()}
        assert all(name.endswith("_scale") or name == "bias" for name in floats)

    def test_biases_are_integers_of_32_bits_within_their_limit(self, example):
        draft, _ = example
        state = freeze(draft.network, draft.plan).state_dict()
        biases = {k: v for k, v in state.items() if k.split(".")[-1].rstrip("_0123456789") == "bias"}
        sequences = {"integers.wide.bias"}  # a linear layer on three axes adds its bias in floating point
        for key, value in biases.items():
            if key in sequences:
                assert value.dtype == torch.float32
            else:
                assert value.dtype == torch.int32
                assert int(value.abs().max()) <= BIAS_LIMIT * (1 + 1e-6)

    def test_the_given_network_stays_as_it_was(self, example):
        draft, inputs = example
        before = copy.deepcopy(draft.network)
        insert(draft.network, draft.plan)
        freeze(draft.network, draft.plan)
        assert str(draft.network.graph) == str(before.graph)
        assert list(draft.network.state_dict()) == list(before.state_dict())
        for a, b in zip(leaves(draft.network(*inputs)), leaves(before(*inputs)), strict=True):
            assert torch.equal(a, b)

    def test_a_copy_of_the_network_takes_the_same_plan(self, example):
        draft, inputs = example
        copied = copy.deepcopy(draft.network)
        with torch.no_grad():
            pairs = zip(
                leaves(insert(copied, Plan.from_json(draft.plan.to_json()))(*inputs)),
                leaves(insert(draft.network, draft.plan)(*inputs)),
                strict=True,
            )
            assert all(torch.equal(a, b) for a, b in pairs)

    def test_every_edge_holds_no_more_values_than_its_integers(self, example):
        draft, inputs = example
        network = insert(draft.network, draft.plan)
        seen = {}

        def note(module, arguments, output):
            seen[id(module)] = len(output.unique()) if module.scale.numel() == 1 else 0

        quantizers = [m for m in network.modules() if isinstance(m, FakeQuantize)]
        for module in quantizers:
            module.register_forward_hook(note)
        with torch.no_grad():
            network(*inputs)
        assert set(seen) == {id(m) for m in quantizers}  # none without a reader
        for module in quantizers:
            low, high = module.spec.limits
            if high - low < 256:
                assert seen[id(module)] <= high - low + 1

    def test_operators_keep_their_sites(self, example):
        draft, _ = example
        edges = {edge.rpartition(":")[0] for edge in draft.plan.entries}
        for network in (insert(draft.network, draft.plan), freeze(draft.network, draft.plan)):
            assert edges <= {site(n) for n in network.graph.nodes} | {"output"}

    def test_a_frozen_network_exports(self, example):
        draft, inputs = example
        frozen = freeze(draft.network, draft.plan)
        program = export(frozen, (inputs, {}), None)
        with torch.no_grad():
            pairs = zip(leaves(program.module()(*inputs)), leaves(frozen(*inputs)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert any("penjing.quantize" in str(n.target) for n in program.graph.nodes)


def one_layer(layer, shape, weight_scale, input_scale, zero=0):
    network = capture_network(nn.Sequential(layer), (torch.zeros(1, *shape),))
    entries = {
        "0:in0": Entry(ACTIVATION, (input_scale,), (zero,)),
        "0:weight": Entry(WEIGHT, tuple(weight_scale), (0,) * len(weight_scale)),
    }
    return network, Plan(entries)


def test_a_linear_layer_by_hand_in_integers():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).requires_grad_(False)
    weight_scale, input_scale, zero = [2.0**-6, 2.0**-7], 2.0**-5, 7
    network, plan = one_layer(layer, (3,), weight_scale, input_scale, zero)
    x = torch.randn(4, 3)
    output = freeze(network, plan)(x)
    for sample in range(4):
        for out in range(2):
            grid = weight_scale[out] * input_scale
            total = round(float(layer.bias[out]) / grid)
            for i in range(3):
                q = min(max(round(float(x[sample, i]) / input_scale) + zero, 0), 255)
                w = min(max(round(float(layer.weight[out, i]) / weight_scale[out]), -127), 127)
                total += (q - zero) * w
            assert float(output[sample, out]) == total * grid  # powers of two: exact


def test_the_bias_takes_the_grid_of_the_accumulator():
    _, plan = one_layer(nn.Linear(3, 2), (3,), [0.1, 0.3], 0.7)
    entry = bias_entry(plan, "0")
    assert entry.scale == tuple((torch.tensor([0.1, 0.3]) * torch.tensor([0.7])).tolist())
    assert entry.zero_point == (0, 0)
    assert entry.spec.bits == 32 and entry.spec.axis == 0
    assert bias_entry(Plan(), "0") is None


def test_one_scale_for_the_whole_weight():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    network = capture_network(nn.Sequential(layer), (torch.zeros(1, 3, 5, 5),))
    whole = replace(WEIGHT, axis=None)
    plan = Plan({"0:in0": Entry(ACTIVATION, (0.02,), (128,)), "0:weight": Entry(whole, (0.003,), (0,))})
    x = torch.randn(2, 3, 5, 5)
    frozen = freeze(network, plan)
    torch.testing.assert_close(frozen(x), insert(network, plan)(x), rtol=1e-6, atol=1e-6)
    assert frozen.state_dict()["integers.0.weight_scale"].shape == ()


def test_both_inputs_of_one_operator_may_be_the_same_value():
    class Doubles(nn.Module):
        def forward(self, x):
            return x + x

    network = capture_network(Doubles(), (torch.zeros(1, 4),))
    entry = Entry(ACTIVATION, (0.5,), (4,))
    plan = Plan({"/add#0:in0": entry, "/add#0:in1": entry})
    inserted = insert(network, plan)
    assert len([m for m in inserted.modules() if isinstance(m, FakeQuantize)]) == 1  # shared
    x = torch.tensor([[0.3, -0.6, 1.1, -9.0]])
    assert inserted(x).tolist() == [[1.0, -1.0, 2.0, -4.0]]
    assert freeze(network, plan)(x).tolist() == [[1.0, -1.0, 2.0, -4.0]]


def test_two_readers_may_have_two_grids():
    class Reads(nn.Module):
        def forward(self, x):
            return x + x

    network = capture_network(Reads(), (torch.zeros(1, 1),))
    plan = Plan({"/add#0:in0": Entry(ACTIVATION, (0.5,), (0,)), "/add#0:in1": Entry(ACTIVATION, (0.2,), (0,))})
    assert float(insert(network, plan)(torch.tensor([[0.7]]))) == pytest.approx(0.5 + 0.8)
    assert float(freeze(network, plan)(torch.tensor([[0.7]]))) == pytest.approx(0.5 + 0.8)


def test_the_output_of_a_network_can_be_an_edge():
    class Names(nn.Module):
        def forward(self, x):
            return {"a": x * 2, "b": (x * 3, x)}

    network = capture_network(Names(), (torch.zeros(1, 1),))
    plan = Plan({"/output:in1": Entry(ACTIVATION, (2.0,), (0,))})
    for rounded in (insert(network, plan), freeze(network, plan)):
        out = rounded(torch.tensor([[1.2]]))
        assert float(out["a"]) == pytest.approx(2.4)
        assert float(out["b"][0]) == 4.0
        assert float(out["b"][1]) == pytest.approx(1.2)


class TestALayerCalledTwice:
    def test_each_call_has_its_own_bias_grid(self):
        torch.manual_seed(0)
        draft, inputs = quantized(Twice(), [(3, 8, 8)])
        state = freeze(draft.network, draft.plan).state_dict()
        scales = {k: v for k, v in state.items() if "bias" in k and k.endswith("_scale")}
        assert len(scales) == 2
        first, second = scales.values()
        assert not torch.equal(first, second)

    def test_a_call_that_stays_float_keeps_the_layer(self):
        torch.manual_seed(0)
        draft, inputs = quantized(Twice(), [(3, 8, 8)])
        half = draft.plan.without({"conv@1": "too lossy"})
        with torch.no_grad():
            planned, frozen = insert(draft.network, half)(*inputs), freeze(draft.network, half)
            torch.testing.assert_close(frozen(*inputs), planned, rtol=1e-6, atol=1e-6)
        assert "conv.weight" in frozen.state_dict()


def test_a_weight_that_another_operator_reads_is_kept():
    class Decodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(6, 4)

        def forward(self, x):
            return F.relu(self.encode(x)) @ self.encode.weight

    torch.manual_seed(0)
    draft, inputs = quantized(Decodes(), [(6,)])
    assert "encode:weight" in draft.plan.entries
    with torch.no_grad():
        planned, frozen = insert(draft.network, draft.plan)(*inputs), freeze(draft.network, draft.plan)(*inputs)
    torch.testing.assert_close(frozen, planned, rtol=1e-6, atol=1e-6)


def test_an_empty_plan_changes_nothing():
    network = capture_network(build("resnet20", width=4), (torch.zeros(1, 3, 8, 8),))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(freeze(network, Plan())(x), network(x))
    assert torch.equal(insert(network, Plan())(x), network(x))


@pytest.mark.parametrize("change", [insert, freeze])
def test_a_plan_for_another_network_is_refused(change):
    network = capture_network(nn.Sequential(nn.Linear(3, 2)), (torch.zeros(1, 3),))
    plan = Plan({"layer4.0.conv1:in0": Entry(ACTIVATION, (1.0,), (0,))})
    with raises_case(QuantizationError, "misfit") as caught:
        change(network, plan)
    assert "layer4.0.conv1:in0" in caught.value.got
    assert "0" in sites(network)


def test_plans_of_the_generic_runtime_cover_every_edge_of_the_placement():
    draft, _ = quantized(Zoo(), [(3, 8, 8)])
    specs = {edge: entry.spec for edge, entry in draft.plan.entries.items()}
    weights = {edge for edge in specs if edge.endswith(":weight")}
    assert {specs[edge].axis for edge in weights} == {0}
    assert {(s.bits, s.signed, s.symmetric) for e, s in specs.items() if e not in weights} == {
        (GENERIC.activation.bits, GENERIC.activation.signed, GENERIC.activation.symmetric)
    }
    assert weights == {"stem:weight", "depthwise:weight", "grouped:weight", "head:weight"}
