"""Ternary kernels: every instruction set of this processor beside the slowest obvious loop."""

import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from penjing.kernels import building, ternary
from penjing.kernels.binary import Convolution
from penjing.kernels.instruction_sets import INSTRUCTION_SETS, named, runs_here
from penjing.kernels.threads import aligned

pytest.importorskip("tvm")

HERE = [name for name, row in INSTRUCTION_SETS.items() if runs_here(row)]
SHAPES = [
    Convolution(height=5, width=7, channels=3, filters=5, pad=(1, 1)),
    Convolution(height=6, width=9, channels=33, filters=70, kernel=(2, 3), stride=(2, 1), pad=(0, 2), dilation=(1, 2)),
    Convolution(height=1, width=1, channels=50, filters=17, kernel=(1, 1)),
]


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_multiplies_as_torch(shape, name, tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.integers(-1, 2, (shape.filters, *shape.kernel, shape.channels))
    x = rng.standard_normal((shape.height, shape.width, shape.channels)).astype(np.float32)
    lay = ternary.layout(shape, named(name))
    function = ternary.function(shape, named(name))
    library = ctypes.CDLL(str(building.library([function], str(shape), named(name), tmp_path)))
    (top, left), (down, right) = shape.pad, shape.outputs
    framed = aligned((shape.height + 2 * top, shape.width + 2 * left, lay.channels), np.float32)
    framed[top : top + shape.height, left : left + shape.width, : shape.channels] = x
    packed = aligned(ternary.packed(weights, lay).shape, np.int32)
    packed[:] = ternary.packed(weights, lay)
    scale, shift = (aligned((lay.filters,), np.float32) for _ in range(2))
    scale[: shape.filters], shift[: shape.filters] = rng.uniform(0.5, 2, shape.filters), rng.normal(size=shape.filters)
    out = aligned((down, right, lay.filters), np.float32)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (framed, packed, scale, shift, out)]
    library.ternary_conv(*pointers, ctypes.c_int32(0), ctypes.c_int32(down))
    kernel = torch.tensor(weights.transpose(0, 3, 1, 2), dtype=torch.float32)
    expected = F.conv2d(torch.tensor(x.transpose(2, 0, 1))[None], kernel, None, shape.stride, shape.pad, shape.dilation)
    expected = expected[0].permute(1, 2, 0).numpy() * scale[: shape.filters] + shift[: shape.filters]
    np.testing.assert_allclose(out[..., : shape.filters], expected, rtol=1e-4, atol=1e-4)


def test_sixteen_weights_take_a_word():
    shape = Convolution(height=4, width=4, channels=32, filters=8)
    weights = np.ones((8, 3, 3, 32), np.int8)
    assert ternary.packed(weights, ternary.layout(shape, named("c"))).nbytes == 8 * 9 * 32 // 4
