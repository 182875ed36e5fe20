import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.analyze import lockstep
from penjing.analyze.gram import patches
from penjing.network.capture import capture_network
from penjing.numerics.grid import integers
from penjing.quantize import BiasCorrection, CoordinateRounding, Static
from penjing.quantize import coordinate_rounding as module_of
from penjing.quantize.coordinate_rounding import covariances, descend
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import freeze, insert
from penjing.tasks.task import Task
from tests.raises import raises_setting


class Small(nn.Module):
    """A residual network with depthwise and grouped convolutions and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding="same", groups=4, bias=False)
        self.wide = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 6)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.grouped(F.relu(self.depthwise(x))) + x)
        return self.head(F.relu(self.wide(x)).mean((2, 3)))


def smooth(samples, seed):
    """Images whose neighbours are alike, as those of the world are."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(samples, 3, 4, 4, generator=random)
    fine = F.interpolate(coarse, size=12, mode="bilinear")
    return fine + 0.1 * torch.randn(samples, 3, 12, 12, generator=random)


def source():
    torch.manual_seed(0)
    return Small().eval()


def quantized(bits):
    data = smooth(64, 1)
    task = Task(example=data[:2], calibration=list(data.split(16)))
    context = Context(task=task)
    network = capture_network(source(), *task.call())
    return Static(weight_bits=bits)(Draft(network), context), context


def noise(draft, data):
    with torch.no_grad():
        return float((insert(draft.network, draft.plan)(data) - source()(data)).square().mean())


@pytest.mark.parametrize("bits", [3, 4])
def test_the_noise_of_few_bits_falls_on_samples_that_it_was_not_shown(bits):
    plain, context = quantized(bits)
    unseen = smooth(64, 99)
    corrected = BiasCorrection()(plain, context)
    rounded = CoordinateRounding()(plain, context)
    static, mean, best = (noise(draft, unseen) for draft in (plain, corrected, rounded))
    assert best < 0.6 * mean
    assert best < 0.5 * static


def test_weights_lie_on_their_grids_and_freeze_to_the_same_integers():
    plain, context = quantized(4)
    rounded = CoordinateRounding(samples=16)(plain, context)
    frozen = freeze(rounded.network, rounded.plan)
    moved = 0
    for edge, entry in rounded.plan.entries.items():
        name, _, port = edge.rpartition(":")
        if port != "weight":
            continue
        weight = rounded.network.get_submodule(name).weight.detach()
        given = plain.network.get_submodule(name).weight.detach()
        scale, zero = torch.tensor(entry.scale), torch.tensor(entry.zero_point, dtype=torch.int32)
        assert torch.equal(lockstep.rounded(weight, entry), weight)
        q = integers(weight, scale, zero, entry.spec)
        assert torch.equal(q.to(torch.int8), frozen.get_buffer(f"integers.{name}.weight"))
        # Up or down: no weight goes further than to the other of its two neighbours.
        step = scale.reshape(-1, *[1] * (weight.dim() - 1))
        inside = (given / step).abs() < entry.spec.limits[1]
        assert float(((weight - given) / step).abs()[inside].max()) <= 1 + 1e-4
        moved += int((q != integers(given, scale, zero, entry.spec)).sum())
    assert moved > 0


def test_the_plan_and_layers_in_floating_point_stay_as_they_are():
    plain, context = quantized(4)
    without = Draft(plain.network, plain.plan.without({"wide": "a test"}), plain.edits)
    before = {k: v.clone() for k, v in plain.network.state_dict().items()}
    rounded = CoordinateRounding(samples=16)(without, context)
    assert rounded.plan == without.plan and rounded.edits == without.edits
    after = rounded.network.state_dict()
    assert torch.equal(after["wide.weight"], before["wide.weight"])
    assert not torch.equal(after["wide.bias"], before["wide.bias"])
    assert not torch.equal(after["stem.weight"], before["stem.weight"])


def test_where_nothing_is_quantized_nothing_is_rounded():
    plain, context = quantized(4)
    draft = Draft(plain.network)
    assert CoordinateRounding()(draft, context) is draft


