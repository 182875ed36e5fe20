"""What a device can't take: a network before anything is computed, and an artifact with the layer that breaks it."""

import json

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing import cli, targets
from penjing.errors import TargetError
from penjing.network.capture import capture_network
from penjing.pipeline import fitting
from penjing.pipeline.order import default_recipe
from penjing.quantize import Static
from penjing.recipes.recipe import Recipe
from penjing.records import yaml_text
from penjing.report import verdict
from penjing.steps.plan import Entry, Plan, QuantSpec
from penjing.targets.reading import PROFILES, parsed
from tests.analyze.test_activations import Wide
from tests.raises import raises_case


def profile(name="microcontroller", **limits):
    data = yaml_text.load((PROFILES / f"{name}.yaml").read_text())
    data |= {"name": "tiny", "runtimes": ["onnxruntime"]}
    data["limits"] |= limits
    return parsed(yaml_text.dump(data), "tiny.yaml")


def captured(network, *shape):
    example = (torch.zeros(*shape),)
    return capture_network(network.eval(), example), (example, {})


MLP = nn.Sequential(nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 700), nn.ReLU(), nn.Linear(700, 8))


class TestSource:
    def check(self, target, network, *shape, recipe=None):
        fitting.check_source(target, *captured(network, *shape), recipe or default_recipe())

    def test_more_weights_than_storage_in_the_fewest_bits(self):
        assert sum(p.numel() for p in MLP.parameters()) // 2 > 100_000  # 4 bits each
        with raises_case(TargetError, "storage") as caught:
            self.check(profile(storage_bytes=100_000), MLP, 1, 64)
        error = caught.value
        assert error.field == "2" and "350 kB, of 386 kB in all at 4 bits a weight" in error.got  # 700 kB at 8 bits
        assert "tiny stores 100 kB" in error.expected and "prune" in error.remedy
        self.check(profile(storage_bytes=390_000), MLP, 1, 64)

    def test_more_activations_than_memory(self):
        with raises_case(TargetError, "memory") as caught:
            self.check(profile(memory_bytes=1_000), MLP, 1, 64)
        assert caught.value.field == "2" and "1.70 kB of activations" in caught.value.got
        self.check(profile(memory_bytes=1_700), MLP, 1, 64)

    def test_weights_count_where_the_device_reads_them_into_its_memory(self):
        with raises_case(TargetError, "memory") as caught:
            self.check(profile(memory_bytes=300_000, storage_bytes=None, weights_in="memory"), MLP, 1, 64)
        assert "beside 386 kB of weights" in caught.value.got

    def test_an_operator_that_it_lacks_is_named_with_its_line(self):
        class Turned(nn.Module):
            def forward(self, x):
                return torch.erf(F.relu(x))

        with raises_case(TargetError, "operator") as caught:
            self.check(profile(), Turned(), 1, 8)
        assert caught.value.field == "/erf#0" and "return torch.erf(F.relu(x))" in caught.value.got

    def test_a_recipe_that_makes_it_smaller_is_waited_for(self):
        small = profile(storage_bytes=100_000)
        with raises_case(TargetError, "storage"):
            self.check(small, MLP, 1, 64, recipe=Recipe(Static()))
        assert self.check(small, MLP, 1, 64, recipe=Recipe(pj.prune.Channels(params=0.1), Static())) is None

    def test_without_integers_weights_are_floats(self):
        with raises_case(TargetError, "storage") as caught:
            self.check(profile(storage_bytes=600_000), MLP, 1, 64, recipe=Recipe(pj.Finetune(epochs=1)))
        assert "of 3.09 MB in all" in caught.value.got

    @pytest.mark.parametrize("name", targets.names())
    def test_a_small_network_fits_into_every_device(self, name):
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        assert fitting.check_source(targets.load(name), *captured(network, 1, 3, 8, 8), default_recipe()) is None


def test_a_format_that_the_device_lacks_is_named_with_its_edge():
    network, _ = captured(nn.Sequential(nn.Linear(4, 4)), 1, 4)
    entries = {"0:in0": Entry(QuantSpec(signed=False, symmetric=False), (1.0,), (0,)), "0:weight": Entry(QuantSpec())}
    needs = fitting.figures(profile(), fitting.needed(network, (((torch.zeros(1, 4)),), {}), Plan(), "fp32"), 10)
    excesses = fitting.broken(profile(), network, Plan(entries), (), needs)
    assert [(e.code, e.site, e.got) for e in excesses] == [("format", "0:in0", "unsigned integers")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Fits in integers and in the order that needs least alone."""
    folder = tmp_path_factory.mktemp("device")
    torch.manual_seed(0)
    task = pj.Task(example=torch.randn(1, 1, 8, 8), calibration=[torch.randn(8, 1, 8, 8)])
    target = profile(memory_bytes=3_000, storage_bytes=None)
    return pj.compress(
        Wide().eval(),
        task,
        "minimize size_bytes",
        recipe=Static(),
        target=target,
        seconds=0.0,
        threads=1,
        out=folder / "r",
    )


class TestArtifact:
    def test_one_that_needs_too_much_is_not_offered_and_names_the_layer(self, run):
        assert [c.name for c in run.record.candidates] == ["onnxruntime-int8"]
        (rejected,) = run.record.rejected
        assert rejected.name == "onnxruntime-fp32" and rejected.rejection.operator in rejected.device.alive
        assert "5.12 kB of activations are alive" in rejected.rejection.reason
        assert any("onnxruntime-fp32 is not offered" in text for text in run.record.warnings)

    def test_what_it_needs_stands_in_the_record(self, run):
        device = run.record.chosen.device
        assert device.activation_bytes == device.memory_bytes == 1_280 < 3_000 < device.activation_bytes_as_given
        assert device.proved and sum(device.alive.values()) == 1_280
        assert "1.28 kB of 3.00 kB of its memory at the peak" in verdict.of(run.record).headline

    def test_the_file_has_the_order_that_needs_least(self, run):
        nodes = [n.name for n in onnx.load(run.folder / "artifact" / "model.onnx").graph.node if n.op_type == "Conv"]
        wide = [i for i, name in enumerate(nodes) if name.startswith("wide")]
        assert len(nodes) == 8 and wide == [0, 2, 4, 6]


def test_inspect_tells_what_breaks_and_says_so_in_its_exit_code(tmp_path, digits_source, capsys):
    data = yaml_text.load((PROFILES / "microcontroller.yaml").read_text())
    data["limits"] |= {"storage_bytes": 1_000}
    (tmp_path / "mine.yaml").write_text(yaml_text.dump(data))
    asked = ["inspect", digits_source, "--shape", "1,8,8", "--target", str(tmp_path / "mine.yaml")]
    assert cli.main(asked) == 3
    out = capsys.readouterr().out
    assert "can't take it" in out and "of weights, of 1.00 kB of storage; about" in out
    assert cli.main([*asked, "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)
    (excess,) = shown["excesses"]
    assert excess["code"] == "storage" and excess["site"] == "body"
    assert shown["device"]["storage_bytes"] == shown["parameters"]  # a byte each
