"""Plain recurrent layers and cells are the products they are made of: same answers, integers, training, pruning."""

import onnx
import pytest
import torch
from torch import nn

import penjing as pj
from penjing import measure, runtimes
from penjing.analyze.cost import cost
from penjing.network.capture import capture_network
from penjing.network.graph import kind, sites
from penjing.pipeline import building
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.outputs import flatten_outputs

both = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


class Layer(nn.Module):
    def __init__(self, *sizes, **settings):
        super().__init__()
        self.cells = nn.RNN(*sizes, **settings)

    def forward(self, x, state=None):
        return self.cells(x, state)


class Looped(nn.Module):
    """A cell that the forward calls itself, as decoders do."""

    def __init__(self, cell, **settings):
        super().__init__()
        self.cell, self.head = cell(6, 8, **settings), nn.Linear(8, 3)

    def forward(self, x):
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Tagger(nn.Module):
    def __init__(self, width=96):
        super().__init__()
        self.cells = nn.RNN(32, width, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x):
        return self.head(self.cells(x)[0])


def decibel(reference, other):
    reference, other = (torch.as_tensor(x).double() for x in (reference, other))
    assert reference.shape == other.shape
    noise = (reference - other).detach().square().mean().clamp(min=1e-30)
    return float(10 * torch.log10(reference.detach().square().mean() / noise))


LAYERS = {
    "plain": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    "time first": {"batch_first": False},
    "no bias": {"bias": False, "bidirectional": True},
    "relu": {"nonlinearity": "relu", "num_layers": 2},
}


@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_states_are_the_sources(name, given, tmp_path):
    torch.manual_seed(0)
    settings = {"batch_first": True, **LAYERS[name]}
    model = Layer(6, 8, **settings).eval()
    batch = 0 if settings["batch_first"] else 1
    count = model.cells.num_layers * (1 + model.cells.bidirectional)

    def call(n):
        x = torch.randn(n, 5, 6) if batch == 0 else torch.randn(5, n, 6)
        return (x, torch.randn(count, n, 8)) if given else (x,)

    dynamic = {"x": {batch: "batch"}, "state": {1: "batch"}} if given else {"x": {batch: "batch"}}
    task = pj.Task(example=call(2), dynamic=dynamic)
    network = capture_network(model, *task.call(), dynamic=dynamic)
    assert {kind(network, n) for n in network.graph.nodes} >= {"linear"}
    assert not [n for n in network.graph.nodes if "rnn" in kind(network, n)]
    values = call(3)
    with torch.no_grad():
        answers, structure = flatten_outputs(model(*values))
        assert all(decibel(a, b) > 120 for a, b in zip(answers, flatten_outputs(network(*values))[0], strict=True))
    for runtime in ("onnxruntime", "openvino"):
        folder = tmp_path / runtime
        folder.mkdir()
        building.build(Draft(network), runtime, "fp32", task, structure, folder)
        predict = predictor(isolated.open_artifact(folder, 1), read_manifest(folder))
        theirs, _ = flatten_outputs(predict(*(v.numpy() for v in values)))
        assert all(decibel(a, b) > 100 for a, b in zip(answers, theirs, strict=True)), runtime


def test_a_sequence_without_a_batch():
    torch.manual_seed(0)
    model, x = Layer(6, 8, bidirectional=True).eval(), torch.randn(5, 6)
    network = capture_network(model, (x,), dynamic={})
    assert all(decibel(a, b) > 120 for a, b in zip(model(x), network(x), strict=True))


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_a_cell_is_a_linear_layer_for_its_input_and_one_for_its_state(cell):
    torch.manual_seed(0)
    model, x = Looped(cell).eval(), torch.randn(3, 5, 6)
    network = capture_network(model, (x,))
    assert decibel(model(x), network(x)) > 120
    layers = {str(n.target) for n in network.graph.nodes if kind(network, n) == "linear"}
    assert layers == {"cell.weight_ih_layer", "cell.weight_hh_layer", "head"}
    assert {r.kind for r in cost(network, ((x,), {})) if r.macs} == {"linear"}


def quantized(model, data, runtime):
    task = pj.Task(example=data(2), calibration=[data(16 + i) for i in range(3)])
    network = capture_network(model, *task.call())
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    return pj.quantize.Static()(Draft(network), Context(task=task, capabilities=capabilities)), task