@pytest.mark.parametrize(
    "settings",
    [{"samples": 0}, {"samples": True}, {"samples": 1.5}, {"samples": "64"}, {"sweeps": 0}, {"sweeps": -1},
     {"damping": -0.1}, {"damping": "much"}, {"damping": float("nan")}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings):
    with raises_setting(*settings):
        CoordinateRounding(**settings)


def test_covariances_equal_those_of_all_rows_together():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    x = [torch.randn(3, 4, 6, 6), torch.randn(2, 4, 6, 6)]
    replica = [a + 0.1 * torch.randn_like(a) for a in x]
    layer = lockstep.Layer("conv", "conv", conv, conv.weight, None, x, replica, [conv(a) for a in x])
    own, cross = covariances(layer)
    a, b = patches(conv, torch.cat(x)), patches(conv, torch.cat(replica))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    torch.testing.assert_close(own, b.transpose(1, 2) @ b / a.shape[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cross, a.transpose(1, 2) @ b / a.shape[1], atol=1e-5, rtol=1e-4)


def test_layers_without_such_a_form_are_left_to_the_nearest_rounding():
    for conv, shape in (
        (nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
        (nn.Conv2d(2, 3, 3, padding_mode="reflect", padding=1), (2, 6, 6)),
    ):
        x = [torch.randn(2, *shape)]
        assert covariances(lockstep.Layer("conv", "conv", conv, conv.weight, None, x, x, [])) is None


def objective(q, exact, steps, own, cross, damping):
    """The header's formula for one output channel; q (candidates, columns), the result (candidates,)."""
    ridge = damping * own.diagonal().mean()
    rounded, given = q * steps, exact * steps
    inner = ((rounded @ own) * rounded).sum(1) - 2 * (given @ cross * rounded).sum(1)
    return inner + ridge * (rounded - given).square().sum(1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_descent_comes_near_the_best_of_all_roundings(seed, damping):
    torch.manual_seed(seed)
    columns, out = 8, 24
    x = (torch.randn(400, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns))).double()
    replica = x + 0.05 * torch.randn_like(x)
    own, cross = replica.T @ replica / len(x), x.T @ replica / len(x)
    exact = 3 * torch.randn(1, out, columns).double()
    steps = torch.rand(1, out, 1).expand(1, out, columns).double() + 0.1
    nearest = exact.round().clamp(-7, 7)
    lowest, highest = exact.floor().clamp(-7, 7), exact.ceil().clamp(-7, 7)
    codes = descend(nearest, exact, steps, lowest, highest, own[None], cross[None], damping=damping, sweeps=20)
    assert torch.equal(codes, codes.round()) and (codes >= lowest).all() and (codes <= highest).all()
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=columns))).double()
    lost, gained = 0.0, 0.0
    for channel in range(out):
        rest = exact[0, channel], steps[0, channel], own, cross, damping
        low, high = lowest[0, channel], highest[0, channel]
        best = float(objective(low + every * (high - low), *rest).min())
        mine, before = objective(torch.stack([codes[0, channel], nearest[0, channel]]), *rest).tolist()
        assert best - 1e-6 <= mine <= before + 1e-6
        one_off = torch.where(torch.eye(columns, dtype=torch.bool), low + high - codes[0, channel], codes[0, channel])
        assert mine <= float(objective(one_off, *rest).min()) + 1e-6  # no single weight wants to go the other way
        lost, gained = lost + mine - best, gained + before - best
    assert lost <= 0.7 * gained  # of what the very best rounding gains; one weight at a time does not find it all


def test_where_columns_do_not_depend_on_each_other_the_nearest_integer_is_best():
    torch.manual_seed(0)
    exact = 3 * torch.randn(2, 5, 300)  # wider than a block
    own = torch.eye(300).expand(2, 300, 300)
    steps = torch.ones(2, 5, 300)
    start = exact.floor()
    codes = descend(start, exact, steps, exact.floor(), exact.ceil(), own, own, damping=0.0, sweeps=3)
    assert torch.equal(codes, exact.round())
    assert torch.equal(start, exact.floor())


def test_blocks_change_nothing_but_the_speed(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(500, 40) @ torch.randn(40, 40)
    own = (x.T @ x / len(x))[None]
    exact = 3 * torch.randn(1, 6, 40)
    steps = torch.ones_like(exact)
    rest = (exact, steps, exact.floor(), exact.ceil(), own, own)
    whole = descend(exact.round(), *rest, damping=0.01, sweeps=30)
    monkeypatch.setattr(module_of, "BLOCK", 7)
    assert torch.equal(descend(exact.round(), *rest, damping=0.01, sweeps=30), whole)
