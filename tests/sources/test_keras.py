"""Networks of Keras as sources: they compute what Keras says, become layers, and are compressed like any other."""

import inspect
import io
import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

os.environ["KERAS_BACKEND"] = os.environ.get("KERAS_BACKEND", "torch")
pytest.importorskip("keras")
pytest.importorskip("h5py")

import h5py
import keras
from keras import layers, ops

import penjing as pj
from penjing.errors import CheckpointError, ExportError, SourceError
from penjing.network.capture import capture_network
from penjing.network.graph import line
from penjing.records.manifest import read_manifest
from penjing.sources.source import in_single_precision, open_source
from penjing.tasks.task import Task
from tests.raises import raises_case

RUNTIMES = ("onnxruntime", "openvino")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="Keras runs on another backend")


def filled(model, seed=0):
    """The model with weights that are no initial values, so that a wrong order of axes or gates is seen."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        if "float" in str(variable.dtype):
            values = random.normal(0, 0.3, variable.shape).astype("float32")
            variable.assign(np.abs(values) + 0.5 if "variance" in variable.path else values)
    return model


def cnn():
    """A sequential network as of a phone: strides with uneven padding, separable and depthwise convolutions."""
    return keras.Sequential(
        [
            layers.Input((9, 9, 3), name="image"),
            layers.Conv2D(8, 3, padding="same", strides=2, use_bias=False, name="stem"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(6.0),
            layers.SeparableConv2D(12, 3, padding="same", activation="relu", name="sep"),
            layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="dw"),
            layers.BatchNormalization(scale=False, name="bn2"),
            layers.ReLU(),
            layers.Conv2D(16, 1, activation="relu", name="mix"),
            layers.MaxPooling2D(3, 2, padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.5, name="drop"),
            layers.Dense(5, name="head"),
        ]
    )


def functional():
    """Two inputs and outputs, a skip connection, squeeze and excitation, a shared layer, layers that enlarge."""
    image, row = keras.Input((8, 8, 3), name="image"), keras.Input((6,), name="row.1")
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="first")(image)
    y = layers.BatchNormalization(scale=False)(layers.Conv2D(8, 3, padding="same", name="second")(x))
    x = layers.Activation("swish")(layers.Add()([x, y]))
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = x * layers.Conv2D(8, 1, activation="sigmoid", name="gate")(gate)
    x = layers.Conv2D(8, 3, strides=2, name="third")(layers.ZeroPadding2D(((0, 1), (0, 1)))(x))
    x = layers.Concatenate()([x, layers.AveragePooling2D(2)(layers.LeakyReLU()(y))])
    x = layers.Conv2DTranspose(4, 3, strides=2, padding="same", name="larger")(x)
    x = layers.Flatten()(layers.MaxPooling2D(4)(layers.UpSampling2D(2)(x)))
    shared = layers.Dense(6, name="shared")
    z = shared(shared(row))
    scores = layers.Dense(3, name="scores")(layers.Concatenate()([x, z]))
    return keras.Model([image, row], [scores, layers.Dense(2, name="other")(z)])


class Attention(keras.Model):
    """A subclassed network: embedding, attention, layer norm, and a weight of its own."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(20, 8, name="table")
        self.attention = layers.MultiHeadAttention(2, 4, name="attention")
        self.norm, self.head = layers.LayerNormalization(name="norm"), layers.Dense(3, name="head")
        self.factor = self.add_weight(shape=(8,), name="factor", initializer="ones")

    def call(self, ids, training=False):
        x = self.table(ids)
        x = self.norm(x + self.attention(x, x)) * self.factor
        return self.head(ops.mean(x, axis=1))


def subclassed():
    model = Attention()
    model(np.zeros((2, 6), "int32"))
    return model


def recurrent():
    """Recurrent layers in one direction and in two, forwards and backwards, merged in several ways."""
    x = keras.Input((5, 4), name="x")
    y = layers.LSTM(6, return_sequences=True, name="lstm")(x)
    y = layers.Bidirectional(layers.GRU(4, return_sequences=True), name="both")(y)
    outputs = {
        "plain": layers.SimpleRNN(3, name="plain")(y),
        "backwards": layers.GRU(3, go_backwards=True, use_bias=False)(y),
        "sum": layers.Bidirectional(layers.LSTM(3), merge_mode="sum")(y),
    }
    return keras.Model(x, outputs)


