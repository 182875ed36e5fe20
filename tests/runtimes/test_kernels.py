"""Libraries of kernels as artifacts: opened where they were made alone, refused for networks that are not binary."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from penjing import runtimes
from penjing.errors import ArtifactError, ExportError
from penjing.network.capture import capture_network
from penjing.records.manifest import read_manifest, write_manifest
from penjing.runtimes import isolated
from tests.raises import raises_case

pytest.importorskip("tvm")


@pytest.fixture
def copied(exported, tmp_path):
    """An artifact of a small binary network that may be changed."""
    artifact = exported("residual", "kernels", "fp32")
    for path in artifact.folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return artifact, tmp_path


def refused(network, example, dynamic=None):
    captured = capture_network(network.eval(), (example,), {})
    return runtimes.get("kernels").export(captured, ((example,), {}), dynamic, "fp32", {"kind": "tensor"}, None)


def test_a_network_without_binary_layers_is_refused_with_its_largest_layer():
    with raises_case(ExportError, "no-levels") as refusal:
        refused(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), torch.rand(2, 1, 4, 4))
    assert "weights of 2" in refusal.value.got and "quantize.Binary" in refusal.value.remedy


def test_sizes_that_vary_are_refused():
    with raises_case(ExportError, "varying-sizes"):
        refused(nn.Conv2d(1, 2, 3), torch.rand(2, 1, 4, 4), {0: {0: "batch", 2: "height"}})


def test_a_sequence_is_refused():
    with raises_case(ExportError, "ports"):
        refused(nn.Linear(4, 2), torch.rand(2, 5, 4))


def test_foreign_machine_code_is_not_run(copied, monkeypatch):
    _, folder = copied
    data = bytearray((folder / "model.so").read_bytes())
    data[-1] ^= 1
    (folder / "model.so").write_bytes(data)
    with raises_case(ArtifactError, "foreign-code") as refusal:
        isolated.open_artifact(folder, 1)
    assert "PENJING_TRUST" in refusal.value.remedy


def test_another_processor_is_told(copied):
    artifact, folder = copied
    manifest = read_manifest(folder)
    manifest.settings["instructions"] = "aarch64-neon"
    write_manifest(folder, manifest)
    with raises_case(ArtifactError, "processor"):
        runtimes.open_artifact(folder, 1)
    manifest.settings["instructions"] = "abacus"
    write_manifest(folder, manifest)
    with pytest.raises(Exception, match="abacus"):
        runtimes.open_artifact(folder, 1)


def test_its_loader_needs_numpy_alone_and_looks_at_the_processor(copied):
    artifact, folder = copied
    code = "import load, sys, numpy; print(load.predict(numpy.ones((2, 3, 12, 12))).shape, 'penjing' in sys.modules)"
    shape = artifact.manifest.programs[0].inputs[0].shape[1:]
    code = code.replace("(2, 3, 12, 12)", str((2, *shape)))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "(2, 5) False\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["flags"] = "mmx9"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    failed = subprocess.run([sys.executable, "load.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and "lacks some of mmx9" in failed.stderr


def test_numbers_in_16_bits_make_it_smaller(exported):
    sizes = [len((exported("residual", "kernels", p).folder / "model.so").read_bytes()) for p in ("fp32", "fp16")]
    assert sizes[1] < sizes[0] - 500
    x = exported("residual", "kernels", "fp16").arrays(2, seed=3)
    answers = [runtimes.open_artifact(exported("residual", "kernels", p).folder, 1).run(x)[0] for p in ("fp32", "fp16")]
    assert 0 < np.abs(answers[0] - answers[1]).max() < 0.2
