"""A few huge channels are mitigated by themselves, and a network without them keeps its plan to the bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import runtimes
from penjing.architectures import build
from penjing.measure import machine
from penjing.network.capture import capture_network
from penjing.network.graph import sites
from penjing.quantize import CoordinateRounding, Static
from penjing.quantize.outlier_mitigation import outliers
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.task import Task
from tests.raises import raises_setting


class Blocks(nn.Module):
    """Feed-forward blocks behind norms, of which the first gives a few channels a hundred times larger.

    The weights behind hardly read them, as in trained transformers.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList([nn.LayerNorm(64) for _ in range(2)])
        self.up = nn.ModuleList([nn.Linear(64, 128) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(128, 64) for _ in range(2)])
        self.head = nn.Linear(64, 5)
        with torch.no_grad():
            for norm, up in zip(self.norms, self.up, strict=True):
                norm.weight[[3, 40]] = 300.0
                up.weight[:, [3, 40]] /= 300.0

    def forward(self, x):
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.relu(up(norm(x))))
        return self.head(x)


def context_of(runtime, *shape, data=None):
    spec = runtimes.get(runtime).capabilities(machine(1).instruction_sets)
    data = data or [torch.randn(16, *shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    return Context(task=Task(example=torch.zeros(2, *shape), calibration=data), capabilities=spec)


def decibels(network, draft, x):
    with torch.no_grad():
        expected, given = network(x), insert(draft.network, draft.plan)(x)
    return float(10 * torch.log10(expected.square().mean() / (expected - given).square().mean()))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_huge_channels_are_mitigated_and_the_plan_says_how(runtime):
    model = Blocks().eval()
    draft, context = Draft(capture_network(model, (torch.zeros(2, 6, 64),))), context_of(runtime, 6, 64)
    plain, mitigated = Static()(draft, context), Static(outliers="mitigate")(draft, context)
    x = torch.randn(16, 6, 64, generator=torch.Generator().manual_seed(9))
    assert {"up.0", "up.1"} <= set(outliers(plain.network, plain.plan, [((x,), {})]))
    assert decibels(model, plain, x) < 15 < 20 < decibels(model, mitigated, x)
    assert "outlier channels" in mitigated.plan.remedy and "dB instead of" in mitigated.plan.remedy
    assert decibels(model, CoordinateRounding()(mitigated, context), x) > 20


@pytest.mark.parametrize(("worse_from", "asked"), [(1.0, 8), (300.0, 32)])
def test_a_few_samples_are_asked_where_their_noise_is_far_below_the_limit(monkeypatch, worse_from, asked):
    model = Blocks().eval()
    with torch.no_grad():
        for norm, up in zip(model.norms, model.up, strict=True):
            norm.weight[[3, 40]] *= worse_from / 300
            up.weight[:, [3, 40]] *= 300 / worse_from
    data = [torch.randn(8, 6, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    samples = []

    def counted(network, plan):
        quantized = insert(network, plan)
        quantized.register_forward_hook(lambda module, args, output: samples.append(len(output)))
        return quantized

    monkeypatch.setattr("penjing.quantize.outlier_mitigation.insert", counted)
    draft = Draft(capture_network(model, (torch.zeros(2, 6, 64),)))
    Static(outliers="mitigate")(draft, context_of("onnxruntime", 6, 64, data=data))
    assert sum(samples[: asked // 8]) == asked and (len(samples) == 1) == (asked == 8)


class WideAndDeep(nn.Module):
    """Most of the columns that the last layer reads are raw measurements of up to thousands, the rest is below 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(20, 1)
        with torch.no_grad():
            self.last.weight[:, :12] /= 1000

    def forward(self, x):
        deep = F.relu(self.second(F.relu(self.first(x[:, 12:] / 1000))))
        return self.last(torch.cat((x[:, :12], deep), 1))


class Stream(nn.Module):
    """A residual stream with a few huge channels, as in trained transformers: every addition carries them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(3)])
        self.up = nn.ModuleList([nn.Linear(32, 64) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(64, 32) for _ in range(3)])
        self.head = nn.Linear(32, 5)
        with torch.no_grad():
            self.down[0].bias[[3, 20]] = torch.tensor([900.0, -700.0])
            self.head.weight[:, [3, 20]] /= 500

    def forward(self, x):
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(x)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_products_of_a_stream_with_huge_channels_stay_in_integers(runtime):
    draft = Draft(capture_network(Stream().eval(), (torch.zeros(2, 6, 32),)))
    context = context_of(runtime, 6, 32)
    plain, mitigated = Static()(draft, context), Static(outliers="mitigate")(draft, context)
    x = torch.randn(32, 6, 32, generator=torch.Generator().manual_seed(9))
    assert decibels(draft.network, plain, x) < 15
    assert decibels(draft.network, mitigated, x) > decibels(draft.network, plain, x) + 6
    assert "additions in floating point" in mitigated.plan.remedy
    products = {f"{kind}.{i}:weight" for kind in ("up", "down") for i in range(3)}
    assert products <= set(mitigated.plan.entries)
    assert {f"add#{i}" for i in range(3)} & {name.rpartition("/")[2] for name in sites(mitigated.network)}
    assert not [
        edge for edge in mitigated.plan.entries if "/add#" in f"/{edge}"
    ]  # the first carries none yet, and stays too


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_columns_of_which_most_are_huge_are_mitigated_too(runtime):
    model = WideAndDeep().eval()
    data = [1000 * torch.randn(16, 18, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    draft, context = Draft(capture_network(model, (data[0],))), context_of(runtime, 18, data=data[:3])
    plain, mitigated = Static()(draft, context), Static(outliers="mitigate")(draft, context)
    assert decibels(model, plain, data[3]) < 15 < 20 < decibels(model, mitigated, data[3])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_where_nothing_is_lost_the_plan_is_the_same_to_the_bit(runtime):
    torch.manual_seed(0)
    draft = Draft(capture_network(build("resnet20", width=8).eval(), (torch.zeros(2, 3, 16, 16),)))
    context = context_of(runtime, 3, 16, 16)
    plain, mitigated = Static()(draft, context), Static(outliers="mitigate")(draft, context)
    assert plain.plan.to_json() == mitigated.plan.to_json()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.network.parameters(), mitigated.network.parameters(), strict=True)
    )


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_outputs_that_are_no_floats_or_infinite_are_not_judged(runtime):
    class CachedTeacher(Blocks):
        def forward(self, x):
            y = super().forward(x)
            return y.argmax(-1), y > 0, y, y.masked_fill(torch.eye(6)[:, :5] > 0, float("-inf"))

    model = CachedTeacher().eval()
    draft, context = Draft(capture_network(model, (torch.zeros(2, 6, 64),))), context_of(runtime, 6, 64)
    mitigated = Static(outliers="mitigate")(draft, context)
    assert mitigated.plan.remedy
    x = torch.randn(16, 6, 64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        reference, given = model(x)[2], insert(mitigated.network, mitigated.plan)(x)[2]
    assert 10 * torch.log10(reference.square().mean() / (reference - given).square().mean()) > 20


@pytest.mark.parametrize("word", ["drop", "ease"])
def test_what_can_be_done_about_outliers(word):
    with raises_setting("outliers"):
        Static(outliers=word)
