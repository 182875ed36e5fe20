"""Operators written with others: the same values in torch, and in both runtimes at another batch size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import ExportError
from penjing.network import projected_lstm
from penjing.network.capture import capture_network
from penjing.network.decompositions import REWRITES
from penjing.network.exporting import export_module
from penjing.network.graph import operator_name
from penjing.pipeline.building import build
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.raises import raises_case


def decibel(reference, other):
    reference, other = (torch.as_tensor(x).double() for x in (reference, other))
    assert reference.shape == other.shape
    noise = (reference - other).square().mean()
    return float("inf") if not noise else float(10 * torch.log10(reference.square().mean() / noise))


class Called(nn.Module):
    """A function as a network, with the modules that it reads."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, part in modules.items():
            self.register_module(name, part) if isinstance(part, nn.Module) else self.register_buffer(name, part)

    def forward(self, x):
        return self.function(self, x)


def module(make):
    return lambda: Called(lambda self, x: self.layer(x), layer=make())


def function(apply):
    return lambda: Called(lambda self, x: apply(x))


def resized(**how):
    return function(lambda x: F.interpolate(x, **how))


def bag(mode, **how):
    return module(lambda: nn.EmbeddingBag(20, 6, mode=mode, **how))


def numbers(*shape):
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def tokens(length):
    return lambda batch: torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(batch))


def spread(reduce, include_self, indexed=False):
    """Ten rows go to five places, and some places get none."""
    index = torch.tensor([0, 1, 3, 0, 1, 0, 3, 1, 0, 4])

    def apply(x):
        own = x * 0.5 - 3
        if indexed:
            return own.index_reduce(1, index, x - 1, reduce, include_self=include_self)
        rows = index[None, :, None].expand_as(x)
        return own.scatter_reduce(1, rows, x - 1, reduce, include_self=include_self)

    return function(apply)


