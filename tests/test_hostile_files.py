"""Files of strangers through every door: a clear error each, and never a crash, a hang or a bare exception."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from penjing import records, runtimes
from penjing.errors import ArtifactError, PenjingError, RecipeError, SourceError, TaskError
from penjing.pipeline.evidence import stored
from penjing.pipeline.verify import verify
from penjing.recipes.recipe import Recipe
from penjing.records.manifest import read_manifest
from penjing.sources.pt2 import open_program
from penjing.steps.plan import Plan
from penjing.storage import checkpoint
from penjing.tasks.datasets import image_folder, npz_arrays
from tests.raises import raises_case, raises_setting

SEED = 24
FEW = 300
PARTS, MANY = 20, 500  # ten thousand

RECIPE = """\
- prune.Channels: {macs: 0.5, criterion: taylor}
- Finetune: {epochs: 3, learning_rate: 1e-3, distill: {distill.Logits: {temperature: 4.0}}}
- quantize.Static: {weight_bits: 8, activation_bits: 8, exclude: ["head*", stem]}
- quantize.CoordinateRounding
"""


@dataclass(frozen=True)
class Door:
    """A kind of file, and what reads it.

    Attributes:
        name: Of the file, relative to the folder.
        read: Called with the folder.
        share: How many of the mutations it gets, against the others.
    """

    name: str
    read: Callable[[Path], object]
    share: int = 4


def read_task(task):
    """Look at all of a task's data."""
    for batches in (task.calibration, task.train):
        if batches is not None:
            for _ in batches:
                pass


@pytest.fixture(scope="module")
def captured(digits_run, digits_source, digits_task):
    from penjing.network.capture import capture_network
    from penjing.sources.source import open_source
    from penjing.tasks.opening import open_task

    task = open_task(digits_task)
    return capture_network(open_source(digits_source, task=task).module, *task.call(), task.dynamic)


