"""Networks as one library: answers as torch's, files that are checked, and what can't be written."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import ArtifactError, ExportError
from penjing.kernels.artifact import open_artifact, write
from penjing.kernels.instruction_sets import INSTRUCTION_SETS, named, runs_here
from penjing.network.capture import capture_network
from penjing.numerics.signs import binary
from penjing.surgery import sign_inputs
from tests.raises import raises_case

pytest.importorskip("tvm")

HERE = [name for name, row in INSTRUCTION_SETS.items() if runs_here(row)]
BINARY = ("down", "body", "wide")


class Net(nn.Module):
    """Odd widths, strides, a projection, a pool, biases and batch norms."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 11, 3, padding=1), nn.BatchNorm2d(11)
        self.down, self.norm2 = nn.Conv2d(11, 24, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(24)
        self.body = nn.Conv2d(24, 24, 3, padding="same")
        self.pool = nn.MaxPool2d(2)
        self.wide, self.norm3 = nn.Conv2d(24, 70, 3, padding=2, dilation=2), nn.BatchNorm2d(70, affine=False)
        self.shortcut = nn.Conv2d(24, 70, 1)
        self.head = nn.Linear(70, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.norm2(self.down(x))
        x = self.pool(F.relu(self.body(x) + x))
        x = F.relu(self.norm3(self.wide(x)) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    module = Net()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 1.5)
    captured = capture_network(module.eval(), (torch.rand(2, 2, 8, 9),), {})
    sign_inputs(captured, BINARY)
    with torch.no_grad():
        for name in BINARY:
            weight = captured.get_parameter(f"{name}.weight")
            weight.copy_(binary(weight))
            captured.get_parameter(f"{name}_sign.threshold").uniform_(-0.2, 0.4)
    return captured


@pytest.fixture(scope="module")
def artifact(network, tmp_path_factory):
    return write(network, (2, 8, 9), tmp_path_factory.mktemp("artifact"), float_bits=32)


@pytest.mark.parametrize("name", HERE)
def test_it_answers_as_torch(network, name, tmp_path):
    predict = open_artifact(write(network, (2, 8, 9), tmp_path, instructions=named(name), float_bits=32))
    for batch in (1, 5):
        x = torch.randn(batch, 2, 8, 9)
        with torch.no_grad():
            np.testing.assert_allclose(predict(x.numpy()), network(x).numpy(), rtol=1e-4, atol=1e-4)


def test_it_runs_with_numpy_alone(artifact):
    code = "import load, sys, numpy; print(load.predict(numpy.ones((1, 2, 8, 9))).shape, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=artifact, capture_output=True, text=True, check=True)
    assert done.stdout == "(1, 3) False\n"


def test_binary_weights_take_a_bit_and_others_half_a_float(network, tmp_path):
    write(network, (2, 8, 9), tmp_path, instructions=named("c"))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    stored = [section["bytes"] for section in manifest["sections"]]
    words = {11: 2, 24: 4}  # bytes of a pixel of so many channels
    assert stored[3] == 24 * 3 * 2 * words[11]
    assert stored[0] == 11 * 9 * 2 * 2
    assert sum(stored) == (tmp_path / "weights.bin").stat().st_size


@pytest.mark.parametrize("name", ["network.so", "weights.bin"])
def test_a_damaged_file_is_not_loaded(network, name, tmp_path):
    write(network, (2, 8, 9), tmp_path, instructions=named("c"))
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with raises_case(ArtifactError, "damaged") as refusal:
        open_artifact(tmp_path)
    assert name in refusal.value.got


@pytest.mark.parametrize(
    "field, value, said", [("format", 2, "format 2"), ("machine", "vax", "for vax"), ("flags", ["mmx9"], "lacks mmx9")]
)
def test_an_artifact_for_something_else_is_not_loaded(artifact, field, value, said, tmp_path):
    for path in artifact.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | {field: value}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with raises_case(ArtifactError, "damaged") as refusal:
        open_artifact(tmp_path)
    assert said in refusal.value.got


def test_an_input_of_another_shape_is_refused(artifact):
    with pytest.raises(ValueError):
        open_artifact(artifact)(np.zeros((1, 2, 9, 8)))


@pytest.mark.parametrize(
    "layer, said",
    [(nn.Softmax(dim=1), "softmax"), (nn.Conv2d(2, 2, 3, groups=2), "groups"), (nn.BatchNorm2d(2), "batch norm")],
)
def test_an_operator_that_is_lacking_is_named(layer, said, tmp_path):
    captured = capture_network(nn.Sequential(layer).eval(), (torch.rand(2, 2, 4, 4),), {})
    with raises_case(ExportError, "operator") as refusal:
        write(captured, (2, 4, 4), tmp_path)
    assert said in str(refusal.value)
