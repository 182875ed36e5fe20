"""Percentile clipping against a slow reference, and what it must leave alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import penjing as pj
from penjing.errors import RecipeError
from penjing.network.capture import capture_network
from penjing.quantize import QAT, Static, WeightClipping
from penjing.quantize.weight_clipping import limits
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import fold_batch_norms, insert
from penjing.tasks.task import Task
from tests.raises import raises_case, raises_setting


def clipped(model, x, percentile):
    """(network before, network after, events)."""
    task, events = Task(example=x[:2], calibration=[x]), []
    source = capture_network(model.eval(), (x[:2],))
    context = Context(task=task, source=source, events=lambda kind, **values: events.append((kind, values)))
    return source, WeightClipping(percentile=percentile)(Draft(source), context).network, events


def reference(row, percentile):
    values = sorted(abs(w) for w in row if w != 0)
    if not values:
        return 0.0
    rank = next(k for k in range(1, len(values) + 1) if 1000 * k >= round(10 * percentile) * len(values))
    return values[rank - 1]


@given(
    seed=st.integers(0, 10**6), percentile=st.integers(500, 1000).map(lambda tenths: tenths / 10), zeros=st.floats(0, 1)
)
def test_limits(seed, percentile, zeros):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 17, generator=generator) * (torch.rand(3, 17, generator=generator) >= zeros)
    expected = [reference(row, percentile) for row in rows.tolist()]
    assert limits(rows.abs(), percentile).flatten().tolist() == pytest.approx(expected)


def test_99_9_percent_of_a_thousand_are_999():
    assert float(limits(torch.arange(1.0, 1001)[None], 99.9)) == 999
    assert float(limits(torch.arange(1.0, 101)[None], 99.9)) == 100  # none lies beyond


LAYERS = {
    "linear": (nn.Linear(40, 3), (4, 40), lambda w: w),
    "conv": (nn.Conv2d(8, 6, 3, groups=2), (2, 8, 5, 5), lambda w: w.flatten(1)),
    "conv_transpose": (nn.ConvTranspose2d(8, 6, 3), (2, 8, 5, 5), lambda w: w.transpose(0, 1).flatten(1)),
    "grouped conv_transpose": (
        nn.ConvTranspose1d(8, 6, 5, groups=2), (2, 8, 5),
        lambda w: torch.cat([part.transpose(0, 1).flatten(1) for part in w.split(4)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_output_channel_by_itself(name):
    torch.manual_seed(0)
    layer, shape, rows = LAYERS[name]
    before, after, events = clipped(nn.Sequential(layer), torch.randn(shape), 80)
    old, new = (rows(n.get_parameter("0.weight").detach()) for n in (before, after))
    for was, now in zip(old.tolist(), new.tolist(), strict=True):
        limit = reference(was, 80)
        assert now == pytest.approx([math.copysign(min(abs(w), limit), w) for w in was])
        assert sum(a != b for a, b in zip(was, now, strict=True)) == len(was) - math.ceil(0.8 * len(was))
    assert torch.equal(before.get_parameter("0.bias"), after.get_parameter("0.bias"))
    assert events == [("covered", {"step": "WeightClipping", "layers": 1, "total": 1})]


def test_zeros_stay_and_no_channel_becomes_empty():
    torch.manual_seed(0)
    layer = nn.Linear(50, 3)
    with torch.no_grad():
        layer.weight[0, 1:] = 0  # 98 % zeros: their percentile would be 0
        layer.weight[1] = 0
    before, after, _ = clipped(nn.Sequential(layer), torch.randn(4, 50), 50)
    old, new = before.get_parameter("0.weight"), after.get_parameter("0.weight")
    assert torch.equal(old[:2], new[:2]) and not torch.equal(old[2], new[2])
    assert torch.equal(old == 0, new == 0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(30, 20), nn.Linear(20, 20), nn.Linear(20, 30)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.hidden(self.embedding(x)))


def test_a_weight_that_something_else_reads_stays():
    torch.manual_seed(0)
    before, after, _ = clipped(Tied(), torch.randint(0, 30, (8, 4)), 60)
    assert torch.equal(before.get_parameter("embedding.weight"), after.get_parameter("embedding.weight"))
    assert not torch.equal(before.get_parameter("hidden.weight"), after.get_parameter("hidden.weight"))


def test_batch_norms_need_not_be_folded_before():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.running_var.uniform_(0.1, 9)
    nn.init.uniform_(norm.weight, -2, 2)
    x = torch.randn(4, 3, 8, 8)
    source, after, _ = clipped(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU()), x, 90)
    fold_batch_norms(source)
    folded = WeightClipping(percentile=90)(Draft(source), Context(task=Task(example=x[:2]))).network
    with torch.no_grad():
        torch.testing.assert_close(folded(x), after(x), rtol=1e-4, atol=1e-5)


def test_outliers_among_the_weights_cost_less_in_4_bits():
    torch.manual_seed(0)
    layer = nn.Linear(400, 16)
    with torch.no_grad():
        layer.weight[:, 7] *= 12  # of an input that is hardly ever there
    x = torch.randn(128, 400)
    x[:, 7] *= 0.01
    task = Task(example=x[:2], calibration=[x])
    source = capture_network(nn.Sequential(layer).eval(), (x[:2],))
    context = Context(task=task, source=source)

    def noise(*steps):
        draft = Draft(source)
        for step in (*steps, Static(weight_bits=4, weight_range="minmax")):
            draft = step(draft, context)
        with torch.no_grad():
            return float((insert(draft.network, draft.plan)(x) - source(x)).square().mean())

    assert noise(WeightClipping(percentile=99.0)) < 0.1 * noise()


def test_floating_point_artifacts_go_without_it(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 60)
    network = nn.Sequential(nn.Linear(60, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    task = pj.Task(example=x[:2], calibration=[x])
    recipe = pj.Recipe(WeightClipping(percentile=60), Static())
    run = pj.compress(
        network,
        task,
        "minimize size_bytes",
        runtime="onnxruntime",
        recipe=recipe,
        out=tmp_path / "run",
        seconds=0.05,
        threads=1,
    )
    beside_source = {c.precision: c.parity[1].rows[0].snr_db for c in run.record.candidates}
    assert beside_source["fp32"] > 120 and beside_source["int8"] < 20
    assert all(c.parity[0].rows[0].snr_db > 60 for c in run.record.candidates if c.precision in ("fp32", "int8"))


def test_where_it_stands_in_a_recipe():
    pj.Recipe(WeightClipping(percentile=99.5), Static(), QAT())
    with raises_case(RecipeError, "order"):
        pj.Recipe(Static(), WeightClipping())


@pytest.mark.parametrize("percentile", [0.999, 0, 101, -1, math.nan, "most"])
def test_percentiles_that_make_no_sense(percentile):
    with raises_setting("percentile"):
        WeightClipping(percentile=percentile)