@pytest.fixture(scope="module")
def whole(digits_run, tmp_path_factory):
    """A folder with one file of every kind: a finished run, a recipe, tasks."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(digits_run.folder, folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    draw = np.random.default_rng(0)
    np.savez(
        folder / "task.npz",
        x_train=draw.normal(size=(6, 3)).astype(np.float32),
        y_train=np.arange(6) % 3,
        x_test=draw.normal(size=(4, 3)),
        y_test=np.arange(4) % 3,
    )
    np.savez_compressed(folder / "packed.npz", x_train=draw.normal(size=(6, 3)).astype(np.float32))
    for suffix in ("png", "jpg"):
        for name in ("a", "b"):
            (folder / "images" / suffix / name).mkdir(parents=True)
            for i in range(2):
                image = Image.fromarray(draw.integers(0, 255, (9, 8, 3), dtype=np.uint8))
                image.save(folder / "images" / suffix / name / f"{i}.{suffix}")
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    import torch

    from penjing.distill.stored import CachedTeacher

    for name, older in (("net.pth", False), ("old.pth", True)):
        state = {"model": torch.nn.Linear(3, 2).state_dict()}
        torch.save(state, folder / name, _use_new_zipfile_serialization=not older)
    places = dict.fromkeys(("weight", "bias"), "old.pth")
    (folder / "net.index.json").write_text(json.dumps({"weight_map": places}))
    CachedTeacher(folder / "answers", torch.nn.Linear(3, 2))(torch.zeros(2, 3))
    store_onnx(folder)
    (folder / "state").mkdir()
    (folder / "state" / "request.json").write_text(json.dumps({"goal": "drop<=1%", "seed": 0}))
    return folder


def store_onnx(folder):
    """An ONNX file with layers, computed sizes, a branch, a recurrent layer, a function and tensors beside it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    node, draw = helper.make_node, np.random.default_rng(0)

    def branch(name):
        shown = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        return helper.make_graph([node(name, ["reshaped"], [f"{name}_out"])], name, [], [shown])

    nodes = [
        node("Conv", ["x", "kernel"], ["convolved"], pads=[1, 1, 1, 1], name="conv"),
        node("BatchNormalization", ["convolved", "four", "four", "four", "four"], ["normal"]),
        node("Resize", ["normal", "", "scales"], ["larger"], mode="nearest"),
        node("Shape", ["larger"], ["shape"]),
        node("Gather", ["shape", "zero"], ["batch"], axis=0),
        node("Concat", ["batch", "rest"], ["target"], axis=0),
        node("Reshape", ["larger", "target"], ["reshaped"]),
        node("If", ["yes"], ["chosen"], then_branch=branch("Relu"), else_branch=branch("Neg")),
        node("Transpose", ["chosen"], ["steps"], perm=[1, 0, 2]),
        node("LSTM", ["steps", "w", "r"], ["", "hidden"], hidden_size=3),
        node("Squeeze", ["hidden", "zero"], ["last"]),
        node("MatMul", ["last", "table"], ["product"]),
        node("twice", ["product"], ["y"], domain="mine"),
    ]
    weights = {
        "kernel": draw.normal(size=(4, 3, 3, 3)), "four": np.ones(4), "w": draw.normal(size=(1, 12, 8)),
        "r": draw.normal(size=(1, 12, 3)), "table": draw.normal(size=(3, 2)),
    }  # fmt: skip
    numbers = {"zero": np.array([0]), "rest": np.array([-1, 8]), "yes": np.array(True)}
    stored = {name: value.astype(np.float32) for name, value in weights.items()} | numbers
    stored["scales"] = np.float32([1, 1, 2, 2])
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    twice = helper.make_function("mine", "twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], sets[:1])
    model = helper.make_model(graph, opset_imports=sets, functions=[twice])
    model.ir_version = 9
    onnx.save_model(model, folder / "net.onnx")
    onnx.save_model(model, folder / "large.onnx", save_as_external_data=True, location="large.bin", size_threshold=0)


def doors(captured, artifacts):
    """Every kind of file with its reader."""
    from torch.nn import Linear

    from penjing.distill.stored import CachedTeacher
    from penjing.records.folder import RunFolder
    from penjing.sources.huggingface import open_folder
    from penjing.sources.onnx import open_network
    from penjing.sources.source import load_weights

    def claimed(folder):
        RunFolder(folder, resume=True).claim({"goal": "drop<=1%", "seed": 0})

    def verified(folder):
        verify(folder, threads=1, seconds=0.0)

    kinds = [
        Door("record.json", lambda f: records.read(f), 8),
        Door("artifact/manifest.json", lambda f: read_manifest(f / "artifact"), 8),
        Door("edits.json", lambda f: checkpoint.load(f, captured), 2),
        Door("plan.json", lambda f: Plan.from_json((f / "plan.json").read_text("utf-8", "surrogateescape")), 8),
        Door("weights.safetensors", lambda f: checkpoint.load(f, captured), 2),
        Door("evidence.npz", stored),
        Door("recipe.yaml", lambda f: Recipe.from_yaml((f / "recipe.yaml").read_text("utf-8", "surrogateescape")), 8),
        Door("task.npz", lambda f: read_task(npz_arrays(f / "task.npz"))),
        Door("packed.npz", lambda f: read_task(npz_arrays(f / "packed.npz"))),
        Door("images/png/a/1.png", lambda f: read_task(image_folder(f / "images/png", size=8)), 2),
        Door("images/jpg/b/0.jpg", lambda f: read_task(image_folder(f / "images/jpg", size=8)), 2),
        Door("source/model.pt2", lambda f: open_program(f / "source/model.pt2"), 1),
        Door("bert/config.json", lambda f: open_folder(f / "bert"), 2),
        Door("bert/model.safetensors", lambda f: open_folder(f / "bert"), 1),
        Door("net.pth", lambda f: load_weights(Linear(3, 2), f / "net.pth"), 2),
        Door("old.pth", lambda f: load_weights(Linear(3, 2), f / "old.pth"), 2),
        Door("net.index.json", lambda f: load_weights(Linear(3, 2), f / "net.index.json"), 2),
        Door("net.onnx", lambda f: open_network(f / "net.onnx"), 8),
        Door("large.onnx", lambda f: open_network(f / "large.onnx"), 2),
        Door("large.bin", lambda f: open_network(f / "large.onnx"), 1),
        Door("answers/about.json", lambda f: CachedTeacher(f / "answers"), 2),
        Door("state/request.json", claimed),
        Door("record.json", verified, 1),
        Door("evidence.npz", verified, 1),
    ]
    return kinds + [Door(f"artifact/{name}", verified, 1) for name in artifacts]


# --- named cases --------------------------------------------------------------------------------------------------


def change(path, edit):
    """Edit a JSON file's data in place."""
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


NINE = {"kind": "tuple", "items": [{"kind": "tensor"}] * 9}


def spec_of(data):
    return next(iter(data["entries"].values()))["spec"]


def input_of(data):
    return data["programs"][0]["inputs"][0]


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("name", "edit", "code", "word"),
    [
        ("record.json", lambda d: d["machine"].update(threads=20000), "value", "20000"),
        ("record.json", lambda d: d.update(seed=10**400), "unreadable", "more than 64 bits"),
        ("record.json", lambda d: d["source"].update(metric="0.5"), "type", "'0.5'"),
        ("plan.json", lambda d: spec_of(d).update(bits=40), "damaged", "bits = 40"),
        ("plan.json", lambda d: spec_of(d).update(bits="8"), "damaged", "bits = '8'"),
        ("plan.json", lambda d: spec_of(d).update(grid="octonions"), "damaged", "octonions"),
        ("plan.json", lambda d: next(iter(d["entries"].values())).update(scale=[-1.0]), "damaged", "scale"),
        ("artifact/manifest.json", lambda d: d["programs"][0].update(files=["../../etc/passwd"]), "outside", "passwd"),
        ("artifact/manifest.json", lambda d: input_of(d).update(shape=[2**40, 2**40]), "damaged", "values"),
        ("artifact/manifest.json", lambda d: input_of(d).update(dtype="O"), "damaged", "is of 'O'"),
        ("artifact/manifest.json", lambda d: d.update(structure=NINE), "damaged", "structure"),
    ],
)
def test_values_that_no_file_of_ours_has(copy, name, edit, code, word):
    path = copy / name
    change(path, edit)
    read = {"record.json": records.read, "plan.json": lambda f: Plan.from_json(path.read_text())}.get(name)
    read = read or (lambda f: read_manifest(f / "artifact"))
    with raises_case(PenjingError, code) as caught:
        read(copy)
    assert word in str(caught.value.got)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 200_000, "nested deeper"),
        ("- " * 100_000, ""),
        ("- x: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"- x: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in
         zip("abcdefgh", "bcdefghi", strict=True)), "aliases expanded"),
        ("- &a [*a]\n", "aliases expanded"),
        ("- Finetune: {epochs: 3, epochs: 4}\n", "appears twice"),
        ("- Finetune: {epochs: 1" + "0" * 400 + "}\n", "more than 64 bits"),
        ("- Finetune: {epochs: 1" + "0" * 5000 + "}\n", "64 bits"),
        ("- Finetune: {epochs: 2001-13-45}\n", ""),
        ("- Finetune: {? [a] : 1}\n", ""),
        ("- !!python/object/apply:os.system [ls]\n", ""),
        ("- x\n" * 100_000, "at most"),
    ],
    ids=range(11),
)  # fmt: skip
def test_recipes_that_are_none(text, word):
    with raises_case(RecipeError, "unreadable") as caught:
        Recipe.from_yaml(text)
    assert word in caught.value.got
    assert len(str(caught.value)) < 2000


