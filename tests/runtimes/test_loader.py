"""`load.py` in a Python that has the runtime and NumPy, and no Penjing."""

import importlib.util
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from penjing import runtimes
from penjing.runtimes import isolated
from penjing.runtimes.loader import write_loader

# -S leaves out what .pth files put on the path, such as an editable install; an installed Penjing is refused by name.
ALONE = """
import importlib.abc, importlib.util, sys
sys.path += {paths}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "penjing":
            raise ModuleNotFoundError("no penjing here", name="penjing")

sys.meta_path.insert(0, Refuse())
try:
    import penjing
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("penjing can be imported: this proves nothing")

spec = importlib.util.spec_from_file_location("load", sys.argv[1])
load = importlib.util.module_from_spec(spec)
spec.loader.exec_module(load)
import numpy as np
with np.load(sys.argv[2]) as data:
    args = [data[name] for name in data.files if name.startswith("arg_")]
    kwargs = {{name[3:]: data[name] for name in data.files if name.startswith("kw_")}}
answer = load.predict(*args, **kwargs)
flat = []

def walk(value, where):
    if isinstance(value, dict):
        for name, item in value.items():
            walk(item, f"{{where}}.{{name}}")
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            walk(item, f"{{where}}.{{number}}")
    else:
        flat.append((where, value))

walk(answer, "")
np.savez(sys.argv[3], **dict(flat))
print(",".join(sorted({{name.split(".")[0] for name in sys.modules}} & {{"penjing", "torch"}})))
"""


def packages():
    """The folders of installed packages, without what their .pth files add."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    return sorted(folder for folder in folders if Path(folder).is_dir())


def run_alone(loader, inputs, out):
    code = ALONE.format(paths=packages())
    command = [sys.executable, "-I", "-S", "-B", "-c", code, str(loader), str(inputs), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=loader.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("case", "structure"),
    [("tokens", [".hidden", ".logits"]), ("branches", [".0", ".1.mean"]), ("two inputs", [""])],
)
def test_the_artifact_answers_the_same_without_penjing(exported, tmp_path, runtime, case, structure):
    artifact = exported(case, runtime, "int8")
    arrays = artifact.arrays(3, seed=8)
    if isinstance(artifact.case.shapes, dict):
        named = {f"kw_{port.name}": x for port, x in zip(artifact.manifest.programs[0].inputs, arrays, strict=True)}
        named = dict(reversed(named.items()))  # keywords come in any order
    else:
        named = {f"arg_{i}": x for i, x in enumerate(arrays)}
    np.savez(tmp_path / "in.npz", **named)
    loaded = run_alone(artifact.folder / "load.py", tmp_path / "in.npz", tmp_path / "out.npz")
    assert "penjing" not in loaded
    assert "torch" not in loaded
    with np.load(tmp_path / "out.npz") as outputs:
        assert sorted(outputs.files) == structure
        flat = [outputs[name] for name in sorted(outputs.files, key=[".0", ".1.mean", ".logits", ".hidden", ""].index)]
    expected = isolated.open_artifact(artifact.folder, 1).run(arrays)
    for mine, theirs in zip(flat, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)


def test_a_torch_artifact_needs_torch_alone(exported, tmp_path):
    artifact = exported("tokens", "torch", "fp32")
    arrays = artifact.arrays(3, seed=8)
    named = {f"kw_{port.name}": x for port, x in zip(artifact.manifest.programs[0].inputs, arrays, strict=True)}
    np.savez(tmp_path / "in.npz", **named)
    assert run_alone(artifact.folder / "load.py", tmp_path / "in.npz", tmp_path / "out.npz") == "torch"
    with np.load(tmp_path / "out.npz") as outputs:
        for name, expected in zip((".logits", ".hidden"), artifact.answers(3, seed=8), strict=True):
            np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=1e-6)


def test_run_as_a_script_it_shows_the_outputs(exported):
    artifact = exported("tokens", "onnxruntime", "int8")
    done = subprocess.run(
        [sys.executable, "-B", str(artifact.folder / "load.py")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["logits float32 (1, 3)", "hidden float32 (1, 6, 8)"]


def test_a_loader_beside_the_artifact_opens_it(exported, tmp_path):
    artifact = exported("residual", "onnxruntime", "int8")
    folder = tmp_path / "artifact"
    folder.mkdir()
    for path in artifact.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_loader(tmp_path / "load.py", artifact.manifest, "artifact", 2)
    text = (tmp_path / "load.py").read_text(encoding="utf-8")
    assert '"THREADS", 2' in text and "@" not in text
    np.savez(tmp_path / "in.npz", arg_0=artifact.arrays(2, seed=3)[0])
    run_alone(tmp_path / "load.py", tmp_path / "in.npz", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as outputs:
        np.testing.assert_allclose(outputs[""], artifact.answers(2, seed=3)[0], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def loaded(exported, tmp_path_factory):
    """``loaded(runtime)``: the module `load.py` of a network in this process."""
    modules = {}

    def get(runtime):
        if runtime not in modules:
            artifact, path = exported("residual", runtime, "fp32"), tmp_path_factory.mktemp("loader") / "load.py"
            write_loader(path, artifact.manifest, str(artifact.folder), 1)
            spec = importlib.util.spec_from_file_location("load_of_a_test", path)
            modules[runtime] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[runtime])
        return modules[runtime]

    return get


@pytest.mark.parametrize("runtime", [name for name in runtimes.names() if not runtimes.absent(name)])
@pytest.mark.parametrize("wrong", ["surplus", "unknown", "missing", "twice"])
def test_inputs_that_it_does_not_have_are_an_error(loaded, runtime, wrong):
    load = loaded(runtime)
    name, x = load.PROGRAM["inputs"][0]["name"], np.zeros((1, 1), np.float32)
    calls = {
        "surplus": ((x, x), {}),
        "unknown": ((), {"bogus": x, name: x}),
        "missing": ((), {}),
        "twice": ((x,), {name: x}),
    }
    args, kwargs = calls[wrong]
    with pytest.raises(TypeError, match=f"predict takes .*{name}"):
        load.predict(*args, **kwargs)
