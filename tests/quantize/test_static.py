import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import runtimes
from penjing.architectures import build
from penjing.errors import CalibrationError, RecipeError
from penjing.network.capture import capture_network
from penjing.network.graph import sites
from penjing.quantize import Static
from penjing.quantize.static import matches
from penjing.quantize.statistics import collect
from penjing.steps.draft import Draft
from penjing.steps.plan import BIAS_LIMIT
from penjing.steps.step import Context
from penjing.surgery import freeze, insert
from penjing.tasks.task import Task
from tests.raises import raises_case, raises_setting


def batches(*shape, count=4, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=generator) for _ in range(count)]


def context_of(shape, calibration=None, **fields):
    data = batches(*shape) if calibration is None else calibration
    return Context(task=Task(example=torch.zeros(1, *shape), calibration=data), **fields)


def draft_of(model, *shape):
    return Draft(capture_network(model.eval(), (torch.zeros(1, *shape),)))


def lived(model, seed=0):
    """As after a training: weights and statistics of their own."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


@pytest.fixture
def draft():
    torch.manual_seed(0)
    return draft_of(lived(build("resnet20", width=8)), 3, 16, 16)


SHAPE = (3, 16, 16)


class TestTheStep:
    def test_other_data_give_another_plan(self, draft):
        one = Static()(draft, context_of(SHAPE))
        elsewhere = Static()(draft, context_of(SHAPE, batches(*SHAPE, seed=1)))
        assert elsewhere.plan.to_json() != one.plan.to_json()

    def test_a_second_run_on_its_own_result_gives_the_same_plan(self, draft):
        once = Static()(draft, context_of(SHAPE))
        twice = Static()(once, context_of(SHAPE))
        assert twice.plan == once.plan
        assert twice.edits == once.edits

    def test_progress_is_told(self, draft):
        told = []
        Static()(draft, context_of(SHAPE, events=lambda kind, **values: told.append((kind, values["done"]))))
        assert told == [("progress", 8), ("progress", 16), ("progress", 24), ("progress", 32)]


class TestAccuracy:
    @pytest.mark.parametrize("estimator", ["minmax", "moving_average", "percentile", "mse"])
    def test_every_estimator_stays_near_the_source(self, draft, estimator):
        result = Static(activation_range=estimator)(draft, context_of(SHAPE))
        x = batches(*SHAPE, seed=9)[0]
        with torch.no_grad():
            exact, rounded = draft.network(x), insert(result.network, result.plan)(x)
        assert float((exact - rounded).square().sum() / exact.square().sum()) < 1e-2  # 20 dB

    def test_more_bits_lose_less(self, draft):
        x = batches(*SHAPE, seed=9)[0]
        losses = []
        with torch.no_grad():
            for bits in (3, 4, 6, 8):
                result = Static(weight_bits=bits, activation_bits=bits)(draft, context_of(SHAPE))
                losses.append(float((insert(result.network, result.plan)(x) - draft.network(x)).square().sum()))
        assert losses == sorted(losses, reverse=True)


class TestThePlan:
    def test_specs_are_what_was_asked_for(self, draft):
        plan = Static(weight_bits=4, activation_bits=6, weight_range="minmax")(draft, context_of(SHAPE)).plan
        for edge, entry in plan.entries.items():
            if edge.endswith(":weight"):
                assert (entry.spec.bits, entry.spec.range, entry.spec.axis) == (4, "minmax", 0)
                assert set(entry.zero_point) == {0}
            else:
                assert (entry.spec.bits, entry.spec.range, entry.spec.axis) == (6, "mse", None)
                assert len(entry.scale) == 1

    def test_numbers_are_plain(self, draft):
        plan = Static()(draft, context_of(SHAPE)).plan
        for entry in plan.entries.values():
            assert {type(s) for s in entry.scale} == {float}  # generated code can name no NumPy type
            assert {type(z) for z in entry.zero_point} == {int}

    def test_ranges_cover_what_was_seen(self, draft):
        result = Static(activation_range="minmax")(draft, context_of(SHAPE))
        entry = result.plan.entries["conv1:in0"]
        data = torch.cat(batches(*SHAPE))
        low = (0 - entry.zero_point[0]) * entry.scale[0]
        high = (255 - entry.zero_point[0]) * entry.scale[0]
        assert low == pytest.approx(float(data.min()), abs=entry.scale[0])
        assert high == pytest.approx(float(data.max()), abs=entry.scale[0])

    def test_edges_with_the_same_value_have_the_same_numbers(self):
        class Skip(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

            def forward(self, x):
                y = F.max_pool2d(F.relu(self.a(x)), 2)
                return self.b(y) + y

        torch.manual_seed(0)
        plan = Static()(draft_of(Skip(), 3, 8, 8), context_of((3, 8, 8))).plan
        assert plan.entries["b:in0"] == plan.entries["/add#0:in1"] == plan.entries["/max_pool2d#0:in0"]

    def test_settings_by_name(self, draft):
        step = Static(settings={"stages.2.*": {"weight_bits": 4}, "classifier": {"activation_range": "minmax"}})
        plan = step(draft, context_of(SHAPE)).plan
        bits = {edge: e.spec.bits for edge, e in plan.entries.items() if edge.endswith(":weight")}
        assert {bits[e] for e in bits if e.startswith("stages.2.")} == {4}
        assert {bits[e] for e in bits if not e.startswith("stages.2.")} == {8}
        assert plan.entries["classifier:in0"].spec.range == "minmax"
        assert plan.entries["conv1:in0"].spec.range == "mse"

    def test_settings_for_all_that_lies_in_a_module(self, draft):
        plan = Static(settings={"stages.2": {"weight_bits": 4}})(draft, context_of(SHAPE)).plan
        assert plan.entries["stages.2.0.conv1:weight"].spec.bits == 4
        assert plan.entries["stages.1.0.conv1:weight"].spec.bits == 8

    @pytest.mark.parametrize("name", ["weight_bit", "samples", "exclude"])
    def test_settings_that_operators_cannot_have(self, draft, name):
        with raises_case(RecipeError, "unknown-setting") as caught:
            Static(settings={"classifier": {name: 4}})(draft, context_of(SHAPE))
        assert caught.value.got == name

    def test_excluded_operators_stay_float_with_their_reason(self, draft):
        result = Static(exclude=("stages.1", "classifier"))(draft, context_of(SHAPE))
        excluded = [name for name in sites(result.network) if name.startswith("stages.1.") or name == "classifier"]
        assert set(excluded) <= set(result.plan.floats)
        assert result.plan.floats["classifier"] == "excluded by 'classifier'"
        assert not any(edge.startswith(("stages.1.", "classifier:")) for edge in result.plan.entries)
        x = batches(*SHAPE)[0]
        with torch.no_grad():
            frozen, planned = freeze(result.network, result.plan), insert(result.network, result.plan)
            torch.testing.assert_close(frozen(x), planned(x), rtol=1e-6, atol=1e-6)
        assert frozen.state_dict()["classifier.weight"].dtype == torch.float32


class TestNames:
    NAMES = ["layer1.0.conv1", "layer1.0.conv1@1", "layer1.0/add#0", "layer10.conv", "fc"]

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("fc", ["fc"]),
            ("layer1", ["layer1.0.conv1", "layer1.0.conv1@1", "layer1.0/add#0"]),
            ("layer1.0.conv1", ["layer1.0.conv1", "layer1.0.conv1@1"]),
            ("layer1*", ["layer1.0.conv1", "layer1.0.conv1@1", "layer1.0/add#0", "layer10.conv"]),
            ("*/add#*", ["layer1.0/add#0"]),
        ],
    )
    def test_patterns(self, pattern, expected):
        assert matches(pattern, self.NAMES) == expected

    @pytest.mark.parametrize("field", ["exclude", "settings"])
    def test_a_pattern_that_fits_nothing_names_the_nearest(self, draft, field):
        value = ("clasifier",) if field == "exclude" else {"clasifier": {"weight_bits": 4}}
        with raises_case(RecipeError, "no-match") as caught:
            Static(**{field: value})(draft, context_of(SHAPE))
        assert caught.value.got == "'clasifier'"
        assert "'classifier'" in caught.value.expected
        assert "inspect" in caught.value.remedy

    def test_an_unknown_estimator_is_refused(self, draft):
        with raises_setting("activation_range"):
            Static(activation_range="magic")(draft, context_of(SHAPE))
        with raises_setting("weight_range"):
            Static(weight_range="percentile")(draft, context_of(SHAPE))


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class TestHardCases:
    @pytest.mark.parametrize("bias", [0.0, 3.0, -1e-9, 1e4])
    def test_a_dead_channel_with_a_bias(self, bias):
        torch.manual_seed(0)
        model = Chain()
        with torch.no_grad():
            model.a.weight[1] = 0
            model.a.bias[1] = bias
        result = Static()(draft_of(model, 3, 8, 8), context_of((3, 8, 8)))
        frozen = freeze(result.network, result.plan)
        x = batches(3, 8, 8)[0]
        with torch.no_grad():
            channel = frozen(x), insert(result.network, result.plan)(x), model(x)
        torch.testing.assert_close(channel[0], channel[1], rtol=1e-6, atol=1e-6)
        largest = float(channel[2].abs().max())
        assert float((channel[0] - channel[2]).abs().max()) < 0.05 * largest
        stored = frozen.state_dict()["integers.a.bias"]
        assert int(stored.abs().max()) <= BIAS_LIMIT * (1 + 1e-6)

    def test_a_batch_norm_that_kills_a_channel(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        with torch.no_grad():
            model[1].weight[2] = 0
            model[1].bias[2] = 0.7
        result = Static()(draft_of(model, 3, 8, 8), context_of((3, 8, 8)))
        x = batches(3, 8, 8)[0]
        with torch.no_grad():
            rounded = freeze(result.network, result.plan)(x)
            assert torch.isfinite(rounded).all()
            torch.testing.assert_close(rounded, model(x), rtol=0.1, atol=0.05)

    @pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
    def test_inputs_that_never_change(self, value):
        torch.manual_seed(0)
        model = Chain()
        data = [torch.full((8, 3, 8, 8), value)] * 2
        result = Static()(draft_of(model, 3, 8, 8), context_of((3, 8, 8), data))
        with torch.no_grad():
            rounded = freeze(result.network, result.plan)(data[0])
            torch.testing.assert_close(rounded, model(data[0]), rtol=0.05, atol=0.02)

    def test_weights_that_are_all_zero(self):
        model = Chain()
        for p in model.parameters():
            nn.init.zeros_(p)
        result = Static()(draft_of(model, 3, 8, 8), context_of((3, 8, 8)))
        with torch.no_grad():
            assert torch.equal(freeze(result.network, result.plan)(batches(3, 8, 8)[0]), torch.zeros(8, 2, 6, 6))

    def test_a_value_that_is_not_finite_inside_the_network(self):
        class Logarithm(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(4, 2)

            def forward(self, x):
                return self.head(torch.log(F.relu(x)))

        with raises_case(CalibrationError, "not-finite") as caught:
            Static()(draft_of(Logarithm(), 4), context_of((4,)))
        assert "-inf" in caught.value.got


class TestCollecting:
    def test_at_most_so_many_samples_are_read(self, draft):
        read = []

        class Stream:
            def __iter__(self):
                for batch in batches(*SHAPE, count=50):
                    read.append(len(batch))
                    yield batch

        Static(samples=20)(draft, context_of(SHAPE, Stream()))
        assert 20 <= sum(read) <= 32  # three batches of 8, and perhaps one that was fetched ahead

    def test_a_cut_batch_counts_its_samples_only(self, draft):
        cut = [batches(*SHAPE)[0], batches(*SHAPE)[1][:4]]
        whole = batches(*SHAPE)
        one = Static(samples=12)(draft, context_of(SHAPE, whole)).plan
        assert one == Static(samples=12)(draft, context_of(SHAPE, cut)).plan

    def test_the_order_of_the_batches_does_not_matter(self, draft):
        data = batches(*SHAPE)
        one = Static()(draft, context_of(SHAPE, data)).plan
        assert one.to_json() == Static()(draft, context_of(SHAPE, data[::-1])).plan.to_json()

    def test_one_pass_serves_later_runs(self, draft):
        passthrough = []

        class Stream:
            def __iter__(self):
                passthrough.append(1)
                return iter(batches(*SHAPE))

        context = context_of(SHAPE, Stream())
        for step in (Static(), Static(weight_bits=4), Static(activation_range="percentile", exclude=("classifier",))):
            step(draft, context)
        assert len(passthrough) == 1

    def test_another_network_is_observed_anew(self, draft):
        context = context_of(SHAPE)
        one = collect(draft.network, {"conv2d"}, context, 32)[0]["conv2d"]
        changed = draft.copy().network
        with torch.no_grad():
            changed.get_submodule("conv1").weight.mul_(3)
        assert collect(changed, {"conv2d"}, context, 32)[0]["conv2d"].high == pytest.approx(3 * one.high, rel=1e-5)

    def test_histograms_hold_what_the_network_computed(self, draft):
        histograms, *_ = collect(draft.network, {"x", "conv2d"}, context_of(SHAPE), 32)
        data = torch.cat(batches(*SHAPE))
        with torch.no_grad():
            expected = draft.network.get_submodule("conv1")(data)
        assert (histograms["x"].low, histograms["x"].high) == (float(data.min()), float(data.max()))
        assert histograms["conv2d"].high == pytest.approx(float(expected.max()), rel=1e-5)
        assert float(histograms["conv2d"].counts.sum()) == pytest.approx(expected.numel())

    def test_a_task_without_calibration_data(self, draft):
        with raises_case(CalibrationError, "no-calibration"):
            Static()(draft, Context(task=Task(example=torch.zeros(1, *SHAPE))))


@pytest.mark.parametrize(("shift", "centred"), [(0.0, True), (1.0, False)])
def test_openvino_gets_no_zero_point_where_that_costs_the_grid_little(shift, centred):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.padded, self.pointwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.a(x)
            return self.padded(x) + self.pointwise(F.silu(x))

    torch.manual_seed(0)
    model = Two().eval()
    with torch.no_grad():
        model.a.bias.add_(shift)
    x = torch.randn(16, 3, 8, 8)
    task = Task(example=(x,), calibration=[(x,)])
    network = capture_network(model, *task.call())
    for runtime, expected in (("openvino", centred), ("onnxruntime", False)):
        capabilities = runtimes.get(runtime).capabilities(("avx2", "avx512f", "avx512_vnni", "amx_int8"))
        entries = Static()(Draft(network), Context(task=task, capabilities=capabilities)).plan.entries
        assert (entries["padded:in0"].zero_point[0] == 0) == expected
        assert entries["pointwise:in0"].zero_point[0] != 0 and entries["a:in0"].zero_point[0] != 0
        asymmetric = Static(activation_symmetric=False)(Draft(network), Context(task=task, capabilities=capabilities))
        assert asymmetric.plan.entries["padded:in0"].zero_point[0] != 0
