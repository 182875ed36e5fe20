"""Attention with masks in integers: no mask, of whatever number, form or origin, costs what it does not hide."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention

from penjing import measure, runtimes
from penjing.network.capture import capture_network
from penjing.network.graph import kind, site, sites
from penjing.pipeline import building
from penjing.quantize import Static
from penjing.quantize.masking import REASON, before_softmax
from penjing.quantize.placement import place
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task

LENGTH, WIDTH, HEADS = 8, 16, 2
RUNTIMES = ("onnxruntime", "openvino")
SMALLEST = torch.finfo(torch.float32).min
NUMBERS = {"minus ten thousand": -1e4, "smallest number": SMALLEST, "minus infinity": -math.inf}


def decibels(reference, got):
    reference, got = np.asarray(reference, np.float64), np.asarray(got, np.float64)
    assert reference.shape == got.shape and np.isfinite(got).all()
    return 10 * math.log10((reference**2).sum() / max(((reference - got) ** 2).sum(), 1e-30))


@pytest.fixture(scope="module")
def captures():
    """Networks by name, captured once for all runtimes."""
    return {}


def assert_costs_nothing(captures, name, forms, data, runtime, folder, source=28.0, planned=30.0):
    """Quantize, export and run; every output is compared with torch's and with the plan's, on another batch size."""
    task = Task(example=data(2), calibration=[data(8 + i) for i in range(3)])
    if name not in captures:
        net = Several(forms).eval()
        captures[name] = net, capture_network(net, *task.call(), task.dynamic)
    net, captured = captures[name]
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    draft = Static()(Draft(captured), Context(task=task, capabilities=capabilities, source=captured))
    outputs = [name for name, _ in net.forms]
    structure = {"kind": "tuple", "items": [{"kind": "tensor"}] * len(outputs)}
    building.build(draft, runtime, "int8", task, structure, folder)
    args = data(5)
    with torch.no_grad():
        references = [flatten_outputs(network(*args))[0] for network in (net, insert(draft.network, draft.plan))]
    got = isolated.open_artifact(folder, 1).run([x.numpy() for x in args])
    for name, of_source, of_plan, output in zip(outputs, *references, got, strict=True):
        assert decibels(of_source, output) > source, name
        assert decibels(of_plan, output) > planned, name
    return draft


class Heads(nn.Module):
    """Attention written out; `hide` masks the scores (batch, head, l, l)."""

    def __init__(self, hide, **buffers):
        super().__init__()
        self.o, self.hide = nn.Linear(WIDTH, 5), hide
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x, parts, mask):
        q, k, v = parts
        weights = self.hide(self, q @ k.transpose(-1, -2) / 8**0.5, mask).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(x.shape))


class Together(nn.Module):
    """`scaled_dot_product_attention` in the place of the operators; `hide` makes its mask."""

    def __init__(self, hide, **settings):
        super().__init__()
        self.o, self.hide, self.settings = nn.Linear(WIDTH, 5), hide, settings

    def forward(self, x, parts, mask):
        values = attention(*parts, attn_mask=self.hide(self, mask), **self.settings)
        return self.o(values.transpose(1, 2).reshape(x.shape))


class Torchs(nn.Module):
    """`nn.MultiheadAttention` with both masks, of numbers or of truths as `mask` is."""

    def __init__(self, mask):
        super().__init__()
        self.a, self.o = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, 5)
        self.register_buffer("mask", mask)

    def forward(self, x, parts, mask):
        pad = ~mask[:, 0, 0]
        if self.mask.dtype != torch.bool:
            pad = torch.zeros(pad.shape).masked_fill(pad, -math.inf)
        return self.o(self.a(x, x, x, key_padding_mask=pad, attn_mask=self.mask, need_weights=False)[0])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
        self.t = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x, parts, mask):
        pad = ~mask[:, 0, 0]
        return self.t(x, src_key_padding_mask=pad).masked_fill(pad[..., None], 0.0)


class Several(nn.Module):
    """An attention for every form of the mask, each with an output of its own.

    All read the same queries, keys and values, with weights large enough to choose.
    """

    def __init__(self, forms):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.q = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.e.weight.data *= 3
        self.forms = [(name, make()) for name, make in forms.items()]
        self.nets = nn.ModuleList(net for _, net in self.forms)

    def forward(self, ids, mask):
        x = self.e(ids)
        width = (ids.shape[0], LENGTH, HEADS, WIDTH // HEADS)
        parts = [part.reshape(width).transpose(1, 2) for part in self.q(x).chunk(3, -1)]
        return [net(x, parts, mask) for net in self.nets]


def ids(n):
    return torch.randint(0, 50, (n, LENGTH), generator=torch.Generator().manual_seed(n))


def seen(n):
    """Which keys are seen, (n, 1, 1, length): the rest is padding, of another length in every sample."""
    return (torch.arange(LENGTH) < LENGTH - torch.arange(n)[:, None] % 5)[:, None, None]


def boolean(n):
    return ids(n), seen(n)


def causal(number):
    return torch.triu(torch.full((LENGTH, LENGTH), number), 1)


def bias():
    return torch.randn(HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3))


def eager(number):
    """Every way to write a mask of this number, from a boolean one (batch, 1, 1, length) or from none."""
    forms = {
        "made in forward": lambda: Heads(lambda m, s, mask: s + causal(number)),
        "buffer": lambda: Heads(lambda m, s, mask: s + m.mask, mask=causal(number)),
        "filled": lambda: Heads(lambda m, s, mask: s.masked_fill(~mask, number)),
        "where": lambda: Heads(lambda m, s, mask: torch.where(mask, s, number)),
        "added where": lambda: Heads(lambda m, s, mask: s + torch.where(mask, 0.0, number)),
        "behind a bias and a reshape": lambda: Heads(
            lambda m, s, mask: ((s + m.bias).flatten(0, 1) + m.mask).unflatten(0, (-1, HEADS)),
            bias=bias(),
            mask=causal(number),
        ),
    }
    if number > -math.inf:  # infinity times zero is not a number
        forms |= {
            "arithmetic": lambda: Heads(lambda m, s, mask: s + (1 - mask.float()) * number),
            "two masks": lambda: Heads(
                lambda m, s, mask: s + ((1 - mask.float()) * number + m.mask).clamp(min=number), mask=causal(number)
            ),
            "times the mask": lambda: Heads(lambda m, s, mask: s * mask.float() - abs(number) * (1 - mask.float())),
        }
    return forms


FUSED = {
    "causal": lambda: Together(lambda m, mask: None, is_causal=True),
    "boolean": lambda: Together(lambda m, mask: mask),
    "smallest number": lambda: Together(lambda m, mask: torch.zeros(mask.shape).masked_fill(~mask, SMALLEST)),
    "minus infinity": lambda: Together(lambda m, mask: torch.zeros(mask.shape).masked_fill(~mask, -math.inf)),
    "minus infinity in torch's module": lambda: Torchs(causal(-math.inf)),
    "boolean in torch's module": lambda: Torchs(causal(1.0) > 0),
    "padding in torch's encoder": lambda: Encoder(),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_a_mask_of_any_number_costs_nothing_that_is_seen(captures, number, runtime, tmp_path):
    assert_costs_nothing(captures, number, eager(number), boolean, runtime, tmp_path)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_mask_of_torchs_own_attention(captures, runtime, tmp_path):
    assert_costs_nothing(captures, "fused", FUSED, boolean, runtime, tmp_path)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("number", [-1e4, SMALLEST], ids=["minus ten thousand", "smallest number"])
def test_a_mask_of_numbers_as_an_input(captures, number, runtime, tmp_path):
    """Eager and in torch's own attention; the calibration data holds the padding."""
    forms = {
        "eager": lambda: Heads(lambda m, s, mask: s + mask),
        "behind a bias": lambda: Heads(lambda m, s, mask: s + m.bias + mask, bias=bias()),
        "torch's": lambda: Together(lambda m, mask: mask),
    }
    assert_costs_nothing(
        captures,
        f"input {number}",
        forms,
        lambda n: (ids(n), torch.zeros(n, 1, 1, LENGTH).masked_fill(~seen(n), number)),
        runtime,
        tmp_path,
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_rows_that_see_nothing_stay_zeros(captures, runtime, tmp_path):
    """A whole row is hidden: torch gives zeros for it, and so do plan and artifact."""

    def nothing(n):
        mask = seen(n).expand(n, 1, LENGTH, LENGTH).clone()
        mask[0, 0, 2] = False
        return ids(n), mask

    forms = {"hidden rows": lambda: Together(lambda m, mask: mask)}
    assert_costs_nothing(captures, "hidden rows", forms, nothing, runtime, tmp_path)


def test_products_before_and_behind_the_softmax_stay_integers_and_the_addition_does_not():
    network = capture_network(Several({"buffer": eager(-1e4)["buffer"]}).eval(), boolean(2))
    capabilities = runtimes.get("onnxruntime").capabilities(measure.machine(1).instruction_sets)
    placement = place(network, capabilities, {})
    assert placement.floats == {"nets.0/add#0": REASON}
    assert {f"nets.0/matmul#{i}:in{j}" for i in range(2) for j in range(2)} <= set(placement.edges)
    assert not any(edge.startswith(("nets.0/add#0", "nets.0/softmax#0")) for edge in placement.edges)


def test_what_does_not_lead_to_a_softmax_keeps_its_integers():
    """A residual addition before a linear layer with a softmax behind it is no mask."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(x + self.a(x)).softmax(-1)

    network = capture_network(Residual(), (torch.zeros(2, 8),))
    assert before_softmax(network) == {}
    assert {"/add#0:in0", "/add#0:in1"} <= set(place(network, GENERIC, {}).edges)


def test_every_sum_on_the_way_is_told():
    network = capture_network(Several({"sums": eager(-1e4)["behind a bias and a reshape"]}).eval(), boolean(2))
    told = {site(n) for n in network.graph.nodes if n.name in before_softmax(network) and kind(network, n) == "add"}
    assert told == {"nets.0/add#0", "nets.0/add#1"} and told <= set(sites(network))


class MaskedMaximum(nn.Module):
    """The largest of every feature over the tokens that are not padding."""

    def __init__(self, fill):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.head, self.fill = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 4), fill

    def forward(self, ids):
        hidden = torch.relu(self.up(self.table(ids)))
        return self.head(self.fill(hidden, (ids < 5)[..., None]).amax(1))


FILLS = {
    "number": lambda h, hidden: h.masked_fill(hidden, -1e9),
    "tensor": lambda h, hidden: torch.where(hidden, torch.tensor(-1e4), h),
    "smallest": lambda h, hidden: torch.where(hidden, torch.finfo(torch.float32).min, h),
}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("fill", FILLS)
def test_a_maximum_over_what_is_not_masked_keeps_its_values(runtime, fill):
    network = capture_network(MaskedMaximum(FILLS[fill]).eval(), (torch.zeros(2, 8, dtype=torch.long),))
    data = [torch.randint(0, 50, (16, 8), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    draft = Static()(
        Draft(network), Context(task=Task(example=data[0], calibration=data[:3]), capabilities=capabilities)
    )
    with torch.no_grad():
        reference, given = network(data[3]), insert(draft.network, draft.plan)(data[3])
    assert 10 * torch.log10(reference.square().mean() / (reference - given).square().mean()) > 25
    assert "up:in0" in draft.plan.entries
