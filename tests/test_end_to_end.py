"""Real data, a trained network, real runtimes: the demo's ResNet-20 on Fashion-MNIST, from source to evidence."""

import os
from dataclasses import replace

import numpy as np
import pytest

import penjing as pj
from penjing import runtimes
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor

PICTURES = 1000  # of the 10,000 test images
OPERATORS = {"conv": 21, "linear": 1, "add": 9}


@pytest.fixture(scope="module")
def task():
    from examples.data import DataUnavailable, fashion_mnist
    from examples.fashion_mnist import task as fashion

    try:
        arrays = fashion_mnist()
    except DataUnavailable as error:
        if os.environ.get("PENJING_REQUIRE_FASHION_MNIST") == "1":
            raise
        pytest.skip(str(error))
    import torch

    images = torch.from_numpy(arrays["test_images"][:PICTURES, None])
    labels = torch.from_numpy(arrays["test_labels"][:PICTURES]).long()
    return replace(fashion.task(), select=None, evaluate=fashion.accuracy(images, labels))


@pytest.fixture(scope="module")
def result(task, tmp_path_factory):
    from examples.fashion_mnist.network import resnet20

    out = tmp_path_factory.mktemp("end-to-end") / "run"
    return pj.compress(resnet20(), task, "minimize latency_ms, drop<=1%", out=out, seconds=0.2, threads=1)


@pytest.fixture(scope="module")
def candidates(result):
    return {candidate.name: candidate for candidate in result.record.candidates}


@pytest.mark.parametrize("runtime", runtimes.DEPLOYED)
def test_integers_keep_the_accuracy(result, candidates, runtime):
    fp32, int8 = (candidates[f"{runtime}-{precision}"] for precision in ("fp32", "int8"))
    assert result.record.source.metric >= 0.92
    assert abs(fp32.measured.metric - result.record.source.metric) <= 0.001
    assert abs(int8.measured.metric - fp32.measured.metric) <= 0.01
    assert int8.parity[1].agreement >= 0.9 and int8.parity[1].snr_db >= 25


@pytest.mark.parametrize("runtime", runtimes.DEPLOYED)
def test_no_operator_stays_in_floating_point(candidates, runtime):
    int8 = candidates[f"{runtime}-int8"]
    counted = {kind: int8.integer_operators.get(kind, 0) for kind in OPERATORS}
    assert counted == OPERATORS
    assert not set(OPERATORS) & set(int8.float_operators)
    assert not [row.name for row in int8.layers if row.kind in OPERATORS and row.reason]


@pytest.mark.parametrize("runtime", runtimes.DEPLOYED)
def test_the_file_is_less_than_half_of_the_source(result, candidates, runtime):
    size = candidates[f"{runtime}-int8"].measured.size_bytes
    assert size < 0.45 * result.record.source.size_bytes


def test_the_goal_is_met_and_the_artifact_says_what_the_record_says(result, task):
    assert result.met, result.record.goal.reason
    assert result.record.warnings == ()
    manifest = read_manifest(result.artifact)
    predict = predictor(isolated.open_artifact(result.artifact, 1), manifest)
    assert task.evaluate(predict) == pytest.approx(result.record.artifact.metric, abs=1e-3)
    some = predict(np.zeros((1, 1, 28, 28), np.float32))
    assert some.shape == (1, 10) and np.isfinite(some).all()
    assert (result.folder / "report.html").stat().st_size > 10_000
