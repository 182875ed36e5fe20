"""What a draft costs in each unit, and that a latency needs a runtime."""

import pytest
import torch
from torch import nn

from penjing.analyze import meter
from penjing.analyze.coupling import couple
from penjing.errors import PruningError
from penjing.network.capture import capture_network
from penjing.prune.channels import remove
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task
from tests.raises import raises_case


@pytest.fixture(scope="module")
def network():
    return capture_network(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), (torch.zeros(2, 4),))


@pytest.mark.parametrize(
    ("unit", "expected"),
    # The count of batches in a norm is one number of 8 bytes.
    [("macs", 4 * 3), ("params", 4 * 3 + 3 + 2 * 3), ("size", 4 * (4 * 3 + 3 + 4 * 3) + 8)],
)
def test_amounts(network, unit, expected):
    assert meter.amount(unit, network, ((torch.zeros(2, 4),), {})) == expected


def test_a_latency_is_a_part_of_the_first_drafts(network):
    task, draft = Task(example=torch.zeros(2, 4)), Draft(network)
    asked = []

    def measured(drafts, precision):
        asked.append(precision)
        return [4.0, 1.0]

    assert meter.latency_left(Context(task=task, latency=measured), "int8")(draft, draft) == 0.25 and asked == ["int8"]
    with raises_case(PruningError, "no-runtime"):
        meter.latency_left(Context(task=task), "fp32")


class Chain(nn.Module):
    """Convolutions, a norm, a grouped convolution and a linear layer that reads several numbers of a channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1, bias=False)
        self.wide = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x):
        x = self.grouped(self.norm(self.stem(x)).relu()).relu()
        return self.head(self.wide(x).relu().flatten(1))


@pytest.fixture(scope="module")
def chain():
    call = ((torch.zeros(2, 3, 2, 2),), {})
    network = capture_network(Chain().eval(), *call)
    return network, call, couple(network, call)


def test_what_is_left_is_what_the_smaller_network_costs(chain):
    network, call, coupling = chain
    for unit in ("macs", "params", "size"):
        for name, group in coupling.groups.items():
            removed = {name: list(range(group.units // 2))}
            sizes = coupling.sizes(coupling.removed_atoms(removed))
            smaller = remove(Draft(network), coupling, removed).network
            samples = 2 if unit == "macs" else 1  # values have the example's batch
            assert meter.resized_amount(unit, network, *sizes) == samples * meter.amount(unit, smaller, call)
    left = meter.fraction_left(lambda amount: amount, 8.0)
    assert left(2.0) == 0.25 and meter.fraction_left(lambda amount: amount, 0.0)(0.0) == 0


def test_a_unit_of_a_group_costs_what_its_tensors_do(chain):
    network, call, coupling = chain
    wide = next(name for name, group in coupling.groups.items() if any(m.tensor == "wide.bias" for m in group.members))
    # One channel of twelve: a row and a bias of the convolution, and four columns of the linear layer.
    assert meter.group_prices("params", network, coupling, call)[wide] == pytest.approx(8 + 1 + 4 * 5)
    macs = 8 * 12 * 4 + 48 * 5  # of both layers, of which a twelfth goes
    for unit in ("macs", "latency"):
        assert meter.group_prices(unit, network, coupling, call)[wide] == pytest.approx(macs / 12)
    assert set(meter.group_prices("channels", network, coupling, call).values()) == {1.0}


def test_a_part_costs_what_its_layers_do(chain):
    network, call, _ = chain
    parts = {"first": ("stem", "norm"), "last": ("head",), "norms": ("norm",)}
    expected = {
        "macs": [3 * 8 * 9 * 4, 48 * 5, 1.0], "params": [3 * 8 * 9 + 8 + 16, 48 * 5 + 5, 16], "blocks": [1, 1, 1],
    }  # fmt: skip
    expected |= {"latency": expected["macs"], "size": expected["params"]}
    for unit, prices in expected.items():
        assert list(meter.part_prices(unit, network, parts, call).values()) == prices
