import sys
import textwrap

import pytest
import torch
from torch import nn

from penjing.errors import CheckpointError, SourceError, TaskError
from penjing.sources.source import check_forward, open_source
from penjing.tasks.opening import open_task
from penjing.tasks.task import Task
from tests.raises import raises_case

NET_FILE = """
    import torch
    from torch import nn
    from penjing.tasks.task import Task
    from parts import Small

    IMPORTED = []
    IMPORTED.append(1)

    def make():
        return Small()

    ready = nn.Linear(4, 2)
    task = Task(example=torch.zeros(1, 4))

    def weights():
        return ready.state_dict()

    def raises():
        return nn.Linear(4, "2")

    def leaves():
        raise SystemExit(2)

    def needs(width):
        return nn.Linear(width, 2)

    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 2)

        def forward(self, x):
            return self.fc(x)

    class Text(nn.Module):
        def forward(self, x):
            return {"answer": object()}
"""
PARTS_FILE = """
    from torch import nn

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x)
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(textwrap.dedent(NET_FILE))
    (tmp_path / "parts.py").write_text(textwrap.dedent(PARTS_FILE))
    before = set(sys.modules)
    yield tmp_path / "net.py"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(spec, code, kind=SourceError, task=None):
    with raises_case(kind, code) as caught:
        open_source(spec, task=task)
    assert caught.value.expected is not None
    return caught.value


def test_factories_modules_and_classes_of_a_file(net):
    assert type(open_source(f"{net}:make").module).__name__ == "Small"
    source = open_source(f"{net}:ready", task=open_task(f"{net}:task"))
    assert isinstance(source.module, nn.Linear) and (source.name, source.spec) == ("ready", f"{net}:ready")
    assert isinstance(open_source(f"{net}:Wrong").module, nn.Module)


def test_source_and_task_of_one_file_import_it_once(net):
    path = list(sys.path)
    source, task = open_source(f"{net}:make"), open_task(f"{net}:task")
    module = sys.modules[type(open_source(f"{net}:Wrong").module).__module__]
    assert module.IMPORTED == [1] and task is module.task
    assert isinstance(source.module, sys.modules["parts"].Small)
    assert sys.path == path


def test_two_files_of_one_name_do_not_meet(tmp_path):
    for folder, width in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(f"from torch import nn\nnet = nn.Linear(1, {width})")
    widths = [open_source(f"{tmp_path / folder / 'net.py'}:net").module.out_features for folder in "ab"]
    assert widths == [2, 3]


@pytest.mark.parametrize(("given", "backend"), [(None, "torch"), ("jax", "jax")])
def test_code_that_imports_keras_gets_the_backend_that_can_be_captured(tmp_path, monkeypatch, given, backend):
    monkeypatch.setenv("KERAS_BACKEND", given or "")
    if given is None:
        monkeypatch.delenv("KERAS_BACKEND")
    lines = ["import os", "from torch import nn", "net = nn.Identity()", 'net.backend = os.environ["KERAS_BACKEND"]']
    (tmp_path / f"of_{backend}.py").write_text("\n".join(lines))
    assert open_source(f"{tmp_path}/of_{backend}.py:net").module.backend == backend


def test_a_module_on_the_path(net, monkeypatch):
    monkeypatch.chdir(net.parent)
    assert type(open_source("parts:Small").module).__name__ == "Small"


def test_objects_are_taken_as_they_are():
    network = nn.Linear(2, 2).train()
    source = open_source(network, task=Task(example=torch.zeros(1, 2)))
    assert source.module is network and source.name == "Linear" and network.training
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    assert open_source(program).example[0].shape == (1, 2)
    assert open_source(program).dynamic == {}  # it takes no other sizes
    assert refusal(3, "not-a-network").got == "int"


def test_built_in_architectures():
    source = open_source("resnet20")
    assert source.name == "resnet20" and isinstance(source.module, nn.Module)
    assert "did you mean resnet5" in refusal("resnet55", "missing").remedy


def test_an_exported_program_brings_its_example(tmp_path):
    path = tmp_path / "small.pt2"
    torch.export.save(torch.export.export(nn.Linear(4, 2), (torch.zeros(3, 4),)), path)
    source = open_source(path)
    assert source.name == "small" and source.example[0].shape == (3, 4)
    assert check_forward(source, Task(example=source.example)).shape == (3, 2)


def test_missing_files_name_the_nearest(net):
    assert "did you mean net.py" in refusal(f"{net.parent / 'nett.py'}:make", "missing").remedy
    (net.parent / "model.pt2").write_bytes(b"")
    assert "did you mean model.pt2" in refusal(str(net.parent / "modle.pt2"), "missing").remedy
    folder = net.parent.parent / (net.parent.name + "x")
    assert "did you mean" in refusal(str(folder / "net.pt2"), "missing").remedy


def test_a_missing_attribute_names_the_nearest(net):
    error = refusal(f"{net}:mak", "unknown-name")
    assert "did you mean make" in error.remedy and "nn" not in error.got.split("which has ")[1].split(", ")


def test_a_file_without_a_name_lists_its_names_without_running(tmp_path):
    (tmp_path / "net.py").write_text("raise RuntimeError('ran')\ndef make(): ...\nclass Net: ...\ndef _hidden(): ...")
    error = refusal(str(tmp_path / "net.py"), "no-name")
    assert error.remedy.endswith(": make, Net")


@pytest.mark.parametrize(
    ("name", "code", "got"),
    [
        ("raises", "raised", "net.py:20 in raises"),
        ("leaves", "raised", "net.py:23 in leaves"),
        ("needs", "raised", "width"),
        ("weights", "not-a-network", "OrderedDict"),
        ("IMPORTED", "not-a-network", "list"),
    ],
)
def test_factories_that_give_no_network(net, name, code, got):
    error = refusal(f"{net}:{name}", code)
    assert got in error.got and name in error.what


def test_the_original_error_is_chained(net):
    assert isinstance(refusal(f"{net}:raises", "raised").__cause__, TypeError)
    assert isinstance(refusal(f"{net}:leaves", "raised").__cause__, SystemExit)


@pytest.mark.parametrize(
    ("text", "cause", "words"),
    [
        ("import torch\nx = 1 / 0\n", ZeroDivisionError, ["broken.py:2"]),
        ("def make(:\n  pass", SyntaxError, ["broken.py:1"]),
        ("import penjing_no_such_package", ModuleNotFoundError, ["penjing_no_such_package", "broken.py:1"]),
        ("import sys\nsys.exit('usage')", SystemExit, ["usage"]),
    ],
)
def test_a_file_that_can_not_be_imported(tmp_path, text, cause, words):
    (tmp_path / "broken.py").write_text(text)
    error = refusal(f"{tmp_path / 'broken.py'}:make", "import")
    assert isinstance(error.__cause__, cause) and cause.__name__ in error.what
    assert all(word in error.got for word in words)
    (tmp_path / "broken.py").write_text("from torch import nn\nmake = nn.ReLU")
    assert isinstance(open_source(f"{tmp_path / 'broken.py'}:make").module, nn.ReLU)  # a mended file is tried again


def test_a_module_that_can_not_be_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "penjing_half.py").write_text("import penjing_no_such_package")
    assert "penjing_no_such_package" in refusal("penjing_half:make", "import").got
    assert "penjing_no_such.module" in refusal("penjing_no_such.module:make", "no-module").what


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.bin", "net.pkl", "net.ckpt", "NET.PT"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    remedy = refusal(str(tmp_path / name), "pickle", CheckpointError).remedy
    assert "file.py:factory" in remedy and f"--weights {name}" in remedy


def test_files_that_are_not_networks(tmp_path):
    (tmp_path / "net.safetensors").write_bytes(b"")
    assert "--weights net.safetensors" in refusal(str(tmp_path / "net.safetensors"), "only-weights").remedy
    assert "file.py:factory" in refusal(str(tmp_path / "net.npz"), "only-weights").remedy
    (tmp_path / "net.onnx").write_bytes(b"")
    refusal(str(tmp_path / "net.onnx"), "damaged", CheckpointError)


def test_folders(tmp_path):
    assert refusal(str(tmp_path), "no-model").code == "no-model"
    (tmp_path / "record.json").write_text("{}")
    assert refusal(tmp_path, "run").code == "run"


def test_a_forward_that_fails_names_the_users_line(net):
    error = refusal(f"{net}:Wrong", "forward", task=open_task(f"{net}:task"))
    assert "net.py:34 in forward: return self.fc(x)" in error.got and "(float32[1, 4])" in error.expected
    by_name = Task(example={"x": torch.zeros(1, 4)})
    assert "x=float32[1, 4]" in refusal(f"{net}:ready", "forward", task=by_name).expected


@pytest.mark.parametrize(
    ("forward", "example", "remedy"),
    [
        (
            lambda self, batch: batch["x"],
            {"x": torch.ones(2), "y": torch.ones(2)},
            "forward(self, x, y) that builds batch",
        ),
        (lambda self, x, y: x + y, {"x": torch.ones(2), "z": torch.ones(2)}, "those of forward(x, y)"),
        (lambda self, x: x, (torch.ones(2), torch.ones(2)), "those of forward(x)"),
    ],
)
def test_an_example_that_does_not_fit_the_forward_is_told_its_parameters(forward, example, remedy):
    network = type("Network", (nn.Module,), {"forward": forward})()
    with raises_case(SourceError, "forward") as error:
        check_forward(open_source(network), Task(example=example))
    assert remedy in error.value.remedy


def test_a_forward_that_returns_no_tensors(net):
    assert "output['answer']" in refusal(f"{net}:Text", "not-a-tensor", task=open_task(f"{net}:task")).what


def test_check_forward_puts_the_mode_back():
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()).train()
    before = network[0].running_mean.clone()
    check_forward(open_source(network), Task(example=torch.ones(1, 4)))
    assert network.training and torch.equal(network[0].running_mean, before)


def test_a_task_is_not_opened_as_a_source(net):
    assert refusal(f"{net}:task", "not-a-network").got == "Task"
    with raises_case(TaskError, "not-a-task"):
        open_task(f"{net}:ready")
