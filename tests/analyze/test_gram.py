"""Gram matrices are sums over what a layer multiplies with its weights, however data come and layers are laid out.

The slow reference takes rows from autograd: the gradient of one output by the weight is what the weight multiplies.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.analyze import gram
from penjing.analyze.gram import Gram
from penjing.errors import CalibrationError
from penjing.network.capture import capture_network
from penjing.steps.step import Context
from penjing.tasks.task import Task
from tests.raises import raises_case

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (4, 5)),
    "conv1d, dilated": (nn.Conv1d(4, 6, 3, padding=2, dilation=2, stride=2), (4, 9)),
    "conv1d, same": (nn.Conv1d(4, 6, 4, padding="same"), (4, 6)),
    "conv2d": (nn.Conv2d(3, 5, 3, padding=1), (3, 4, 5)),
    "pointwise": (nn.Conv2d(3, 5, 1), (3, 4, 3)),
    "pointwise, strided": (nn.Conv2d(3, 5, 1, stride=2), (3, 5, 4)),
    "pointwise, grouped": (nn.Conv2d(4, 6, 1, groups=2), (4, 3, 4)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3), (6, 5, 4)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 3, 4)),
    "depthwise, twofold": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (6, 3, 4)),
    "dilated, uneven": (nn.Conv2d(3, 5, (3, 2), padding=(2, 0), dilation=(2, 3), stride=(1, 2)), (3, 4, 7)),
    "same": (nn.Conv2d(3, 5, 4, padding="same", dilation=2), (3, 4, 5)),
    "valid": (nn.Conv2d(3, 5, 3, padding="valid"), (3, 4, 5)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2), (4, 4, 3)),
    "circular": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (4, 6)),
    "conv3d": (nn.Conv3d(4, 6, (2, 1, 3), padding=(0, 1, 1), stride=(1, 2, 1), groups=2), (4, 3, 2, 3)),
    "linear": (nn.Linear(7, 5), (7,)),
    "linear, 3-D": (nn.Linear(7, 5), (4, 7)),
    "linear, 4-D": (nn.Linear(7, 5), (2, 4, 7)),
}
TRANSPOSED = {
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2), (6, 4, 3)),
    "transposed, grouped": (nn.ConvTranspose1d(6, 4, 2, groups=2), (6, 5)),
}


def rows_of(layer, x, by_tap=False):
    """(groups, rows, columns), row by row: gradients of the outputs of each group's first channel by its weights."""
    groups = getattr(layer, "groups", 1)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    rows = []
    for group in range(groups):
        channel = group * (layer.weight.shape[0] // groups)
        outputs = layer(x).movedim(axis, -1)[..., channel].flatten()
        of_outputs = [torch.autograd.grad(output, layer.weight, retain_graph=True)[0][channel] for output in outputs]
        rows.append(torch.stack([(row.movedim(0, -1) if by_tap else row).flatten() for row in of_outputs]))
    return torch.stack(rows)


def of_channels(layer, x):
    """(groups, rows, columns) of a transposed convolution: the channels of every input position."""
    by_group = x.reshape(len(x), layer.groups, x.shape[1] // layer.groups, -1)
    return by_group.permute(1, 0, 3, 2).flatten(1, 2)


@pytest.mark.parametrize("by_tap", [False, True], ids=["by channel", "by tap"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_patches_are_what_the_weights_are_multiplied_with(layer, shape, by_tap):
    torch.manual_seed(0)
    for samples in (1, 3):
        x = torch.randn(samples, *shape)
        torch.testing.assert_close(gram.patches(layer, x, by_tap=by_tap), rows_of(layer, x, by_tap))
        if x.dim() == 4 and not isinstance(layer, nn.Linear):
            x = x.contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(gram.patches(layer, x, by_tap=by_tap), rows_of(layer, x, by_tap))
    if not isinstance(layer, nn.Linear):  # one sample without a batch axis
        torch.testing.assert_close(gram.patches(layer, x[0], by_tap=by_tap), rows_of(layer, x[:1], by_tap))


@pytest.mark.parametrize(("layer", "shape"), TRANSPOSED.values(), ids=TRANSPOSED)
def test_a_transposed_convolution_has_a_column_an_input_channel(layer, shape):
    x = torch.randn(3, *shape)
    torch.testing.assert_close(gram.patches(layer, x), of_channels(layer, x))
    assert gram.columns_of(layer) == (layer.groups, 6 // layer.groups)


def test_of_large_pictures_every_so_many_positions_are_looked_at():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    x = torch.randn(2, 3, 16, 16)
    columns = gram.patches(conv, x, positions=30)
    outputs = conv(x)[:, :, ::4, ::4].flatten(2).transpose(1, 2).reshape(1, -1, 5)  # 16 of 256; every third were 36
    torch.testing.assert_close(columns @ conv.weight.reshape(1, 5, -1).transpose(1, 2), outputs, atol=1e-5, rtol=1e-5)
    x = torch.randn(2, 100, 7)
    assert torch.equal(gram.patches(nn.Linear(7, 5), x, positions=30)[0], x.flatten(0, 1)[::4])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_those_of_every_row(grouped, dtype, weighted):
    torch.manual_seed(0)
    x, y = torch.randn(2, 30, 4) + 1, torch.randn(2, 30, 3) - 2
    weights = torch.rand(30, 1) * torch.tensor([0.0, 1.0, 2.0]).repeat(10)[:, None] if weighted else torch.ones(30, 1)
    if not grouped:
        x, y = x[0], y[0]
    sums = Gram(4, groups=2 if grouped else None, others=3, means=True, dtype=dtype)
    for piece in (slice(0, 7), slice(7, 30)):
        sums.add(x[..., piece, :], y[..., piece, :], weights[piece] if weighted else None)
    own, cross = torch.zeros(x.shape[:-2] + (4, 4)), torch.zeros(x.shape[:-2] + (3, 4))
    mean_x, mean_y, count = torch.zeros(x.shape[:-2] + (4,)), torch.zeros(x.shape[:-2] + (3,)), 0.0
    for row in range(30):
        a, b, weight = x[..., row, :], y[..., row, :], float(weights[row])
        own += weight * a[..., :, None] * a[..., None, :]
        cross += weight * b[..., :, None] * a[..., None, :]
        mean_x, mean_y, count = mean_x + weight * a, mean_y + weight * b, count + weight
    mean_x, mean_y = mean_x / count, mean_y / count
    assert sums.own.dtype == sums.cross.dtype == dtype
    expected = [
        own, cross, own / count - mean_x[..., :, None] * mean_x[..., None, :],
        cross / count - mean_y[..., :, None] * mean_x[..., None, :],
    ]  # fmt: skip
    for result, reference in zip((sums.own, sums.cross, *sums.covariances()), expected, strict=True):
        torch.testing.assert_close(result.float(), reference, atol=1e-4, rtol=1e-4)
    assert sums.count == pytest.approx(count, rel=1e-5)


def test_products_in_single_precision_are_summed_as_the_caller_says():
    """4096² + 1 is not a float32."""
    wide, narrow = Gram(1), Gram(1, dtype=torch.float32)
    for value in (4096.0, 1.0, 1.0, 1.0):
        wide.add(torch.tensor([[value]]))
        narrow.add(torch.tensor([[value]]))
    assert float(wide.own) == 4096**2 + 3 and float(narrow.own) == 4096**2


class Branches(nn.Module):
    """A layer that is called twice, one whose turn does not come, one of each kind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.twice = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x):
        y = self.up(F.relu(self.conv(x))).mean((2, 3))
        return self.twice(F.relu(self.twice(y)))


@pytest.fixture(scope="module")
def branches():
    torch.manual_seed(0)
    model = Branches().eval()
    network = capture_network(model, (torch.zeros(2, 2, 5, 5),))
    return model, network, {name: network.get_submodule(name) for name in ("conv", "up", "twice")}


def data(seed=0, sizes=(3, 2)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 5, 5, generator=generator) for size in sizes]


@pytest.mark.parametrize("room", [gram.UNFOLDED, 100, 1])
def test_all_layers_are_collected_in_one_pass(branches, room, monkeypatch):
    monkeypatch.setattr(gram, "UNFOLDED", room)
    model, network, layers = branches
    largest, patches = [], gram.patches

    def watched(module, x, **settings):
        rows = patches(module, x, **settings)
        largest.append((rows.numel(), patches(module, x[:1], **settings).numel()))
        return rows

    monkeypatch.setattr(gram, "patches", watched)
    passes = []
    x = data()
    results = gram.collect(network, layers, (passes.append(1) or ((batch,), {}) for batch in x))
    assert len(passes) == 2 and results.keys() == layers.keys()
    assert all(rows <= max(room, one_sample) for rows, one_sample in largest)
    x = torch.cat(x)
    with torch.no_grad():
        hidden = F.relu(model.conv(x))
        first = model.up(hidden).mean((2, 3))
        second = F.relu(model.twice(first))
    rows = {
        "conv": rows_of(model.conv, x),
        "up": of_channels(model.up, hidden),
        "twice": torch.cat([first, second])[None],
    }
    for name, reference in rows.items():
        reference = reference.double()
        torch.testing.assert_close(results[name].own, reference.mT @ reference, rtol=1e-5, atol=1e-5)
        assert results[name].own.dtype == torch.float64 and results[name].count == reference.shape[1]
    matrices = sum(result.own.numel() * 8 for result in results.values())
    assert gram.size_bytes(layers.values()) >= matrices
    assert not any(module._forward_pre_hooks for module in layers.values())


def test_columns_come_in_the_order_that_is_asked_for(branches):
    model, network, layers = branches
    x = data()
    result = gram.collect(network, {"conv": layers["conv"]}, [((batch,), {}) for batch in x], by_tap=True)["conv"]
    rows = rows_of(model.conv, torch.cat(x), by_tap=True).double()
    torch.testing.assert_close(result.own, rows.mT @ rows, rtol=1e-5, atol=1e-5)


def test_layers_that_nothing_reaches_are_left_out():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x[x[:, 0] > 0]).sum(0) + x.sum()

    network = capture_network(Chosen().eval(), (torch.ones(2, 3),))
    layers = {"head": network.get_submodule("head")}
    assert gram.collect(network, layers, [((-torch.ones(2, 3),), {})]) == {}
    assert gram.collect(network, layers, [((torch.ones(2, 3),), {})])["head"].count == 2


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


class TestShared:
    @pytest.fixture
    def ask(self, branches):
        _, network, layers = branches

        def ask(context, names=("conv", "twice"), samples=5, network=network, **settings):
            return gram.shared(network, {name: layers[name] for name in names}, context, samples, **settings)

        return ask

    @staticmethod
    def context(calibration):
        return Context(task=Task(example=torch.zeros(2, 2, 5, 5), calibration=calibration))

    def test_data_is_read_once_for_the_same(self, ask, branches):
        _, network, layers = branches
        batches = Counted(data())
        context = self.context(batches)
        first, second = ask(context), ask(context, ("twice",))
        assert batches.passes == 1 and second["twice"] is first["twice"]
        mine = gram.collect(network, layers, [((x,), {}) for x in batches.batches])
        assert torch.equal(first["conv"].own, mine["conv"].own)
        assert ask(context, ("up", "conv"))["up"].count == 5 * 25 and batches.passes == 2  # new is `up` alone

    def test_other_data_samples_orders_and_weights_are_read_anew(self, ask, branches):
        batches, others = Counted(data()), Counted(data(1))
        context = self.context(batches)
        before = ask(context)
        assert ask(context, samples=2)["twice"].count == 4 and batches.passes == 2
        ask(context, by_tap=True)
        assert batches.passes == 3
        other = Context(task=self.context(others).task, cache=context.cache)
        assert not torch.equal(ask(other)["conv"].own, before["conv"].own) and others.passes == 1
        changed = capture_network(branches[0], (torch.zeros(2, 2, 5, 5),))
        nn.init.zeros_(changed.get_submodule("conv").weight)
        layers = {"twice": changed.get_submodule("twice")}
        assert gram.shared(changed, layers, other, 5)["twice"].own.abs().max() != before["twice"].own.abs().max()

    def test_what_is_too_large_is_not_kept_and_older_networks_are_dropped(self, ask, monkeypatch):
        batches = Counted(data())
        context = self.context(batches)
        ask(context), ask(context, samples=2), ask(context)
        assert batches.passes == 3  # those of the latest key alone are there
        monkeypatch.setattr(gram, "SHARED_BYTES", 100)
        one, two = ask(context, samples=4), ask(context, samples=4)
        assert batches.passes == 5 and torch.equal(one["conv"].own, two["conv"].own)

    def test_without_calibration_data(self, ask):
        with raises_case(CalibrationError, "no-calibration"):
            ask(self.context(None))
