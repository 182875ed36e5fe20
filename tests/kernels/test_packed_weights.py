"""Products of packed weights against a slow product of the weights that they stand for."""

import numpy as np
import pytest

from penjing.errors import ArtifactError
from penjing.kernels import building
from penjing.kernels.instruction_sets import INSTRUCTION_SETS, named, runs_here
from penjing.kernels.packed_weights import PackedProduct, Product, function, rounded
from tests.raises import raises_case

pytest.importorskip("tvm")

HERE = [name for name, row in INSTRUCTION_SETS.items() if runs_here(row)]
SHAPES = (
    Product(outputs=70, inputs=256, bits=4, group=128),
    Product(outputs=3, inputs=48, bits=4, group=8),
    Product(outputs=130, inputs=192, bits=2, group=64),
    Product(outputs=1, inputs=16, bits=2, group=16),
)


def slow(q, scales, x, shape):
    """Σ scale·(q − half)·x, one weight at a time, in float64."""
    y = np.zeros(shape.outputs)
    for o, i in np.ndindex(q.shape):
        y[o] += float(scales[o, i // shape.group]) * (int(q[o, i]) - 2 ** (shape.bits - 1)) * float(x[i])
    return y


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_of_what_the_integers_stand_for(shape, name):
    rng = np.random.default_rng(0)
    q = rng.integers(0, 2**shape.bits, (shape.outputs, shape.inputs), dtype=np.uint8)
    scales = rng.standard_normal((shape.outputs, shape.inputs // shape.group)).astype(np.float32)
    x = rng.standard_normal(shape.inputs).astype(np.float32)
    product, expected = PackedProduct(shape, q, scales, instructions=named(name)), slow(q, scales, x, shape)
    for threads in (1, 2):
        np.testing.assert_allclose(product(x, threads), expected, rtol=0, atol=1e-4 * np.abs(expected).max() + 1e-5)


@pytest.mark.parametrize("bits", [4, 2])
def test_weights_take_their_bits(bits):
    shape = Product(outputs=256, inputs=512, bits=bits)
    q, scales = rounded(np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32), bits, 128)
    assert PackedProduct(shape, q, scales).weights.nbytes == 256 * 512 * bits // 8


def test_rounding_errs_by_half_a_step():
    weights = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    q, scales = rounded(weights, 4, 32)
    values = (q.astype(np.float32) - 8) * scales.repeat(32, 1)
    inside = q < 15  # the highest integer may stand for what is beyond it
    assert (np.abs(values - weights)[inside] <= np.abs(scales.repeat(32, 1))[inside] / 2 + 1e-6).all()
    assert q.min() == 0 and q.max() <= 15


def test_the_machine_code_converts_where_the_bits_stand():
    shape, arm = Product(outputs=64, inputs=128, group=64), named("aarch64-neon")
    text = building.assembly([function(shape, arm)], arm)
    assert "fmla" in text and "ucvtf" in text


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"group": 12}, {"group": 96}])
def test_shapes_that_do_not_pack_are_refused(wrong):
    with raises_case(ArtifactError, "shape"):
        Product(**({"outputs": 4, "inputs": 128, "group": 32} | wrong))


def test_an_integer_of_more_bits_is_refused():
    with raises_case(ArtifactError, "range"):
        PackedProduct(Product(outputs=2, inputs=16, group=16), np.full((2, 16), 16), np.ones((2, 1), np.float32))


def test_arrays_that_do_not_fit_are_refused():
    shape = Product(outputs=2, inputs=16, group=16)
    q, scales = np.zeros((2, 16), np.uint8), np.ones((2, 1), np.float32)
    for case, wrong in (("shape", (q, scales[:1])), ("shape", (q[:, :8], scales)), ("range", (q + 0.5, scales))):
        with raises_case(ArtifactError, case):
            PackedProduct(shape, *wrong, instructions=named("c"))
    with raises_case(ArtifactError, "shape"):
        PackedProduct(shape, q, scales, instructions=named("c"))(np.float32(1.0) * np.ones(1))


def test_weights_that_can_not_be_rounded_are_refused_and_tiny_ones_are_zero():
    tiny = np.full((1, 16), 1e-45, np.float32)
    q, scales = rounded(tiny, 4, 16)
    assert (q == 8).all() and (scales == 1).all()
    for weights, group in ((np.full((1, 16), np.nan), 16), (np.ones((1, 16)), 5), (np.ones(16), 16)):
        with raises_case(ArtifactError, "weights"):
            rounded(weights, 4, group)
