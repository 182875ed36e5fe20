"""Times of layers and latencies of networks that follow from them."""

import math
import multiprocessing
import os

import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import ExportError
from penjing.network.capture import capture_network
from penjing.search import layer_probes, layer_table
from penjing.search.gaussian_process import LayerTimes
from penjing.search.layer_probes import EMPTY, KINDS, Probe
from penjing.search.layer_shapes import LayerShape, layer_shapes
from penjing.search.predictor import Predictor

PICTURE = torch.zeros(2, 3, 12, 12)
SIZES = (4, 8, 16, 24, 32, 48, 64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.Hardswish())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.depth(x))
        return self.head(x.mean((2, 3)))


def layer_ms(shape):
    """A processor whose time grows with arithmetic and values, in vectors of eight channels."""
    padded = math.ceil(shape.outputs / 8) * 8 / shape.outputs
    return 1e-3 + 1e-8 * shape.macs * padded + 2e-7 * shape.values


def convolutions(sizes=SIZES, pixels=(7, 14, 28)):
    return [LayerShape("conv", i, o, 3, 1, 1, p, p) for i in sizes for o in sizes for p in pixels]


def test_layers_of_a_network_without_what_the_runtime_fuses():
    network = capture_network(Net().eval(), (PICTURE,))
    shapes = layer_shapes(network, ((PICTURE,), {}), {"relu"})
    assert shapes == (
        LayerShape("conv", 3, 8, 3, 2, 1, 12, 12),
        LayerShape("conv", 8, 8, 5, 1, 8, 6, 6),
        LayerShape("hardswish", 8, 8, height=6, width=6),
        LayerShape("add", 8, 8, height=6, width=6),
        LayerShape("avg_pool", 8, 8, height=6, width=6),
        LayerShape("linear", 8, 4),
    )
    assert [s.macs for s in shapes] == [27 * 8 * 36, 25 * 8 * 36, 0, 0, 0, 32]
    assert [s.kind for s in layer_shapes(network, ((PICTURE,), {}), ())].count("relu") == 2
    assert {s.kind for s in shapes} <= KINDS


@pytest.mark.parametrize(
    "shape",
    [
        LayerShape("conv", 4, 8, 3, 1, 1, 6, 6),
        LayerShape("conv", 4, 8, 3, 2, 1, 6, 6),
        LayerShape("conv", 8, 8, 5, 1, 8, 6, 6),
        LayerShape("conv", 1, 8, 3, 1, 1, 6, 6),
        LayerShape("linear", 6, 3, height=5),
        LayerShape("mul", 4, 4, height=6, width=6),
        LayerShape("max_pool", 4, 4, stride=2, height=6, width=6),
    ],
)
def test_a_probe_computes_its_layer(shape):
    sizes = (shape.height, shape.inputs) if shape.kind == "linear" else (shape.inputs, shape.height, shape.width)
    probe = Probe(shape).eval()
    read = []
    for layer in probe.layers:
        layer.register_forward_hook(lambda layer, x, y: read.append((tuple(x[0].shape[1:]), y[0].numel())))
    probe(torch.zeros(1, *sizes))
    if shape.parallel and shape.weights:
        assert {sizes for sizes, _ in read} == {sizes}
    for layer, (_, values) in zip(probe.layers, read, strict=True):
        assert layer.weight.numel() == shape.weights
        assert values * layer.weight[0].numel() == shape.macs


def test_times_between_and_beyond_measured_layers():
    measured = {s: layer_ms(s) for s in convolutions(sizes=(8, 16, 32, 64), pixels=(7, 28))}
    model = LayerTimes(measured)
    between = [LayerShape("conv", 24, 48, 3, 1, 1, 14, 14), LayerShape("conv", 12, 20, 3, 1, 1, 28, 28)]
    means, covariance = model.predict(between)
    assert np.exp(means) == pytest.approx([layer_ms(s) for s in between], rel=0.2)
    known = next(iter(measured))
    far = LayerShape("conv", 512, 512, 7, 1, 512, 112, 112)
    means, covariance = model.predict([known, between[0], far])
    sds = np.sqrt(np.diag(covariance))
    assert math.exp(means[0]) == pytest.approx(measured[known], rel=0.1)
    assert sds[0] < sds[1] < sds[2]


def test_a_network_is_the_sum_of_its_layers_corrected_by_networks_that_were_measured():
    measured = {EMPTY: 0.01} | {s: layer_ms(s) for s in convolutions()}
    layers = convolutions(sizes=(8, 24), pixels=(14,))
    total = sum(map(layer_ms, layers))
    plain = Predictor(measured).predict(layers)
    assert plain.ms == pytest.approx(0.01 + total, rel=0.05)

    def whole(network):
        return 0.02 + 1.3 * sum(map(layer_ms, network))

    seen = [(layers[:1], whole(layers[:1])), (layers[:3], whole(layers[:3])), (layers[1:] * 3, whole(layers[1:] * 3))]
    corrected = Predictor(measured, seen)
    assert corrected.predict(layers).ms == pytest.approx(whole(layers), rel=0.05)
    assert corrected.predict(layers).sd < plain.sd
    assert corrected.error < 0.1
    assert Predictor(measured).error is None


