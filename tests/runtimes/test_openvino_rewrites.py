"""What OpenVINO 2026.4 gets wrong with some numbers of threads, rows and axes, right in the files that are written."""

import dataclasses

import numpy as np
import openvino
import pytest
import torch
import torch.nn.functional as F
from openvino import opset13
from torch import nn

from penjing import runtimes, surgery
from penjing.measure import machine
from penjing.network.capture import capture_network
from penjing.pipeline import building
from penjing.quantize import Static
from penjing.runtimes import openvino as runtime
from penjing.runtimes import openvino_rewrites
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task


class Linears(nn.Module):
    def __init__(self, activation, bias=None, sizes=(32, 64, 48, 4)):
        super().__init__()
        self.activation = activation
        pairs = zip(sizes, sizes[1:], strict=False)
        self.layers = nn.ModuleList([nn.Linear(a, b, bias=bias is not None) for a, b in pairs])
        for layer in self.layers if bias is not None else ():
            nn.init.constant_(layer.bias, bias)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class StoredProducts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(32, 64) / 6), nn.Parameter(torch.randn(64, 4) / 8)

    def forward(self, x):
        return F.relu(x @ self.w) @ self.v


class Halves(nn.Module):
    """A bilinear layer: a sum over the last axis, with a bias for each channel behind it."""

    def __init__(self):
        super().__init__()
        self.product, self.out = nn.Bilinear(12, 20, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(F.relu(self.product(x[:, :12], x[:, 12:])))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, n, bias=False) for n in (32, 32, 4))

    def forward(self, x):
        h = self.a(x)
        return self.c(F.relu(h + self.b(h)))


class Blocks(nn.Module):
    """Residual blocks: values that are added to what two linear layers make of them."""

    def __init__(self, bias, inner=nn.ReLU, width=32, before=nn.Identity, behind=nn.Identity, beside=False):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(before(width), nn.Linear(width, 64, bias=bias), inner(), nn.Linear(64, width, bias=bias))
            for _ in range(2)
        )
        self.beside = nn.Linear(width, width, bias=bias) if beside else nn.Identity()
        self.behind, self.head = behind(), nn.Linear(width, 5, bias=bias)

    def forward(self, x):
        for branch in self.branches:
            x = self.behind(self.beside(x) + branch(x))
        return self.head(x)


