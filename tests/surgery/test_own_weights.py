"""A tied weight that is read as it is and turned: two readers, whose integers have their scales along other axes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import measure, runtimes
from penjing.errors import CheckpointError
from penjing.network.capture import capture_network
from penjing.network.graph import sites
from penjing.pipeline import building
from penjing.quantize import Dynamic, Static
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.storage import checkpoint
from penjing.surgery import insert, own_weights, replay
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.raises import raises_case

IN, OUT = 32, 96
both = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


class Read(nn.Module):
    """A weight of any shape, and a function that reads it in several ways."""

    def __init__(self, shape, function, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(*shape) / 6)
        self.b = nn.Parameter(torch.randn(IN) / 6)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def overlapping(m, x):
    return F.linear(x, m.w[:64]).relu() + F.linear(x, m.w[32:]).relu()


# name: (the network, shape of a sample, operators that multiply by a weight of their own)
WAYS = {
    "linear and turned": (
        lambda: Read((OUT, IN), lambda m, x: F.linear(F.linear(x, m.w).relu(), m.w.t(), m.b)),
        (5, IN),
        ["w_copy"],
    ),
    "products": (lambda: Read((IN, OUT), lambda m, x: (x @ m.w).relu() @ m.w.T), (5, IN), ["w_copy"]),
    "turned twice": (
        lambda: Read((IN, OUT), lambda m, x: ((x @ m.w).relu() @ m.w.T).relu() @ m.w),
        (5, IN),
        ["w_copy", "w_copy_1"],
    ),
    "a batch norm behind": (
        lambda: Read((IN, OUT), lambda m, x: m.norm(x @ m.w).relu() @ m.w.T, norm=nn.BatchNorm1d(OUT)),
        (IN,),
        ["w_copy"],
    ),
    "a convolution": (
        lambda: Read(
            (IN, IN // 2, 3, 3),
            lambda m, x: F.conv2d(F.conv2d(x, m.w, padding=1).relu(), m.w.transpose(0, 1), padding=1),
        ),
        (IN // 2, 8, 8),
        ["w_copy"],
    ),
    "a matrix for every head": (
        lambda: Read(
            (4, IN, 48),
            lambda m, x: torch.einsum("bnhe,hde->bnhd", torch.einsum("bnhd,hde->bnhe", x, m.w).relu(), m.w),
        ),
        (5, 4, IN),
        ["/matmul#0", "/matmul#1"],
    ),
    "parts that overlap": (lambda: Read((OUT, IN), overlapping), (5, IN), ["w_copy", "w_copy_1"]),
}
every = pytest.mark.parametrize("name", WAYS)


def values(name, n):
    return torch.randn(n, *WAYS[name][1], generator=torch.Generator().manual_seed(n))


def of(name):
    build, _, readers = WAYS[name]
    model = build().eval()
    return model, capture_network(model, (values(name, 2),)), readers


def drafted(name, runtime, step):
    model, network, readers = of(name)
    task = Task(example=values(name, 2), calibration=[values(name, 16 + i) for i in range(3)])
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    return step(Draft(network), Context(task=task, capabilities=capabilities)), task, model, readers


def built(draft, task, runtime, precision, folder):
    folder.mkdir()
    structure = flatten_outputs(draft.network(*task.call()[0]))[1]
    manifest = building.build(draft, runtime, precision, task, structure, folder)
    return manifest, measure.size_bytes(folder, manifest.files())


def snr(reference, result):
    noise = np.square(reference - result).mean()
    return 999.0 if noise == 0 else float(10 * np.log10(np.square(reference).mean() / noise))


@every
@torch.no_grad()
def test_the_network_computes_the_same_with_weights_of_their_own(name):
    model, network, readers = of(name)
    (edit,) = own_weights(network)
    assert edit["edit"] == "own_weights"
    assert set(readers) <= set(sites(network))
    for n in (1, 5):
        x = values(name, n)
        torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-5)
    assert own_weights(network) == ()  # nothing is left to do


@every
def test_the_edit_is_replayed_and_the_draft_reloads_to_the_bit(name, tmp_path):
    draft, *_ = drafted(name, "onnxruntime", Static())
    again = replay(of(name)[1], draft.edits)
    assert set(again.state_dict()) == set(draft.network.state_dict())
    checkpoint.save(draft, tmp_path)
    loaded = checkpoint.load(tmp_path, of(name)[1])
    x = values(name, 3)
    with torch.no_grad():
        assert torch.equal(insert(loaded.network, loaded.plan)(x), insert(draft.network, draft.plan)(x))


def test_an_edit_of_another_network_is_refused():
    with raises_case(CheckpointError, "misfit"):
        replay(of("products")[1], ({"edit": "own_weights", "sites": ["/relu#0"]},))


@both
@every
@torch.no_grad()
def test_both_readers_are_integer_and_the_weight_is_stored_in_integers(name, runtime, tmp_path):
    draft, task, model, readers = drafted(name, runtime, Static())
    manifest, size = built(draft, task, runtime, "int8", tmp_path / "int8")
    rows = building.executed_rows(draft.network, draft.plan, task.call(), manifest, tmp_path / "int8")[0]
    # What a runtime fused without a trace counts as it was planned.
    multiplied = {row.name: (row.executed or row.planned, row.stored) for row in rows if row.macs}
    assert set(readers) <= set(multiplied)
    assert set(multiplied.values()) == {("int8", "int8")}, [(r.name, r.reason) for r in rows]
    _, whole = built(Draft(of(name)[1]), task, runtime, "fp32", tmp_path / "fp32")
    assert whole - size > model.w.numel()  # at most two integers in the place of a float
    session = isolated.open_artifact(tmp_path / "int8", 1)
    for n in (2, 5):
        x = values(name, n)
        output = predictor(session, manifest)(x.numpy())
        assert snr(insert(draft.network, draft.plan)(x).numpy(), output) > 60
        assert snr(model(x).numpy(), output) > 25


@torch.no_grad()
def test_ranges_at_run_time_too(tmp_path):
    draft, task, model, readers = drafted("products", "onnxruntime", Dynamic())
    manifest, _ = built(draft, task, "onnxruntime", "int8", tmp_path / "int8")
    rows = building.executed_rows(draft.network, draft.plan, task.call(), manifest, tmp_path / "int8")[0]
    assert {row.executed for row in rows if row.macs} == {"int8"}
    assert set(readers) <= {row.name for row in rows}
    x = values("products", 5)
    output = predictor(isolated.open_artifact(tmp_path / "int8", 1), manifest)(x.numpy())
    assert snr(model(x).numpy(), output) > 25


@pytest.mark.parametrize("step", [Static, Dynamic])
def test_a_reader_that_is_excluded_keeps_the_tie(step):
    draft, *_ = drafted("products", "onnxruntime", step(exclude=("/linear#0",)))
    assert draft.plan.floats["/linear#0"] == "excluded by '/linear#0'"
    assert len(list(draft.network.parameters())) == 1
    assert draft.edits == ()


def test_a_network_without_ties_stays_as_it_is():
    network = capture_network(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (torch.randn(2, 4),))
    assert own_weights(network) == ()
