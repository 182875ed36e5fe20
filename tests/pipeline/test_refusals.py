"""Which operators a runtime can't take, found in the real runtimes, for every kind of source."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import cli, runtimes
from penjing.cli.blockers import lines
from penjing.errors import OutputError
from penjing.network.capture import capture_network
from penjing.pipeline.inspection import inspect
from penjing.pipeline.refusals import refused
from penjing.sources.source import Source
from penjing.tasks.task import Task
from tests.raises import raises_case

RUNTIMES = ("onnxruntime", "openvino")


class Net(nn.Module):
    """Two convolutions, and in between what a runtime may not take."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.between = between

    def forward(self, x):
        return self.b(self.between(F.relu(self.a(x)))).flatten(1)


def untranslated(x):
    return torch.special.bessel_j0(x)  # no ONNX form


def short(x):
    return torch.maximum(x.to(torch.int16), -x.to(torch.int16)).float()  # no kernel in ONNX Runtime


def asked(network, runtime, save=None, task=None):
    task = task or Task(example=torch.randn(2, 3, 10, 10))
    return refused(capture_network(network.eval(), *task.call(), task.dynamic), task, runtime, save)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_network_that_runs_has_none_and_values_that_decide_sizes_run(runtime):
    class Holes(Net):
        def forward(self, x):
            y = super().forward(x)
            return y[y > 0]

    assert asked(Net(), runtime) == asked(Holes(), runtime) == ()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_operator_without_an_onnx_form_is_found_with_its_line_and_saved_as_a_program(tmp_path, runtime):
    (refusal,) = asked(Net(untranslated), runtime, tmp_path / "part.onnx")
    assert refusal.kind == "special_bessel_j0" and refusal.stage == "export" and len(refusal.sites) == 1
    assert refusal.where.startswith("test_refusals.py:") and "bessel_j0" in refusal.reason
    program = torch.export.load(refusal.saved)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert refusal.saved == str(tmp_path / "part.pt2") and calls == ["aten.special_bessel_j0.default"]


def test_an_operator_without_a_kernel_is_saved_as_a_file_that_its_makers_can_open(tmp_path):
    import onnxruntime

    (refusal,) = asked(Net(short), "onnxruntime", tmp_path / "part.onnx")
    assert refusal.kind == "maximum" and refusal.stage == "open" and "NOT_IMPLEMENTED" in refusal.reason
    assert str(tmp_path) not in refusal.reason and "/penjing-" not in refusal.reason  # no path of ours
    with pytest.raises(Exception, match="NOT_IMPLEMENTED.*Max"):
        onnxruntime.InferenceSession(refusal.saved, providers=["CPUExecutionProvider"])
    assert asked(Net(short), "openvino") == ()


def test_an_operator_of_several_outputs_is_alone(tmp_path):
    network = Net(lambda x: torch.linalg.svd(x)[1][..., None].expand(-1, -1, -1, 8))
    (refusal,) = asked(network, "onnxruntime", tmp_path / "part.onnx")
    assert refusal.kind == "linalg_svd" and len(refusal.sites) == 1


@pytest.mark.parametrize("name", ["part.onnx", "part-openvino.pt2", "part-3.onnx", "part-onnxruntime-2.onnx"])
def test_files_that_are_there_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    source, task = Source(name="net", module=Net()), Task(example=torch.randn(2, 3, 10, 10))
    with raises_case(OutputError, "exists") as caught:
        inspect(source, task, asked=["onnxruntime"], save_failing=tmp_path / "part.onnx")
    assert name in caught.value.got and (tmp_path / name).read_text() == "mine"