CASES = {
    "products up to a place": (function(lambda x: x.sigmoid().cumprod(1)), numbers(9, 4)),
    "products up to a place of integers": (function(lambda x: (x > 0).cumprod(-1) * x), numbers(9, 4)),
    "the largest up to a place": (function(lambda x: x.cummax(2).values), numbers(3, 7)),
    "the smallest up to a place": (function(lambda x: x.cummin(1)[0] + x), numbers(16, 2)),
    "a rank": (function(lambda x: x.kthvalue(3, 1).values), numbers(9, 4)),
    "a rank and where it lies": (function(lambda x: x + x.kthvalue(2, -1, keepdim=True)[1]), numbers(9, 4)),
    "a mean of what is scattered": (spread("mean", True), numbers(10, 3)),
    "a mean of what is scattered alone": (spread("mean", False), numbers(10, 3)),
    "a mean by an index": (spread("mean", False, indexed=True), numbers(10, 3)),
    "a maximum by an index": (spread("amax", True, indexed=True), numbers(10, 3)),
    "a product by an index": (spread("prod", False, indexed=True), numbers(10, 3)),
    "a number less a mask of integers": (function(lambda x: x * (1.0 - (x > 0).long())), numbers(3, 9)),
    "a number less a mask of booleans": (function(lambda x: (1.0 - (x > 0).int()) * -1e4 + x), numbers(3, 9)),
    "a random leaky ReLU has its mean slope": (function(lambda x: F.rrelu(x, 0.1, 0.5)), numbers(3, 9)),
    "and in place": (function(lambda x: F.rrelu(x + 0.1, inplace=True) * 2), numbers(3, 9)),
    "zeros that are joined are padding": (
        function(lambda x: torch.cat([x.new_zeros(x.shape[0], 2, 9), x, torch.zeros(x.shape[0], 1, 9)], 1)),
        numbers(3, 9),
    ),
    "circular padding in one axis": (module(lambda: nn.CircularPad1d((2, 1))), numbers(3, 9)),
    "in two axes, uneven": (function(lambda x: F.pad(x, (1, 2, 0, 1), "circular")), numbers(3, 8, 9)),
    "in three axes": (module(lambda: nn.CircularPad3d((2, 1, 1, 0, 2, 2))), numbers(3, 5, 6, 7)),
    "within a convolution": (module(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), numbers(3, 9, 9)),
    "adaptive maximum over windows of one size": (function(lambda x: F.adaptive_max_pool2d(x, 3)), numbers(3, 9, 12)),
    "over windows of two sizes": (function(lambda x: F.adaptive_max_pool2d(x, (5, 7))), numbers(3, 12, 16)),
    "an axis as it is": (function(lambda x: F.adaptive_max_pool2d(x, (None, 5))), numbers(3, 12, 16)),
    "to more than there is": (function(lambda x: F.adaptive_max_pool2d(x, (15, 4))), numbers(3, 12, 16)),
    "over a line": (module(lambda: nn.AdaptiveMaxPool1d(4)), numbers(3, 10)),
    "over a volume": (module(lambda: nn.AdaptiveMaxPool3d((2, 3, 4))), numbers(3, 5, 6, 7)),
    "the average of a volume": (module(lambda: nn.AdaptiveAvgPool3d((2, 3, 4))), numbers(3, 5, 6, 7)),
    "median along an axis": (function(lambda x: x.median(1).values), numbers(5, 3)),
    "of an even number, axis kept": (function(lambda x: x - x.median(-1, keepdim=True).values), numbers(5, 4)),
    "and where it stands": (function(lambda x: x.median(1)), numbers(5, 3)),
    "median of all": (function(lambda x: x - x.median()), numbers(5, 3)),
    "distances": (function(lambda x: torch.cdist(x, x[:, :3] + 1)), numbers(6, 4)),
    "sums of differences": (function(lambda x: torch.cdist(x, x[:, :3] + 1, p=1.0)), numbers(6, 4)),
    "the largest difference": (function(lambda x: torch.cdist(x, x[:, :3] + 1, p=float("inf"))), numbers(6, 4)),
    "a norm of 3": (function(lambda x: torch.cdist(x, x[:, :3] + 1, p=3.0)), numbers(6, 4)),
    "a bag's mean": (bag("mean"), tokens(7)),
    "a bag's sum": (bag("sum"), tokens(7)),
    "a bag's maximum": (bag("max"), tokens(7)),
    "a bag without its padding": (bag("mean", padding_idx=3), tokens(7)),
    "the maximum without padding": (bag("max", padding_idx=-2), tokens(2)),
    "a weighted bag": (
        lambda: Called(lambda self, x: self.bag(x, per_sample_weights=x / 20), bag=nn.EmbeddingBag(20, 6, mode="sum")),
        tokens(7),
    ),
    "bags by their beginnings": (
        lambda: Called(
            lambda self, x: self.bag(x.flatten(), self.begins),
            bag=nn.EmbeddingBag(20, 6),
            begins=torch.tensor([0, 2, 2, 5]),
        ),
        tokens(4),
    ),
    "bags by beginnings and the end, without padding": (
        lambda: Called(
            lambda self, x: self.bag(x.flatten(), self.begins),
            begins=torch.tensor([0, 2, 2, 5]),
            bag=nn.EmbeddingBag(20, 6, mode="max", include_last_offset=True, padding_idx=2),
        ),
        tokens(4),
    ),
    "an LSTM with projections": (
        module(lambda: nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True, proj_size=3)),
        numbers(3, 6),
    ),
    "time first, without biases, the states alone": (
        lambda: Called(lambda self, x: self.cells(x.transpose(0, 1))[1], cells=nn.LSTM(6, 8, bias=False, proj_size=3)),
        numbers(5, 6),
    ),
    "bicubic to fewer pixels": (resized(size=(9, 7), mode="bicubic"), numbers(3, 12, 14)),
    "by a factor": (resized(scale_factor=0.6, mode="bicubic"), numbers(3, 12, 14)),
    "fewer and more": (resized(size=(9, 17), mode="bicubic", align_corners=True), numbers(3, 12, 14)),
    "bicubic with antialias": (resized(size=(5, 7), mode="bicubic", antialias=True), numbers(3, 12, 14)),
    "to more pixels": (resized(size=(17, 20), mode="bicubic", antialias=True), numbers(3, 12, 14)),
    "bilinear with antialias": (resized(scale_factor=0.4, mode="bilinear", antialias=True), numbers(3, 12, 14)),
    "with aligned corners": (
        resized(size=(9, 7), mode="bilinear", antialias=True, align_corners=True),
        numbers(3, 12, 14),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    make, data = CASES[request.param]
    net = make().eval()
    return net, data, capture_network(net, (data(2),))


def test_the_same_values_in_torch_and_in_the_runtimes(case, tmp_path):
    net, data, network = case
    rewritten = {operator_name(n) for n in export_module(net, (data(2),)).graph.nodes if operator_name(n) in REWRITES}
    left = {operator_name(node) for node in network.graph.nodes if node.op == "call_function"}
    assert rewritten and not rewritten & left
    task = Task(example=data(2))
    with torch.no_grad():
        answers, structure = flatten_outputs(net(data(5)))
        mine, _ = flatten_outputs(network(data(5)))
    assert all(decibel(a, b) > 120 for a, b in zip(answers, mine, strict=True))
    for runtime in ("onnxruntime", "openvino"):
        folder = tmp_path / runtime
        folder.mkdir()
        build(Draft(network), runtime, "fp32", task, structure, folder)
        predict = predictor(isolated.open_artifact(folder, 1), read_manifest(folder))
        theirs, _ = flatten_outputs(predict(data(5).numpy()))
        assert all(decibel(a, b) > 80 for a, b in zip(answers, theirs, strict=True)), runtime


def test_projections_over_more_steps_than_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(projected_lstm, "MOST_STEPS", 8)  # tracing the 512 that are allowed takes long
    net = nn.LSTM(6, 8, batch_first=True, proj_size=3)
    with raises_case(ExportError, "length") as error:
        capture_network(net, (torch.zeros(2, 9, 6),))
    assert error.value.got == "9 steps"
    capture_network(net, (torch.zeros(2, 8, 6),))


def test_they_train():
    net = Called(lambda self, x: F.rrelu(F.adaptive_max_pool2d(self.conv(x), 3)), conv=nn.Conv2d(3, 4, 3))
    network = capture_network(net, (torch.zeros(1, 3, 12, 10),)).train()
    network(torch.randn(2, 3, 12, 10)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_a_layer_that_is_written_with_others_keeps_its_place():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(3))
    network = capture_network(net, (torch.zeros(1, 3, 10, 13),))
    places = [node.meta["site"] for node in network.graph.nodes if operator_name(node) == "max_pool2d"]
    assert places == [f"1/max_pool2d#{i}" for i in range(6)]


def test_what_the_network_had_is_left_to_itself():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.RReLU())
    program = export_module(net.eval(), (torch.zeros(1, 3, 8, 8),))
    before = str(program.graph), str(program.graph_signature), dict(program.constants)
    capture_network(program)
    assert (str(program.graph), str(program.graph_signature), dict(program.constants)) == before


def test_an_empty_vector_joined_to_what_has_more_axes():
    net = Called(lambda self, x: torch.cat([torch.zeros(0), x * 2], 1))
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        assert torch.equal(capture_network(net, (torch.randn(2, 3, 5),))(x), 2 * x)
