"""What optimizations before export gain: counted at capture, on the way to integers, and in the runtime's own graph."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from penjing.network.capture import capture_network
from penjing.pipeline import gains
from penjing.records import GainRow
from penjing.report import html, table
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC
from penjing.surgery import fold_batch_norms


class Wasteful(nn.Module):
    """A branch that nobody reads, a conversion to the type that is there, a weight computed from constants."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.unread = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.ones(5, 144))

    def forward(self, x):
        self.unread(x).relu().tanh()
        x = F.relu(self.norm(self.conv(x)).to(torch.float32))
        return F.linear(x.flatten(1), self.weight * 2 + 1)


def captured(network=None):
    example = (torch.zeros(1, 3, 8, 8),)
    return capture_network((network or Wasteful()).eval(), example), (example, {})


def by_name(rows):
    return {row.name: row for row in rows}


def test_what_was_removed_at_capture_is_counted():
    rows = by_name(gains.at_capture(captured()[0]))
    assert rows["conversions and copies removed"].operators == 1
    assert rows["dead branches removed"].operators == 3
    assert rows["constants folded"].operators == 2


def test_a_network_without_waste_has_no_rows():
    assert gains.at_capture(captured(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))[0]) == ()


def test_folding_and_fusion_are_told_before_anything_is_built():
    network, call = captured()
    rows = by_name(gains.before_export(network, call, [("mine", GENERIC)]))
    assert rows["batch norms folded"] == GainRow(name="batch norms folded", operators=1, parameters=4)  # a bias is new
    assert rows["activations fused by mine"].operators == 1
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())  # it is as it was


def test_an_activation_behind_a_norm_that_stays_is_not_fused():
    first = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    network, call = captured(first)
    assert gains.before_export(network, call, [("mine", GENERIC)]) == ()


def test_of_an_artifact_it_is_what_was_done():
    network, _ = captured()
    draft = Draft(network).copy()
    draft = dataclasses.replace(draft, edits=fold_batch_norms(draft.network))
    rows = by_name(gains.of_artifact(network, draft, (), "onnxruntime"))
    assert rows["batch norms folded"].parameters == 4
    assert sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in draft.network.parameters()) == 4


def test_the_record_and_the_report_of_a_run_say_it(digits_run):
    record = digits_run.record
    rows = by_name(record.chosen.gains)
    assert rows["batch norms folded"].operators == 1
    counted = record.source.parameters - record.chosen.measured.parameters
    assert rows["batch norms folded"].parameters == counted > 0
    assert rows[f"fused or removed by {record.chosen.runtime}"].operators >= 1  # relu
    assert "Optimized before export and in the runtime: " in html.render(record)


def test_a_line_for_every_row():
    rows = [GainRow(name="a", operators=-1), GainRow(name="b", operators=2, parameters=1_500, macs=3_000_000)]
    assert table.gains(rows) == ["a: 1 operator more", "b: 2 operators, 1.50 k parameters, 3.00 M MACs fewer"]
