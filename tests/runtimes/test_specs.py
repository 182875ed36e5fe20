"""Runtimes that are missing or unknown."""

from penjing import runtimes
from penjing.errors import MissingDependency, UsageError
from penjing.runtimes import SPECS
from tests.raises import raises_case


def test_a_runtime_that_is_not_installed_names_what_to_install(monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda package: None)
    with raises_case(MissingDependency, "not-installed") as refusal:
        runtimes.get("openvino")
    assert refusal.value.remedy == "pip install openvino onnx onnxscript"
    assert not runtimes.installed("onnxruntime")


def test_an_unknown_runtime_names_the_known_ones():
    with raises_case(UsageError, "unknown-runtime") as refusal:
        runtimes.get("tensorrt")
    assert all(name in refusal.value.expected for name in SPECS)