def test_a_layer_without_a_probe_makes_a_prediction_unsure():
    measured = {EMPTY: 0.01} | {s: layer_ms(s) for s in convolutions()}
    layers = convolutions(sizes=(8,))
    predictor = Predictor(measured)
    unknown = LayerShape("layer_norm", 64, 64, height=28, width=28)
    share = [p.sd / p.ms for p in (predictor.predict(layers), predictor.predict([*layers, unknown]))]
    assert share[1] > 1.2 * share[0]


def test_too_few_layers():
    with pytest.raises(ValueError, match="1 layers are too few"):
        Predictor({EMPTY: 0.1, LayerShape("add", 4, 4): 0.2})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path))
    return tmp_path


def test_the_table_keeps_apart_what_times_depend_on(cache):
    keys = [
        layer_table.key("onnxruntime", "fp32", 1, 1),
        layer_table.key("onnxruntime", "int8", 1, 1),
        layer_table.key("onnxruntime", "fp32", 2, 1),
        layer_table.key("onnxruntime", "fp32", 1, 8),
        layer_table.key("openvino", "fp32", 1, 1),
    ]
    assert {"onnxruntime", "penjing"} <= set(keys[0]["versions"])
    for number, key in enumerate(keys):
        layer_table.add(key, {EMPTY: 1.0 + number})
    assert [layer_table.read(key) for key in keys] == [{EMPTY: 1.0 + number} for number in range(5)]
    assert layer_table.read(keys[0] | {"versions": {"onnxruntime": "0.1"}}) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"conv"', "7"),
        lambda text: text.replace("0.5", "NaN"),
        lambda text: text.replace("0.5", "-1"),
        lambda text: text.replace("fp32", "fp64"),
    ],
    ids=["half", "list", "kind", "nan", "negative", "another"],
)
def test_a_damaged_table_is_none(cache, damage):
    key = layer_table.key("onnxruntime", "fp32", 1, 1)
    layer = LayerShape("conv", 4, 8, 3, 1, 1, 6, 6)
    layer_table.add(key, {layer: 0.5})
    (file,) = cache.glob("layer-times/*.json")
    file.write_text(damage(file.read_text()))
    assert layer_table.read(key) == {}
    layer_table.add(key, {layer: 0.25})
    assert layer_table.read(key) == {layer: 0.25}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes_write_the_table_at_once(cache):
    key = {"runtime": "x", "precision": "y"}

    def write(kind):
        for i in range(1, 20):
            layer_table.add(key, {LayerShape(kind, i, i): 1.0})

    both = [multiprocessing.get_context("fork").Process(target=write, args=(kind,)) for kind in ("add", "mul")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert layer_table.read(key) == {LayerShape(kind, i, i): 1.0 for kind in ("add", "mul") for i in range(1, 20)}


def test_a_cache_that_is_no_folder_is_none(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("PENJING_CACHE", str(cache / "file"))
    key = layer_table.key("onnxruntime", "fp32", 1, 1)
    layer_table.add(key, {EMPTY: 1.0})
    assert layer_table.read(key) == {}


def test_layers_are_measured_once(cache, monkeypatch):
    asked = [LayerShape("conv", 16, 16, 3, 1, 1, 14, 14), LayerShape("layer_norm", 8, 8)]
    first = layer_table.layer_times(asked, "onnxruntime", ("fp32", "int8"), threads=1, batch=1)
    monkeypatch.setattr(layer_table, "times", None)
    again = layer_table.layer_times(asked, "onnxruntime", ("fp32", "int8"), threads=1, batch=1)
    assert again == first
    for row in first.values():
        assert set(row) == {EMPTY, asked[0]}
        assert all(0 < ms < 1000 for ms in row.values())


def test_a_probe_that_a_runtime_does_not_take_is_left_out(monkeypatch):
    def refuse(shape, *rest):
        raise ExportError("no", code="x", got="x", expected="y")

    built = layer_probes.built
    monkeypatch.setattr(layer_probes, "built", lambda s, *rest: (refuse if s.kind == "mul" else built)(s, *rest))
    layers = [LayerShape("mul", 4, 4, height=6, width=6), LayerShape("add", 4, 4, height=6, width=6)]
    measured = layer_probes.times(layers, "onnxruntime", ("fp32",), threads=1, batch=1)
    assert set(measured["fp32"]) == {EMPTY, layers[1]}


def test_layers_around_a_network():
    conv = LayerShape("conv", 16, 32, 3, 1, 1, 14, 14)
    depth = LayerShape("conv", 32, 32, 3, 1, 32, 14, 14)
    stem = LayerShape("conv", 3, 16, 3, 1, 1, 14, 14)
    every = layer_table.around([conv, depth, stem, conv, LayerShape("layer_norm", 8, 8)])
    assert every[:3] == [conv, stem, depth]
    assert LayerShape("conv", 8, 16, 3, 1, 1, 14, 14) in every
    assert LayerShape("conv", 8, 8, 3, 1, 8, 14, 14) in every
    assert {s.inputs for s in every if s.inputs < 4} == {3}  # an image keeps its channels
    assert layer_table.around([conv, depth, stem], most=4) == every[:4]
