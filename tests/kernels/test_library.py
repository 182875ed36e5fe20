"""Networks as one library: answers as torch's, what is stored, and what can't be written."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import ExportError, TaskError
from penjing.kernels import library, library_source
from penjing.kernels.instruction_sets import INSTRUCTION_SETS, named, runs_here
from penjing.kernels.library import write
from penjing.kernels.network import described
from penjing.kernels.opened import Opened
from penjing.network.capture import capture_network
from penjing.numerics.signs import binary, in_bytes, ternary
from penjing.surgery import sign_inputs
from tests.raises import raises_case

pytest.importorskip("tvm")

HERE = [name for name, row in INSTRUCTION_SETS.items() if runs_here(row)]
BINARY, SHAPE = ("down", "body", "wide"), (2, 8, 9)


class Net(nn.Module):
    """Odd widths, strides, a projection, a pool, biases and batch norms."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 11, 3, padding=1), nn.BatchNorm2d(11)
        self.down, self.norm2 = nn.Conv2d(11, 24, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(24)
        self.body = nn.Conv2d(24, 24, 3, padding="same")
        self.pool = nn.MaxPool2d(2)
        self.wide, self.norm3 = nn.Conv2d(24, 70, 3, padding=2, dilation=2), nn.BatchNorm2d(70, affine=False)
        self.shortcut = nn.Conv2d(24, 70, 1)
        self.head = nn.Linear(70, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.norm2(self.down(x))
        x = self.pool(F.relu(self.body(x) + x))
        x = F.relu(self.norm3(self.wide(x)) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


def made(levels, signs=True):
    """A captured network whose inner layers have weights of these levels, and read signs."""
    torch.manual_seed(0)
    module = Net()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 1.5)
    captured = capture_network(module.eval(), (torch.rand(2, *SHAPE),), {})
    if signs:
        sign_inputs(captured, BINARY)
    with torch.no_grad():
        for name in BINARY:
            weight = captured.get_parameter(f"{name}.weight")
            weight.copy_(levels(weight))
            if signs:
                captured.get_parameter(f"{name}_sign.threshold").uniform_(-0.2, 0.4)
    return captured


@pytest.fixture(scope="module")
def network():
    return made(binary)


def opened(network, path, **settings):
    write(described(network, SHAPE), path / "model.so", **settings)
    return Opened(path / "model.so", (SHAPE, (3,)))


@pytest.mark.parametrize("name", HERE)
def test_it_answers_as_torch(network, name, tmp_path):
    predict = opened(network, tmp_path, instructions=named(name))
    for batch in (1, 5):
        x = torch.randn(batch, *SHAPE)
        with torch.no_grad():
            np.testing.assert_allclose(predict(x.numpy()), network(x).numpy(), rtol=1e-4, atol=1e-4)


def test_layers_are_told_by_how_they_are_computed(network, tmp_path):
    executed = write(described(network, SHAPE), tmp_path / "model.so", named("c"))
    assert {site for site, how in executed.items() if how == "binary"} == set(BINARY)
    assert executed["stem"] == executed["head"] == executed["/add#0"] == "fp32"


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("signs", [False, True], ids=["numbers", "signs"])
def test_ternary_weights_take_two_bits_and_answer_as_torch(name, signs, tmp_path):
    captured = made(ternary, signs)
    executed = write(described(captured, SHAPE), tmp_path / "model.so", named(name))
    assert {site for site, how in executed.items() if how == "ternary"} == set(BINARY)
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        expected = captured(x).numpy()
    answers = Opened(tmp_path / "model.so", (SHAPE, (3,)))(x.numpy())
    np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("x86-vpopcnt" not in HERE, reason="needs words of 16 bits")
def test_small_layers_share_kernels_and_answer_to_the_bit_as_with_their_own(tmp_path, monkeypatch):
    class Even(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(2, 16, 1)
            self.same, self.down = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 32, (2, 3), stride=(1, 2))
            self.tall, self.wide = nn.Conv2d(32, 64, (3, 1), padding=(2, 0), dilation=(2, 1)), nn.Conv2d(64, 48, 1)
            self.odd = nn.Conv2d(48, 20, 3, padding=1)

        def forward(self, x):
            x = self.same(self.stem(x))
            return self.odd(self.wide(self.tall(self.down(x)))).mean((2, 3))

    torch.manual_seed(0)
    captured = capture_network(Even().eval(), (torch.rand(2, *SHAPE),), {})
    inner = ["same", "down", "tall", "wide", "odd"]
    sign_inputs(captured, inner)
    with torch.no_grad():
        for name in inner:
            captured.get_parameter(f"{name}.weight").copy_(binary(captured.get_parameter(f"{name}.weight")))
            captured.get_parameter(f"{name}_sign.threshold").uniform_(-0.2, 0.2)
    x = torch.randn(2, *SHAPE)
    answers, sizes = [], []
    for most in (library_source.SHARES, 0):
        monkeypatch.setattr(library_source, "SHARES", most)
        write(described(captured, SHAPE), tmp_path / f"{most}.so", named("x86-vpopcnt"))
        answers.append(Opened(tmp_path / f"{most}.so", (SHAPE, (20,)))(x.numpy()))
        sizes.append((tmp_path / f"{most}.so").stat().st_size)
    np.testing.assert_array_equal(*answers)
    np.testing.assert_allclose(answers[0], captured(x).detach().numpy(), rtol=1e-4, atol=1e-4)
    assert sizes[0] < sizes[1] - 2000


@pytest.mark.parametrize("bits", [16, 32])
def test_weights_that_are_multiples_of_a_step_take_a_byte(bits, tmp_path):
    sizes = []
    torch.manual_seed(0)
    captured = capture_network(nn.Sequential(nn.Conv2d(2, 33, 3), nn.ReLU()).eval(), (torch.rand(2, *SHAPE),), {})
    for whole in (False, True):
        if whole:
            with torch.no_grad():
                captured.get_parameter("0.weight").copy_(in_bytes(captured.get_parameter("0.weight")))
        path = tmp_path / f"{whole}.so"
        write(described(captured, SHAPE), path, named("c"), float_bits=bits)
        sizes.append(path.stat().st_size)
        x = torch.randn(2, *SHAPE)
        answers = Opened(path, (SHAPE, (33, 6, 7)))(x.numpy())
        near = 1e-5 if bits == 32 else 5e-3
        np.testing.assert_allclose(answers, captured(x).detach().numpy(), rtol=near, atol=near)
    assert sizes[0] - sizes[1] == pytest.approx(33 * 18 * (bits // 8 - 1), abs=300)


def test_threads_share_samples_and_change_no_bit(network, tmp_path, monkeypatch):
    write(described(network, SHAPE), tmp_path / "model.so")
    one, three = (Opened(tmp_path / "model.so", (SHAPE, (3,)), threads) for threads in (1, 3))
    x = np.random.default_rng(0).standard_normal((7, *SHAPE)).astype(np.float32)
    three(x[:1])
    assert len(three.memories) == 1 and 0 < three.sample_s < 1
    monkeypatch.setattr("penjing.kernels.opened.LEAST_S", 1e-9)
    for samples in (0, 1, 2, 3, 7):
        np.testing.assert_array_equal(three(x[:samples]), one(x[:samples]))
    assert len(three.memories) == 3 and len(one.memories) == 1


@pytest.mark.skipif(HERE == ["c"], reason="plain C has no threads")
@pytest.mark.parametrize("levels", [binary, ternary])
def test_threads_share_the_rows_of_large_layers_and_change_no_bit(levels, tmp_path, monkeypatch):
    captured = made(levels, levels is binary)
    write(described(captured, SHAPE), tmp_path / "small.so")
    monkeypatch.setattr(library_source, "SPLITS", 0)
    write(described(captured, SHAPE), tmp_path / "split.so")
    small = Opened(tmp_path / "small.so", (SHAPE, (3,)))
    one, three = (Opened(tmp_path / "split.so", (SHAPE, (3,)), threads) for threads in (1, 3))
    assert not small.rows and one.rows
    x = np.random.default_rng(0).standard_normal((4, *SHAPE)).astype(np.float32)
    for _ in range(20):
        np.testing.assert_array_equal(three(x), small(x))
        np.testing.assert_array_equal(one(x[:1]), small(x[:1]))


def test_little_work_stays_on_one_thread(network, tmp_path, monkeypatch):
    write(described(network, SHAPE), tmp_path / "model.so")
    predict = Opened(tmp_path / "model.so", (SHAPE, (3,)), 2)
    monkeypatch.setattr("penjing.kernels.opened.LEAST_S", 1e9)
    for _ in range(2):
        predict(np.zeros((50, *SHAPE), np.float32))
    assert len(predict.memories) == 1


def test_only_the_table_of_sections_is_left_out(network, tmp_path):
    write(described(network, SHAPE), tmp_path / "model.so", named("c"))
    written = (tmp_path / "model.so").read_bytes()
    assert written[:4] == b"\x7fELF" and written[40:48] == bytes(8)
    assert library.without_sections(written) == written
    assert library.without_sections(b"MZ of another system") == b"MZ of another system"


def test_two_that_are_open_do_not_disturb_each_other(network, tmp_path):
    first = opened(network, tmp_path, instructions=named("c"))
    second = Opened(tmp_path / "model.so", (SHAPE, (3,)))
    x, y = (np.random.default_rng(seed).standard_normal((1, *SHAPE)).astype(np.float32) for seed in (0, 1))
    expected = first(x)
    assert not np.array_equal(second(y), expected)
    np.testing.assert_array_equal(first(x), expected)


def test_the_bytes_are_the_same_again_and_a_weight_takes_a_bit(network, tmp_path):
    sizes = {}
    for bits in (32, 16):
        for number in (0, 1):
            write(described(network, SHAPE), tmp_path / f"{bits}-{number}.so", named("c"), float_bits=bits)
        first, again = ((tmp_path / f"{bits}-{number}.so").read_bytes() for number in (0, 1))
        assert first == again
        sizes[bits] = len(first)
    floats = 11 * 2 * 9 + 70 * 24 + 3 * 70  # weights
    floats += 2 * (11 + 24 + 24 + 70 + 70 + 3) + 11 + 24 + 24  # scales, shifts, thresholds
    assert sizes[32] - sizes[16] == pytest.approx(2 * floats, rel=0.15)


def test_numbers_in_16_bits_are_those_of_numpy_and_none_becomes_0(tmp_path):
    linear = nn.Linear(7, 1, bias=False)
    numbers = torch.tensor([1.0, -2.5, 65504.0, 6.1e-5, -5.9e-8, 1e-9, 3.14159])
    with torch.no_grad():
        linear.weight.copy_(numbers[None])
    captured = capture_network(nn.Sequential(linear).eval(), (torch.rand(2, 7),), {})
    write(described(captured, (7,)), tmp_path / "model.so", named("c"), float_bits=16)
    answers = Opened(tmp_path / "model.so", ((7,), (1,)))(np.eye(7, dtype=np.float32))[:, 0]
    expected = numbers.numpy().astype(np.float16).astype(np.float32)
    assert expected[5] == 0 and answers[5] == np.float32(2.0**-24)
    np.testing.assert_array_equal(np.delete(answers, 5), np.delete(expected, 5))


def test_an_image_may_become_a_vector_for_a_binary_layer_or_leave_as_one(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.hidden, self.last = nn.Conv2d(2, 3, 3), nn.Linear(3 * 2 * 4, 9), nn.Conv2d(2, 5, 2)

        def forward(self, x):
            return self.last(x).flatten(1).relu() if self.images else self.hidden(self.stem(x).flatten(1))

    for images, outputs in ((False, 9), (True, 5 * 3 * 5)):
        module = Flat().eval()
        module.images = images
        captured = capture_network(module, (torch.rand(2, 2, 4, 6),), {})
        if not images:
            sign_inputs(captured, ["hidden"])
            with torch.no_grad():
                captured.hidden.weight.copy_(binary(captured.hidden.weight))
        write(described(captured, (2, 4, 6)), tmp_path / f"{images}.so", named("c"))
        x = torch.randn(3, 2, 4, 6)
        answers = Opened(tmp_path / f"{images}.so", ((2, 4, 6), (outputs,)))(x.numpy())
        np.testing.assert_allclose(answers, captured(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_an_input_of_another_shape_is_refused(network, tmp_path):
    with raises_case(TaskError, "shape"):
        opened(network, tmp_path, instructions=named("c"))(np.zeros((1, 2, 9, 8), np.float32))


@pytest.mark.parametrize(
    "layer, said",
    [
        (nn.Softmax(dim=1), "softmax"),
        (nn.Conv2d(2, 2, 3, groups=2), "groups"),
        (nn.BatchNorm2d(2), "batch norm"),
    ],
)
def test_an_operator_that_is_lacking_is_named(layer, said):
    captured = capture_network(nn.Sequential(layer).eval(), (torch.rand(2, 2, 4, 6),), {})
    with raises_case(ExportError, "operator") as refusal:
        described(captured, (2, 4, 6))
    assert said in str(refusal.value)
