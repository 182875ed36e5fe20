"""What the runtime gives and what compression gives, told apart in a whole run."""

import pytest
import torch
from torch import nn

import penjing as pj
from penjing import records
from penjing.report import comparison, verdict


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    )


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(3)]
    return pj.Task(example=batches[0][:1], calibration=batches)


def test_the_source_in_fp32_is_built_where_the_candidate_is_another_network(task, tmp_path):
    recipe = pj.Recipe(pj.prune.Channels(channels=0.5), pj.quantize.Static())
    settings = {"runtime": "onnxruntime", "seconds": 0.01, "threads": 1, "out": tmp_path / "run"}
    result = pj.compress(network(), task, "minimize size_bytes", recipe=recipe, **settings)
    record = records.read(result.folder)
    (floor,) = record.floors.values()
    plain = next(c for c in record.candidates if c.precision == "fp32")
    assert list(record.floors) == ["onnxruntime"]
    assert (floor.parameters, floor.macs) == (record.source.parameters, record.source.macs)
    assert floor.size_bytes > 1.3 * plain.measured.size_bytes and floor.latency_ms.calls > 0
    assert len(floor.latency_ms.rounds) == len(record.source.latency_ms.rounds) == 7
    assert comparison.floor(record, record.chosen) == floor
    assert f"smaller than {verdict.FLOOR}" in verdict.of(record).headline
    assert verdict.of(record).headline in str(result)
    assert not (result.folder / "state").exists()


def test_the_fp32_candidate_is_the_floor_where_only_numbers_change(task, tmp_path):
    settings = {"runtime": "onnxruntime", "seconds": 0.01, "threads": 1, "out": tmp_path / "run"}
    record = pj.compress(network(), task, "minimize size_bytes", **settings).record
    plain = next(c for c in record.candidates if c.precision == "fp32")
    assert record.floors == {} and comparison.floor(record, record.chosen) is plain.measured
    assert f"than {verdict.FLOOR}" in verdict.of(record).headline
