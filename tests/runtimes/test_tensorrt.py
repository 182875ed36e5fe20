"""Files for TensorRT obey its rules, compute as planned in ONNX Runtime, and have the builder's command beside them."""

import os
import subprocess

import onnx
import pytest

from penjing import measure, runtimes
from penjing.onnx_files import tensorrt_rules
from penjing.runtimes import tensorrt, tensorrt_engine
from tests.tiny_networks import CASES

pytestmark = pytest.mark.skipif(runtimes.NVIDIA.here(), reason="an engine is built here")


@pytest.mark.parametrize("case", CASES)
def test_every_pattern_obeys_the_rules_and_computes_as_planned(exported, case):
    artifact = exported(case, "tensorrt", "int8")
    model = onnx.load(str(artifact.folder / "model.onnx"))
    assert tensorrt_rules.broken(model) == []
    quantized = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(quantized) >= 4 and "int32" not in {
        str(onnx.numpy_helper.to_array(t).dtype) for t in model.graph.initializer
    }
    session = tensorrt.open_session(artifact.folder, artifact.manifest, 1)
    answers = session.run(artifact.arrays(5, seed=3))
    assert measure.parity(artifact.answers(5, seed=3), answers, "planned").snr_db > 60


def test_the_command_builds_the_file_beside_it_for_shapes_that_vary(exported, tmp_path):
    artifact = exported("tokens", "tensorrt", "int8")
    script = tmp_path / "small name.sh"
    script.write_text((artifact.folder / "model.sh").read_text(encoding="utf-8"), encoding="utf-8")
    program = tmp_path / "trtexec"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    told = subprocess.run(["sh", str(script)], env={"PATH": path}, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == [
        f"--onnx={tmp_path}/small name.onnx",
        f"--saveEngine={tmp_path}/small name.engine",
        "--stronglyTyped",
        "--minShapes=tokens:1x6x8,context:1x4",
        "--optShapes=tokens:1x6x8,context:1x4",
        "--maxShapes=tokens:64x6x8,context:64x4",
    ]


def test_shapes_of_the_profile_are_read_as_they_are_written(exported):
    shapes = exported("tokens", "tensorrt", "int8").manifest.settings["shapes"]
    assert tensorrt_engine.shapes_of(shapes) == {
        "tokens": [(1, 6, 8), (1, 6, 8), (64, 6, 8)],
        "context": [(1, 4), (1, 4), (64, 4)],
    }
    assert tensorrt_engine.shapes_of("") == {}


def test_the_loader_is_whole_and_needs_nothing_of_penjing(exported):
    text = (exported("tokens", "tensorrt", "int8").folder / "load.py").read_text(encoding="utf-8")
    compile(text, "load.py", "exec")
    assert "penjing" not in text.replace("Penjing", "") and "class Engine" in text


def test_the_suffix_of_an_onnx_file_stays_onnx_runtimes_and_the_name_chooses_tensorrt(tmp_path):
    from penjing.pipeline.quick import _Target

    assert _Target(tmp_path / "small.onnx", None, False).runtime == "onnxruntime"
    target = _Target(tmp_path / "small.onnx", "tensorrt", False)
    assert target.runtime == "tensorrt" and [file.name for file in target.files] == ["small.onnx", "small.sh"]
