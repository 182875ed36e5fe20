"""What a draft costs in each unit, and that a latency needs a runtime."""

import pytest
import torch
from torch import nn

from penjing.analyze import meter
from penjing.errors import PruningError
from penjing.network.capture import capture_network
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task


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
    with pytest.raises(PruningError):
        meter.latency_left(Context(task=task), "fp32")