def stepwise():
    """Gates with other activations, and a GRU that resets before its product: steps written out one by one."""
    x = keras.Input((4, 3), name="x")
    y, *states = layers.LSTM(3, recurrent_activation="hard_sigmoid", return_state=True, return_sequences=True)(x)
    return keras.Model(x, [layers.GRU(3, reset_after=False, name="old")(y), *states])


def masked():
    return keras.Sequential(
        [
            layers.Input((6,), dtype="int32", name="ids"),
            layers.Embedding(20, 4, mask_zero=True),
            layers.LSTM(5, return_sequences=True),
            layers.Bidirectional(layers.GRU(3)),
            layers.Dense(2),
        ]
    )


def lines():
    """Layers of one axis."""
    return keras.Sequential(
        [
            layers.Input((16, 3), name="signal"),
            layers.Conv1D(4, 3, padding="causal", dilation_rate=2),
            layers.PReLU(),
            layers.SeparableConv1D(6, 3, padding="same"),
            layers.MaxPooling1D(2),
            layers.Conv1DTranspose(6, 4, strides=2),
            layers.GroupNormalization(3),
            layers.LayerNormalization(),
            layers.GlobalMaxPooling1D(),
        ]
    )


@keras.saving.register_keras_serializable("tests")
class Cell(layers.Layer):
    """A recurrent cell of the user's own."""

    def __init__(self, units, **more):
        super().__init__(**more)
        self.state_size = self.units = units

    def build(self, shape):
        self.inward = self.add_weight(shape=(shape[-1], self.units), name="inward")
        self.onward = self.add_weight(shape=(self.units, self.units), name="onward")

    def call(self, x, states):
        state = ops.tanh(x @ self.inward + states[0] @ self.onward)
        return state, [state]


def cells():
    """Recurrent layers that only Keras has, written out step by step."""
    x = keras.Input((4, 5, 5, 2), name="film")
    y = layers.ConvLSTM2D(2, 2, return_sequences=True, name="film_steps")(x)
    y = layers.TimeDistributed(layers.Conv2D(3, 2, name="each"), name="frames")(y)
    y = layers.RNN([layers.LSTMCell(3), Cell(2, name="mine")], name="stack")(layers.Reshape((4, 27))(y))
    return keras.Model(x, y)


def pictures():
    """Bytes of a picture given by name, and layers that run by their own code; outputs by name."""
    x = keras.Input((8, 6, 4), dtype="uint8", name="picture")
    other = keras.Input((8, 6, 4), name="other")
    y = layers.Rescaling(1 / 127.5, offset=-1)(x) + other
    y = layers.PReLU(shared_axes=[1, 2])(layers.Conv2D(8, 3, groups=2, padding="same")(y))
    backbone = keras.Sequential([layers.Input((8, 6, 8)), layers.Conv2D(8, 1, name="conv")], name="backbone")
    y = layers.GroupNormalization(2)(backbone(y))
    outputs = {
        "same": layers.AveragePooling2D(3, 2, padding="same")(y),
        "larger": layers.UpSampling2D(2, interpolation="bilinear")(layers.Cropping2D(((1, 0), (2, 1)))(y)),
        "sized": layers.Resizing(5, 7)(layers.UnitNormalization()(y)),
        "chosen": layers.Softmax(axis=1)(layers.GlobalMaxPooling2D()(y)),
    }
    return keras.Model({"picture": x, "other": other}, outputs)


def attentions():
    """Attention with a causal mask, across two sequences, with grouped queries, and with a mask of padding."""
    ids, memory = keras.Input((6,), dtype="int32", name="ids"), keras.Input((4, 8), name="memory")
    x = layers.Embedding(20, 8, mask_zero=True, name="table")(ids)
    x = x + layers.MultiHeadAttention(2, 3, dropout=0.1, name="itself")(x, x, use_causal_mask=True)
    x = x + layers.MultiHeadAttention(2, 3, value_dim=4, name="across")(x, memory)
    y = layers.GroupQueryAttention(3, 4, 2, name="grouped")(memory, memory)
    return keras.Model([ids, memory], [layers.Attention(use_scale=True)([x, y]), layers.AdditiveAttention()([x, y])])


