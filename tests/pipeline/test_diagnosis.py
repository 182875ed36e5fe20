"""One tiny network for every kind of finding, on a machine whose balance is given; the expectations; a whole run."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.analyze.traffic import fake_quantized
from penjing.network.capture import capture_network
from penjing.pipeline import findings, machine_balance
from penjing.pipeline.diagnosis import compared, diagnose, prepared
from penjing.pipeline.refusals import Refusal
from penjing.records import Balance, from_dict
from penjing.report import expected
from penjing.steps.plan import GENERIC

SLOW_MEMORY = Balance(
    macs_per_s=1e12,
    rates={"fp32": 1.0, "fp16": 1.0, "bf16": 2.0, "int8": 4.0},
    values_per_s=1e9,
    weights_per_s=dict.fromkeys(("fp32", "fp16", "bf16", "int8"), 1e9),
    operator_s=1e-9,
    threads=1,
)
SLOW_ARITHMETIC = dataclasses.replace(
    SLOW_MEMORY, macs_per_s=1e9, values_per_s=1e12, weights_per_s=dict.fromkeys(SLOW_MEMORY.weights_per_s, 1e12)
)


def _ready(network, *shape):
    torch.manual_seed(0)
    call = ((torch.zeros(2, *shape),), {})
    return prepared(capture_network(network.eval(), *call), call, GENERIC)


def _kinds(ready, balance=SLOW_ARITHMETIC):
    return {finding.kind: finding for finding in findings.of_machine(ready, balance)}


def _convolutions(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8))


def test_a_layer_that_moves_more_than_it_multiplies():
    ready = _ready(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)), 256)
    finding = _kinds(ready, SLOW_MEMORY)["memory-bound"]
    assert finding.sites[0] == "0" and finding.operators == 2 and finding.bytes_share == pytest.approx(1.0)
    assert finding.bound > 100  # a byte takes a thousand times as long as a product, and each weight has one
    assert "memory-bound" not in _kinds(ready, SLOW_ARITHMETIC)


def test_depthwise_layers():
    ready = _ready(_convolutions(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1)), 3, 8, 8)
    finding = _kinds(ready)["depthwise"]
    assert finding.sites == ("1",) and 0 < finding.macs_share < 1
    assert finding.bound == pytest.approx(1 / (1 - finding.time_share))
    grouped = _ready(_convolutions(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=4)), 3, 8, 8)
    assert "depthwise" not in _kinds(grouped)


def test_operators_that_take_longer_to_start_than_to_compute():
    ready = _ready(nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(6))), 2, 4, 4)
    slow_start = dataclasses.replace(SLOW_ARITHMETIC, operator_s=1e-3)
    assert _kinds(ready, slow_start)["small-operators"].operators == 6
    assert "small-operators" not in _kinds(ready)


def test_channels_off_the_grid():
    network = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 16, 3))
    finding = _kinds(_ready(network, 3, 12, 12))["off-grid"]
    assert finding.sites == ("0",) and "not divisible by 8" in finding.words  # 9 channels are computed as 16
    assert "43.8 %" in finding.words
    assert "off-grid" not in _kinds(_ready(nn.Sequential(nn.Conv2d(3, 16, 3)), 3, 12, 12))


def test_zeros_that_nothing_skips():
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with torch.no_grad():
        network[0].weight[:, ::2] = 0
    finding = _kinds(_ready(network, 64))["idle-zeros"]
    assert finding.sites == ("0",) and "25.0 %" in finding.words and finding.bound == pytest.approx(4 / 3, rel=0.01)


class Island(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.two(torch.cumsum(self.one(x), dim=1))


def test_floats_between_integers():
    ready = _ready(Island(), 32)
    (finding,) = findings.of_runtime("mine", ready, SLOW_MEMORY)
    assert finding.kind == "float-island" and finding.sites == ("/cumsum#0",) and finding.runtime == "mine"
    assert "no integer kernel for cumsum" in finding.words and finding.bound > 1
    assert findings.of_runtime("mine", _ready(nn.Sequential(nn.Linear(32, 32)), 32), SLOW_MEMORY) == []


class Rounding(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return (self.fc(x) / 0.1).round().clamp(-128, 127) * 0.1


def test_fake_quantizers_that_the_source_still_holds():
    call = ((torch.zeros(2, 8),), {})
    network = capture_network(Rounding().eval(), *call)
    (finding,) = findings.rounded_already(fake_quantized(network))
    assert finding.kind == "fake-quantization" and finding.operators == 1
    assert fake_quantized(capture_network(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), *call)) == ()


def test_operators_that_a_runtime_refuses_come_first():
    refusal = Refusal(sites=("/det#0",), kind="linalg_det", where="", stage="open", reason="no such operator")
    call = ((torch.zeros(2, 32),), {})
    network = capture_network(Island().eval(), *call)
    ready = {"mine": prepared(network, call, GENERIC)}
    diagnosis = diagnose(network, ready, (), 1, here=False, refused={"mine": (refusal,)})
    assert expected.lines(diagnosis)[len(diagnosis.expectations)].startswith("blocked: mine can't take /det#0")


class Searching(nn.Module):
    def forward(self, x):
        return x + torch.searchsorted(torch.zeros(4), x)


def test_operators_without_an_onnx_form_are_named_before_anything_is_exported():
    call = ((torch.zeros(2, 8),), {})
    network = capture_network(Searching().eval(), *call)
    ready = {"onnxruntime": prepared(network, call, GENERIC)}
    (row,) = [row for row in diagnose(network, ready, (), 1, here=False).findings if row.kind == "blocked"]
    assert row.sites == ("/searchsorted#0",) and "aten.searchsorted" in row.words and row.bound is None


def test_what_is_expected_of_each_precision():
    capabilities = dataclasses.replace(GENERIC, precisions=("fp32", "bf16", "int8"))
    call = ((torch.zeros(2, 3, 16, 16),), {})
    network = capture_network(_convolutions(nn.Conv2d(3, 16, 3), nn.ReLU()).eval(), *call)
    rows = {
        row.precision: row
        for row in diagnose(network, {"mine": prepared(network, call, capabilities)}, ("avx512_vnni",), 1).expectations
    }
    assert 1 < rows["int8"].faster <= 4 and 3 < rows["int8"].smaller < 4  # biases stay
    assert rows["bf16"].smaller == 1.0 and rows["bf16"].faster < rows["int8"].faster  # its bytes alone are fewer here
    elsewhere = diagnose(network, {"mine": prepared(network, call, capabilities)}, (), 1, here=False)
    assert elsewhere.balance is None and all(row.faster is None for row in elsewhere.expectations)


def test_the_balance_of_this_machine_is_measured_and_leaves_no_trace():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    balance = machine_balance.balance(10**6, ("avx512_vnni",), 2)
    assert balance.macs_per_s > 1e8 and balance.values_per_s > 1e8 and balance.rates["int8"] == 4
    assert balance.macs_per_s == 2 * machine_balance.balance(10**6, (), 1).macs_per_s
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_the_network_is_not_modified():
    call = ((torch.zeros(2, 3, 8, 8),), {})
    network = capture_network(_convolutions(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)).eval(), *call)
    before = network.code, {name: tensor.clone() for name, tensor in network.state_dict().items()}
    diagnose(network, {"mine": prepared(network, call, GENERIC)}, (), 1)
    assert network.code == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in network.state_dict().items())


def test_a_run_is_diagnosed_before_and_compared_after(digits_run):
    events = [json.loads(line) for line in (digits_run.folder / "events.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds.index("diagnosis") < kinds.index("effort") < kinds.index("candidate")
    diagnosis = digits_run.record.diagnosis
    rows = {(row.runtime, row.precision): row for row in diagnosis.expectations}
    row = rows[("onnxruntime", "int8")]
    assert row.faster > 1 and row.faster_measured > 0 and row.smaller_measured > 0
    built = len(digits_run.record.candidates) + len(digits_run.record.rejected)
    assert diagnosis.effort.candidates >= built and diagnosis.effort.took_s > 0
    texts = expected.after(digits_run.record)
    assert "it took" in texts[-1] and all(text.startswith("expected: ") for text in texts[:-1])
    page = (digits_run.folder / "report.html").read_text(encoding="utf-8")
    assert "What was to be expected" in page and "Why not more" in page
    assert from_dict(type(diagnosis), dataclasses.asdict(diagnosis)) == diagnosis


def test_a_recipe_that_changes_the_network_is_not_compared(digits_run):
    record = dataclasses.replace(digits_run.record, floors={"onnxruntime": digits_run.record.source})
    rows = [r for r in compared(record.diagnosis, record).expectations if r.runtime == "onnxruntime"]
    assert all(row.doubt == "the recipe changed the network" for row in rows)


class Unplaceable(nn.Module):
    def forward(self, x):
        return F.relu(x)


def test_a_network_without_weights_is_diagnosed():
    call = ((torch.zeros(2, 8),), {})
    network = capture_network(Unplaceable().eval(), *call)
    diagnosis = diagnose(network, {"mine": prepared(network, call, GENERIC)}, (), 1)
    assert expected.lines(diagnosis)
