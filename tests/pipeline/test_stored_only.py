"""Integer artifacts of which no operator runs in integers: offered where they are smaller, and said to be only that."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.pipeline.stored_only import weighed
from penjing.records import STORED, Candidate, LayerRow, Measured, Rejection
from penjing.report import arithmetic, table


class Tagger(nn.Module):
    """An LSTM, which ONNX Runtime stores in 8 bits and computes in floating point where ranges are fixed."""

    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def compressed(width, folder):
    torch.manual_seed(0)
    x = torch.randn(8, 4, width)
    return pj.compress(
        Tagger(width).eval(), pj.Task(example=x[:2], calibration=[x]), "minimize size_bytes", runtime="onnxruntime",
        recipe=pj.Recipe(pj.quantize.Static()), out=folder, seconds=0.01, threads=1,
    )  # fmt: skip


def test_one_that_is_smaller_is_offered_and_said_to_be_no_faster(tmp_path):
    result = compressed(48, tmp_path / "run")
    chosen = result.record.chosen
    assert chosen.name == "onnxruntime-int8" and chosen.only_stored and chosen.layers[0].stored == "int8"
    told = f"onnxruntime-int8: {STORED}"
    assert chosen.doubts[0] == told and told in result.record.warnings
    assert arithmetic.in_floats(chosen) == told and STORED in str(result)
    assert told in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert told in " ".join(str(table.candidates(result.record).caption).split())


def test_one_that_is_no_smaller_is_rejected_with_the_sizes(tmp_path):
    record = compressed(2, tmp_path / "run").record
    (rejected,) = [c for c in (*record.candidates, *record.rejected) if c.precision == "int8"]
    least = min((c for c in record.candidates), key=lambda c: c.measured.size_bytes)
    assert rejected.rejection is not None and record.chosen.precision != "int8"
    assert rejected.rejection.reason == (
        f"no operator runs in integers, and the file is not smaller than that of {least.name} "
        f"({rejected.measured.size_bytes} bytes, {least.measured.size_bytes} bytes)"
    )
    assert any(f"onnxruntime-int8 is not offered: {rejected.rejection.reason}" in text for text in record.warnings)


def of(precision, size, runtime="litert", **more):
    name = f"{runtime}-{precision}"
    return Candidate(
        name=name, runtime=runtime, precision=precision, folder=name, measured=Measured(size_bytes=size), **more
    )


@pytest.mark.parametrize("stored", ["int8", None])
def test_without_one_in_floating_point_it_counts_whether_weights_are_stored_as_integers(stored):
    row = LayerRow(name="lstm", kind="lstm", parameters=8, macs=8, weight_bytes=8, stored=stored)
    alone, other = of("int8", 100, float_operators={"lstm": 1}, layers=(row,)), of("fp32", 10, "openvino")
    judged, same = weighed((alone, other))
    assert (judged.rejection is None) == bool(stored) and same == other
    assert judged.doubts == ((f"litert-int8: {STORED}",) if stored else ())


def test_one_that_runs_in_integers_or_is_rejected_already_stays_as_it_is():
    fast = of("int8", 100, integer_operators={"linear": 1}, float_operators={"lstm": 1})
    refused = replace(of("int8", 100, "openvino", float_operators={"lstm": 1}), rejection=Rejection(reason="parity"))
    assert weighed((fast, refused, of("fp32", 10), of("fp32", 10, "openvino")))[:2] == (fast, refused)
