"""A Core ML package holds the plan's integers and scales to the bit, and what is read back computes as planned."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("coremltools")

from penjing import measure
from penjing.errors import ArtifactError, ExportError
from penjing.network.capture import capture_network
from penjing.numerics.codebooks import LookedUp, Table
from penjing.runtimes import coreml, coreml_operators, coreml_palettes, coreml_reading
from penjing.surgery import freeze
from penjing.tasks.task import Task
from tests.raises import raises_case
from tests.tiny_networks import Case, export


@pytest.fixture
def package(exported):
    """An integer package of a residual network, as it was planned, and the program that is read back."""
    artifact = exported("residual", "coreml", "int8-fp16")
    return artifact, coreml_reading.program(artifact.folder / coreml.PACKAGE)


def test_integers_and_scales_of_weights_are_the_plans_to_the_bit(package):
    artifact, program = package
    frozen = freeze(artifact.draft.network, artifact.draft.plan)
    stored = list(coreml_reading.weights(program).values())
    for layer in ("stem", "body", "head"):
        entry = artifact.draft.plan.entries[f"{layer}:weight"]
        integers = frozen.get_submodule("integers").get_submodule(layer).weight.numpy()
        (tensor,) = [t for t in stored if t["data"].shape == integers.shape and np.array_equal(t["data"], integers)]
        assert tensor["data"].dtype == np.int8 and tensor["scale"].dtype == np.float16
        assert tuple(tensor["scale"].astype(np.float32).reshape(-1).tolist()) == entry.scale
        assert "offset" not in tensor


def test_quantizers_of_activations_have_the_plans_scales(package):
    artifact, program = package
    planned = {e.scale[0] for edge, e in artifact.draft.plan.entries.items() if not edge.endswith(":weight")}
    own = {float(op.scale.val) for op in program.operations if op.op_type == "quantize"}
    assert len(own) >= 5 and own <= planned
    assert all(op.output_dtype.val == "int8" for op in program.operations if op.op_type == "quantize")


def test_a_product_reads_integers_and_stored_integers(package):
    _, program = package
    products = [op for op in program.operations if op.op_type in ("conv", "linear")]
    assert len(products) == 3
    for op in products:
        assert op.weight.op.op_type == "constexpr_blockwise_shift_scale"
        before = op.x.op
        while before.op_type in ("reshape", "max_pool", "cast"):
            before = before.x.op
        assert before.op_type == "dequantize"


def test_inputs_and_outputs_are_called_as_in_the_manifest_and_the_batch_varies(exported):
    artifact = exported("tokens", "coreml", "fp16")
    program = coreml_reading.program(artifact.folder / coreml.PACKAGE)
    ports = artifact.manifest.programs[0]
    assert list(program.inputs) == [port.name for port in ports.inputs] == ["tokens", "context"]
    assert [var.name for var in program.outputs] == [port.name for port in ports.outputs] == ["logits", "hidden"]
    session = coreml.open_session(artifact.folder, artifact.manifest, 1)
    for batch in (1, 3):
        answers = session.run(artifact.arrays(batch, seed=3))
        expected = artifact.answers(batch, seed=3)
        assert all(y.dtype == np.float32 for y in answers)
        assert measure.parity(expected, answers, "planned").snr_db > 55


def test_the_same_network_gives_the_same_bytes(exported, tmp_path):
    artifact = exported("tokens", "coreml", "fp16")
    manifest = coreml.export(artifact.network, artifact.task.call(), None, "fp16", artifact.structure, tmp_path)
    assert manifest == artifact.manifest
    assert all((tmp_path / f).read_bytes() == (artifact.folder / f).read_bytes() for f in manifest.files())


def test_an_operator_that_is_not_read_is_named(package, monkeypatch):
    artifact, _ = package
    monkeypatch.delitem(coreml_operators.OPERATORS, "max_pool")
    with pytest.raises(ArtifactError) as caught:
        coreml_reading.Reading(artifact.folder / coreml.PACKAGE)
    assert (caught.value.code, caught.value.got) == ("unread", "max_pool")


def test_padding_around_a_convolution_is_on_its_own_axis():
    x, weight = torch.arange(24.0).reshape(1, 1, 4, 6), torch.ones(1, 1, 3, 3)
    y = coreml_operators.conv(x, weight, [1, 1], "custom", [1, 1], 1, pad=[0, 2, 1, 0])
    expected = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 0, 0, 2)), weight)
    torch.testing.assert_close(y, expected)
    same = coreml_operators.conv(x, weight, [2, 2], "same", [1, 1], 1)
    assert same.shape == (1, 1, 2, 3)


def test_slices_and_means_of_windows_are_those_of_the_definitions():
    x = torch.arange(12.0).reshape(3, 4)
    kwargs = {"begin_mask": torch.tensor([False, True]), "squeeze_mask": torch.tensor([True, False])}
    assert coreml_operators.slice_by_index(x, [1, 0], [0, 3], **kwargs).tolist() == [4, 5, 6]
    reverse = coreml_operators.slice_by_index(
        x, [0, 0], [3, 0], stride=[1, -1], begin_mask=[False, True], end_mask=[False, True]
    )
    assert reverse[0].tolist() == [3, 2, 1, 0]
    window = x.reshape(1, 1, 3, 4)
    outside = coreml_operators.avg_pool(
        window, [2, 2], [2, 2], "custom", [0, 1, 0, 0], exclude_padding_from_average=True
    )
    assert outside[0, 0, 1].tolist() == [8.5, 10.5]
    inside = coreml_operators.avg_pool(window, [2, 2], [2, 2], "custom", [0, 1, 0, 0])
    assert inside[0, 0, 1].tolist() == [4.25, 5.25]


def book(values, rows=None):
    """A tensor of few values as a codebook, of all of it or of so many rows each."""
    shape = values.shape
    each = values.reshape(1 if rows is None else shape[0], -1)
    parts = np.split(each, 1 if rows is None else shape[0] // rows)
    entries, indices, starts, before = [], [], [], 0
    for part in parts:
        used, inside = np.unique(part, return_inverse=True)
        entries.append(used)
        indices.append(inside.reshape(part.shape) + before)
        starts += [before] * len(part)
        before += len(used)
    table = Table(np.concatenate(entries)[:, None], np.concatenate(indices).astype(np.int64), np.array(starts))
    return LookedUp((table,), shape)


class Few(nn.Module):
    """A convolution with a batch norm and a linear layer whose weights have few values."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 64)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def test_codebooks_become_palettes_with_their_own_entries(tmp_path):
    torch.manual_seed(0)
    network = Few().eval()
    nn.init.uniform_(network.norm.weight, 0.5, 2)
    with torch.no_grad():
        for layer in (network.conv, network.head):
            layer.weight.copy_((layer.weight * 16).round() / 16)
        network.head.weight[32:] *= 0.5  # another codebook from there on
    task = Task(example=torch.randn(2, 3, 8, 8))
    captured = capture_network(network, *task.call())
    books = {"conv.weight": book(network.conv.weight.detach().numpy())}
    books["head.weight"] = book(network.head.weight.detach().numpy(), rows=32)
    captured.meta["codebooks"] = books
    structure = {"kind": "tensor"}
    manifest = coreml.export(captured, task.call(), None, "fp16", structure, tmp_path)
    stored = coreml_reading.weights(coreml_reading.program(tmp_path / coreml.PACKAGE))
    by_shape = {tensor["indices"].shape: tensor["lut"] for tensor in stored.values()}
    assert by_shape.keys() == {(16, 3, 3, 3), (64, 16)}
    assert by_shape[16, 3, 3, 3].shape == (1, 1, 1, 1, 8, 1)
    assert by_shape[64, 16].shape[:2] == (2, 1)
    assert set(books["conv.weight"].tables[0].entries.reshape(-1)) <= set(by_shape[16, 3, 3, 3].reshape(-1).tolist())
    x = torch.randn(3, 3, 8, 8)
    (answer,) = coreml.open_session(tmp_path, manifest, 1).run([x.numpy()])
    assert measure.parity([network(x).detach().numpy()], [answer], "planned").snr_db > 50


