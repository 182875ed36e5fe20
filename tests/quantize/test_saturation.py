"""x86 without VNNI: two products of unsigned and signed bytes are added in 16 bits with saturation (vpmaddubsw).

The instruction is emulated, and a whole network is computed with it: weights of 8 bits lose, and those that a target
without VNNI gets lose nothing.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import cli, targets
from penjing.network.capture import capture_network
from penjing.network.graph import sites
from penjing.quantize import Static
from penjing.runtimes import onnxruntime
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.targets.narrowing import narrowed
from penjing.tasks.task import Task

LOW, HIGH = -(2**15), 2**15 - 1


def saturating(x, weight):
    """(n, k) unsigned bytes times (m, k) signed bytes, as vpmaddubsw and vpmaddwd add them; (n, m) integers."""
    k = x.shape[1] + x.shape[1] % 2
    x, weight = (np.pad(a, ((0, 0), (0, k - a.shape[1]))).astype(np.int64) for a in (x, weight))
    pairs = (x[:, None] * weight[None]).reshape(len(x), len(weight), k // 2, 2).sum(3)
    return pairs.clip(LOW, HIGH).sum(2)


def exact(x, weight):
    return x.astype(np.int64) @ weight.T.astype(np.int64)


def test_the_emulation_is_the_obvious_loop():
    chance = np.random.default_rng(0)
    x, weight = chance.integers(100, 256, (3, 7)), chance.integers(40, 128, (2, 7)) * [[1], [-1]]
    for n, m in itertools.product(range(3), range(2)):
        total = 0
        for k in range(0, 7, 2):
            pair = int(x[n, k]) * int(weight[m, k])
            pair += int(x[n, k + 1]) * int(weight[m, k + 1]) if k + 1 < 7 else 0
            total += max(LOW, min(HIGH, pair))
        assert saturating(x, weight)[n, m] == total
    assert (saturating(x, weight) != exact(x, weight)).any()


@pytest.mark.parametrize(("bits", "saturates"), [(8, True), (7, False)])
def test_the_largest_integers_of_seven_bits_fit_and_those_of_eight_do_not(bits, saturates):
    largest = 2 ** (bits - 1) - 1
    x = np.full((1, 64), 255)
    for weight in (np.full((1, 64), largest), np.full((1, 64), -largest)):
        assert (saturating(x, weight) != exact(x, weight)).any() == saturates


class Net(nn.Module):
    """Weights of one sign, so that neighbours add up."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 10)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.abs_().clamp_(min=float(layer.weight.max()) / 2)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def computed(draft, x, product):
    """The network's answers with every product computed in integers, by `product`."""

    def layer(name, module, value):
        entry, weight = draft.plan.entries[f"{name}:in0"], draft.plan.entries[f"{name}:weight"]
        low, high = entry.spec.limits
        q = (value / entry.scale[0]).round().add(entry.zero_point[0]).clamp(low, high)
        scale = torch.tensor(weight.scale).reshape(-1, *[1] * (module.weight.dim() - 1))
        w = (module.weight / scale).round().clamp(*weight.spec.limits).flatten(1)
        if module.weight.dim() == 4:
            padded = F.pad(q, (module.padding[0],) * 4, value=float(entry.zero_point[0]))
            rows = F.unfold(padded, module.kernel_size).transpose(1, 2)
        else:
            rows = q[:, None]
        flat = rows.reshape(-1, rows.shape[2]).detach().numpy().astype(np.int64)
        ints = product(flat, w.detach().numpy().astype(np.int64)) - entry.zero_point[0] * w.sum(1).numpy().astype(
            np.int64
        )
        y = torch.tensor(ints * entry.scale[0], dtype=torch.float32) * torch.tensor(weight.scale) + module.bias
        y = y.reshape(len(value), -1, len(w))
        return y.transpose(1, 2).reshape(len(value), -1, *value.shape[2:]) if module.weight.dim() == 4 else y[:, 0]

    class Integers(torch.fx.Interpreter):
        def call_module(self, target, args, kwargs):
            module = self.fetch_attr(target)
            return layer(target, module, args[0]) if f"{target}:weight" in draft.plan.entries else module(*args)

    with torch.no_grad():
        return Integers(draft.network).run(x, enable_io_processing=False)


def draft_for(capabilities):
    torch.manual_seed(1)
    batches = [torch.rand(16, 3, 8, 8)]
    task = Task(example=batches[0][:1], calibration=batches)
    network = capture_network(Net().eval(), *task.call())
    draft = Static()(Draft(network), Context(task=task, capabilities=capabilities, source=network))
    assert {f"{name}:weight" for name in ("first", "second", "head")} <= draft.plan.entries.keys()
    assert set(sites(draft.network)) >= {"first", "second", "head"}
    return draft, batches[0], network


def decibels(right, other):
    return float(10 * torch.log10((right**2).mean() / ((right - other) ** 2).mean()).detach())


def answers(draft, x, product):
    result = computed(draft, x, product)
    return result if isinstance(result, torch.Tensor) else result[0]


def test_a_plan_for_a_target_without_vnni_computes_the_same_there():
    target = targets.load("x86-avx2")
    draft, x, network = draft_for(narrowed(target, onnxruntime.capabilities(target.instruction_sets)))
    right = answers(draft, x, exact)
    assert torch.equal(right, answers(draft, x, saturating)) and decibels(network(x), right) > 30


def test_a_plan_with_eight_bits_does_not():
    draft, x, network = draft_for(onnxruntime.capabilities(("avx2", "avx512f", "avx512_vnni")))
    assert decibels(network(x), answers(draft, x, exact)) > 35
    assert decibels(network(x), answers(draft, x, saturating)) < 20


def test_inspect_says_so(digits_source, capsys):
    assert cli.main(["inspect", digits_source, "--shape", "1,8,8", "--target", "x86-avx2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("without VNNI, 8-bit products saturate in 16 bits: weights take 7 bits") == 1
