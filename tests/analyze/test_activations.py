"""Memory of activations by hand: in place, views, several results, branches in a bad order, 8 bits a value."""

import json

import torch
import torch.nn.functional as F
from torch import nn

from penjing import cli
from penjing.analyze.activations import activations
from penjing.analyze.cost import peak_activation_bytes
from penjing.network.capture import capture_network
from penjing.tasks.task import Task


def of(network, *shape, **more):
    task = Task(example=torch.zeros(*shape))
    captured = capture_network(network.eval(), *task.call())
    return activations(captured, task.call(), **more), captured, task


class Wide(nn.Module):
    """Four branches that are first all widened, and then all narrowed."""

    def __init__(self):
        super().__init__()
        self.wide = nn.ModuleList(nn.Conv2d(1, 16, 3, padding=1) for _ in range(4))
        self.narrow = nn.ModuleList(nn.Conv2d(16, 1, 1) for _ in range(4))

    def forward(self, x):
        middle = [F.relu(wide(x)) for wide in self.wide]
        return torch.cat([narrow(one) for narrow, one in zip(self.narrow, middle, strict=True)], 1)


def test_branches_are_reordered():
    best, network, task = of(Wide(), 1, 1, 8, 8)
    value = 8 * 8 * 4
    assert best.graph_bytes == (4 * 16 + 1) * value  # all four are wide at once; the last is narrowed from there
    assert best.size_bytes == (16 + 1 + 3) * value and best.proved
    assert peak_activation_bytes(network, task.call()) >= best.graph_bytes
    assert best.site in best.order and sum(best.alive.values()) == best.size_bytes
    assert sorted(best.order) == sorted(set(best.order)) and len(best.order) == 13


def test_elementwise_operators_are_in_place_and_others_are_not():
    best, _, _ = of(nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Sigmoid(), nn.Linear(10, 4)), 1, 10)
    assert best.size_bytes == 2 * 10 * 4
    best, _, _ = of(nn.Sequential(nn.Linear(10, 10), nn.Softmax(1)), 1, 10)
    assert best.size_bytes == 2 * 10 * 4


def test_what_is_read_later_is_not_overwritten():
    class Residual(nn.Module):
        def forward(self, x):
            return F.relu(x) + x

    best, _, _ = of(Residual(), 1, 10)
    assert best.size_bytes == 2 * 10 * 4


def test_a_value_that_is_read_twice_in_another_order_is_not_overwritten():
    class Turned(nn.Module):
        def forward(self, x):
            y = torch.tanh(x)
            return y + y.transpose(1, 2)

    best, _, _ = of(Turned(), 1, 8, 8)
    assert best.size_bytes == 2 * 64 * 4


def test_views_and_several_results_take_no_room_twice():
    class Parts(nn.Module):
        def forward(self, x):
            a, b = x.flatten(1).chunk(2, 1)
            return torch.cat([F.softmax(a, 1), F.softmax(b, 1)], 1)

    best, _, _ = of(Parts(), 1, 2, 4)
    assert best.size_bytes == (8 + 8) * 4  # the input and both halves; then both halves and their concatenation


def test_one_byte_for_a_value_but_not_where_it_stays_wide():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    narrow, captured, _ = of(network, 1, 1, 8, 8, element_bytes=1)
    assert narrow.size_bytes == (4 + 4) * 64
    some, _, _ = of(network, 1, 1, 8, 8, element_bytes=1, wide=["1"])
    assert some.size_bytes == (4 + 4 * 4) * 64


def test_a_batch_counts_as_one_sample():
    one, _, _ = of(Wide(), 1, 1, 8, 8)
    many, _, _ = of(Wide(), 5, 1, 8, 8)
    assert one.size_bytes == many.size_bytes


def test_inspect_shows_both_orders(digits_source, capsys):
    assert cli.main(["inspect", digits_source, "--shape", "1,8,8"]) == 0
    shown = capsys.readouterr().out
    assert "in the order that needs least (no order needs less)" in shown
    assert cli.main(["inspect", digits_source, "--shape", "1,8,8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    best, narrow = data["activations"], data["int8_activations"]
    assert narrow["size_bytes"] * 4 == best["size_bytes"] <= best["graph_bytes"] <= data["peak_activation_bytes"]
