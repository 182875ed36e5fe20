"""Of recurrent matrices and bare tables, too, it is told why they are not prunable."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penjing.analyze.coupling import couple
from penjing.network.capture import capture_network
from tests.analyze.listed import assert_every_weight_is_listed


class Stuck(nn.Module):
    """Parts around a forward that is written in the test."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def table(*sizes):
    return nn.Parameter(torch.randn(*sizes))


def matrices(word, layers=1, sides=("",)):
    return {f"cells.weight_{of}_l{n}{side}:0": word for of in ("ih", "hh") for n in range(layers) for side in sides}


STUCK = {  # forward, parts, and what the reasons name
    "an LSTM that is the output": (
        lambda m, x: m.cells(x)[0],
        {"cells": nn.LSTM(6, 8, batch_first=True)},
        matrices("output"),
    ),
    "an LSTM behind a layer": (
        lambda m, x: m.cells(m.up(x))[0],
        {"up": nn.Linear(6, 5), "cells": nn.LSTM(5, 8, 2, bidirectional=True, batch_first=True)},
        matrices("output", 2, ("", "_reverse")),
    ),
    "a GRU beside its input": (
        lambda m, x: m.head(x + m.cells(x)[0]),
        {"cells": nn.GRU(6, 6, batch_first=True), "head": nn.Linear(6, 3)},
        matrices("/add#0"),
    ),
    "rows of a table": (lambda m, x: m.rows[x.argmax(-1)], {"rows": table(6, 8)}, {"rows:1": "output"}),
    "a table that is added": (
        lambda m, x: m.head(x + m.places),
        {"places": table(5, 6), "head": nn.Linear(6, 3)},
        {"places:1": "/add#0"},
    ),
    "queries": (
        lambda m, x: F.scaled_dot_product_attention(m.queries.expand(x.shape[0], -1, -1), x, x),
        {"queries": table(4, 6)},
        {"queries:1": "/scaled_dot_product_attention#0"},
    ),
    "centres": (lambda m, x: torch.cdist(x, m.centres), {"centres": table(7, 6)}, {"centres:1": "/sub#0"}),
    "a norm of two axes": (lambda m, x: m.norm(x), {"norm": nn.LayerNorm((5, 6))}, {"norm.weight:0": "norm"}),
}


@pytest.mark.parametrize("name", STUCK)
def test_a_weight_that_no_group_holds_is_listed_with_its_reason(name):
    forward, parts, reasons = STUCK[name]
    x = torch.randn(2, 5, 6)
    network = capture_network(Stuck(forward, **parts).eval(), (x,))
    coupling = couple(network, ((x,), {}))
    assert_every_weight_is_listed(network, coupling)
    for where, word in reasons.items():
        assert word in coupling.not_prunable[where]
        assert where.rpartition(":")[0] not in {
            m.tensor for group in coupling.groups.values() for m in group.members if m.axis == int(where[-1])
        }


@pytest.mark.parametrize(
    "cells", [nn.LSTM(6, 8, batch_first=True), nn.GRU(6, 8, batch_first=True)], ids=["LSTM", "GRU"]
)
def test_recurrent_matrices_that_a_group_holds_are_not_listed(cells):
    x = torch.randn(2, 5, 6)
    network = capture_network(Stuck(lambda m, x: m.head(m.cells(x)[0]), cells=cells, head=nn.Linear(8, 3)).eval(), (x,))
    coupling = couple(network, ((x,), {}))
    assert_every_weight_is_listed(network, coupling)
    assert {where.partition(".")[0] for where in coupling.not_prunable} == {"head"}
