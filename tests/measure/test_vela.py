"""Arm's compiler for the Ethos-U on files that LiteRT's exporter writes."""

import importlib.util
from dataclasses import replace

import pytest

from penjing import targets
from penjing.errors import ArtifactError, MissingDependency
from penjing.measure import vela
from penjing.pipeline import fitting
from penjing.records import DeviceFigures
from penjing.steps.plan import Plan
from tests.raises import raises_case

pytest.importorskip("ethosu")
pytest.importorskip("litert_torch")
pytest.importorskip("ai_edge_litert")

TARGET = targets.load("ethos-u55")
CHECK = TARGET.check
NEEDS = DeviceFigures(
    storage_bytes=4_000, memory_bytes=2_000, activation_bytes=2_000, activation_bytes_as_given=2_000, site="stem",
    alive={"x": 2_000}, proved=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def artifact(exported):
    return exported("residual", "litert", "int8")


@pytest.fixture(scope="module")
def told(artifact):
    return vela.estimate(artifact.folder / "model.tflite", CHECK.accelerator, CHECK.system, CHECK.memory)


def test_it_estimates_cycles_and_memory(told, artifact):
    figures = told.figures
    assert told.compiler == "vela 5.2.0" and figures["npu_operators"] >= 7
    assert figures["cycles"] >= figures["npu_cycles"] > 0 and figures["clock_mhz"] == 500
    assert figures["inference_ms"] == pytest.approx(figures["cycles"] / figures["clock_mhz"] / 1000)
    macs = 144 * (3 * 9 * 8 + 0) + 36 * 8 * 9 * 8 + 8 * 5
    assert macs <= figures["macs"] <= 1.2 * macs
    weights = sum(p.numel() for p in artifact.draft.network.parameters())
    assert weights / 2 < figures["flash_bytes"] < 10 * weights and figures["sram_bytes"] > 144 * 8


def test_only_the_conversions_of_inputs_and_outputs_are_left(told):
    assert told.left == () and told.figures["cpu_operators"] == 2


def test_more_multipliers_take_fewer_cycles(told, artifact):
    small = vela.estimate(artifact.folder / "model.tflite", "ethos-u55-32", CHECK.system, CHECK.memory)
    assert small.figures["npu_cycles"] > told.figures["npu_cycles"]


def test_what_is_left_is_read_with_its_reason():
    printed = (
        "\nWarning (supported operators) operator: SOFTMAX, ofm: 'a/b'\nReason: beta must be positive\n"
        "\nWarning (semantic) operator: ARG_MAX, ofm: 'c'\n   Reason: another\n"
        "\nWarning (supported operators) operator: QUANTIZE, ofm: 'in'\nReason: Float32\n"
    )
    assert vela._left(printed) == ("SOFTMAX (a/b): beta must be positive", "ARG_MAX (c): another")


@pytest.mark.parametrize("cut", [0, 40, 2_000])
def test_a_truncated_file_is_refused(cut, artifact, tmp_path):
    data = (artifact.folder / "model.tflite").read_bytes()
    (tmp_path / "model.tflite").write_bytes(data[:cut])
    with raises_case(ArtifactError, "vela"):
        vela.estimate(tmp_path / "model.tflite", CHECK.accelerator, CHECK.system, CHECK.memory)


def test_an_unknown_configuration_is_refused_with_what_vela_says(artifact):
    with raises_case(ArtifactError, "vela") as caught:
        vela.estimate(artifact.folder / "model.tflite", CHECK.accelerator, "My_Board", CHECK.memory)
    assert "My_Board" in caught.value.got


def test_without_it_the_install_command_is_told(monkeypatch, artifact):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ethosu" else there(name))
    with raises_case(MissingDependency, "not-installed") as caught:
        vela.estimate(artifact.folder / "model.tflite", CHECK.accelerator, CHECK.system, CHECK.memory)
    assert "penjing[ethos-u]" in caught.value.remedy


def test_what_the_compiler_needs_is_held_against_the_limits(told, artifact):
    needs, left = replace(NEEDS, compiler=told.compiler, estimate=told.figures), told.left
    assert left == ()

    def broken(**limits):
        target = replace(TARGET, limits=replace(TARGET.limits, **limits))
        return [(e.code, e.got) for e in fitting.broken(target, artifact.draft.network, Plan(), (), needs)]

    assert broken() == []
    ((code, got),) = broken(memory_bytes=2_000)
    assert code == "memory" and got.startswith("vela 5.2.0 needs") and got.endswith("of sram")
    file, compiled = broken(storage_bytes=500)
    assert (file[0], compiled[0]) == ("storage", "storage") and compiled[1].endswith("of flash")


def test_a_target_without_a_compiler_has_no_estimate(artifact):
    needs, left = fitting.compiled(targets.load("pi4"), artifact.folder / "model.tflite", NEEDS)
    assert (needs, left) == (NEEDS, ())
