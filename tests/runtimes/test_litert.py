"""LiteRT: one sample a file, the plan's own integers, and what the file's operators really are."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing import measure, runtimes
from penjing.errors import ArtifactError, ExportError
from penjing.network.capture import capture_network
from penjing.pipeline import building
from penjing.pipeline.device import write_bench
from penjing.pipeline.verify import verify
from penjing.quantize import Static
from penjing.records.manifest import write_manifest
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import freeze, insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.pairs import FLOAT_DB
from tests.raises import raises_case

pytest.importorskip("litert_torch")
runtime = pytest.importorskip("penjing.runtimes.litert")
pytest.importorskip("ai_edge_litert")

INTEGER_DB = 30.0


def conv(inputs, outputs, kernel=3, **more):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **more)


class Pictures(nn.Module):
    """Batch norm, depthwise and grouped convolutions, a residual addition, both poolings, concatenation, a split."""

    shape, integer = (3, 16, 16), {"conv": 6, "add": 1, "avg_pool": 2, "cat": 1, "linear": 1}

    def __init__(self):
        super().__init__()
        self.stem, self.norm = conv(3, 8, stride=2, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.point = conv(8, 8, groups=8), conv(8, 8, 1)
        self.grouped, self.other = conv(8, 8, groups=2), conv(4, 4)
        self.merge, self.head = conv(12, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.point(F.relu6(self.depthwise(x))) + x
        a, b = F.max_pool2d(x, 2), F.avg_pool2d(x, 2)
        left, _ = a.chunk(2, 1)
        x = F.relu(self.merge(torch.cat([F.relu(self.grouped(b)), self.other(left)], 1)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Gates(nn.Module):
    """Squeeze-and-excitation with a hard sigmoid, hard swish, SiLU, and a concatenation of unlike values as output."""

    shape, integer = (3, 8, 8), {"conv": 6, "avg_pool": 1}

    def __init__(self):
        super().__init__()
        self.stem, self.next, self.last, self.far = conv(3, 8), conv(8, 8), conv(8, 4), conv(8, 4)
        self.squeeze, self.excite = conv(8, 4, 1), conv(4, 8, 1)

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.silu(self.next(x * gate))
        return torch.cat([self.last(x), 100 * self.far(x)], 1)


class Tokens(nn.Module):
    """An embedding, layer norm, causal attention, GELU."""

    shape, integer = None, {"linear": 4, "matmul": 2, "add": 2}

    def __init__(self):
        super().__init__()
        self.table, self.block = nn.Embedding(20, 16), nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, activation="gelu", batch_first=True
        )  # fmt: skip

    def forward(self, tokens):
        later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        return self.block(self.table(tokens), src_mask=later, is_causal=True)


class Sequences(nn.Module):
    """Convolutions over a sequence, one of them transposed and cropped, and an LSTM."""

    shape, integer = (4, 9), {"conv": 1, "linear": 1}

    def __init__(self):
        super().__init__()
        self.mix, self.up = nn.Conv1d(4, 8, 3, padding=1), nn.ConvTranspose1d(8, 6, 3, stride=2, padding=1)
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.up(F.relu(self.mix(x)))[..., ::4]
        return self.head(self.lstm(x.transpose(1, 2))[0][:, -1])


class Twice(nn.Module):
    """A layer that is called twice, and values that are read several times, two of them outputs."""

    shape, integer = (3, 8, 8), {"conv": 3, "add": 1}

    def __init__(self):
        super().__init__()
        self.layer, self.up = conv(3, 3), nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1)
        self.deep = nn.Conv2d(3, 3, 3, dilation=2)

    def forward(self, x):
        x = self.layer(F.relu(self.layer(x))) + x
        return {"map": x, "mean": x.mean((2, 3)), "up": self.up(self.deep(x))}


NETWORKS = {cls.__name__: cls for cls in (Pictures, Gates, Tokens, Sequences, Twice)}


def inputs(cls, samples, seed):
    generator = torch.Generator().manual_seed(seed)
    if cls.shape is None:
        return torch.randint(0, 20, (samples, 5), generator=generator)
    return torch.randn(samples, *cls.shape, generator=generator)


def built(network, task, precision, folder):
    """The draft and the manifest of an artifact."""
    draft = Draft(network)
    if precision == "int8":
        capabilities = runtime.capabilities(measure.machine(1).instruction_sets)
        draft = Static()(draft, Context(task=task, capabilities=capabilities))
    args, kwargs = task.call()
    structure = flatten_outputs(network(*args, **kwargs))[1]
    return draft, building.build(draft, "litert", precision, task, structure, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(name, precision)``: class, draft, manifest, folder and task, each made once."""
    known = {}

    def get(name, precision):
        if (name, precision) not in known:
            cls, folder = NETWORKS[name], tmp_path_factory.mktemp("litert")
            torch.manual_seed(0)
            task = Task(example=inputs(cls, 2, 0), calibration=[inputs(cls, 16, seed) for seed in (1, 2)])
            network = capture_network(cls().eval(), *task.call())
            known[name, precision] = (cls, *built(network, task, precision, folder), folder, task)
        return known[name, precision]

    return get