class Normed(nn.Module):
    """Additions behind batch norms, and one that is an output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.n, self.m = nn.BatchNorm1d(32), nn.BatchNorm1d(32)

    def forward(self, x):
        x = F.relu(x + self.n(self.a(x)))
        return x + self.m(self.b(x))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mix = nn.Conv1d(1, 16, 5, bias=False), nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 4, bias=False)

    def forward(self, x):
        x = F.relu(self.conv(x[:, None])).mean(2)
        return self.head(x + F.silu(self.mix(x)))


class FirstToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True, bias=False)
        self.mix, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 4, bias=False)

    def forward(self, x):
        x = self.encode(x.unflatten(0, (-1, 1)).expand(-1, 5, -1) * torch.arange(1.0, 6.0)[:, None])[:, 0]
        return self.head(x + F.relu(self.mix(x)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def identity(x):
    return x


def decibels(expected, got):
    return 10 * np.log10((expected**2).mean() / max(((expected - got) ** 2).mean(), 1e-20))


def rows(n, seed):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)


def quantized(network, folder, draw):
    task = Task(example=draw(2, 0), calibration=[draw(16, seed) for seed in range(1, 5)])
    graph = capture_network(network, (draw(2, 0),))
    structure = flatten_outputs(graph(draw(2, 0)))[1]
    capabilities = runtimes.get("openvino").capabilities(machine(1).instruction_sets)
    draft = Static()(Draft(graph), Context(task=task, capabilities=capabilities, source=graph))
    return draft, building.build(draft, "openvino", "int8", task, structure, folder)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Linears(F.relu),
        lambda: Linears(identity),
        lambda: Linears(F.relu6, sizes=(32, 24, 4)),
        lambda: Linears(F.gelu),
        lambda: Linears(F.relu, bias=0.0),
        lambda: Linears(F.relu, bias=0.5),
        lambda: Linears(F.relu, sizes=(32, 64, 1)),
        StoredProducts,
        Residual,
        Halves,
    ],
    ids="relu none relu6 gelu zeros halves one_output stored residual bilinear".split(),
)
def test_matrices_are_right_with_every_number_of_threads_and_rows(build, tmp_path):
    torch.manual_seed(1)
    network = build().eval()
    draft, manifest = quantized(network, tmp_path, rows)
    plan = surgery.insert(draft.network, draft.plan)
    for threads in (1, 2):
        for fixed in (True, False):
            session = runtime.open_session(tmp_path, dataclasses.replace(manifest, fixed_shapes=fixed), threads)
            session.fixed *= 10  # every number of rows gets a network of its own
            for n in (1, 3, 5, 8, 16):
                x = rows(n, seed=n + 10)
                got = predictor(session, manifest)(x.numpy())
                with torch.no_grad():
                    expected = [f(x).numpy() for f in (network, plan)]
                assert decibels(expected[0], got) > 20, (threads, fixed, n)
                assert decibels(expected[1], got) > 30, (threads, fixed, n)


def tokens(n, seed):
    return rows(5 * n, seed).unflatten(0, (n, 5))


@pytest.mark.parametrize(
    ("build", "draw"),
    [
        *((lambda bias=bias: Blocks(bias), draw) for bias in (True, False) for draw in (rows, tokens)),
        (lambda: Blocks(False, nn.GELU, before=nn.LayerNorm), rows),
        (lambda: Blocks(True, nn.GELU, before=nn.LayerNorm), tokens),
        (lambda: Blocks(False, behind=nn.ReLU, beside=True), rows),
        (Normed, rows),
        (Pooled, rows),
        (FirstToken, rows),
        (Gated, rows),
    ],
    ids="bias bias_3 bare bare_3 normed normed_3 beside batch_norms pooled first_token gated".split(),
)
def test_residual_additions_are_integer_and_right(build, draw, tmp_path):
    """Version 2026.4 gave numbers a million times too large for those of two axes, before biases were unequal."""
    torch.manual_seed(0)
    network = build().eval()
    draft, manifest = quantized(network, tmp_path, draw)
    executed = building.executed_rows(draft.network, draft.plan, ((draw(2, 0),), {}), manifest, tmp_path)[0]
    assert {row.executed for row in executed if row.kind == "add"} == {"int8"}
    plan = surgery.insert(draft.network, draft.plan)
    for threads in (1, 2):
        session = runtime.open_session(tmp_path, manifest, threads)
        for n in (1, 3, 8, 32):
            x = draw(n, seed=n + 10)
            got = predictor(session, manifest)(x.numpy())
            with torch.no_grad():
                expected = [f(x).numpy() for f in (network, plan)]
            assert decibels(expected[0], got) > 20, (threads, n)
            assert decibels(expected[1], got) > 30, (threads, n)


class Places(nn.Module):
    """A convolution without a bias, and what is read of its places."""

    def __init__(self, conv, read):
        super().__init__()
        self.conv, self.read, self.head = conv, read, nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.read(F.relu(self.conv(x)).flatten(2)))


@pytest.mark.parametrize("read", [lambda x: x.mean(2), lambda x: x[..., 0]], ids=["mean", "first"])
@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (lambda: nn.Conv1d(3, 8, 3, bias=False), (3, 9)),
        (lambda: nn.Conv1d(8, 8, 3, groups=8, bias=False), (8, 9)),
        (lambda: nn.Conv2d(3, 8, 3, bias=False), (3, 6, 6)),
        (lambda: nn.Conv2d(3, 8, 1, bias=False), (3, 6, 6)),
        (lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), (8, 6, 6)),
    ],
    ids=["1d", "1d_depthwise", "2d", "1x1", "2d_depthwise"],
)
def test_places_of_a_convolution_without_a_bias_are_read_right_for_every_batch(conv, shape, read, tmp_path):
    torch.manual_seed(0)
    network = Places(conv(), read).eval()

    def draw(n, seed):
        return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))

    draft, manifest = quantized(network, tmp_path, draw)
    plan = surgery.insert(draft.network, draft.plan)
    session = runtime.open_session(tmp_path, manifest, 1)
    for n in (1, 3, 8):
        x = draw(n, seed=n + 10)
        with torch.no_grad():
            assert decibels(plan(x).numpy(), predictor(session, manifest)(x.numpy())) > 40, n


def test_shapes_are_fixed_only_where_they_compile_with_one_thread_too(tmp_path):
    torch.manual_seed(1)
    network = Linears(F.relu, bias=0.5, sizes=(1, 1, 1)).eval()
    _, manifest = quantized(network, tmp_path, lambda n, seed: rows(n, seed)[:, :1])
    got = predictor(runtime.open_session(tmp_path, manifest, 1), manifest)(np.full((3, 1), 0.5, np.float32))
    with torch.no_grad():
        expected = network(torch.full((3, 1), 0.5)).numpy()
    assert decibels(expected, got) > 20


def test_the_lowest_number_of_a_mask_is_finite_in_bfloat16():
    inputs = opset13.parameter([2, 3], np.float32)
    lowest = opset13.constant(np.array([np.finfo(np.float32).min, -np.inf, 1.5], np.float32))
    model = openvino.Model([opset13.add(inputs, lowest)], [inputs])
    openvino_rewrites.finite_in_bfloat16(model)
    (stored,) = [op.data for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    rounded = torch.from_numpy(stored.copy()).bfloat16()
    assert torch.isfinite(rounded).tolist() == [True, False, True]
    assert rounded[0] < -3.3e38 and stored[2] == 1.5


def test_a_network_with_more_ways_back_than_can_be_walked_is_read():
    inputs = opset13.parameter([4, 8], np.float32)
    value = inputs
    for _ in range(64):  # two to the power of 64 ways from the end to the input
        value = opset13.add(value, opset13.tanh(value))
    product = opset13.matmul(value, opset13.multiply(value, value), False, True)
    mean = opset13.reduce_mean(value, np.array([1]), True)
    model = openvino.Model([product, opset13.multiply(mean, value)], [inputs])
    operators = [op.get_friendly_name() for op in model.get_ordered_ops()]
    openvino_rewrites.unequal_biases(model)
    openvino_rewrites.reductions_alone(model)
    assert [op.get_friendly_name() for op in model.get_ordered_ops()] == operators


@pytest.mark.parametrize("reduce", [opset13.reduce_mean, opset13.reduce_sum, opset13.reduce_max, opset13.reduce_l2])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 8, 6), [2]),
        ((5, 6, 8), [1]),
        ((5, 8, 6, 6), [2, 3]),
        ((5, 6, 6, 8), [-3, -2]),
        ((5, 6, 4, 8), [1]),
        ((5, 8, 3, 4, 2), [2, 3, 4]),
    ],
)
@pytest.mark.parametrize("behind", ["add", "add and quantize", "scale and quantize"])
def test_what_has_a_constant_for_each_channel_is_right_behind_a_reduction(reduce, keep, shape, axes, behind):
    random = np.random.default_rng(0)
    channel_shape = [8 if size == 8 else 1 for size in shape]
    others = [size for axis, size in enumerate(channel_shape) if keep or axis not in {a % len(shape) for a in axes}]
    values = random.normal(size=others).astype(np.float32)
    x = random.normal(size=shape).astype(np.float32)

    def number(value):
        return opset13.constant(np.asarray(value, np.float32))

    def quantize(value):
        ends = number(-3.0), number(3.1)  # 0 is in the middle of no step
        return opset13.fake_quantize(value, *ends, *ends, 256)

    parameter = opset13.parameter([-1, *shape[1:]], np.float32)
    reduced = reduce(parameter, np.array(axes), keep)
    result = {
        "add": lambda: opset13.relu(opset13.add(reduced, number(values))),
        "add and quantize": lambda: quantize(opset13.add(reduced, number(values))),
        "scale and quantize": lambda: quantize(opset13.multiply(opset13.relu(reduced), number(1 + abs(values)))),
    }[behind]()
    model = openvino.Model([result], [parameter])
    fixed = model.clone()
    fixed.reshape(list(shape))
    expected = openvino.Tensor(np.zeros(fixed.output(0).shape, np.float32))
    fixed.evaluate([expected], [openvino.Tensor(x)])  # by the reference implementations, which fuse nothing
    openvino_rewrites.reductions_alone(model)
    model.validate_nodes_and_infer_types()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    got = openvino.Core().compile_model(model, "CPU", settings)(x)[0]
    step = 6.1 / 255 if "quantize" in behind else 0
    assert np.abs(got - expected.data).max() < 1.01 * step + 1e-4
    assert (np.abs(got - expected.data) > 1e-4).mean() < 0.1  # a value at the edge of a step


def test_a_mean_over_an_image_stays_one_operator():
    parameter = opset13.parameter([-1, 8, 6, 6], np.float32)
    mean = opset13.reduce_mean(parameter, np.array([2, 3]), False)
    model = openvino.Model([opset13.add(mean, opset13.constant(np.arange(8, dtype=np.float32)))], [parameter])
    before = [op.get_type_name() for op in model.get_ordered_ops()]
    openvino_rewrites.reductions_alone(model)
    assert [op.get_type_name() for op in model.get_ordered_ops()] == before


class Distances(nn.Module):
    """Positions that are far apart attend less, as in ALiBi; and how far a position is from the middle."""

    def forward(self, x):
        at = torch.arange(x.shape[1])
        apart = (at[:, None] - at[None]).abs()
        middle = ((at / 2 - x.shape[1] / 4).abs() - 1).abs()
        return (x @ x.transpose(1, 2) - apart / 4).softmax(-1) @ x + middle[:, None], x.abs()


def test_distances_of_positions_are_not_negative(tmp_path):
    torch.manual_seed(0)
    example, dynamic = torch.randn(2, 5, 4), {0: {0: "batch", 1: "length"}}
    network = capture_network(Distances().eval(), (example,), dynamic=dynamic)
    _, structure = flatten_outputs(network(example))
    manifest = building.build(
        Draft(network), "openvino", "fp32", Task(example=example, dynamic=dynamic), structure, tmp_path
    )
    predict = predictor(runtimes.open_artifact(tmp_path, 1), manifest)
    for x in (example, torch.randn(3, 9, 4), torch.randn(1, 4, 4), torch.randn(1, 7, 4)):
        for mine, right in zip(predict(x.numpy()), network(x), strict=True):
            np.testing.assert_allclose(mine, right.numpy(), rtol=1e-4, atol=1e-5)