def built(draft, task, runtime, folder):
    structure = flatten_outputs(draft.network(*task.call()[0]))[1]
    manifest = building.build(draft, runtime, "int8", task, structure, folder)
    rows = building.executed_rows(draft.network, draft.plan, task.call(), manifest, folder)[0]
    return predictor(isolated.open_artifact(folder, 1), read_manifest(folder)), rows


def sequences(n, steps=6, width=32):
    return torch.randn(n, steps, width, generator=torch.Generator().manual_seed(n))


@both
def test_every_product_is_an_integer_and_every_matrix_lies_in_the_file_once(runtime, tmp_path):
    torch.manual_seed(0)
    model = Tagger().eval()
    draft, task = quantized(model, sequences, runtime)
    predict, rows = built(draft, task, runtime, tmp_path)
    products = [r for r in rows if r.macs]
    # Four cells read a whole sequence at once, and their state at each of its steps but the first, where it is zero.
    assert len(products) == 4 + 4 * 5 + 1
    assert {(r.kind, r.planned, r.executed) for r in products} == {("linear", "int8", "int8")}
    x = sequences(7)
    with torch.no_grad():
        source, planned = model(x), insert(draft.network, draft.plan)(x)
    answer = torch.as_tensor(predict(x.numpy()))
    assert decibel(planned, answer) > 40
    assert decibel(source, answer) > 28
    assert decibel(source, planned) > 28
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    weights = "model.bin" if runtime == "openvino" else "model.onnx"
    assert (tmp_path / weights).stat().st_size < 1.6 * matrices
    if runtime == "onnxruntime":
        file = onnx.load(tmp_path / weights)
        big = [t for t in file.graph.initializer if len(t.dims) == 2 and t.dims[0] == 96]
        assert sorted(tuple(t.dims) for t in big) == sorted(
            tuple(p.shape) for n, p in model.cells.named_parameters() if "weight" in n
        )
        assert {t.data_type for t in big} == {onnx.TensorProto.INT8}


@both
@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells_are_integers(cell, runtime, tmp_path):
    torch.manual_seed(0)
    model = Looped(cell).eval()
    draft, task = quantized(model, lambda n: sequences(n, 4, 6), runtime)
    predict, rows = built(draft, task, runtime, tmp_path)
    assert {(r.kind, r.executed) for r in rows if r.macs} == {("linear", "int8")}
    x = sequences(7, 4, 6)
    with torch.no_grad():
        source, planned = model(x), insert(draft.network, draft.plan)(x)
    answer = torch.as_tensor(predict(x.numpy()))
    assert decibel(planned, answer) > 40 and decibel(source, answer) > 25


def test_sums_of_a_step_say_why_they_stay_in_floating_point():
    draft, _ = quantized(Tagger(8).eval(), sequences, "onnxruntime")
    sums = [name for name, node in sites(draft.network).items() if kind(draft.network, node) == "add"]
    assert len(sums) == 4 * 5
    assert all("within a step of a recurrent layer" in draft.plan.floats[name] for name in sums)


def test_it_trains_with_dropout_between_the_layers():
    torch.manual_seed(0)
    model = Layer(6, 8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(3, 5, 6)
    network = capture_network(model.eval(), (x,)).train()
    assert not torch.equal(network(x)[0], network(x)[0])
    network(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    network.eval()
    assert torch.equal(network(x)[0], network(x)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_its_units_are_pruned_with_all_that_reads_them(bidirectional):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.RNN(6, 16, batch_first=True, bidirectional=bidirectional)
            self.head = nn.Linear(32 if bidirectional else 16, 4)

        def forward(self, x):
            return self.head(self.cells(x)[0][:, -1])

    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    task = pj.Task(example=x, calibration=[torch.randn(16, 5, 6)])
    small = pj.apply(pj.Recipe(pj.prune.Channels(channels=0.5)), Classifier().eval(), task)
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    width = 0
    for side in ("", "_reverse") if bidirectional else ("",):  # the two directions are free of each other
        units, inputs = shapes[f"cells.weight_ih_l0{side}_layer.weight"]
        assert inputs == 6 and 0 < units < 16
        assert shapes[f"cells.weight_hh_l0{side}_layer.weight"] == (units, units)
        width += units
    assert shapes["head.weight"] == (4, width) and width == (16 if bidirectional else 8)
    assert small(x).shape == (2, 4)