def images(count, size=9, seed=0):
    return torch.randn(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PADDED = torch.tensor([[3, 4, 5, 0, 0, 0], [1, 2, 0, 4, 5, 0], [7, 8, 9, 1, 2, 3]], dtype=torch.int32)
NETWORKS = {
    "sequential": (cnn, (images(3),)),
    "functional": (functional, (images(3, 8), normal(3, 6))),
    "subclassed": (subclassed, (torch.arange(18).reshape(3, 6),)),
    "recurrent": (recurrent, (normal(3, 5, 4),)),
    "stepwise": (stepwise, (normal(3, 4, 3),)),
    "masked": (masked, (PADDED,)),
    "lines": (lines, (normal(3, 16, 3),)),
    "cells": (cells, (normal(3, 4, 5, 5, 2),)),
    "pictures": (pictures, (normal(3, 8, 6, 4), (normal(3, 8, 6, 4, seed=1).abs() * 80).to(torch.uint8))),
    "attentions": (attentions, (PADDED, normal(3, 4, 8))),
}


def tensors(outputs):
    """Outputs in their order, whatever holds them."""
    if isinstance(outputs, dict):
        return [tensor for key in sorted(outputs) for tensor in tensors(outputs[key])]
    if isinstance(outputs, list | tuple):
        return [tensor for part in outputs for tensor in tensors(part)]
    return [torch.as_tensor(outputs)]


def predicted(model, example):
    arrays = [value.numpy() for value in example]
    structure = getattr(model, "input", None)
    if isinstance(structure, dict):
        arrays = [dict(zip(sorted(structure), arrays, strict=True))]
    return tensors(model.predict(arrays[0] if len(arrays) == 1 else arrays, verbose=0))


@pytest.fixture(scope="module", params=NETWORKS)
def opened(request):
    """A model of Keras, what it says of an example, and the captured network."""
    build, example = NETWORKS[request.param]
    model = filled(build())
    right = predicted(model, example)
    before = {variable.path: variable.numpy() for variable in model.weights}
    network = capture_network(open_source(model).module, tuple(value[:2] for value in example))
    assert all(np.array_equal(before[variable.path], variable.numpy()) for variable in model.weights)
    return request.param, example, right, network


def test_the_captured_network_computes_what_keras_says(opened):
    _, example, right, network = opened
    with torch.no_grad():
        outputs = tensors(network(*example))  # of another batch than it was captured with
    assert len(outputs) == len(right)
    for output, expected in zip(outputs, right, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def kinds(network):
    return {name: type(part) for name, part in network.named_modules() if not list(part.children()) and name}


def test_layers_are_layers_under_their_names_and_permutations_are_gone():
    network = capture_network(open_source(filled(cnn())).module, (images(2),))
    layer_classes = kinds(network)
    convolutions = {"stem", "sep.depthwise", "sep.pointwise", "dw", "mix"}
    assert {name for name, kind in layer_classes.items() if kind is nn.Conv2d} == convolutions
    assert {name for name, kind in layer_classes.items() if kind is nn.BatchNorm2d} == {"bn", "bn2"}
    assert layer_classes["head"] is nn.Linear and layer_classes["drop"] is nn.Dropout
    names = [str(node.target) for node in network.graph.nodes]
    assert sum("permute" in name for name in names) == 1  # of the input
    assert not any(word in name for name in names for word in ("aten.to", "contiguous", "reshape"))
    node = next(node for node in network.graph.nodes if node.target == "stem")
    assert "Conv2D: stem" in line(node)


class Wave(layers.Layer):
    """A layer of the user's."""

    def call(self, x):
        return ops.sin(x)


class Wavy(keras.Model):
    """A model of the user's, with an operator between its layers."""

    def __init__(self):
        super().__init__()
        self.sep, self.wave = layers.SeparableConv2D(4, 3, name="sep"), Wave(name="wave")

    def call(self, x):
        return ops.exp(self.wave(self.sep(x)))


def test_operators_are_told_by_their_layer_and_no_line_is_of_the_code_that_reads_it():
    model = Wavy()
    model(np.zeros((1, 8, 8, 3), "float32"))
    x = keras.Input((8, 8, 3))
    graph = keras.Model(x, ops.exp(layers.SeparableConv2D(4, 3, name="sep")(x)), name="net")
    calls = [inspect.getsourcelines(kind.call)[1] for kind in (Wave, Wavy)]
    for source, expected in (
        (model, {"sep.depthwise": "SeparableConv2D: sep", "sin": f"test_keras.py:{calls[0]} in Wave.call: wave",
                 "exp": f"test_keras.py:{calls[1]} in Wavy.call: {model.name}"}),
        (graph, {"sep.pointwise": "SeparableConv2D: sep", "exp": "net.keras:0 in Functional: net"}),
    ):  # fmt: skip
        network = capture_network(open_source(source).module, (images(2, 8),))
        nodes = [node for node in network.graph.nodes if node.op in ("call_module", "call_function") and line(node)]
        for name, place in expected.items():
            assert [place in line(node) for node in nodes if name in str(node.target)] == [True]
        assert not [line(node) for node in nodes if re.search(r"\Wkeras\w*\.py", line(node))]


def test_a_network_with_branches_keeps_two_permutations():
    example = NETWORKS["functional"][1]
    network = capture_network(open_source(filled(functional())).module, example)
    moves = [node for node in network.graph.nodes if "permute" in str(node.target)]
    assert len(moves) == 2  # of the image, and before what flattens
    assert network.meta["ports"] == {"inputs": {"image": "image", "row_1": "row.1"}, "outputs": ("scores", "other")}


def test_attention_has_its_weights_as_linear_layers():
    network = capture_network(open_source(filled(subclassed())).module, NETWORKS["subclassed"][1])
    layer_classes = kinds(network)
    projections = {f"attention.{word}" for word in ("query", "key", "value", "attention_output")}
    assert {name for name, kind in layer_classes.items() if kind is nn.Linear} == {*projections, "head"}
    assert layer_classes["table"] is nn.Embedding and layer_classes["norm"] is nn.LayerNorm
    assert "factor" in dict(network.named_parameters())


class Towers(keras.Model):
    """A subclassed network whose only argument is a dict or a list of its inputs, as Keras passes several."""

    def __init__(self):
        super().__init__()
        self.layer = layers.Dense(4, name="layer")

    def call(self, towers, training=False):
        first, second = (towers["query"], towers["item"]["picture"]) if isinstance(towers, dict) else towers
        return {"score": self.layer(first) * 2 + self.layer(second)}


@pytest.mark.parametrize(
    ("arrange", "names"),
    [
        (lambda query, item: {"query": query, "item": {"picture": item}}, ["query", "item_picture"]),
        (lambda query, item: [query, item], ["towers_0", "towers_1"]),
        (lambda query, item: (query, item), ["towers_0", "towers_1"]),
    ],
)
def test_a_subclassed_model_with_one_structure_of_inputs_takes_them_by_name(arrange, names):
    model, (query, item) = Towers(), normal(3, 5, 6).unbind(1)[:2]
    expected = model(arrange(query, item))["score"].detach()
    network = capture_network(open_source(model).module, (), dict(zip(names, (query, item), strict=True)))
    assert {node.name for node in network.graph.nodes if node.op == "placeholder"} == set(names)
    torch.testing.assert_close(network(**dict(zip(names, (query, item), strict=True)))["score"], expected)


def test_recurrent_layers_are_one_operator_each():
    network = capture_network(open_source(filled(recurrent())).module, NETWORKS["recurrent"][1])
    names = [str(node.target) for node in network.graph.nodes]
    assert sum("aten.lstm" in name for name in names) == 2
    assert sum("aten.gru" in name for name in names) == 2


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("size", "window", "stride", "dilation"), [(7, 3, 2, 1), (8, 2, 3, 1), (5, 3, 1, 2)])
def test_convolutions_and_their_transposes_pad_and_crop_as_keras_does(padding, size, window, stride, dilation):
    settings = {"strides": stride, "padding": padding, "dilation_rate": dilation}
    x = keras.Input((size, size, 2))
    outputs = [
        layers.Conv2D(3, window, **settings)(x),
        layers.Conv2DTranspose(3, window, **settings)(x),
        layers.MaxPooling2D(window, stride, padding=padding)(x),
    ]
    model = filled(keras.Model(x, outputs))
    example = normal(2, size, size, 2)
    with torch.no_grad():
        results = tensors(open_source(model).module(example))
    for output, expected in zip(results, predicted(model, (example,)), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A saved network, compiled so that the file holds a loss and an optimizer, too."""
    model = filled(cnn())
    model.compile("adam", "sparse_categorical_crossentropy")
    path = tmp_path_factory.mktemp("keras") / "small.keras"
    model.save(path)
    return path, model


@pytest.fixture(scope="module")
def task():
    return pj.Task(example=(images(1),), calibration=[images(16, seed=1), images(16, seed=2)])


def test_a_file_is_opened_with_an_example_of_its_inputs(file):
    path, model = file
    source = open_source(path)
    assert source.name == "small"
    assert [tuple(value.shape) for value in source.example] == [(1, 9, 9, 3)]
    with torch.no_grad():
        torch.testing.assert_close(source.module(images(3)), predicted(model, (images(3),))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted({*NETWORKS} - {"subclassed", "cells"}))
def test_a_file_holds_what_the_model_was(name, tmp_path):
    """Everything that Keras itself saves is opened again: operators between layers, masks, nested networks."""
    build, example = NETWORKS[name]
    model = filled(build())
    model.save(tmp_path / "net.keras")
    source = open_source(tmp_path / "net.keras")
    assert len(source.example) == len(example)
    with torch.no_grad():
        outputs = tensors(source.module(*example))
    for output, expected in zip(outputs, predicted(model, example), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def compressed(file, task, tmp_path_factory):
    for runtime in RUNTIMES:
        pytest.importorskip(runtime)
    recipe, out = pj.Recipe(pj.quantize.Static()), tmp_path_factory.mktemp("keras") / "run"
    return pj.run(recipe, str(file[0]), task, runtime=RUNTIMES, out=out, seconds=0.02, threads=1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_artifacts_agree_with_keras_and_every_convolution_is_integer(compressed, runtime):
    rows = {row.name: row for row in compressed.record.candidates}
    single, integers = rows[f"{runtime}-fp32"], rows[f"{runtime}-int8"]
    assert max(parity.largest for parity in single.parity) < 1e-4
    assert integers.rejection is None and min(parity.snr_db for parity in integers.parity) > 35
    executed = {layer.name: layer.executed for layer in integers.layers}
    assert {executed[name] for name in ("stem", "sep.depthwise", "sep.pointwise", "dw", "mix", "head")} == {"int8"}
    program = read_manifest(compressed.folder / "candidates" / single.name).programs[0]
    assert [port.name for port in program.inputs] == ["image"]
    assert [port.name for port in program.outputs] == ["head"]


def test_its_weights_are_counted_as_in_keras(compressed, file):
    # Keras counts moving averages; the factors that a batch norm lacks here are ones.
    trainable = sum(int(np.prod(v.shape)) for v in file[1].trainable_weights)
    ones = 24
    assert compressed.record.source.parameters == trainable + ones


def test_the_network_in_a_runtime_says_what_keras_predicts(compressed, file):
    import onnxruntime

    artifact = compressed.folder / "candidates" / "onnxruntime-fp32"
    program = read_manifest(artifact).programs[0]
    session = onnxruntime.InferenceSession(str(artifact / program.files[0]), providers=["CPUExecutionProvider"])
    example = images(4, seed=9)
    (output,) = session.run(["head"], {"image": example.numpy()})
    np.testing.assert_allclose(output, file[1].predict(example.numpy(), verbose=0), rtol=1e-4, atol=1e-4)


def test_it_is_pruned_and_trains(file, task):
    small = pj.apply(pj.Recipe(pj.prune.Channels(macs=0.6)), file[1], task)
    assert small.get_submodule("stem").out_channels < 8 or small.get_submodule("mix").out_channels < 16
    small.train()
    small(images(2)).sum().backward()
    assert all(small.get_submodule(name).weight.grad is not None for name in ("stem", "mix", "head"))
    assert small.get_submodule("drop").p == 0.5


def test_a_factory_may_return_a_model(tmp_path, task):
    code = "import keras\n\ndef net():\n    x = keras.Input((4,))\n"
    code += "    return keras.Model(x, keras.layers.Dense(2, name='head')(x))\n"
    (tmp_path / "net.py").write_text(code)
    source = open_source(f"{tmp_path / 'net.py'}:net")
    assert "head.weight" in dict(source.module.named_parameters())


# --- what is refused -----------------------------------------------------------------------------------------------


def changed(path, to, change):
    """The file with its config changed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                change(config)
                content = json.dumps(config).encode()
            new.writestr(name, content)
    return to


def layer_of(config, name):
    return next(layer for layer in config["config"]["layers"] if layer["config"].get("name") == name)


def lambda_layer(config):
    layer = layer_of(config, "mix")
    layer["class_name"], layer["config"] = "Lambda", {"name": "mix", "function": {"class_name": "__lambda__"}}


def lambda_activation(config):
    code = {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}}
    layer_of(config, "mix")["config"]["activation"] = code


def custom_layer(config):
    layer_of(config, "mix").update(module=None, class_name="Mixer", registered_name="mine>Mixer")


def imported_layer(config):
    layer_of(config, "mix").update(module="os", class_name="system", registered_name=None)


def library_layer(config):
    layer_of(config, "mix").update(module="keras_hub.layers", class_name="ReversibleEmbedding", registered_name=None)


def utility(config):
    layer_of(config, "mix")["config"]["activation"] = {
        "module": "keras.utils", "class_name": "function", "config": "get_file", "registered_name": "get_file",
    }  # fmt: skip


def hidden_registration(config):
    layer_of(config, "mix").update(module="keras.layers", registered_name="mine>Mixer")


def foreign_metric(config):
    config["config"]["layers"][1]["config"]["kernel_initializer"] = {
        "module": "subprocess", "class_name": "Popen", "config": {"args": ["true"]}, "registered_name": None,
    }  # fmt: skip


@pytest.mark.parametrize("activation", ["sharper", {"module": "builtins", "class_name": "function", "config": "sharper",
                                                    "registered_name": "function"}])  # fmt: skip
def test_a_function_that_keras_does_not_know_is_named(file, tmp_path, activation):
    def own(config):
        layer_of(config, "mix")["config"]["activation"] = activation

    with raises_case(CheckpointError, "custom-object") as caught:
        open_source(changed(file[0], tmp_path / "own.keras", own))
    assert "'sharper'" in str(caught.value)


FOREIGN = {
    "Lambda": (lambda_layer, "foreign-code"),
    "__lambda__": (lambda_activation, "foreign-code"),
    "mine>Mixer": (custom_layer, "custom-object"),
    "os.system": (imported_layer, "custom-object"),
    "keras_hub.layers.ReversibleEmbedding": (library_layer, "custom-object"),
    "get_file": (utility, "custom-object"),
    "'mine>Mixer'": (hidden_registration, "custom-object"),
    "subprocess.Popen": (foreign_metric, "custom-object"),
}


@pytest.mark.parametrize("named", FOREIGN)
def test_a_file_that_needs_code_is_refused_by_its_name_before_keras_reads_it(file, tmp_path, monkeypatch, named):
    change, code = FOREIGN[named]
    path = changed(file[0], tmp_path / "foreign.keras", change)
    monkeypatch.setattr(keras.saving, "load_model", lambda *a, **k: pytest.fail("Keras read the file"))
    with raises_case(CheckpointError, code) as caught:
        open_source(path)
    assert named in str(caught.value)


def test_a_custom_loss_of_the_training_does_not_matter(file, tmp_path):
    def own_loss(config):
        config["compile_config"] = {"loss": {"module": "mine", "class_name": "Loss", "config": {}}}

    assert open_source(changed(file[0], tmp_path / "trained.keras", own_loss)).name == "trained"


def test_the_loss_of_a_network_within_the_network_is_checked(tmp_path):
    """Keras makes it again, unlike that of the whole."""
    inner = keras.Sequential([layers.Input((4,)), layers.Dense(3)], name="inner")
    inner.compile("adam", keras.losses.SparseCategoricalCrossentropy(), metrics=["accuracy"])
    keras.Sequential([layers.Input((4,)), inner]).save(tmp_path / "plain.keras")
    assert "inner.dense" in str(list(open_source(tmp_path / "plain.keras").module.state_dict()))

    def own_loss(config):
        loss = {"module": "subprocess", "class_name": "Popen", "config": {"args": ["true"]}, "registered_name": None}
        layer_of(config, "inner")["compile_config"]["loss"] = loss

    with raises_case(CheckpointError, "custom-object") as caught:
        open_source(changed(tmp_path / "plain.keras", tmp_path / "inner.keras", own_loss))
    assert "subprocess.Popen" in str(caught.value)


def rewritten(path, to, members):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as new:
        for name in {**dict.fromkeys(old.namelist()), **members}:
            new.writestr(name, members[name] if name in members else old.read(name))
    return to


def weights_with(change):
    stored = io.BytesIO()
    with h5py.File(stored, "w") as weights:
        change(weights)
    return stored.getvalue()


def outside(weights):
    weights["layers"] = h5py.ExternalLink("/etc/other.h5", "/layers")


def beside(weights):
    weights.create_dataset("w", (4,), "f4", external=[("/etc/hostname", 0, 16)])


@pytest.mark.parametrize("change", [outside, beside])
def test_weights_that_lie_in_other_files_are_refused(file, tmp_path, change):
    members = {"model.weights.h5": weights_with(change)}
    with raises_case(CheckpointError, "foreign-code"):
        open_source(rewritten(file[0], tmp_path / "linked.keras", members))


def test_a_file_that_would_grow_is_refused(file, tmp_path):
    def sparse(weights):
        weights.create_dataset("w", (1 << 34,), "f4", chunks=(1 << 20,))

    for n, members in enumerate(
        ({"model.weights.h5": weights_with(sparse)}, {"config.json": b"{" + b" " * (1 << 27) + b"}"})
    ):
        with raises_case(CheckpointError, "damaged"):
            open_source(rewritten(file[0], tmp_path / f"bomb{n}.keras", members))


@pytest.mark.parametrize("name", ["filters", "units"])
def test_sizes_beyond_the_weights_take_no_memory(tmp_path, name):
    inputs = keras.Input((8, 8, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(7, 3)(inputs))
    keras.Model(inputs, keras.layers.Dense(5)(pooled)).save(tmp_path / "net.keras")
    with zipfile.ZipFile(tmp_path / "net.keras") as archive:
        config = archive.read("config.json").decode()
    size = {"filters": 7, "units": 5}[name]
    text = f'"{name}": {size}'
    assert text in config
    members = {"config.json": config.replace(text, f'"{name}": {1 << 31}').encode()}
    with raises_case(CheckpointError, "damaged") as caught:
        open_source(rewritten(tmp_path / "net.keras", tmp_path / "huge.keras", members))
    assert f"{name} = 2,147,483,648 in layer" in caught.value.got


FACTORS = {
    "width by width": (
        layers.Dense(1500),
        {'"units": 1500': '"units": 30000', "8, 8, 4": "80, 80, 40", "256": "256000"},
    ),
    "window": (layers.Conv2D(6, 3, padding="same"), {'"kernel_size": [3, 3]': '"kernel_size": [9000, 9000]'}),
    "outputs": (layers.EinsumDense("ahwc,cde->ahwde", (8, 8, 3, 5)), {"[8, 8, 3, 5]": "[8, 8, 90000, 90000]"}),
}


@pytest.mark.parametrize("name", FACTORS)
def test_small_sizes_whose_product_is_beyond_the_weights_take_no_memory(tmp_path, name):
    layer, change = FACTORS[name]
    inputs = keras.Input((8, 8, 4))
    outputs = layer(layers.Flatten()(inputs) if "width" == name[:5] else inputs)
    keras.Model(inputs, layers.Dense(2, name="head")(outputs)).save(tmp_path / "net.keras")
    with zipfile.ZipFile(tmp_path / "net.keras") as archive:
        config = archive.read("config.json").decode()
    for old, new in change.items():
        assert old in config, config
        config = config.replace(old, new)
    before = keras.Variable.__init__
    with raises_case(CheckpointError, "larger-than-weights") as caught:
        open_source(rewritten(tmp_path / "net.keras", tmp_path / "huge.keras", {"config.json": config.encode()}))
    assert layer.name in caught.value.got and keras.Variable.__init__ is before


def test_other_members_and_damaged_files_are_refused(file, tmp_path):
    with raises_case(CheckpointError, "foreign-code") as caught:
        open_source(rewritten(file[0], tmp_path / "more.keras", {"assets/run.py": b"print()"}))
    assert "assets/run.py" in str(caught.value)
    content = file[0].read_bytes()
    for n, damaged in enumerate((content[: len(content) // 2], b"not an archive", content.replace(b"HDF", b"XXX"))):
        path = tmp_path / f"damaged{n}.keras"
        path.write_bytes(damaged)
        with raises_case(CheckpointError, "damaged"):
            open_source(path)


def test_weights_that_do_not_fit_are_refused(file, tmp_path):
    def smaller(config):
        layer_of(config, "head")["config"]["units"] = 3

    with raises_case(CheckpointError, "damaged"):
        open_source(changed(file[0], tmp_path / "other.keras", smaller))


def test_a_model_without_weights_is_refused():
    with raises_case(SourceError, "not-built"):
        open_source(keras.Sequential([layers.Dense(3)]))


def test_states_between_calls_are_refused():
    x = keras.Input(batch_shape=(2, 4, 3))
    with raises_case(SourceError, "stateful") as caught:
        open_source(keras.Model(x, layers.LSTM(3, stateful=True, name="steps")(x)))
    assert "'steps'" in str(caught.value)


def test_a_long_sequence_that_runs_step_by_step_is_refused_and_a_long_lstm_is_not():
    x = keras.Input((500, 3))
    model = keras.Model(x, layers.GRU(2, reset_after=False, name="old")(x))
    with raises_case(SourceError, "unrolled") as caught:
        capture_network(open_source(model).module, (normal(2, 500, 3),))
    assert "'old'" in str(caught.value)
    network = capture_network(open_source(keras.Model(x, layers.LSTM(2)(x))).module, (normal(2, 500, 3),))
    assert len(network.graph.nodes) < 20


def test_half_precision_is_refused_in_memory_and_computed_in_single_from_a_file(tmp_path):
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(3, dtype="mixed_bfloat16", name="half")(x))
    with raises_case(SourceError, "half"):
        open_source(model)
    model.save(tmp_path / "half.keras")
    assert open_source(tmp_path / "half.keras").module(normal(2, 4)).dtype == torch.float32


class Chooses(layers.Layer):
    """What no graph holds: Python that follows the values of a tensor."""

    def call(self, x):
        return x * 2 if float(x.sum()) > 0 else x


def test_a_layer_that_cannot_be_exported_is_named():
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2)(Chooses(name="chooses")(x)))
    with raises_case(ExportError, "keras-layer") as caught:
        capture_network(open_source(model).module, (normal(2, 4),))
    assert "'chooses' (Chooses)" in str(caught.value)


def test_another_backend_is_refused_with_the_remedy():
    code = (
        "import sys, types\n"
        "keras = types.ModuleType('keras'); keras.__version__ = '3'; keras.Layer = type('Layer', (), {})\n"
        "keras.backend = types.SimpleNamespace(backend=lambda: 'jax'); sys.modules['keras'] = keras\n"
        "from penjing.sources.source import open_source\n"
        "try:\n    open_source(keras.Layer())\nexcept Exception as error:\n    print(error.code, error.remedy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("backend ") and "KERAS_BACKEND=torch" in done.stdout, done.stderr


def test_weights_that_are_nan_are_refused_by_the_name_of_the_layer(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="head")])
    model.layers[0].set_weights([np.full((4, 2), np.nan, "float32"), np.zeros(2, "float32")])
    model.save(tmp_path / "net.keras")
    for source in (tmp_path / "net.keras", model):
        with raises_case(SourceError, "weight-not-finite") as error:
            open_source(source)
        assert "head.weight" in error.value.what and "8 of 8" in error.value.got


def test_sizes_that_a_model_leaves_open_are_told_with_what_lets_them_vary():
    x = keras.Input((None, None, 1), name="scan")
    source = open_source(keras.Model(x, layers.Conv2D(2, 3, padding="same")(x)))
    example = torch.zeros(1, 6, 8, 1)
    note = in_single_precision(source, Task(example=example))[2]
    assert "the axis 1 of scan and the axis 2 of scan have the example's size" in note
    names = {"scan": {0: "batch", 1: "scan_1", 2: "scan_2"}}
    assert f"Task(dynamic={names}) lets them vary" in note
    assert in_single_precision(source, Task(example=example, dynamic=names))[2] is None
    network = capture_network(source.module, (example,), {}, names)
    assert network(torch.zeros(2, 9, 5, 1)).shape == (2, 9, 5, 2)


def test_the_length_of_a_recurrent_model_is_told_to_be_the_examples():
    x = keras.Input((None, 3), name="x")
    source = open_source(keras.Model(x, layers.GRU(4)(x)))
    note = in_single_precision(source, Task(example=torch.zeros(1, 6, 3)))[2]
    assert note.startswith("the axis 1 of x has the example's size") and "recurrent" in note
