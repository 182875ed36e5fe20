"""Binary kernels against the slowest obvious loops, on random shapes of odd sizes."""

import os
import signal
import time

import numpy as np
import pytest

from penjing.errors import ArtifactError
from penjing.kernels import building
from penjing.kernels.binary import BinaryConvolution, BinaryProduct, Convolution, functions, packed
from penjing.kernels.instruction_sets import INSTRUCTION_SETS, named, runs_here
from tests.raises import raises_case

pytest.importorskip("tvm")

HERE = [name for name, row in INSTRUCTION_SETS.items() if runs_here(row)]
SHAPES = (
    Convolution(height=5, width=7, channels=64, filters=32, pad=(1, 1)),
    Convolution(batch=2, height=6, width=5, channels=3, filters=5, kernel=(3, 2), stride=(2, 1), pad=(2, 0)),
    Convolution(height=4, width=9, channels=16, filters=16, stride=(2, 2), pad=(1, 1)),
    Convolution(height=5, width=4, channels=37, filters=24, kernel=(2, 3), pad=(1, 2), dilation=(2, 1)),
    Convolution(height=3, width=3, channels=200, filters=70, pad=(1, 1)),
    Convolution(height=2, width=3, channels=328, filters=9, kernel=(1, 1)),
)


def slow(x, signs, shape, padding):
    """Loops over every output of a convolution of signs, NHWC."""
    border = 0 if padding == "zeros" else -1
    padded = np.full(
        (shape.batch, shape.height + 2 * shape.pad[0], shape.width + 2 * shape.pad[1], shape.channels), border
    )
    inside = padded[:, shape.pad[0] : shape.pad[0] + shape.height, shape.pad[1] : shape.pad[1] + shape.width]
    inside[:] = np.where(x >= 0, 1, -1)
    w = np.where(signs, 1, -1)
    out = np.zeros((shape.batch, *shape.outputs, shape.filters))
    for n, y, z in np.ndindex(out.shape[:3]):
        for i, j in np.ndindex(*shape.kernel):
            pixel = padded[n, y * shape.stride[0] + i * shape.dilation[0], z * shape.stride[1] + j * shape.dilation[1]]
            out[n, y, z] += w[:, i, j] @ pixel
    return out


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_convolution_counts_what_slow_loops_add(shape, name):
    rng = np.random.default_rng(0)
    signs = rng.random((shape.filters, *shape.kernel, shape.channels)) < 0.5
    x = rng.standard_normal((shape.batch, shape.height, shape.width, shape.channels)).astype(np.float32)
    x[0, 0, 0, 0] = 0.0  # counts as +1
    for padding in ("zeros", "minus"):
        layer = BinaryConvolution(shape, signs, padding=padding, instructions=named(name))
        for threads in (1, 2):
            np.testing.assert_array_equal(layer(x, threads), slow(x, signs, shape, padding))


@pytest.mark.parametrize("name", HERE)
def test_scale_shift_and_threshold_are_by_channel(name):
    rng = np.random.default_rng(1)
    shape = Convolution(height=3, width=4, channels=20, filters=6, pad=(1, 1))
    signs = rng.random((6, 3, 3, 20)) < 0.5
    x = rng.standard_normal((1, 3, 4, 20)).astype(np.float32)
    scale, shift, threshold = (rng.standard_normal(n).astype(np.float32) for n in (6, 6, 20))
    layer = BinaryConvolution(shape, signs, scale, shift, threshold, instructions=named(name))
    expected = slow(np.where(x >= threshold, 1, -1), signs, shape, "zeros") * scale + shift
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("rows, filters, channels", [(1, 10, 64), (13, 33, 70), (8, 16, 2304)])
def test_a_product_of_signs(name, rows, filters, channels):
    rng = np.random.default_rng(2)
    x, w = (rng.standard_normal((n, channels)).astype(np.float32) for n in (rows, filters))
    product = BinaryProduct(rows, w, instructions=named(name))
    np.testing.assert_array_equal(product(x), np.where(x >= 0, 1, -1) @ np.where(w >= 0, 1, -1).T)


def test_weights_take_one_bit_each():
    rng = np.random.default_rng(3)
    shape = Convolution(height=4, width=4, channels=128, filters=64)
    layer = BinaryConvolution(shape, rng.random((64, 3, 3, 128)) < 0.5)
    assert layer.weights.nbytes == 64 * 9 * 128 // 8


def test_bits_of_a_byte_are_channels_a_width_apart():
    signs = np.zeros(20, bool)
    signs[[0, 4, 19]] = True  # of 4 bytes: bit 0 of byte 0, bit 1 of byte 0, bit 4 of byte 3
    assert packed(signs, 4).tolist() == [0b11, 0, 0, 0b10000]


COUNTS = {"x86-vpopcnt": "vpopcntq", "x86-avx2": "vpshufb", "aarch64-neon": "cnt\tv"}


@pytest.mark.parametrize("name", COUNTS)
def test_the_machine_code_counts_bits_in_vectors(name):
    shape = Convolution(height=8, width=8, channels=128, filters=64, pad=(1, 1))
    _, convolution = functions(shape, named(name))
    text = building.assembly([convolution], named(name))
    assert COUNTS[name] in text
    assert ("vpopcnt" in text) == (name == "x86-vpopcnt")


def test_a_forked_process_has_threads_of_its_own():
    layer = BinaryProduct(64, np.random.default_rng(0).standard_normal((16, 64)))
    x = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    expected = layer(x, 2).copy()
    child = os.fork()
    if not child:
        os._exit(0 if (layer(x, 2) == expected).all() else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done and status == 0


def test_a_library_that_was_altered_is_not_loaded(tmp_path):
    shape = Convolution(height=3, width=3, channels=8, filters=8)
    path = building.library(functions(shape, named("c")), str(shape), named("c"), tmp_path)
    assert building.library(functions(shape, named("c")), str(shape), named("c"), tmp_path) == path
    path.write_bytes(path.read_bytes() + b"x")
    with raises_case(ArtifactError, "altered"):
        building.load(path)


def test_a_window_larger_than_the_input_is_refused():
    with raises_case(ArtifactError, "shape"):
        Convolution(height=2, width=2, channels=8, filters=8)


@pytest.mark.parametrize("wrong", [{"stride": (0, 1)}, {"dilation": (1, 0)}, {"pad": (-1, 0)}, {"channels": 0}])
def test_sizes_that_are_no_sizes_are_refused(wrong):
    with raises_case(ArtifactError, "shape"):
        Convolution(**({"height": 4, "width": 4, "channels": 8, "filters": 8} | wrong))


def test_arrays_that_numpy_would_repeat_are_refused():
    shape = Convolution(height=3, width=3, channels=4, filters=8)
    signs = np.ones((8, 3, 3, 4), bool)
    for name, count in (("scale", 1), ("shift", 9), ("threshold", 3)):
        with raises_case(ArtifactError, "shape") as refusal:
            BinaryConvolution(shape, signs, **{name: np.ones(count, np.float32)}, instructions=named("c"))
        assert name in refusal.value.what
    layer, product = (
        BinaryConvolution(shape, signs, instructions=named("c")),
        BinaryProduct(4, np.ones((3, 8)), instructions=named("c")),
    )
    for call, x in ((layer, np.ones((3, 3, 1))), (product, np.ones((1, 8)))):
        with raises_case(ArtifactError, "shape"):
            call(x)
