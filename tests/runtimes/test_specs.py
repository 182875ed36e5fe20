"""Runtimes that are missing or unknown."""

import pytest

from penjing import runtimes
from penjing.errors import MissingDependency, UsageError
from penjing.runtimes import SPECS, versions
from tests.raises import raises_case


def test_a_runtime_that_is_not_installed_names_what_to_install(monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda package: None)
    with raises_case(MissingDependency, "not-installed") as refusal:
        runtimes.get("openvino")
    assert refusal.value.remedy == "pip install 'penjing[openvino]'"
    assert not runtimes.installed("onnxruntime")


def test_an_unknown_runtime_names_the_known_ones():
    with raises_case(UsageError, "unknown-runtime") as refusal:
        runtimes.get("abacus")
    assert all(name in refusal.value.expected for name in SPECS)


def test_versions_that_do_not_fit_are_found_before_anything_is_imported(monkeypatch):
    versions.clashes.cache_clear()
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: "0.1")
    refusal = runtimes.missing("openvino")
    versions.clashes.cache_clear()
    assert refusal.code == "clash" and refusal.got.startswith("penjing needs onnx<2,>=1.20, 0.1 is installed; ")


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.deployed])
def test_what_is_installed_here_fits_together(name):
    assert versions.clashes(name) == ()
