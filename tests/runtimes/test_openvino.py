import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import runtimes
from penjing.measure import machine
from penjing.network.capture import capture_network
from penjing.pipeline import building
from penjing.quantize import Static
from penjing.runtimes import openvino as runtime
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task

VNNI = ("avx", "avx2", "avx512f", "avx512_vnni")


@pytest.mark.parametrize(
    ("instruction_sets", "bits", "bf16"),
    [
        (VNNI, 8, False),
        ((*VNNI, "avx512_bf16"), 8, True),
        ((*VNNI, "amx_int8", "amx_bf16"), 8, True),
        (("avx", "avx2", "fma"), 7, False),
        (("neon",), 8, False),
    ],
)
def test_what_it_accelerates_follows_the_processor(instruction_sets, bits, bf16):
    capabilities = runtime.capabilities(instruction_sets)
    assert capabilities.weight.bits == bits
    assert ("bf16" in capabilities.precisions) == bf16
    assert {"fp32", "fp16", "int8"} <= set(capabilities.precisions)
    assert not capabilities.activation.signed  # AMX refuses signed activations with a zero point


@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("fp16", "f32"), ("int8", "f32")])
def test_the_precision_that_is_not_in_the_file_stands_in_the_manifest(exported, precision, hint):
    artifact = exported("residual", "openvino", precision)
    assert artifact.manifest.settings["INFERENCE_PRECISION_HINT"] == hint
    session = runtimes.open_artifact(artifact.folder, 2)
    session.run(artifact.arrays(1, seed=1))
    (request,) = session.session.requests.values()
    compiled = request.get_compiled_model()
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == hint
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2
    assert compiled.get_property("NUM_STREAMS") == 1


def test_weights_lie_in_the_file_once_and_as_integers(exported):
    fp32, int8 = (exported("residual", "openvino", precision) for precision in ("fp32", "int8"))
    sizes = [(artifact.folder / "model.bin").stat().st_size for artifact in (fp32, int8)]
    weights = 8 * 3 * 9 + 8 * 8 * 9 + 5 * 8
    assert sizes[0] >= 4 * weights
    assert sizes[1] < 2 * weights  # with scales and shapes; no float weight beside the integers


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_xml_calls_operators_by_their_sites_and_by_no_running_number(exported, precision):
    artifact = exported("branches", "openvino", precision)
    text = (artifact.folder / "model.xml").read_text(encoding="utf-8")
    names = set(re.findall(r'<layer id="\d+" name="([^"]+)"', text))
    stems = {runtime._origin(name) for name in names}
    assert {"wide", "depthwise", "point", "other", "merge", "/cat#0", "/avg_pool2d#0"} <= stems
    assert not {name for name in names if re.fullmatch(r"[A-Z][A-Za-z]+_\d{3,}", name)}


def test_nothing_of_the_crossing_by_onnx_is_left(exported):
    artifact = exported("residual", "openvino", "int8")
    assert sorted(p.name for p in artifact.folder.iterdir()) == ["load.py", "manifest.json", "model.bin", "model.xml"]


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("conv1", "conv1"),
        ("conv1/WithoutBiases", "conv1"),
        ("/mean#0/axes", "/mean#0"),
        ("layers.0.up/bias", "layers.0.up"),
        ("layer/add#0_original", "layer/add#0"),
        ("conv1/Dequantization/sub", "conv1"),
    ],
)
def test_names_lead_back_to_their_site(name, origin):
    assert runtime._origin(name) == origin


class Crashing(nn.Module):
    """OpenVINO 2026.4 ends the process when it compiles this for fixed shapes."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.up = (nn.Linear(64, 64) for _ in range(4))
        self.mix = nn.Conv1d(64, 64, 3, padding=1)

    def forward(self, x):
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = x + torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 8, -1) @ self.v(x)
        return x + torch.relu(self.up(x))


def test_a_network_that_can_not_be_compiled_for_fixed_shapes_runs_all_the_same(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 64)
    network = capture_network(Crashing().eval(), (x,))
    folder = tmp_path / "with, a comma"
    folder.mkdir()
    manifest = runtime.export(network, ((x,), {}), None, "fp32", {"kind": "tensor"}, folder)
    session = runtime.open_session(folder, manifest, 1)
    for size in (1, 2, 3):
        given = torch.randn(size, 6, 64)
        with torch.no_grad():
            assert np.abs(session.run([given.numpy()])[0] - network(given).numpy()).max() < 1e-4


def test_fixed_shapes_and_varying_ones_give_the_same_answers(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    network = capture_network(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(2)).eval(), (x,))
    manifest = runtime.export(network, ((x,), {}), None, "fp32", {"kind": "tensor"}, tmp_path)
    assert manifest.fixed_shapes
    session = runtime.open_session(tmp_path, manifest, 1)
    for size in (1, 2, 3, 4):
        given = torch.randn(size, 3, 16, 16)
        with torch.no_grad():
            assert np.abs(session.run([given.numpy()])[0] - network(given).numpy()).max() < 1e-5
    assert list(session.requests)[2:] == ["any"] and len(session.requests) == 3


class OneWeight(nn.Module):
    """Two convolutions of the same values with the same weight, of which one has a bias and an activation."""

    shape = (3, 12, 12)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 1)

    def forward(self, x):
        return self.last(F.relu(self.first(x))) + F.conv2d(x, self.first.weight, padding=1)


class BothWays(OneWeight):
    """A convolution and a transposed one, whose channel axes differ."""

    def forward(self, x):
        h = F.relu(self.last(F.relu(self.first(x))))
        back = F.conv_transpose2d(h, self.first.weight, padding=1)
        return back + F.conv2d(x, self.first.weight, padding=1).mean(1, keepdim=True)


class SumOfLayers(nn.Module):
    """Rows that two linear layers give, added, and read by a third."""

    shape = (16,)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.c(h + self.b(h)) + self.b(h)


@pytest.mark.parametrize("network", [OneWeight, BothWays, SumOfLayers])
def test_integers_are_right_at_every_batch_size(network, tmp_path):
    """In one session: from the third shape on it compiles a network whose shapes vary."""
    model, example = network().eval(), torch.randn(2, *network.shape)
    task = Task(example=(example,), calibration=[torch.randn(16, *network.shape) for _ in range(2)])
    spec = runtimes.get("openvino").capabilities(machine(1).instruction_sets)
    draft = Static()(Draft(capture_network(model, (example,))), Context(task=task, capabilities=spec))
    building.build(draft, "openvino", "int8", task, flatten_outputs(model(example))[1], tmp_path)
    session, plan = runtimes.open_artifact(tmp_path, 1), insert(draft.network, draft.plan)
    for batch in (1, 2, 3, 32):
        x = torch.randn(batch, *network.shape)
        with torch.no_grad():
            (given,), expected, planned = session.run([x.numpy()]), model(x), plan(x)
        for reference, least in ((expected, 20), (planned, 30)):  # of few rows, one beyond the range counts
            noise = (torch.from_numpy(given) - reference).square().mean()
            assert 10 * torch.log10(reference.square().mean() / noise) > least, batch