def test_what_a_package_has_no_form_for_stays_a_dense_weight():
    few = np.resize(np.arange(4, dtype=np.float32), (32, 64))
    assert coreml_palettes.palette(book(few)).bits == 2
    many = np.arange(600, dtype=np.float32).reshape(20, 30)
    assert coreml_palettes.palette(book(many)) is None
    one = book(few)
    assert coreml_palettes.palette(LookedUp((*one.tables, *one.tables), one.shape)) is None


def test_in_single_precision_the_package_is_the_plan(exported):
    artifact = exported("residual", "coreml", "int8")
    answers = coreml.open_session(artifact.folder, artifact.manifest, 1).run(artifact.arrays(5, seed=3))
    assert measure.parity(artifact.answers(5, seed=3), answers, "planned").snr_db > 100


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("thresholded_relu", {"x": [-1.0, 0.5, 2.0], "alpha": 1.0}, [0, 0, 2]),
        ("reverse", {"x": [1.0, 2.0], "axes": [0]}, [2, 1]),
        ("sigmoid_hard", {"x": [-9.0, 0.0, 9.0], "alpha": 0.5, "beta": 0.5}, [0, 0.5, 1]),
        ("real_div", {"x": [4.0, 1.0], "y": 2.0}, [2, 0.5]),
        ("quantize", {"input": [0.5, 1.5, 900.0], "scale": 1.0, "output_dtype": "int8"}, [0, 2, 127]),
        ("reshape", {"x": [1.0, 2.0], "shape": [0, -1]}, [[1], [2]]),
        ("concat", {"values": [torch.tensor(2), 3, torch.tensor([4])], "axis": 0}, [2, 3, 4]),
        ("reduce_mean", {"x": [1.0, 2.0], "axes": [0], "keep_dims": True}, [1.5]),
    ],
)
def test_operators_compute_what_the_definitions_say(name, arguments, expected):
    values = {key: torch.tensor(value) if key in ("x", "input") else value for key, value in arguments.items()}
    assert coreml_operators.OPERATORS[name](**values).tolist() == expected


class Unknown(nn.Module):
    def forward(self, x):
        return torch.erfinv(x.tanh())


def test_an_operator_that_core_ml_has_no_form_of_is_named(tmp_path):
    with raises_case(ExportError, "no-coreml-form") as refusal:
        export(Case(Unknown, ((4,),), {}, ()), "coreml", "fp32", tmp_path)
    assert "/erfinv#0 (aten.erfinv.default)" in refusal.value.what