def test_a_setting_that_no_recipe_of_ours_has():
    with raises_setting("weight_bits"):
        Recipe.from_yaml("- quantize.Static: {weight_bits: 40}\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_or_a_folder_in_the_place_of_a_file(whole, copy, captured, digits_run):
    for door in doors(captured, []):
        path = copy / door.name
        for make in (os.mkfifo, os.mkdir):
            path.unlink()
            make(path)
            if "read_text" not in door.read.__code__.co_names:  # the test itself would wait
                with pytest.raises((PenjingError, OSError)):
                    door.read(copy)
            path.rmdir() if path.is_dir() else path.unlink()
            shutil.copy(whole / door.name, path)


def test_a_picture_that_is_a_line(tmp_path):
    from PIL import Image

    for name, size in (("a", (1, 100_000)), ("b", (100_000, 1))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size).save(tmp_path / name / "0.png")
    with raises_case(TaskError, "unreadable"):
        read_task(image_folder(tmp_path))


def test_a_configuration_of_a_million_layers(tmp_path):
    from safetensors.numpy import save_file

    from penjing.sources.huggingface import open_folder

    save_file({"w": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors", {"format": "pt"})
    for key, value in (
        ("num_hidden_layers", 10**6),
        ("depths", [10**6, 2]),
        ("max_position_embeddings", 10**10),
        ("vocab_size", 2**25),
        ("hidden_size", 9),
    ):
        config = {"architectures": ["BertModel"], "model_type": "bert", key: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with raises_case(SourceError, "misfit") as caught:
            open_folder(tmp_path)
        assert caught.value.got.startswith(f"{key}: ")


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_out_of_the_artifact(copy, tmp_path):
    name = read_manifest(copy / "artifact").files()[0]
    (copy / "artifact" / name).rename(tmp_path / "elsewhere")
    (copy / "artifact" / name).symlink_to(tmp_path / "elsewhere")
    with raises_case(ArtifactError, "outside") as caught:
        runtimes.open_artifact(copy / "artifact", 1)
    assert caught.value.got == name


# --- mutations ----------------------------------------------------------------------------------------------------


def flipped(draw, content):
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 4, 32))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw, content):
    return content[: draw.randrange(len(content))]


def spliced(draw, content):
    start, end = sorted(draw.randrange(len(content)) for _ in range(2))
    piece = draw.choice((content[start:end], draw.randbytes(draw.choice((1, 8, 200))), b"\0" * 64, b"\xff" * 8))
    return content[:start] + piece + content[draw.choice((start, end)) :]


def number(draw, content):
    """Four or eight bytes of a length, an offset or a size become another number."""
    place = draw.randrange(len(content))
    value = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
    written = struct.pack("<Q", value)[: draw.choice((2, 4, 8))]
    return content[:place] + written + content[place + len(written) :]


def places(value, path=()):
    """Every place within plain data."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


HUGE = ["[" * 200_000, "1" + "0" * 400, "1e999", "NaN", '"' + "x" * 100_000 + '"', "-" + "9" * 30]
ODD = [None, True, False, 0, -1, 1, 2**31, 2**62, 20_000, 1e308, -0.5, "", "x", "../../x", "\0", [], {}, [[]], {"": {}}]


def restructured(draw, content):
    """A JSON file with one value of another kind, left out, or written twice."""
    try:
        lines = content.decode().splitlines() if content.count(b'{"time"') > 1 else [content.decode()]
        line = draw.randrange(len(lines))
        data = json.loads(lines[line])
    except ValueError:
        return flipped(draw, content)
    path = draw.choice(list(places(data))[1:] or [()])
    if not path:
        return draw.choice(HUGE).encode()
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    way = draw.randrange(4)
    if way == 0:
        del holder[path[-1]]
    elif way == 1:
        holder[path[-1]] = draw.choice(ODD)
    elif way == 2:
        holder[path[-1]] = "@@HERE@@"
    else:
        holder[path[-1]] = json.loads(lines[line])
    lines[line] = json.dumps(data).replace('"@@HERE@@"', draw.choice(HUGE))
    if draw.random() < 0.1:
        lines[line] = lines[line].replace("{", '{"a": 1, "a": 2, ', 1)
    return "\n".join(lines).encode()


WORDS = [
    b"&a", b"*a", b"<<: ", b"!!python/name:os ", b"? ", b"{", b"[", b"|", b": ", b"- ", b"~", b"1e999", b"9" * 500,
    b"\t", b"2001-01-01", b"!!binary x", b"!!set {a}", b"0x" + b"f" * 50, b"1:2:3", b"quantize.QAT: ", b"null", b"\x00",
    b"prune.Movement: {finetune: {Finetune: ", b"\xff",
]  # fmt: skip


def words(draw, content):
    """A word of the language in a place where none belongs."""
    place = draw.randrange(len(content))
    return content[:place] + draw.choice(WORDS) + content[place + draw.choice((0, 0, 1, 5)) :]


def mutated(draw, door, content):
    if not content:
        return draw.randbytes(20)
    suffix = Path(door.name).suffix
    ways = [flipped, cut, spliced, number]
    if suffix in (".json", ".jsonl"):
        ways += [restructured] * 8
    if suffix == ".yaml":
        ways += [words] * 8
    return draw.choice(ways)(draw, content)


def campaign(whole, tmp_path, captured, count, seed):
    """Mutate, read, and collect every exception that is not Penjing's own."""
    draw = random.Random(seed)
    folder = Path(shutil.copytree(whole, tmp_path / "campaign"))
    kinds = doors(captured, read_manifest(folder / "artifact").files())
    bad, refused = [], 0
    for number_ in range(count):
        door = draw.choices(kinds, [kind.share for kind in kinds])[0]
        path = folder / door.name
        content = (whole / door.name).read_bytes()
        path.write_bytes(mutated(draw, door, content))
        try:
            door.read(folder)
        except PenjingError as error:
            refused += 1
            if len(str(error)) > 5000:
                bad.append((number_, door.name, f"an error of {len(str(error))} characters"))
        except Exception as error:
            bad.append((number_, door.name, f"{type(error).__name__}: {error}"[:300]))
            if os.environ.get("HOSTILE_KEEP"):
                shutil.copy(path, Path(os.environ["HOSTILE_KEEP"]) / f"{seed}-{number_}-{path.name}")
        finally:
            path.write_bytes(content)
    return bad, refused


def test_a_few_hundred_mutations(whole, tmp_path, captured):
    bad, refused = campaign(whole, tmp_path, captured, FEW, SEED)
    assert bad == []
    assert refused > FEW // 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_ten_thousand_mutations(whole, tmp_path, captured, part):
    bad, refused = campaign(whole, tmp_path, captured, MANY, SEED + part)
    assert bad == []
    assert refused > MANY // 3
