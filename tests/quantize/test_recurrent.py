"""LSTMs in integers with ranges from calibration: OpenVINO computes what was planned, at every batch size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing import measure, runtimes
from penjing.network.capture import capture_network
from penjing.network.graph import kind, sites
from penjing.numerics import operators
from penjing.pipeline import building
from penjing.quantize.static import Static
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated, openvino_rewrites
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert, recurrent
from penjing.tasks.outputs import flatten_outputs


class Reader(nn.Module):
    """A sequence of values, and a class at every step."""

    def __init__(self, size=40, width=48, scale=1.0, **settings):
        super().__init__()
        self.cells, self.scale = nn.LSTM(size, width, batch_first=True, **settings), scale
        self.head = nn.Linear(width * (1 + self.cells.bidirectional), 5)

    def forward(self, x):
        return self.head(self.cells(x * self.scale)[0])


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.cells = nn.Embedding(30, 24), nn.LSTM(24, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, ids):
        return self.head(self.cells(self.words(ids))[1][0][-1])


class Sounds(nn.Module):
    """Convolutions, then time first, then both the last states."""

    def __init__(self):
        super().__init__()
        self.conv, self.cells = nn.Conv1d(6, 16, 3, padding=1), nn.LSTM(16, 24, 2, bidirectional=True)
        self.head = nn.Linear(48, 4)

    def forward(self, x):
        x = F.relu(self.conv(x)).permute(2, 0, 1)
        _, (hidden, cell) = self.cells(x)
        return self.head(torch.cat([hidden[0], cell[1]], -1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(10, 32), nn.LayerNorm(32)
        self.cells, self.head = nn.LSTM(32, 32, batch_first=True, bias=False), nn.Linear(32, 4)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.head(x + self.cells(x)[0])


def values(*shape):
    return lambda n: torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def ids(n):
    return torch.randint(0, 30, (n, 7), generator=torch.Generator().manual_seed(n))


ZOO = {
    "one layer": (Reader, values(6, 40)),
    "two layers, both directions": (lambda: Reader(num_layers=2, bidirectional=True), values(6, 40)),
    "large inputs": (lambda: Reader(scale=30.0), values(6, 40)),
    "small inputs": (lambda: Reader(scale=0.05), values(6, 40)),
    "words": (Words, ids),
    "sounds": (Sounds, values(6, 9)),
    "residual": (Residual, values(5, 10)),
}


def decibel(reference, other):
    reference, other = (torch.as_tensor(x).detach().double() for x in (reference, other))
    assert reference.shape == other.shape
    noise = (reference - other).square().mean().clamp(min=1e-30)
    return float(10 * torch.log10(reference.square().mean() / noise))


def quantized(model, data, runtime="openvino", step=None, n=None, **task):
    sizes = (16, 17, 18) if n is None else (n, n, n)
    task = pj.Task(example=data(n or 2), calibration=[data(size) for size in sizes], **task)
    network = capture_network(model, *task.call(), dynamic=task.dynamic)
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    return (step or Static())(Draft(network), Context(task=task, capabilities=capabilities)), task


def built(draft, task, folder, runtime="openvino"):
    structure = flatten_outputs(draft.network(*task.call()[0]))[1]
    manifest = building.build(draft, runtime, "int8", task, structure, folder)
    rows = building.executed_rows(draft.network, draft.plan, task.call(), manifest, folder)[0]
    return predictor(isolated.open_artifact(folder, 1), read_manifest(folder)), rows


needs_kernel = pytest.mark.skipif(
    not any("vnni" in name or name == "amx_int8" for name in measure.machine(1).instruction_sets),
    reason="OpenVINO is given integer LSTMs on processors with VNNI alone",
)


@needs_kernel
@pytest.mark.parametrize("name", ZOO)
def test_the_runtime_computes_what_was_planned(name, tmp_path):
    torch.manual_seed(0)
    make, data = ZOO[name]
    model = make().eval()
    draft, task = quantized(model, data)
    predict, rows = built(draft, task, tmp_path)
    (cells,) = (r for r in rows if r.kind == "lstm")
    assert (cells.planned, cells.executed, cells.stored, cells.reason) == ("int8", "int8", "int8", None)
    planned = insert(draft.network, draft.plan)
    for n in (2, 5, 1, 7):  # the first two sizes are compiled for their shapes, the others share one network
        x = data(n)
        with torch.no_grad():
            source, plan = model(x), planned(x)
        answer = torch.as_tensor(predict(x.numpy()))
        assert decibel(plan, answer) > 40, n
        assert decibel(source, answer) > 22, n


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["one layer", "two layers, both directions", "large inputs", "residual"])
def test_a_network_of_one_batch_size_computes_in_integers_too(name, threads, tmp_path):
    torch.manual_seed(0)
    make, data = ZOO[name]
    model = make().eval()
    for n in (1, 3):
        draft, task = quantized(model, data, dynamic={}, n=n)
        folder = tmp_path / str(n)
        folder.mkdir()
        _, rows = built(draft, task, folder)
        (cells,) = (r for r in rows if r.kind == "lstm")
        assert (cells.planned, cells.executed, cells.reason) == ("int8", "int8", None)
        with torch.no_grad():
            source, planned = model(data(n)), insert(draft.network, draft.plan)(data(n))
        answer = predictor(isolated.open_artifact(folder, threads), read_manifest(folder))(data(n).numpy())
        assert decibel(planned, torch.as_tensor(answer)) > 40, n
        assert decibel(source, torch.as_tensor(answer)) > 22, n


def test_the_grid_of_the_state_is_that_of_the_operator():
    low, high = (limit / operators.STATE_SCALE for limit in openvino_rewrites.STATE_LIMITS)
    assert (low, high) == pytest.approx((-operators.STATE_ZERO, 255 - operators.STATE_ZERO))


@needs_kernel
def test_its_matrices_lie_in_the_file_as_integers(tmp_path):
    torch.manual_seed(0)
    model = Reader(64, 128, num_layers=2, bidirectional=True).eval()
    draft, task = quantized(model, values(6, 64))
    built(draft, task, tmp_path)
    matrices = sum(p.numel() for n, p in model.cells.named_parameters() if "weight" in n)
    assert (tmp_path / "model.bin").stat().st_size < 1.1 * matrices


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_what_stays_in_floating_point_is_stored_in_8_bits(cell, runtime, tmp_path):
    class FromState(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = cell(64, 128, batch_first=True), nn.Linear(128, 4)

        def forward(self, x, state):
            state = state if cell is nn.GRU else (state, state)
            return self.head(self.cells(x, state)[0])

    torch.manual_seed(0)
    model = FromState().eval()
    dynamic = {"x": {0: "batch"}, "state": {1: "batch"}}

    def data(n):
        return values(6, 64)(n), 3 * torch.randn(1, n, 128, generator=torch.Generator().manual_seed(n))

    draft, task = quantized(model, data, runtime, dynamic=dynamic)
    (reason,) = (text for name, text in draft.plan.floats.items() if name.startswith("cells"))
    if runtime == "openvino" and cell is nn.LSTM:
        assert "its first state is given" in reason
    predict, rows = built(draft, task, tmp_path, runtime)
    (cells,) = (r for r in rows if r.kind in ("lstm", "gru"))
    assert cells.stored == "int8" and cells.executed != "int8"
    x = data(5)
    with torch.no_grad():
        source, planned = model(*x), insert(draft.network, draft.plan)(*x)
    answer = torch.as_tensor(predict(*(v.numpy() for v in x)))
    assert decibel(planned, answer) > 60 and decibel(source, answer) > 30
    matrices = sum(p.numel() for n, p in model.cells.named_parameters() if "weight" in n)
    file = tmp_path / ("model.bin" if runtime == "openvino" else "model.onnx")
    assert file.stat().st_size < 1.25 * matrices


@needs_kernel
def test_rows_of_both_matrices_share_a_scale_and_so_do_two_gates():
    torch.manual_seed(0)
    draft, _ = quantized(Reader(width=8).eval(), values(6, 40))
    (node,) = (n for n in draft.network.graph.nodes if kind(draft.network, n) == "lstm")
    step = draft.plan.entries["cells/lstm#0:in0"].scale[0]
    read, own = (torch.tensor(draft.plan.entries[edge].scale) for edge in recurrent.weights(draft.network, node))
    torch.testing.assert_close(read * step, own / 127)
    assert torch.equal(own[:8], own[8:16])
    for edge, matrix in recurrent.weights(draft.network, node).items():
        assert (matrix.abs().amax(1) <= 127.01 * torch.tensor(draft.plan.entries[edge].scale)).all()


FORMATS = {
    "4 bits": {"weight_bits": 4},
    "one scale": {"weight_per": "tensor"},
    "signed inputs": {"activation_symmetric": True},
    "smallest to largest": {"activation_range": "minmax", "weight_range": "minmax"},
}


@needs_kernel
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_as_the_plan_says(name, tmp_path):
    torch.manual_seed(0)
    draft, task = quantized(Reader(num_layers=2).eval(), values(6, 40), step=Static(**FORMATS[name]))
    predict, rows = built(draft, task, tmp_path)
    (cells,) = (r for r in rows if r.kind == "lstm")
    assert cells.executed == "int8"
    x = values(6, 40)(5)
    with torch.no_grad():
        planned = insert(draft.network, draft.plan)(x)
    assert decibel(planned, torch.as_tensor(predict(x.numpy()))) > 40


@needs_kernel
def test_an_excluded_one_stays_as_it_is():
    draft, _ = quantized(Reader().eval(), values(6, 40), step=Static(exclude=("cells",)))
    assert not [edge for edge in draft.plan.entries if edge.startswith("cells")]
    assert "excluded" in draft.plan.floats["cells/lstm#0"]
    assert "cells/lstm#0" in sites(draft.network)


def test_the_operator_fulfils_what_torch_asks_of_custom_operators():
    torch.manual_seed(0)
    state = torch.rand(2, 3, 4) - 0.5
    q = [torch.randint(-127, 128, (32, n), dtype=torch.int8) for n in (5, 4)]
    numbers = (torch.rand(32) * 0.01, torch.randn(2, 32), torch.tensor(1 / 127), torch.tensor(128, dtype=torch.uint8))
    arguments = (torch.randn(6, 3, 5), state, state, *q, *numbers, 0.5)
    checks = torch.library.opcheck(torch.ops.penjing.lstm_static.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}


@needs_kernel
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "steps",
    [(), (pj.quantize.CoordinateRounding(samples=32),), (pj.quantize.QAT(finetune=pj.Finetune(epochs=1)),)],
    ids=["static", "coordinate_rounding", "qat"],
)
def test_a_run_offers_it(steps, tmp_path):
    torch.manual_seed(0)
    task = pj.Task(
        example=values(6, 40)(2),
        calibration=[values(6, 40)(16 + i) for i in range(3)],
        train=[(values(6, 40)(16 + i), torch.randn(16 + i, 6, 5)) for i in range(3)],
        loss=F.mse_loss,
    )
    recipe = pj.Recipe(pj.quantize.Static(), *steps)
    result = pj.run(recipe, Reader().eval(), task, runtime="openvino", out=tmp_path / "run", seconds=0.01, threads=1)
    (integer,) = (c for c in result.record.candidates if c.precision == "int8")
    assert integer.float_macs_share == 0 and integer.rejection is None