def answers(network, x):
    with torch.no_grad():
        return [leaf.numpy() for leaf in flatten_outputs(network(x))[0]]


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "int8") for name in NETWORKS), ("Pictures", "fp32"), ("Sequences", "fp32")]
)
def test_it_answers_as_torch_does_for_every_number_of_samples(made, name, precision):
    cls, draft, manifest, folder, _ = made(name, precision)
    session = isolated.open_artifact(folder, 1)
    reference = insert(draft.network, draft.plan) if draft.plan else draft.network
    for samples in (1, 3):
        x = inputs(cls, samples, 7)
        outputs = session.run([x.numpy().astype(manifest.programs[0].inputs[0].dtype)])
        expected = answers(reference, x)
        assert [o.shape for o in outputs] == [e.shape for e in expected]
        limit = INTEGER_DB if draft.plan else FLOAT_DB
        assert all(
            measure.parity([[e]], [[o]], "planned").snr_db >= limit for o, e in zip(outputs, expected, strict=True)
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_the_operators_of_the_plan_are_integer_operators_of_the_file(made, name):
    cls, draft, manifest, folder, task = made(name, "int8")
    rows, integer, _ = building.executed_rows(draft.network, draft.plan, task.call(), manifest, folder)
    assert cls.integer.items() <= integer.items()
    planned = {row.name for row in rows if row.planned == "int8" and row.kind in cls.integer}
    assert planned and {row.executed for row in rows if row.name in planned} == {"int8"}
    assert not {row.name for row in rows if row.executed == "int8"} & draft.plan.floats.keys()


def test_products_of_activations_are_exact_but_beside_the_middle_of_two_steps(made):
    """The kernel rounds twice: that is why parity allows LiteRT's integers more rounding than others."""
    from ai_edge_litert.interpreter import Interpreter

    cls, _, _, folder, _ = made("Tokens", "int8")
    file = Interpreter(str(folder / "model.tflite"), experimental_preserve_all_tensors=True)
    file.allocate_tensors()
    tensors = {tensor["index"]: tensor for tensor in file.get_tensor_details()}
    products = [row for row in file._get_ops_details() if row["op_name"] == "BATCH_MATMUL"]
    assert len(products) == 2
    for seed in range(10):
        file.set_tensor(file.get_input_details()[0]["index"], inputs(cls, 1, seed).numpy().astype(np.int32))
        file.invoke()
        for row in products:
            indices = (*row["inputs"][:2], row["outputs"][0])
            (p, a), (q, b), (r, c) = ((*tensors[i]["quantization"],) for i in indices)
            x, y, z = (file.get_tensor(i).astype(np.float64) for i in indices)
            exact = (x - a) @ (y - b) * (p * q / r) + c
            assert np.abs(np.clip(exact, -128, 127) - z).max() <= 0.5 + 1 / 128
    assert runtime.capabilities(()).rounding < 1 / 128 / 127


@pytest.mark.parametrize(("name", "whole"), [("Pictures", False), ("Twice", True)])
def test_the_weights_of_the_file_are_the_integers_of_the_plan(made, name, whole):
    _, draft, _, folder, _ = made(name, "int8")
    frozen = freeze(draft.network, draft.plan)
    planned = [b for n, b in frozen.named_buffers() if n.endswith(".weight") and b.dtype == torch.int8]
    if whole:  # a layer behind average pooling reads the pooling's own grid, on which its bias is another integer
        planned += [b for n, b in frozen.named_buffers() if n.endswith(".bias") and b.dtype == torch.int32]
    stored = _constants((folder / "model.tflite").read_bytes())
    assert len(planned) > 1
    for values in planned:
        assert _sorted(values.numpy()) in [_sorted(array) for array in stored if array.dtype == values.numpy().dtype]


def _sorted(values):
    return sorted(values.ravel().tolist())  # layouts differ: channels come last


def _constants(data):
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    types = {schema.TensorType.INT8: np.int8, schema.TensorType.INT32: np.int32}
    return [
        np.asarray(model.buffers[tensor.buffer].data).view(types[tensor.type])
        for tensor in model.subgraphs[0].tensors
        if tensor.type in types and model.buffers[tensor.buffer].data is not None
    ]


class Padded(nn.Module):
    """Zeros on two sides, as TensorFlow's networks have them, in front of convolutions."""

    shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, stride=2, groups=8)

    def forward(self, x):
        return self.deep(F.pad(F.relu6(self.stem(F.pad(x, (0, 1, 0, 1)))), (0, 1, 0, 1)))