def test_a_place_that_can_not_be_written_is_told_before_anything_is_tried(tmp_path, sources, capsys):
    (tmp_path / "file").write_text("")
    source, task = Source(name="net", module=Net(untranslated)), Task(example=torch.randn(2, 3, 10, 10))
    for place, code in ((tmp_path, "folder"), (tmp_path / "file" / "part.onnx", "unwritable"), (Path(), "folder")):
        with raises_case(OutputError, code):
            inspect(source, task, asked=["onnxruntime"], save_failing=place)
    assert cli.main(["inspect", str(sources / "net.onnx"), "--save-failing", str(sources / "net.onnx")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert inspect(source, task, asked=["onnxruntime"], save_failing=tmp_path / "new" / "part.onnx").refused
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["part.pt2"]


def test_every_place_is_told_once_for_what_is_alike(tmp_path):
    def both(x):
        return untranslated(untranslated(x) + 1) + short(x)

    by_kind = {refusal.kind: refusal for refusal in asked(Net(both), "onnxruntime", tmp_path / "part.onnx")}
    assert by_kind.keys() == {"special_bessel_j0", "maximum"}
    assert len(by_kind["special_bessel_j0"].alike) == 1 and by_kind["maximum"].alike == ()
    assert {file.name for file in tmp_path.iterdir()} == {"part.pt2", "part-2.onnx"}


def test_an_operator_of_the_users_own(tmp_path):
    @torch.library.custom_op("refusals::square", mutates_args=())
    def square(x: torch.Tensor) -> torch.Tensor:
        return x * x

    square.register_fake(torch.empty_like)
    (refusal,) = asked(Net(square), "onnxruntime", tmp_path / "part")
    assert refusal.kind == "square" and refusal.saved == str(tmp_path / "part.pt2")


def test_what_fails_together_alone_is_the_smallest_part(monkeypatch):
    """Halves that run by themselves: what joins them is looked for."""
    from penjing.pipeline import refusals

    def together(self, network, task):
        kinds = [str(n.target) for n in network.graph.nodes]
        return refusals._Trouble("run", "crashed") if {"a", "b"} <= set(kinds) else None

    monkeypatch.setattr(refusals._Search, "_ask", together)
    (refusal,) = asked(Net(lambda x: x + 1), "onnxruntime")
    assert refusal.sites[0] == "a" and refusal.sites[-1] == "b"


NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        return torch.linalg.det(self.a(x))

class Fine(Net):
    def forward(self, x):
        return self.a(x)
"""


@pytest.fixture
def sources(tmp_path):
    """A network with a determinant, for which OpenVINO has no operator: a Python file, a program, an ONNX file."""
    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    names = {}
    exec(NETWORK, names)  # the text above
    x, network = torch.randn(2, 3, 8, 8), names["Net"]().eval()
    torch.export.save(torch.export.export(network, (x,)), tmp_path / "net.pt2")
    torch.onnx.export(network, (x,), dynamo=True, verbose=False).save(str(tmp_path / "net.onnx"))
    return tmp_path


@pytest.mark.parametrize(("name", "where"), [("net.py:Net", "net.py:11"), ("net.pt2", ""), ("net.onnx", "net.onnx")])
def test_on_the_command_line_from_every_kind_of_source(sources, capsys, name, where):
    command = ["inspect", str(sources / name), "--runtime", "openvino,onnxruntime"]
    command += ["--save-failing", str(sources / "part.onnx"), "--json"]
    command += ["--shape", "3,8,8"] if name.startswith("net.py") else []
    assert cli.main(command) == 3
    told = json.loads(capsys.readouterr().out)["refused"]
    (row,) = told["openvino"]
    assert told["onnxruntime"] == [] and row["kind"] == "linalg_det" and where in row["where"]
    assert row["saved"] == str(sources / "part-openvino.onnx") and "Det" in row["reason"]
    code = f"import openvino; openvino.Core().read_model({row['saved']!r})"
    assert b"Det" in subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).stderr


def test_in_words(sources, capsys):
    file = str(sources / "net.py")
    assert cli.main(["inspect", f"{file}:Fine", "--shape", "3,8,8", "--runtime", "all"]) == 0
    text = capsys.readouterr().out
    assert all(f"{runtime} takes every operator" in text for runtime in RUNTIMES)
    assert cli.main(["inspect", f"{file}:Net", "--shape", "3,8,8", "--runtime", "openvino"]) == 3
    text = capsys.readouterr().out
    assert "openvino can't take this network: 1 place" in text and "net.py:11 in forward" in text
    assert cli.main(["inspect", f"{file}:Net", "--shape", "3,8,8", "--runtime", "onyx", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["code"] == "unknown-runtime"


def test_what_fails_only_where_sizes_vary_is_found_by_its_place(monkeypatch):
    """The exporter takes it with fixed sizes alone, as older exporters took pools."""
    from penjing.onnx_files import write as onnx_file

    exported = onnx_file._exported

    def fixed(network, call, dynamic, outputs):
        if dynamic != {} and any("hardswish" in str(node.target) for node in network.graph.nodes):
            raise RuntimeError("hardswish takes fixed sizes")
        return exported(network, call, dynamic, outputs)

    monkeypatch.setattr(onnx_file, "_exported", fixed)
    monkeypatch.setattr(onnx_file.export_cache, "recall", lambda key: None)
    monkeypatch.setattr(onnx_file.export_cache, "store", lambda key, data: None)
    (refusal,) = asked(Net(F.hardswish), "onnxruntime")
    assert refusal.shapes and refusal.kind == "hardswish" and refusal.sites[0] == "a"


def test_what_says_something_of_the_whole_network_is_told_once():
    if not runtimes.installed("kernels"):
        pytest.skip("tvm is not installed")
    (refusal,) = asked(Net(untranslated), "kernels")  # it has no binary layer, and an operator that is unknown too
    assert refusal.kind == "network" and "binary or ternary" in refusal.reason and len(refusal.sites) > 3
    texts = list(lines({"kernels": (refusal,)}))
    assert texts == ["\nkernels can't take this network as a whole", f"    {refusal.reason}"]
