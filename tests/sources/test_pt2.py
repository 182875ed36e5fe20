import io
import json
import pickle
import shutil
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim

from penjing.errors import CheckpointError
from penjing.sources.pt2 import open_program
from tests.raises import raises_case


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.heads = nn.ModuleDict({"my-head": nn.Linear(4, 2)})
        self.offset = torch.ones(2)

    def forward(self, x, *, scale=2.0):
        h = self.conv(x).flatten(1)[:, :4].reshape(x.shape[0] * 2 // 2, 4)
        return {"logits": self.heads["my-head"](h) * scale + self.offset, "pair": (h, h)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.manual_seed(0)
    shapes = {"x": {0: Dim("batch", min=1, max=64)}, "scale": None}
    program = torch.export.export(Net().eval(), (torch.zeros(2, 3, 8, 8),), {"scale": 2.0}, dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def test_an_honest_file_opens_and_computes_the_same(saved):
    program = open_program(saved)
    x = torch.randn(5, 3, 8, 8)
    mine, theirs = (p.module()(x, scale=2.0) for p in (program, torch.export.load(saved)))
    assert torch.equal(mine["logits"], theirs["logits"])


class Bomb:
    """A pickle that leaves a trace on disk when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def bomb(trace):
    buffer = io.BytesIO()
    torch.save((Bomb(trace),), buffer)
    return buffer.getvalue()


def rewrite(path, target, change):
    """A copy of the archive in which `change(member, data)` gives each member's data (None drops it)."""
    writer = torch._C.PyTorchFileWriter(str(target))
    writer.set_min_version(6)  # as torch.export.save does
    with zipfile.ZipFile(path) as archive:
        for full in archive.namelist():
            member = full.split("/", 1)[1]
            data = change(member, archive.read(full))
            if data is not None and not member.startswith(".data/"):
                writer.write_record(member, data, len(data))
    writer.write_end_of_file()
    return target


def test_a_rewritten_file_without_a_change_opens(saved, tmp_path):
    """The refusals below come from what is changed, not from the rewriting."""
    opened = open_program(rewrite(saved, tmp_path / "same.pt2", in_model(lambda model: None)))
    assert [node.name for node in opened.graph.nodes] == [node.name for node in open_program(saved).graph.nodes]


def in_model(edit):
    """A change that edits the JSON of the graph."""

    def change(member, data):
        if member != "models/model.json":
            return data
        model = json.loads(data)
        edit(model)
        return json.dumps(model).encode()

    return change


def nodes(model):
    return model["graph_module"]["graph"]["nodes"]


def set_expression(text):
    def edit(model):
        sizes = model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = text

    return edit


def hide_expression(text):
    """The same under a tensor whose name a careless walk would skip."""

    def edit(model):
        values = model["graph_module"]["graph"]["tensor_values"]
        values["metadata"] = json.loads(json.dumps(values["x"]))
        values["metadata"]["sizes"][0]["as_expr"]["expr_str"] = text

    return edit


def set_target(text):
    def edit(model):
        nodes(model)[-1]["target"] = text

    return edit


def set_name(text):
    def edit(model):
        model["graph_module"]["graph"]["inputs"][-2]["as_tensor"]["name"] = text

    return edit


def set_argument_names(text):
    def edit(model):
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        signature["forward_arg_names"] = [text, "scale"]

    return edit


def set_guard(text):
    def edit(model):
        model["guards_code"] = [text]

    return edit


def set_spec(model):
    signature = model["graph_module"]["module_call_graph"][0]["signature"]
    context = json.dumps({"__enum__": True, "fqn": "penjing_evil:X", "name": "Y"})
    signature["in_spec"] = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])


def set_parameter(model):
    for spec in model["graph_module"]["signature"]["input_specs"]:
        if "parameter" in spec:
            spec["parameter"]["parameter_name"] = 'conv.weight"); import os; ("'


EVIL = "__import__('pathlib').Path('{trace}').write_text('x')"

GRAPHS = {
    "sympy": lambda evil: set_expression(evil),
    "sympy-nested-string": lambda evil: set_expression(f"Add({evil!r})"),
    "sympy-attribute": lambda _: set_expression("(1).__class__"),
    "sympy-lambda": lambda _: set_expression("(lambda: 1)()"),
    "sympy-hidden": lambda evil: hide_expression(evil),
    "operator-os": lambda _: set_target("torch.os.system"),
    "operator-hub": lambda _: set_target("torch.hub.load"),
    "operator-load": lambda _: set_target("torch.load"),
    "operator-file": lambda _: set_target("torch.ops.aten.from_file.default"),
    "operator-getter": lambda _: set_target("_operator.attrgetter"),
    "operator-foreign": lambda _: set_target("torch.ops.mylib.op.default"),
    "operator-path": lambda _: set_target("torch.ops.aten.add.Tensor.__class__"),
    "operator-extension": lambda _: set_target("#pkg:op"),
    "name": lambda evil: set_name(f"x=({evil})"),
    "argument": lambda evil: set_argument_names(f"x=({evil})"),
    "guard": lambda evil: set_guard(evil),
    "guard-attribute": lambda _: set_guard("x.size.__globals__['os'] == 1"),
    "spec": lambda _: set_spec,
    "parameter": lambda _: set_parameter,
}


REASONS = {
    "sympy": "a symbolic size reads",
    "operator": "it calls",
    "name": "a value is called",
    "argument": "an argument is called",
    "guard": "a guard reads",
    "spec": "Python objects to import",
    "parameter": "a tensor is called",
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_graph_that_would_run_code_is_refused(saved, tmp_path, kind):
    trace = tmp_path / "trace"
    evil = rewrite(saved, tmp_path / "evil.pt2", in_model(GRAPHS[kind](EVIL.format(trace=trace))))
    with raises_case(CheckpointError, "foreign-code") as caught:
        open_program(evil)
    assert REASONS[kind.split("-")[0]] in caught.value.got
    assert not trace.exists()


def test_torch_itself_would_have_run_the_expression(saved, tmp_path):
    """What the check is for: without it, opening this file executes it."""
    trace = tmp_path / "trace"
    evil = rewrite(saved, tmp_path / "evil.pt2", in_model(set_expression(EVIL.format(trace=trace.as_posix()))))
    with pytest.raises(Exception):  # noqa: B017  torch fails after the fact, in one way or another
        torch.export.load(evil)
    assert trace.exists()


def members(trace):
    def config(kind):
        def change(member, data):
            if member == f"data/{kind}/model_{kind}_config.json":
                table = json.loads(data)
                next(iter(table["config"].values()))["use_pickle"] = True
                return json.dumps(table).encode()
            return bomb(trace) if member in ("data/weights/weight_0", "data/constants/tensor_0") else data

        return change

    def custom(member, data):
        if member == "data/constants/model_constants_config.json":
            table = json.loads(data)
            next(iter(table["config"].values()))["path_name"] = "opaque_obj_0"
            return json.dumps(table).encode()
        return data

    return {
        "examples": lambda member, data: bomb(trace) if member.startswith("data/sample_inputs") else data,
        "weights": config("weights"),
        "constants": config("constants"),
        "custom object": custom,
    }


@pytest.mark.parametrize("kind", ["examples", "weights", "constants", "custom object"])
def test_a_pickle_in_the_archive_never_runs(saved, tmp_path, kind):
    trace = tmp_path / "trace"
    evil = rewrite(saved, tmp_path / "evil.pt2", members(trace)[kind])
    with raises_case(CheckpointError, "foreign-code") as caught:
        open_program(evil)
    assert "pickle" in caught.value.got
    assert not trace.exists()


def test_the_bomb_of_these_tests_is_live(tmp_path):
    torch.load(io.BytesIO(bomb(tmp_path / "trace")), weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "extra", ["data/weights/model.pt", "data/constants/model.pt", "data/aotinductor/model/lib.so", "code/evil.py"]
)
def test_members_that_torch_would_execute_are_refused(saved, tmp_path, extra):
    trace = tmp_path / "trace"
    evil = tmp_path / "evil.pt2"
    shutil.copy(saved, evil)
    with zipfile.ZipFile(evil, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/{extra}", bomb(trace))
    with raises_case(CheckpointError, "foreign-code"):
        open_program(evil)
    assert not trace.exists()


def test_the_old_format_is_refused(tmp_path):
    old, trace = tmp_path / "old.pt2", tmp_path / "trace"
    with zipfile.ZipFile(old, "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", bomb(trace))
    with raises_case(CheckpointError, "foreign-code") as caught:
        open_program(old)
    assert "torch 2.7" in caught.value.got and not trace.exists()


@pytest.mark.parametrize("content", [b"", b"no zip", pickle.dumps([1])])
def test_a_damaged_file(tmp_path, content):
    (tmp_path / "bad.pt2").write_bytes(content)
    with raises_case(CheckpointError, "damaged") as caught:
        open_program(tmp_path / "bad.pt2")
    assert "torch.export.save" in caught.value.remedy


def test_a_cut_off_file(saved, tmp_path):
    (tmp_path / "cut.pt2").write_bytes(saved.read_bytes()[:4000])
    with raises_case(CheckpointError, "damaged"):
        open_program(tmp_path / "cut.pt2")


def test_real_guards_and_expressions_pass(tmp_path):
    class Cut(nn.Module):
        def forward(self, x):
            return x[:, : x.shape[1] // 2] + x[:, x.shape[1] - x.shape[1] // 2 :]

    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = torch.export.export(Cut(), (torch.zeros(3, 8),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "cut.pt2")
    x = torch.randn(2, 10)
    assert torch.equal(open_program(tmp_path / "cut.pt2").module()(x), Cut()(x))
