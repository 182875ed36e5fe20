"""Every ONNX operator, by the tests of the standard itself."""

import pytest

pytest.importorskip("onnx")

import onnx_nodes

from penjing.errors import SourceError
from penjing.onnx_files.operators import OPERATORS


def test_nearly_all_that_take_part_agree_as_modules():
    names = onnx_nodes.taking_part()
    failing = {}
    for name in names:
        try:
            onnx_nodes.Node(name).as_module()
        except (AssertionError, SourceError) as error:
            failing[name] = error
    assert sorted(failing) == sorted(onnx_nodes.FAILING)
    assert len(names) > 1500
    assert len(failing) < 0.03 * len(names)


def test_operators_that_are_refused_are_not_taken():
    assert not onnx_nodes.REFUSED.keys() & OPERATORS.keys()


A_FEW = (
    "test_add_uint8",
    "test_averagepool_2d_ceil",
    "test_basic_conv_with_padding",
    "test_batchnorm_epsilon",
    "test_cast_FLOAT_to_FLOAT16",
    "test_convtranspose_output_shape",
    "test_gather_2d_indices",
    "test_gemm_all_attributes",
    "test_gru_with_initial_bias",
    "test_layer_normalization_2d_axis1",
    "test_lstm_with_peepholes",
    "test_maxpool_2d_same_upper",
    "test_nonmaxsuppression_two_classes",
    "test_resize_upsample_scales_cubic",
    "test_scatternd_add",
    "test_slice_neg_steps",
    "test_top_k",
)


@pytest.mark.parametrize("name", A_FEW)
def test_a_few_agree_captured_and_exported(name):
    onnx_nodes.Node(name).captured_and_exported()