def test_padding_in_front_of_convolutions_becomes_theirs(tmp_path):
    torch.manual_seed(0)
    task = Task(example=inputs(Padded, 2, 0), calibration=[inputs(Padded, 16, 1)])
    draft, manifest = built(capture_network(Padded().eval(), *task.call()), task, "int8", tmp_path)
    types = [operator.type for operator in isolated.executed(tmp_path, manifest)]
    assert types == ["TRANSPOSE", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE"]
    x = inputs(Padded, 1, 7)
    (outputs,) = isolated.open_artifact(tmp_path, 1).run([x.numpy()])
    np.testing.assert_array_equal(outputs, answers(insert(draft.network, draft.plan), x)[0])


class Swishes(nn.Module):
    """Functions that XNNPACK computes in floating point alone, between layers that it computes in integers."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.head = conv(3, 8), conv(8, 8), conv(8, 4)

    def forward(self, x):
        return self.head(F.gelu(self.middle(F.hardswish(self.stem(x)))))


@pytest.mark.parametrize(("sets", "precision"), [(("avx", "avx2"), "fp32"), ((), "int8")])
def test_functions_stay_in_floating_point_where_they_would_interrupt_xnnpack(tmp_path, sets, precision):
    from ai_edge_litert.interpreter import Interpreter

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    task = Task(example=x, calibration=[x])
    network = capture_network(Swishes().eval(), *task.call())
    capabilities = runtime.capabilities(sets)
    draft = Static()(Draft(network), Context(task=task, capabilities=capabilities))
    manifest = building.build(draft, "litert", "int8", task, flatten_outputs(network(x))[1], tmp_path)
    operators = {operator.type: operator.precision for operator in isolated.executed(tmp_path, manifest)}
    assert {operators[name] for name in ("HARD_SWISH", "GELU")} == {precision}
    assert operators["CONV_2D"] == "int8"
    file = Interpreter(str(tmp_path / "model.tflite"))
    file.allocate_tensors()
    delegated = [row for row in file._get_ops_details() if row["op_name"] == "DELEGATE"]
    assert (len(delegated) == 1) == (precision == "fp32")
    outputs = isolated.open_artifact(tmp_path, 1).run([x.numpy()])
    assert measure.parity([answers(insert(draft.network, draft.plan), x)], [outputs], "planned").snr_db >= INTEGER_DB
    told = {f"litert has no integer kernel for {kind}" for kind in ("hardswish", "gelu")}
    assert set(draft.plan.floats.values()) == (told if precision == "fp32" else set())


def test_the_same_network_gives_the_same_file(made, tmp_path):
    _, draft, manifest, folder, task = made("Gates", "int8")
    building.build(draft, "litert", "int8", task, manifest.structure, tmp_path)
    assert (tmp_path / "model.tflite").read_bytes() == (folder / "model.tflite").read_bytes()


@pytest.mark.parametrize("kept", [0, 7, 0.5, 0.97])
def test_a_truncated_file_is_refused_and_the_run_goes_on(made, tmp_path, kept):
    _, _, manifest, folder, _ = made("Pictures", "int8")
    data = (folder / "model.tflite").read_bytes()
    write_manifest(tmp_path, manifest)
    (tmp_path / "model.tflite").write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    with pytest.raises(ArtifactError):
        isolated.open_artifact(tmp_path, 1).run([np.zeros((1, 3, 16, 16), np.float32)])
    assert len(isolated.open_artifact(folder, 1).run([np.zeros((1, 3, 16, 16), np.float32)])) == 1


def test_a_file_with_damaged_numbers_ends_no_process_but_its_own(made, tmp_path):
    _, _, manifest, folder, _ = made("Pictures", "int8")
    shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((folder / "model.tflite").read_bytes())
    refused = 0
    for start in range(16, len(data) - 64, len(data) // 8):
        damaged = bytearray(data)
        damaged[start : start + 64] = b"\xff" * 64
        (tmp_path / "copy" / "model.tflite").write_bytes(bytes(damaged))
        try:
            isolated.open_artifact(tmp_path / "copy", 1).run([np.zeros((1, 3, 16, 16), np.float32)])
        except ArtifactError:
            refused += 1
    assert refused >= 3  # the others have other weights


class Sorted(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.head, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.head(x))


@pytest.mark.parametrize(
    ("function", "code", "named"),
    [
        (torch.erfinv, "no-litert-form", "/erfinv#0 (aten.erfinv.default)"),
        (lambda x: torch.linalg.inv(x[:, None] * x[..., None] + torch.eye(4)), "no-litert-form", "/linalg_inv"),
        (lambda x: x.topk(2)[0], "no-litert-kernel", "STABLEHLO_SORT of /topk#0"),
    ],
)
def test_an_operator_that_it_lacks_is_named_with_its_layer(tmp_path, function, code, named):
    x = torch.randn(2, 4)
    network = capture_network(Sorted(function).eval(), (x,))
    with raises_case(ExportError, code) as refusal:
        runtime.export(network, ((x,), {}), None, "fp32", {"kind": "tensor"}, tmp_path)
    assert named in refusal.value.what and "another runtime" in refusal.value.remedy


def test_samples_that_affect_each_other_are_refused(tmp_path):
    x = torch.randn(2, 4)
    network = capture_network(Sorted(lambda y: y - y.mean(0)).eval(), (x,))
    with raises_case(ExportError, "samples-together"):
        runtime.export(network, ((x,), {}), None, "fp32", {"kind": "tensor"}, tmp_path)


def test_sizes_that_vary_are_refused_and_fixed_ones_are_taken(tmp_path):
    x = torch.randn(2, 5, 4)
    network = capture_network(Sorted(torch.relu).eval(), (x,), dynamic={"x": {0: "batch", 1: "length"}})
    with raises_case(ExportError, "varying-sizes") as refusal:
        runtime.export(network, ((x,), {}), {"x": {0: "batch", 1: "length"}}, "fp32", {"kind": "tensor"}, tmp_path)
    assert "pad" in refusal.value.remedy
    manifest = runtime.export(network, ((x,), {}), {}, "fp32", {"kind": "tensor"}, tmp_path)
    assert manifest.programs[0].inputs[0].shape == (2, 5, 4)
    write_manifest(tmp_path, manifest)
    (outputs,) = isolated.open_artifact(tmp_path, 1).run([x.numpy()])
    np.testing.assert_allclose(outputs, answers(network, x)[0], atol=1e-6)


def test_it_is_not_considered_unless_it_is_named():
    assert "litert" in runtimes.SPECS and "litert" not in runtimes.DEPLOYED
    capabilities = runtime.capabilities(("avx2",))
    assert capabilities.activation.signed and not capabilities.activation.symmetric
    assert capabilities.weight.axis == 0 and capabilities.weight.symmetric
    assert capabilities.integer == capabilities.quantized_output  # its kernels write integers where they read them


def test_sites_survive_as_names_in_the_file():
    for site in ("layer1.0.conv1", "m@1", "/relu#0", "a;b/c d"):
        assert runtime.sites_of(f"{runtime.named(site)};3") == [site]
    assert runtime.sites_of("/relu#0;;norm;;stem;2") == ["/relu#0", "norm", "stem"]
    assert runtime.sites_of("serving_default_x") == []


def test_tokens_in_int64_are_taken_by_a_run_verify_and_the_folder_for_the_device(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)).eval()
    tokens = torch.randint(0, 9, (16, 3))
    task = pj.Task(example=tokens[:1], calibration=[tokens])
    options = {"runtime": "litert", "recipe": pj.Recipe(), "seconds": 0.0, "threads": 1}
    run = pj.compress(network, task, out=tmp_path / "run", goal="minimize size_bytes", **options)
    assert [c.name for c in run.record.candidates] == ["litert-fp32"]
    assert all(check.holds is not False for check in verify(run.folder, threads=1, seconds=0))
    with np.load(write_bench(run.folder, tmp_path / "bench") / "samples.npz") as samples:
        inputs = [samples[name].dtype for name in samples.files if name.startswith(("input", "timed"))]
    assert len(inputs) == 2 and set(inputs) == {np.dtype(np.int32)}
