"""Every runtime keeps what its row in the table says."""

import importlib

import pytest

from penjing import runtimes
from penjing.errors import MissingDependency, UsageError
from penjing.runtimes import SPECS


@pytest.mark.parametrize("name", SPECS)
def test_a_runtime_has_the_functions_that_its_row_promises(name):
    module, spec = importlib.import_module(SPECS[name].module), SPECS[name]
    assert runtimes.get(name) is module
    for function in ("capabilities", "export", "open_session", "executed"):
        assert callable(getattr(module, function))
    assert hasattr(module, "profile") == spec.times_operators
    assert hasattr(module, "expose") == spec.shows_values
    assert module.capabilities(("avx2",)).runtime == name
    assert isinstance(module.SETTINGS, dict)


def test_a_runtime_that_is_not_installed_names_what_to_install(monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(MissingDependency) as refusal:
        runtimes.get("openvino")
    assert refusal.value.remedy == "pip install openvino onnx onnxscript"
    assert not runtimes.installed("onnxruntime")


def test_an_unknown_runtime_names_the_known_ones():
    with pytest.raises(UsageError) as refusal:
        runtimes.get("tensorrt")
    assert all(name in refusal.value.expected for name in SPECS)
