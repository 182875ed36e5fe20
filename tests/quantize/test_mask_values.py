"""Numbers that hide what is not to be looked at, before whatever passes them over: they cost nothing that is seen."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penjing import measure, runtimes
from penjing.network.capture import capture_network
from penjing.network.graph import site
from penjing.pipeline import building
from penjing.quantize import Static, mask_values
from penjing.quantize.histogram import Histogram
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.task import Task

SMALLEST = torch.finfo(torch.float32).min


def decibels(reference, got):
    reference, got = np.asarray(reference, np.float64), np.asarray(got, np.float64)
    assert reference.shape == got.shape and np.isfinite(got).all()
    return 10 * math.log10((reference**2).sum() / max(((reference - got) ** 2).sum(), 1e-30))


class Words(nn.Module):
    """Token ids → hidden states; those of ids below 12 are padding."""

    def __init__(self, reduce):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.head, self.reduce = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 4), reduce

    def forward(self, ids):
        hidden = torch.relu(self.up(self.table(ids)))
        return self.head(self.reduce(hidden, (ids < 12)[..., None]))


class Images(nn.Module):
    def __init__(self, reduce):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head, self.reduce = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1), reduce

    def forward(self, x):
        return self.head(self.reduce(self.up(x)))


WORDS = {
    "added": lambda h, m: (h + m.float() * -1e4).amax(1),
    "added as transformers does": lambda h, m: (h + (1.0 - (~m).float()) * torch.finfo(h.dtype).min).amax(1),
    "less a mask": lambda h, m: (h - m * 1e9).max(dim=1)[0],
    "added from a choice": lambda h, m: (h + torch.where(m, -1e4, 0.0)).amax(1),
    "scaled and shifted": lambda h, m: (h.masked_fill(m, -1e4) * 0.5 + 1).amax(1),
    "among others": lambda h, m: torch.cat([h.masked_fill(m, -1e4), h[:, :1]], 1).amax(1),
    "stacked": lambda h, m: torch.stack([h.masked_fill(m, -1e4), h], 2).amax((1, 2)),
    "scattered": lambda h, m: h.scatter(1, torch.zeros_like(h[:, :1], dtype=torch.long), -1e4).amax(1),
    "through an activation": lambda h, m: F.gelu(h.masked_fill(m, -1e4).amax(1)),
    "into a rectifier": lambda h, m: F.relu(h + m.float() * -1e9).sum(1),
    "smallest": lambda h, m: h.masked_fill(m, 1e9).amin(1),
    "both ends": lambda h, m: torch.cat([h.masked_fill(m, -1e4).amax(1), h.masked_fill(m, 1e4).amin(1)], -1)[:, 8:24],
    "largest three": lambda h, m: torch.where(m, h.new_tensor(-1e9), h).topk(3, 1).values.mean(1),
    "moved": lambda h, m: h.masked_fill(m, -1e4).permute(0, 2, 1).contiguous().amax(-1),
    "pooled": lambda h, m: F.adaptive_max_pool1d(h.masked_fill(m, -1e4).transpose(1, 2), 1).squeeze(-1),
}
PICTURES = {
    "a huge number": lambda h: F.max_pool2d(F.pad(h, (1, 1, 1, 1), value=-1e9), 3, 2),
    "minus infinity": lambda h: F.max_pool2d(F.pad(h, (1, 1, 1, 1), value=-math.inf), 3, 2),
    "the smallest": lambda h: F.max_pool2d(F.pad(h, (0, 1, 0, 1), value=SMALLEST), 3, 2),
}


def ids(seed, n=16):
    return torch.randint(0, 50, (n, 10), generator=torch.Generator().manual_seed(seed))


def images(seed, n=16):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def judge(net, data, runtime, folder):
    """The draft of an artifact that agrees with its source and its plan on another batch size."""
    task = Task(example=data(0), calibration=[data(1 + i) for i in range(3)])
    captured = capture_network(net.eval(), *task.call(), task.dynamic)
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    draft = Static()(Draft(captured), Context(task=task, capabilities=capabilities, source=captured))
    building.build(draft, runtime, "int8", task, {"kind": "tensor"}, folder)
    args = data(9, 5)
    args = args if isinstance(args, tuple) else (args,)
    with torch.no_grad():
        references = [network(*args) for network in (net, insert(draft.network, draft.plan))]
    [got] = isolated.open_artifact(folder, 1).run([x.numpy() for x in args])
    assert decibels(references[0], got) > 30
    assert decibels(references[1], got) > 40
    return draft


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("way", WORDS)
def test_what_hides_tokens_costs_nothing(way, runtime, tmp_path):
    draft = judge(Words(WORDS[way]), ids, runtime, tmp_path)
    assert {"up:in0", "head:in0"} <= set(draft.plan.entries)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("way", PICTURES)
def test_a_border_that_pooling_passes_over_costs_nothing(way, runtime, tmp_path):
    draft = judge(Images(PICTURES[way]), images, runtime, tmp_path)
    assert {"up:in0", "head:in0"} <= set(draft.plan.entries)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_mask_of_numbers_that_is_an_input_is_seen_in_calibration(runtime, tmp_path):
    class Masked(Words):
        def forward(self, x, mask):
            return self.head((torch.relu(self.up(self.table(x))) + mask[..., None]).amax(1))

    def data(seed, n=16):
        return ids(seed, n), torch.where(ids(seed, n) < 12, -1e4, 0.0)

    draft = judge(Masked(None), data, runtime, tmp_path)
    assert draft.plan.floats["/add#0"] == mask_values.REASON and "head:in0" in draft.plan.entries


def holding(forward, *args):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("causal", torch.triu(torch.full((8, 8), -1e4), 1))
            self.register_buffer("places", torch.arange(0.0, 2048.0, 32.0).reshape(8, 8))
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return forward(self, self.fc(x))

    network = capture_network(Net().eval(), (torch.randn(2, 8, 8),))
    held = mask_values.holders(network)
    return [site(n) for n in network.graph.nodes if n.name in held and n.op == "call_function"]


def test_it_is_followed_up_to_what_passes_it_over():
    assert holding(lambda s, h: (h + s.causal).reshape(-1, 64).amax(1) * 2) == ["/add#0", "/reshape#0"]
    assert holding(lambda s, h: h.masked_fill(h > 0, -1e9).relu() + h) == ["/masked_fill#0"]
    assert holding(lambda s, h: h.masked_fill(h > 0, 1e9).relu()) == ["/masked_fill#0", "/relu#0"]
    assert holding(lambda s, h: h.masked_fill(h > 0, -1e9).clamp(min=-5) + h) == ["/masked_fill#0"]


def test_other_large_numbers_are_values():
    assert not holding(lambda s, h: h * 1500 + s.places)
    assert not holding(lambda s, h: (h * h.sigmoid()).masked_fill(h > 0, -1.0))
    assert not holding(lambda s, h: h.clamp(-1e9, 1e9) + 1)


def test_a_size_minus_one_is_not_a_mask():
    class Shorter(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv1d(3, 4, 1)

        def forward(self, x):
            return self.layer(x[:, :, : x.shape[2] - 1])

    x = torch.randn(4, 3, 9)
    dynamic = {0: {0: "batch", 2: "length"}}
    network = capture_network(Shorter().eval(), (x,), {}, dynamic)
    plan = Static()(Draft(network), Context(task=Task(example=x, calibration=[x], dynamic=dynamic))).plan
    assert {"layer:in0", "layer:weight"} <= plan.entries.keys() and not plan.floats


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (torch.cat([torch.randn(500), torch.full((500,), -1e4)]), {-1}),
        (torch.cat([torch.randn(500), torch.full((1,), SMALLEST / 2)]), {-1}),
        (torch.cat([torch.randn(500), torch.full((500,), -1e4), torch.full((9,), 1e4)]), {-1, 1}),
        (torch.cat([torch.randn(500), torch.full((500,), -500.0)]), set()),
        (torch.randn(2000) * 2000, set()),
        (torch.full((100,), -1e4), set()),
    ],
)
def test_what_stands_out(values, told):
    histogram = Histogram()
    histogram.update(values)
    assert mask_values.standing_out(histogram) == told


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.cat([torch.randn(500), torch.full((500,), -1e4)]), True),
        (torch.cat([torch.randn(500), torch.randn(500) - 1e4]), True),  # added, not filled in
        (torch.cat([torch.randn(500), torch.full((500,), -1e4), torch.full((9,), -2e4)]), True),  # added twice
        (torch.cat([torch.randn(500), torch.full((1,), SMALLEST / 2)]), True),
        (torch.cat([torch.randn(500), torch.randint(1990, 2025, (500,)).float()]), False),  # years
        (torch.cat([torch.randn(500), 1013 + 10 * torch.randn(500)]), False),  # a pressure
        (torch.cat([torch.randn(500), torch.tensor([1990.0, 2003.0, 2024.0])]), False),
    ],
)
def test_a_mask_is_one_number_and_large_values_are_many(values, expected):
    histogram = Histogram()
    histogram.update(values)
    assert mask_values.standing_out(histogram)
    assert mask_values.alike(histogram) is expected


class Features(nn.Module):
    """Two layers with a function between input and first layer, and one between the layers."""

    def __init__(self, before, between):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.before, self.between = nn.Linear(8, 8), nn.Linear(8, 8), before, between
        self.register_buffer("mean", torch.tensor([0.5, 3.0, 1013.0, 7.0, 0.0, 0.0, 1.0, 2.0]))
        self.register_buffer("offset", torch.full((8,), 1500.0))
        self.register_buffer("hidden", torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1e4, -1e4]))

    def forward(self, x):
        return self.second(self.between(self, self.first(self.before(self, x))))


def around_a_thousand(seed):
    return 1000 + 20 * torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))


def of_one_column(seed, low=1003.0, high=1023.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=g)
    x[:, 2] = low + (high - low) * torch.rand(64, generator=g)
    return x


def reasons(data, before=lambda s, x: x, between=lambda s, h: h):
    """The plan, and why layers read values far beyond others."""
    network = capture_network(Features(before, between).eval(), (data(0),))
    task = Task(example=data(0), calibration=[data(1), data(2)])
    plan = Static()(Draft(network), Context(task=task)).plan
    return {name: reason for name, reason in plan.floats.items() if "dominate" in reason}


ORDINARY = {
    "a limit": (around_a_thousand, lambda s, x: torch.where(x > 1000, 1000.0, x)),
    "filled in": (around_a_thousand, lambda s, x: x.masked_fill(x < 960, 1000.0)),
    "a border": (around_a_thousand, lambda s, x: F.pad(x[:, 1:], (1, 0), value=1000.0)),
    "a price of an option": (around_a_thousand, lambda s, x: x + (x > 1000).float() * 1500),
    "beside others": (around_a_thousand, lambda s, x: torch.cat([x[:, 4:], torch.full_like(x[:, 4:], 1000.0)], 1)),
    "a mean": (of_one_column, lambda s, x: (x - s.mean) / 3),
}
SHIFTED = {
    "by a number": lambda s, h: h * 300 + 1500,
    "by a stored number": lambda s, h: h * 300 + s.offset,
    "by a stored vector": lambda s, h: h + s.mean,
}


@pytest.mark.parametrize("name", ORDINARY)
def test_a_number_that_the_values_around_it_reach_is_no_mask(name):
    data, before = ORDINARY[name]
    assert not reasons(data, before)


@pytest.mark.parametrize("name", SHIFTED)
def test_a_number_that_is_added_to_all_alike_is_no_mask(name):
    assert mask_values.REASON not in reasons(lambda seed: torch.randn(64, 8), between=SHIFTED[name]).values()


def test_a_constant_of_two_levels_is_a_mask_whatever_is_calibrated():
    def narrow(seed):
        return torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))

    assert reasons(narrow, lambda s, x: x + s.hidden) == {"first": mask_values.REASON}
    assert reasons(narrow, lambda s, x: x.masked_fill(x > 99, -1e4)) == {"first": mask_values.REASON}


def test_a_column_far_beyond_the_others_is_called_that():
    assert reasons(of_one_column) == {"first": mask_values.DISTANT}
