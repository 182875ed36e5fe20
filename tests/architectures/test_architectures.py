"""What holds for every built-in architecture; each family's own tests stand beside this file."""

import copy
import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from penjing.analyze.coupling import couple
from penjing.architectures import build, names
from penjing.architectures.shufflenet_v2 import shuffled
from penjing.errors import SourceError
from penjing.network.capture import capture_network
from penjing.pipeline.building import build as export
from penjing.prune import Channels
from penjing.prune.channels import disagreement, remove
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.raises import raises_case

TOKENS = ("bert", "gpt", "lstm")
WIDTHS = {"resne": 4, "vgg": 4, "vit": 16, "bert": 16, "gpt": 16, "lstm": 8, "densenet": 4, "unet": 4}

# One of every family: what is checked by exporting takes seconds each.
FAMILIES = (
    "vgg16_small", "resnet20", "resnext50_32x4d", "googlenet", "inception_v3", "mobilenet_v1", "mobilenet_v2",
    "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "efficientnet_lite0", "ghostnet", "mnasnet0_5",
    "squeezenet1_1", "densenet121", "vit_tiny", "bert_tiny", "gpt_tiny", "unet", "lstm_tagger",
)  # fmt: skip


def tiny(name):
    """A narrow network of the family, scattered norms, and an example of two samples."""
    torch.manual_seed(0)
    token = name.startswith(TOKENS)
    settings = {"width": next((w for start, w in WIDTHS.items() if name.startswith(start)), 0.25)}
    if name.startswith("gpt"):
        settings["vocabulary"] = 30
    else:
        settings["classes"] = 3
    side = 80 if name == "inception_v3" else 32
    if not token:
        settings["in_channels"] = 1
    if name.startswith("vit"):
        settings |= {"resolution": 32, "depth": 2, "patch": 8, "heads": 2}
    if name.startswith(("bert", "gpt")):
        settings |= {"heads": 2}
    model = build(name, **settings)
    for module in model.modules():
        for role, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.is_floating_point() and tensor.dim() == 1:
                with torch.no_grad():
                    tensor.uniform_(0.5, 1.5) if role in ("weight", "running_var") else tensor.normal_(0, 0.1)
    return model.eval(), torch.randint(0, 30, (2, 9)) if token else torch.randn(2, 1, side, side)


@functools.cache  # capturing takes seconds; who changes the network copies it
def captured(name):
    model, x = tiny(name)
    return capture_network(model, (x,)), x


@pytest.mark.parametrize("name", [n for n in names() if n not in ("resnext101_32x8d", "densenet169", "densenet201")])
def test_every_architecture_computes_and_learns(name):
    model, x = tiny(name)
    out = model.train()(x)
    loss = F.cross_entropy(out.flatten(2).transpose(1, 2).flatten(0, 1) if out.dim() == 4 else out.flatten(0, -2),
                           torch.randint(0, 3, (out.numel() // out.shape[1 if out.dim() == 4 else -1],)))  # fmt: skip
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not [n for n in without if "segment" not in n]  # of a single segment


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_network_of_every_family_is_its_masked_reference(name):
    network, x = captured(name)
    task = Task(example=x)
    coupling = couple(network, task.call())
    assert set(coupling.not_prunable.values()) <= {"it is an output of the network"}  # nothing else is held
    assert all(where.startswith(("classifier", "tokens")) for where in coupling.not_prunable)
    step = Channels(channels=0.6, scope="layer", criterion="random", approximate=True, round_to=1, min_keep=0)
    ranking = step.ranking(network, coupling, Context(task=task))
    removed = ranking.removed(400)
    pruned = remove(Draft(network), coupling, removed)
    assert sum(p.numel() for p in pruned.network.parameters()) < 0.8 * sum(p.numel() for p in network.parameters())
    recurrent = name == "lstm_tagger"  # makes its first state in float32
    if not recurrent:
        network, pruned = copy.deepcopy(network).double(), Draft(pruned.network.double())
        x = x.double() if x.is_floating_point() else x
    assert disagreement(network, pruned.network, coupling, removed, ((x,), {})) < (1e-5 if recurrent else 1e-11)


DEPLOYED = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "vit_tiny", "gpt_tiny", "unet", "lstm_tagger")
REST = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in DEPLOYED]


@pytest.mark.parametrize("name", [*DEPLOYED, *REST])
def test_every_family_runs_pruned_in_the_runtimes(name, tmp_path):
    network, x = captured(name)
    task = Task(example=x)
    step = Channels(channels=0.7, scope="layer", criterion="l2", approximate=True, round_to=1)
    pruned = step(Draft(network), Context(task=task))
    with torch.no_grad():
        expected, structure = flatten_outputs(copy.deepcopy(pruned.network)(x))
    for runtime in ("onnxruntime", "openvino"):
        where = tmp_path / runtime
        where.mkdir()
        export(pruned, runtime, "fp32", task, structure, where)
        got, _ = flatten_outputs(predictor(isolated.open_artifact(where, 1), read_manifest(where))(x.numpy()))
        for a, b in zip(expected, got, strict=True):
            assert np.abs(a.numpy() - b).max() < 1e-4 * max(1, float(a.abs().max()))


def test_the_catalogue_loads_without_building_anything():
    code = "import penjing.architectures as a; print(len(a.names()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) == len(names()) >= 50


def test_a_shuffle_mixes_the_halves():
    x = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert shuffled(x).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_below_one_are_named(name):
    with raises_case(SourceError, "settings") as caught:
        build(name, classes=0)
    assert "classes" in str(caught.value.__cause__)
