import subprocess
import sys

import pytest

import penjing

PUBLIC = [
    "Clip",
    "Finetune",
    "Goal",
    "PenjingError",
    "Recipe",
    "Result",
    "Task",
    "apply",
    "architectures",
    "compress",
    "decompose",
    "deliver",
    "distill",
    "load_checkpoint",
    "load_weights",
    "pack_to",
    "postprocess",
    "preprocess",
    "prune",
    "quantize",
    "quantize_to",
    "recipes",
    "records",
    "run",
    "share",
    "tasks",
    "watch",
]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_public_names_are_these():
    assert penjing.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(penjing))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_resolves_and_is_documented(name):
    assert getattr(penjing, name).__doc__


def test_they_resolve_by_a_star_import():
    names = {}
    exec("from penjing import *", names)  # the names are ours
    assert set(PUBLIC) <= names.keys()


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'condense'"):
        penjing.condense  # noqa: B018


def test_the_names_of_steps():
    assert penjing.quantize.Static().weight_bits == 8
    assert penjing.Finetune(epochs=2).epochs == 2


@pytest.mark.parametrize(
    "modules",
    [
        "penjing, penjing.records, penjing.steps.plan, penjing.errors, penjing.report.html",
        "penjing.measure, penjing.goals.goal",
    ],
)
def test_what_reads_evidence_imports_no_torch(modules):
    code = f"import {modules}, sys; print(*{{'torch', 'onnx', 'onnxruntime', 'openvino'}} & set(sys.modules))"
    completed = python(code)
    assert (completed.returncode, completed.stdout.strip()) == (0, ""), completed.stderr


def test_the_goal_alone_needs_no_torch():
    completed = python("import penjing as pj, sys; pj.Goal.parse('drop<=1%'); sys.exit('torch' in sys.modules)")
    assert completed.returncode == 0, completed.stderr


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert penjing.__version__ == version("penjing")
