import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention

from penjing import measure, runtimes
from penjing.network.capture import capture_network
from penjing.network.graph import kind, sites
from penjing.pipeline import building
from penjing.quantize import Static
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import attention as surgery_attention
from penjing.surgery import insert, replay, unfold_attentions
from penjing.tasks.task import Task

SITE = "/scaled_dot_product_attention#0"


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, q, k, v, mask=None):
        return attention(q, k, v, attn_mask=mask, **self.settings)


def masks():
    visible = torch.rand(2, 1, 5, 7) < 0.6
    visible[0, 0, 2] = False  # a row that sees nothing
    numbers = torch.randn(2, 1, 5, 7)
    return {
        "none": None,
        "bool": visible,
        "float": numbers,
        "minus infinity": numbers.masked_fill(~visible, -math.inf),
        "lowest number": numbers.masked_fill(~visible, torch.finfo(torch.float32).min),
    }


def call(mask):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 6)
    return (q, k, v) if mask is None else (q, k, v, mask)


@pytest.mark.parametrize("word", masks())
@pytest.mark.parametrize("settings", [{}, {"scale": 0.3}], ids=["own scale", "given scale"])
def test_an_unfolded_attention_computes_what_torch_computes(word, settings):
    torch.manual_seed(1)
    args = call(masks()[word])
    network = capture_network(Attention(**settings).eval(), args, {})
    reference = network(*args)
    edits = unfold_attentions(network)
    assert edits == ({"edit": "unfold_attention", "site": SITE},)
    assert "attention" not in {kind(network, n) for n in network.graph.nodes}
    assert {f"{SITE}.{w}" for w in ("scores", "softmax", "values")} <= set(sites(network))
    torch.testing.assert_close(network(*args), reference, rtol=1e-5, atol=1e-6)


def test_a_causal_one_too_at_any_length():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 8) for _ in range(3))
    axes = {i: {0: "batch", 2: "length"} for i in range(3)}
    network = capture_network(Attention(is_causal=True).eval(), (q, k, v), {}, axes)
    unfold_attentions(network)
    for length in (6, 1, 11):
        q, k, v = (torch.randn(4, 3, length, 8) for _ in range(3))
        torch.testing.assert_close(network(q, k, v), attention(q, k, v, is_causal=True), rtol=1e-5, atol=1e-6)


def test_what_is_kept_and_what_is_not_plain_stays():
    args = call(None)
    network = capture_network(Attention().eval(), args, {})
    assert unfold_attentions(network, {SITE}) == () and SITE in sites(network)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    shared = capture_network(Attention(enable_gqa=True).eval(), (q, k, v), {})
    assert unfold_attentions(shared) == ()


def test_the_edit_can_be_replayed():
    args = call(masks()["bool"])
    network = capture_network(Attention().eval(), args, {})
    fresh = capture_network(Attention().eval(), args, {})
    edits = unfold_attentions(network)
    again = replay(fresh, edits)
    assert list(sites(again)) == list(sites(network))
    assert torch.equal(again(*args), network(*args))


class Block(nn.Module):
    """Self-attention with a mask of positions and a linear layer on each side; (batch, 8, 64)."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        visible = torch.ones(8, 8, dtype=torch.bool).tril()
        return self.out(attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("word", masks())
@pytest.mark.parametrize("settings", [{}, {"enable_gqa": True}], ids=["own keys", "shared keys"])
def test_a_row_that_sees_nothing_is_zero_in_floating_point_files_too(tmp_path, runtime, word, settings):
    q, k, v, *mask = call(masks()[word])
    args = (q, k[:, :1], v[:, :1], *mask) if settings else (q, k, v, *mask)
    network = capture_network(Attention(**settings).eval(), args, {})
    task = Task(example=args)
    manifest = building.build(Draft(network), runtime, "fp32", task, {"kind": "tensor"}, tmp_path)
    session = isolated.open_artifact(tmp_path, 1)
    visible = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.3
    visible[1, 0, 4] = False
    if mask:
        hidden = {"bool": None, "float": -math.inf, "minus infinity": -math.inf, "lowest number": -3.4e38}[word]
        mask = [visible if hidden is None else torch.randn(2, 1, 5, 7).masked_fill(~visible, hidden)]
    args = (*args[:3], *mask)
    (got,) = session.run([x.numpy() for x in args])
    torch.testing.assert_close(torch.from_numpy(got), network(*args), rtol=1e-4, atol=1e-5)
    assert manifest.precision == "fp32"


def test_a_mask_that_no_input_has_a_part_in_costs_nothing():
    network = capture_network(Attention().eval(), call(None), {})
    assert surgery_attention.zero_hidden_rows(network) is network


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_both_products_run_on_integers(tmp_path, runtime):
    torch.manual_seed(0)
    data = torch.randn(64, 8, 64)
    task = Task(example=data[:2], calibration=[data])
    source = capture_network(Block().eval(), *task.call())
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    draft = Static()(Draft(source), Context(task=task, capabilities=capabilities))
    for port in ("in0", "in1"):
        spec = draft.plan.entries[f"{SITE}.scores:{port}"].spec
        assert spec.symmetric == capabilities.symmetric_products
    assert draft.plan.entries[f"{SITE}.values:in0"].spec.signed is False  # probabilities keep all eight bits
    manifest = building.build(draft, runtime, "int8", task, {"kind": "tensor"}, tmp_path)
    executed = {name: o.precision for o in runtimes.executed(tmp_path, manifest) for name in o.sites}
    assert executed[f"{SITE}.scores"] == "int8"
    (output,) = isolated.open_artifact(tmp_path, 1).run([data.numpy()])
    with torch.no_grad():
        simulated, exact = insert(draft.network, draft.plan)(data), source(data)
    noise = (simulated - exact).square().mean()
    assert noise < exact.square().mean() / 1000
    assert (torch.from_numpy(output) - simulated).square().mean() < noise / 4


def test_an_attention_can_be_left_out():
    data = torch.randn(4, 8, 64)
    task = Task(example=data[:2], calibration=[data])
    capabilities = runtimes.get("openvino").capabilities(("avx512_vnni",))
    source = capture_network(Block().eval(), *task.call())
    draft = Static(exclude=("*attention*",))(Draft(source), Context(task=task, capabilities=capabilities))
    assert draft.plan.floats[SITE] == "excluded by '*attention*'"
    assert not [edge for edge in draft.plan.entries if edge.startswith(SITE)]
