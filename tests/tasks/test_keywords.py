"""Misspelt keywords are told with the name that was meant."""

import inspect

import pytest
import torch

import penjing as pj
from penjing.tasks.keywords import suggesting


@pytest.mark.parametrize(
    ("called", "given", "meant"),
    [
        (pj.compress, {"runtimes": "openvino"}, "runtime"),
        (pj.deliver, {"ouput": "runs"}, "out"),
        (pj.apply, {"learn_range": True}, "learn_ranges"),
        (pj.Task, {"calibrate": []}, "calibration"),
        (pj.quantize.Static, {"weights_bits": 4}, "weight_bits"),
    ],
)
def test_the_nearest_keyword_is_named(called, given, meant):
    with pytest.raises(TypeError, match=rf"did you mean {meant}\?"):
        called(**given)


def test_what_is_near_to_none_is_told_with_all():
    with pytest.raises(TypeError, match=r"no keyword 'zzz'\. It takes example, calibration, "):
        pj.Task(example=torch.zeros(1), zzz=1)


def test_signatures_and_values_stay():
    assert list(inspect.signature(pj.Task).parameters)[:2] == ["example", "calibration"]
    assert "resume" in inspect.signature(pj.compress).parameters
    assert pj.quantize.Static(weight_bits=4) == pj.quantize.Static(weight_bits=4)

    @suggesting
    def both(a, *rest, b=1):
        return a, rest, b

    assert both(1, 2, 3, b=4) == (1, (2, 3), 4)
