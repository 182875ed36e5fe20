"""Weights that are stored in integers: tables, tied tables, matrices for every head, transposed convolutions."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import measure, runtimes
from penjing.analyze import noise
from penjing.network.capture import capture_network
from penjing.pipeline import building
from penjing.quantize import QAT, BiasCorrection, CoordinateRounding, Dynamic, Static
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import freeze, insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune

WORDS, WIDTH = 400, 48
both = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


def ids(n):
    return torch.randint(0, WORDS, (n, 6), generator=torch.Generator().manual_seed(n))


def values(*shape):
    return lambda n: torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH, padding_idx=0), nn.Embedding(8, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids):
        return self.head(self.words(ids) + self.places(torch.arange(6)))


class Bags(nn.Module):
    def __init__(self, mode, padding=None):
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(WORDS, WIDTH, mode=mode, padding_idx=padding), nn.Linear(WIDTH, 5)

    def forward(self, ids, offsets=None):
        return self.head(self.words(ids, offsets))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        return F.linear(F.relu(self.inner(self.words(ids))), self.words.weight)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(4, 16, 24) / 4), nn.Linear(24, 8)

    def forward(self, x):
        return self.head(F.relu(torch.einsum("bnhd,hde->bnhe", x, self.w)))


class Upsampling(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.a, self.up = nn.Conv2d(8, 16, 3, padding=1), nn.ConvTranspose2d(16, 12, 4, 2, 1, groups=groups)
        self.b = nn.Conv2d(12, 4, 3)

    def forward(self, x):
        return self.b(F.relu(self.up(F.relu(self.a(x)))))


class Cells(nn.Module):
    def __init__(self, cls, **settings):
        super().__init__()
        self.cells = cls(24, 40, batch_first=True, **settings)
        self.head = nn.Linear(40 * (1 + self.cells.bidirectional), 8)

    def forward(self, x):
        return self.head(self.cells(x)[0])


NETWORKS = {
    "gru": (lambda: Cells(nn.GRU), values(5, 24)),
    "gru both ways": (lambda: Cells(nn.GRU, num_layers=2, bidirectional=True), values(5, 24)),
    "lstm": (lambda: Cells(nn.LSTM), values(5, 24)),
    "table": (Table, ids),
    "bags": (lambda: Bags("mean"), ids),
    "bags' largest": (lambda: Bags("max"), ids),
    "bags with padding": (lambda: Bags("sum", padding=3), ids),
    "tied": (Tied, ids),
    "heads": (Heads, values(5, 4, 16)),
    "upsampling": (Upsampling, values(8, 6, 6)),
    "upsampling in groups": (lambda: Upsampling(4), values(8, 6, 6)),
}


def drafted(name, runtime, step=None):
    torch.manual_seed(0)
    build, data = NETWORKS[name]
    model = build().eval()
    task = Task(example=data(2), calibration=[data(16 + i) for i in range(3)])
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    network = capture_network(model, *task.call())
    return (step or Static())(Draft(network), Context(task=task, capabilities=capabilities)), task, model, data(5)


def built(draft, task, runtime, precision, folder):
    folder.mkdir()
    args, kwargs = task.call()
    structure = flatten_outputs(draft.network(*args, **kwargs))[1]
    manifest = building.build(draft, runtime, precision, task, structure, folder)
    return manifest, measure.size_bytes(folder, manifest.files())


def snr(reference, result):
    noise = np.square(reference - result).mean()
    return 999.0 if noise == 0 else float(10 * np.log10(np.square(reference).mean() / noise))


@both
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_an_artifact_gives_what_its_plan_says(name, runtime, tmp_path):
    draft, task, model, x = drafted(name, runtime)
    manifest, _ = built(draft, task, runtime, "int8", tmp_path / "int8")
    output = predictor(isolated.open_artifact(tmp_path / "int8", 1), manifest)(x.numpy())
    assert snr(insert(draft.network, draft.plan)(x).numpy(), output) > 60
    assert snr(freeze(draft.network, draft.plan)(x).numpy(), output) > 60
    assert snr(model(x).numpy(), output) > 30


@both
@pytest.mark.parametrize("name", ["table", "tied", "bags"])
def test_the_file_is_smaller_than_that_in_half_precision(name, runtime, tmp_path):
    draft, task, *_ = drafted(name, runtime)
    _, half = built(Draft(draft.network), task, runtime, "fp16", tmp_path / "fp16")
    _, whole = built(draft, task, runtime, "int8", tmp_path / "int8")
    assert whole < half


@pytest.mark.parametrize("name", ["table", "tied", "bags"])
def test_integers_are_gathered_and_only_their_rows_are_dequantized(name, tmp_path):
    draft, task, *_ = drafted(name, "onnxruntime")
    built(draft, task, "onnxruntime", "int8", tmp_path / "int8")
    graph = onnx.load(str(tmp_path / "int8" / "model.onnx")).graph
    tables = [t for t in graph.initializer if list(t.dims) == [WORDS, WIDTH]]
    assert [t.data_type for t in tables] == [onnx.TensorProto.INT8]  # one, also where it is tied
    readers = {n.op_type for n in graph.node if tables[0].name in n.input}
    assert "Gather" in readers
    assert readers <= {"Gather", "DequantizeLinear"}  # the latter for the layer that it is tied to


@pytest.mark.parametrize("name", ["gru", "gru both ways", "lstm", "upsampling"])
def test_weights_of_an_operator_in_floating_point_are_stored_in_integers_and_cast_when_the_file_is_loaded(
    name, tmp_path
):
    draft, task, *_ = drafted(name, "onnxruntime")
    _, half = built(Draft(draft.network), task, "onnxruntime", "fp16", tmp_path / "fp16")
    _, whole = built(draft, task, "onnxruntime", "int8", tmp_path / "int8")
    assert whole < half
    graph = onnx.load(str(tmp_path / "int8" / "model.onnx")).graph
    held = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and np.prod(t.dims) >= 2000}
    assert [n.op_type for n in graph.node if set(n.input) & held].count("Cast") >= 1
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(int(np.prod(t.dims)) for t in floats) < 2000


def test_every_row_has_a_scale_of_its_own():
    draft, *_ = drafted("table", "onnxruntime")
    assert len(draft.plan.entries["words:weight"].scale) == WORDS
    assert "words:in0" not in draft.plan.entries


@both
@torch.no_grad()
def test_bags_of_any_length_are_looked_up_in_integers(runtime, tmp_path):
    torch.manual_seed(0)
    model = Bags("mean").eval()
    data = [(ids(n).flatten()[: 5 * n + 1], torch.arange(n) * 5) for n in (3, 16, 20, 7)]
    task = Task(example=data[0], calibration=data[1:3], dynamic={"ids": {0: "words"}, "offsets": {0: "bags"}})
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    network = capture_network(model, *task.call(), task.dynamic)
    draft = Static()(Draft(network), Context(task=task, capabilities=capabilities))
    assert len(draft.plan.entries["words:weight"].scale) == WORDS
    manifest, size = built(draft, task, runtime, "int8", tmp_path / "int8")
    _, half = built(Draft(network), task, runtime, "fp16", tmp_path / "fp16")
    assert size < half
    session = runtimes.open_artifact(tmp_path / "int8", 1)
    for call in data:
        output = predictor(session, manifest)(*(x.numpy() for x in call))
        assert snr(insert(draft.network, draft.plan)(*call).numpy(), output) > 60
        assert snr(model(*call).numpy(), output) > 30


def test_a_tied_table_and_its_head_have_one_grid():
    draft, *_ = drafted("tied", "onnxruntime")
    grids = [e for edge, e in draft.plan.entries.items() if edge.endswith(":weight") and len(e.scale) == WORDS]
    assert len(grids) == 2
    assert grids[0] == grids[1]


@both
def test_ranges_at_run_time_store_tables_in_integers_too(runtime, tmp_path):
    draft, task, model, x = drafted("table", runtime, Dynamic())
    assert "words:weight" in draft.plan.entries
    manifest, size = built(draft, task, runtime, "int8", tmp_path / "int8")
    _, half = built(Draft(draft.network), task, runtime, "fp16", tmp_path / "fp16")
    assert size < half
    with torch.no_grad():
        output = predictor(isolated.open_artifact(tmp_path / "int8", 1), manifest)(x.numpy())
        assert snr(model(x).numpy(), output) > 30


@both
@pytest.mark.parametrize("name", ["heads", "upsampling"])
def test_the_weight_is_stored_in_integers(name, runtime):
    draft, *_ = drafted(name, runtime)
    frozen = freeze(draft.network, draft.plan)
    numbers = 4 * 16 * 24 if name == "heads" else 16 * 12 * 16
    held = [t for t in [*frozen.buffers(), *frozen.parameters()] if t.numel() == numbers]
    assert {t.dtype for t in held} <= {torch.int8, torch.uint8}
    assert held


def test_a_table_that_is_excluded_stays_as_it_is():
    draft, *_ = drafted("table", "onnxruntime", Static(exclude=("words",)))
    assert "words:weight" not in draft.plan.entries
    assert "places:weight" in draft.plan.entries


@pytest.mark.parametrize("name", ["table", "upsampling"])
def test_a_network_with_stored_weights_is_repaired_trained_and_judged(name):
    draft, task, model, x = drafted(name, "openvino")
    context = Context(task=task, source=model)
    for step in (CoordinateRounding(), BiasCorrection(), QAT(finetune=Finetune(epochs=1), data="calibration")):
        draft = step(draft, context)
    with torch.no_grad():
        assert snr(model(x).numpy(), insert(draft.network, draft.plan)(x).numpy()) > 20
    by_operator = noise.isolated(draft.network, draft.plan, [task.call()])
    assert by_operator["words" if name == "table" else "up"].weights > 0
