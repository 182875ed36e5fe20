from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import CalibrationError, SourceError
from penjing.tasks.outputs import flatten_outputs, numpy_predictor, output_names, unflatten_outputs
from tests.raises import raises_case

Pair = namedtuple("Pair", "first second")
A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


@pytest.mark.parametrize(
    ("outputs", "back", "names"),
    [
        (A, A, ["output"]),
        ((A, B), (A, B), ["output_0", "output_1"]),
        ([A, (B, C)], (A, (B, C)), ["output_0", "output_1_0", "output_1_1"]),
        (Pair(A, B), (A, B), ["output_0", "output_1"]),
        ({"logits": A, "loss": None}, {"logits": A}, ["logits"]),
        ({"x": {"y": A}, "x_y": B}, {"x": {"y": A}, "x_y": B}, ["x_y", "x_y_"]),
        ({"hidden": (A, B)}, {"hidden": (A, B)}, ["hidden_0", "hidden_1"]),
        ((A, None, {"k": B}, 3), (A, None, {"k": B}, 3), ["output_0", "output_2_k"]),
    ],
)
def test_outputs_come_back_from_the_flat_list(outputs, back, names):
    leaves, structure = flatten_outputs(outputs)
    assert output_names(structure) == names
    assert len(leaves) == len(names)
    again = unflatten_outputs(leaves, structure)
    assert repr(again) == repr(back)


def test_the_structure_survives_json():
    import json

    _, structure = flatten_outputs({"a": [A, {"b": B}], "n": 4})
    assert json.loads(json.dumps(structure)) == structure


def test_an_output_that_is_no_tensor_is_named():
    with raises_case(SourceError, "not-a-tensor") as caught:
        flatten_outputs({"cache": object()})
    assert "output['cache']" in caught.value.what
    assert "wrap the network" in caught.value.remedy and "use_cache" not in caught.value.remedy


def test_of_a_cache_the_setting_is_named_and_what_helps_where_it_does_not():
    class EncoderDecoderCache: ...

    with raises_case(SourceError, "not-a-tensor") as caught:
        flatten_outputs({"cache": EncoderDecoderCache()})
    assert "use_cache" in caught.value.remedy and "wrap the network" in caught.value.remedy


def test_a_changed_number_of_outputs_is_an_error():
    with raises_case(SourceError, "outputs"):
        unflatten_outputs([A], {"kind": "tuple", "items": [{"kind": "tensor"}, {"kind": "tensor"}]})


class Moody(nn.Module):
    """Behaves differently in train mode, and returns every kind of output."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(4).eval()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x, *, shift=None):
        y = self.drop(self.frozen(x)) * self.scale
        return {"y": y if shift is None else y + shift, "half": y.to(torch.bfloat16), "none": None, "pair": [y, y]}


def test_predict_evaluates_and_puts_every_mode_back():
    network = Moody().train()
    network.frozen.eval()
    x = np.ones((5, 4), np.float32)
    result = numpy_predictor(network)(x, shift=np.float32(1) * np.ones((1, 4), np.float32))
    assert set(result) == {"y", "half", "pair"}
    assert isinstance(result["pair"], tuple)
    assert result["half"].dtype == np.float32
    np.testing.assert_allclose(result["y"], result["pair"][0] + 1)
    assert np.ptp(result["pair"][0]) == 0  # no dropout
    assert network.training and network.drop.training and not network.frozen.training


def test_predict_puts_modes_back_when_the_forward_raises():
    network = Moody().train()
    with pytest.raises(RuntimeError):
        numpy_predictor(network)(np.ones((5, 3), np.float32))
    assert network.training


def test_predict_runs_an_exported_program_in_both_modes():
    program = torch.export.export(nn.Sequential(nn.Linear(3, 2), nn.Dropout()).eval(), (torch.zeros(1, 3),))
    x = np.ones((1, 3), np.float32)
    expected = program.module()(torch.ones(1, 3)).detach().numpy()
    np.testing.assert_array_equal(numpy_predictor(program.module())(x), expected)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3)[::-1],  # negative strides
        np.arange(6, dtype=">f4").reshape(2, 3),  # another byte order
        np.broadcast_to(np.float32(2), (2, 3)),  # read only
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    ],
    ids=["reversed", "big-endian", "read-only", "fortran"],
)
@pytest.mark.filterwarnings("error")
def test_every_layout_of_an_array_is_understood(array):
    np.testing.assert_array_equal(numpy_predictor(nn.Identity())(array), np.ascontiguousarray(array).astype(np.float32))


def test_an_array_without_numbers_is_refused():
    with raises_case(CalibrationError, "no-numbers"):
        numpy_predictor(nn.Identity())(np.array(["a"]))


def test_scalars_keep_their_rank():
    assert numpy_predictor(nn.Identity())(np.array(1.5)).shape == ()
