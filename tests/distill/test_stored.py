import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import penjing
from penjing import distill
from penjing.distill.stored import HASHES, CachedTeacher, _keys, _numbers, _sums
from penjing.distill.teaching import opened
from penjing.errors import CheckpointError, OutputError, RecipeError, SourceError, TaskError
from penjing.network.weights import fingerprint_by_name
from penjing.recipes.recipe import Recipe
from penjing.steps.step import Context
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune, train
from tests.raises import raises_case, raises_setting

SETTINGS = Finetune(epochs=3, autocast="off", learning_rate=0.1, distill=distill.Logits(), save_every_s=1e-9)


def net(width=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator)
    return x, (x[:, :3]).argmax(1)


def task(data, **fields):
    loader = DataLoader(TensorDataset(*data), batch_size=8, shuffle=True)
    return Task(**{"example": data[0][:2], "train": loader, "loss": F.cross_entropy} | fields)


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.samples = net(16, 1), 0

    def forward(self, x):
        self.samples += len(x)
        return self.inner(x)


def run(data, teacher, **fields):
    return train(net(), Context(task=task(data), **fields), replace(SETTINGS, teacher=teacher))


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_every_sample_is_asked_about_once_and_the_student_is_the_same_to_the_bit(data, tmp_path):
    teacher = Counted()
    asked = run(data, teacher)
    teacher.samples = 0
    first = run(data, distill.TeacherCache(tmp_path, teacher))
    assert teacher.samples <= 40 + 8  # a batch with one new sample is asked about whole
    second = run(data, distill.TeacherCache(tmp_path))
    assert same(asked, first) and same(asked, second)
    assert (tmp_path / "answers.bin").stat().st_size == 40 * 3 * 4
    assert (tmp_path / "keys.bin").stat().st_size == 40 * 16


def test_inputs_are_told_apart_by_name(tmp_path):
    class Difference(nn.Module):
        def forward(self, a, b):
            return a - 2 * b

    stored = CachedTeacher(tmp_path, Difference())
    a, b = torch.rand(3, 2), torch.rand(3, 2)
    assert torch.equal(stored(a=a, b=b), a - 2 * b)
    assert torch.equal(stored(b=a, a=b), b - 2 * a)
    assert torch.equal(stored(b=b, a=a), a - 2 * b) and stored.evaluated == 6


class TestHashes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool])
    def test_they_are_what_the_paper_writes(self, dtype):
        rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
        sums = _sums(rows)
        assert sums.dtype == torch.int32
        for row, own in zip(rows, sums, strict=True):
            raw = row.clone().view(torch.uint8).numpy().tobytes()
            words = [
                int.from_bytes(raw[at : at + 4].ljust(4, b"\0"), "little", signed=True) for at in range(0, len(raw), 4)
            ]
            for i in range(HASHES):
                numbers = _numbers(len(words), rows.device)[i].tolist()
                whole = sum(a * b for a, b in zip(words, numbers, strict=True)) % 2**64
                assert int(own[i]) % 2**32 == whole >> 32

    def test_numbers_are_those_of_splitmix(self):
        """The first values of its reference implementation for the seed 0."""
        first = _numbers(1, torch.device("cpu")).flatten().numpy().view(np.uint64)
        assert [hex(n) for n in first[:3]] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]

    def test_many_words_at_once_are_as_few(self):
        rows = torch.randn(3, 2**18)
        assert torch.equal(_sums(rows), torch.cat([_sums(row[None]) for row in rows]))

    def test_a_key_is_of_values_and_nothing_else(self):
        x = torch.randint(0, 255, (9, 3, 5, 7), dtype=torch.uint8)
        keys = _keys((x,), {})
        assert len(set(keys)) == 9
        assert _keys((x.to(memory_format=torch.channels_last),), {}) == keys
        assert _keys((x[2:4],), {}) == keys[2:4]  # begins where no word of 4 bytes does
        assert _keys((x.float(),), {}) != keys and _keys((x[..., None],), {}) != keys

    def test_one_bit_is_enough(self):
        zeros = torch.zeros(1 + 64 * 8, 64, dtype=torch.uint8)
        for bit in range(64 * 8):
            zeros[1 + bit, bit // 8] = 1 << bit % 8
        sums = _sums(zeros)
        assert all(len(set(sums[:, i].tolist())) == 1 + 64 * 8 for i in range(HASHES))
        assert len(set(_keys((zeros,), {}))) == 1 + 64 * 8

    def test_nothing_to_hash(self):
        assert len(_keys((torch.zeros(3, 0), torch.tensor(2.0)), {})) == 3


def test_the_teacher_keeps_its_mode(data, tmp_path):
    teacher = Counted().train()
    run(data, distill.TeacherCache(tmp_path, teacher))
    assert teacher.samples and teacher.training and teacher.inner.training


def test_a_sample_augmented_in_another_way_has_another_answer(data, tmp_path):
    stored, teacher = CachedTeacher(tmp_path, net(16, 1)), net(16, 1)
    x = data[0][:4]
    with torch.no_grad():
        assert torch.equal(stored(x), teacher(x)) and torch.equal(stored(x.flip(1)), teacher(x.flip(1)))
        assert stored.evaluated == 8
        mixed = torch.cat([x[2:], x.flip(1)[:1]])
        assert torch.equal(stored(mixed), torch.cat([teacher(x)[2:], teacher(x.flip(1))[:1]]))
    assert stored.evaluated == 8


def test_a_trained_run_can_be_resumed_with_answers_alone(data, tmp_path):
    class Stop(Exception):
        pass

    class Hook:
        def __init__(self, step):
            self.step = step

        def __repr__(self):
            return "Hook"

        def __call__(self, moment):
            if moment.name == "step" and moment.step == self.step:
                raise Stop

    answers, state = tmp_path / "answers", tmp_path / "state"
    state.mkdir()
    whole = run(data, distill.TeacherCache(answers, net(16, 1)))
    for step, teacher in ((6, distill.TeacherCache(answers, net(16, 1))), (0, distill.TeacherCache(answers))):
        settings = replace(SETTINGS, teacher=teacher, hooks=(Hook(step),))
        context = Context(task=task(data), folder=state)
        if step:
            with pytest.raises(Stop):
                train(net(), context, settings)
        else:
            assert same(train(net(), context, settings), whole)
    with raises_case(CheckpointError, "settings") as caught:
        train(net(), context, replace(settings, teacher=distill.TeacherCache(tmp_path / "others", net(16, 2))))
    assert caught.value.field == "teacher"


def test_two_on_one_folder_answer_what_the_teacher_answers(data, tmp_path):
    teacher, x = net(16, 1), data[0][:6]
    one, two = (CachedTeacher(tmp_path, teacher) for _ in range(2))
    with torch.no_grad():
        answers = teacher(x)
        for stored, order in ((one, [0, 1, 2]), (two, [3, 2, 1]), (one, [5, 3, 4])):
            assert torch.allclose(stored(x[order]), answers[order], atol=1e-6)
        assert torch.allclose(CachedTeacher(tmp_path)(x), answers, atol=1e-6)


class Scaled(nn.Module):
    def forward(self, x, scale, by=1.0):
        return (x * scale).float() * by


def test_all_that_is_asked_is_part_of_the_question(tmp_path):
    stored = CachedTeacher(tmp_path, Scaled())
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for scale, by in ((torch.tensor(2.0), 1.0), (torch.tensor(2.0), 5.0), (torch.tensor(3.0), 5.0)):
        assert torch.equal(stored(x, scale, by=by), x * scale * by)
        half = x.to(torch.bfloat16)
        assert torch.equal(stored(half, scale.to(torch.bfloat16), by=by), x * scale * by)
    assert stored.evaluated == 12
    with raises_case(TaskError, "no-rows"):
        stored(torch.tensor(1.0), torch.tensor(2.0))


class TestBadInput:
    def test_data_that_differ_at_every_pass(self, data, tmp_path):
        noise = np.random.default_rng()  # a generator of its own, which nobody seeds

        class Noisy:
            def __iter__(self):
                yield data[0] + torch.tensor(noise.normal(size=(40, 6)), dtype=torch.float32), data[1]

            def __len__(self):
                return 1

        context = Context(task=task(data, train=Noisy()))
        with raises_case(TaskError, "unrepeatable"):
            train(net(), context, replace(SETTINGS, teacher=distill.TeacherCache(tmp_path, net(16, 1))))

    def test_no_answers_and_no_teacher(self, tmp_path):
        with raises_case(TaskError, "no-cache"):
            CachedTeacher(tmp_path)

    def test_samples_that_have_no_answer(self, data, tmp_path):
        with torch.no_grad():
            CachedTeacher(tmp_path, net(16, 1))(data[0][:8])
        with raises_case(TaskError, "missing") as error:
            CachedTeacher(tmp_path)(data[0][4:12])
        assert error.value.got.startswith("4 of 8 ")

    def test_answers_of_another_teacher(self, data, tmp_path):
        with torch.no_grad():
            CachedTeacher(tmp_path, net(16, 1))(data[0][:8])
        with raises_case(TaskError, "another-teacher"):
            CachedTeacher(tmp_path, net(16, 2))

    @pytest.mark.parametrize(
        "text", ["", "{}", "[]", *(json.dumps({"version": 1, "teacher": of, "shape": [3]}) for of in ("", "xy"))]
    )
    def test_a_damaged_folder(self, tmp_path, text):
        (tmp_path / "about.json").write_text(text)
        with raises_case(TaskError, "unreadable"):
            CachedTeacher(tmp_path)

    def test_values_inside(self, data, tmp_path):
        from penjing.network.capture import capture_network

        student = capture_network(net(), (data[0][:2],))
        way = distill.Hints(features=("0",))
        with raises_case(TaskError, "only-outputs"):
            train(
                student, Context(task=task(data)),
                replace(SETTINGS, distill=way, teacher=distill.TeacherCache(tmp_path, net(16, 1))),
            )  # fmt: skip


@pytest.mark.parametrize("cut", [("answers.bin", 5), ("keys.bin", 3), ("keys.bin", 40)])
def test_what_a_killed_process_left_half_is_asked_again(data, tmp_path, cut):
    teacher = net(16, 1)
    with torch.no_grad():
        answers = CachedTeacher(tmp_path, teacher)(data[0])
        name, lost = cut
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-lost])
        again = CachedTeacher(tmp_path, teacher)
        assert 0 < len(again.rows) < 40
        assert torch.equal(again(data[0]), answers)
    assert torch.equal(CachedTeacher(tmp_path)(data[0]), answers)


@dataclass(frozen=True)
class Never:
    """A step that a refused recipe does not come to."""

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    def __call__(self, draft, context):
        pytest.fail("a step has begun")


def program(data, path, seed=1):
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net(16, seed), (data[0][:2],), dynamic_shapes=batch), path)
    return str(path)


@dataclass(frozen=True)
class Outer:
    """A step of a user's, around another one."""

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    steps: tuple

    def __call__(self, draft, context):
        pytest.fail("a step has begun")


class TestNamed:
    """A teacher by the path of its file: in a recipe's YAML nothing else can stand."""

    def test_a_program_and_kept_answers_teach_what_the_network_teaches(self, data, tmp_path):
        reference, answers = run(data, net(16, 1)), tmp_path / "answers"
        path = program(data, tmp_path / "teacher.pt2")
        assert same(run(data, path), reference) and not same(run(data, "self"), reference)
        assert same(run(data, tmp_path / "teacher.pt2"), reference)
        assert same(run(data, distill.TeacherCache(answers, path)), reference)
        assert same(run(data, distill.TeacherCache(answers, net(16, 1))), reference)  # the same weights
        assert same(run(data, distill.TeacherCache(answers)), reference)
        assert same(run(data, (path, "self")), run(data, (net(16, 1), net())))

    def test_opening_draws_nothing(self, data, tmp_path):
        path = program(data, tmp_path / "teacher.pt2")
        torch.manual_seed(3)
        draws = torch.rand(2)
        torch.manual_seed(3)
        opened(path, task(data))
        assert torch.equal(torch.rand(2), draws)

    def test_yaml(self, tmp_path):
        recipe = Recipe(
            Finetune(teacher="teacher.pt2"),
            Finetune(teacher=("self", "teacher.pt2")),
            Finetune(teacher=distill.TeacherCache(tmp_path, "teacher.pt2"), distill=distill.Logits()),
        )
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        with raises_case(RecipeError, "unwritable"):
            Recipe(Finetune(teacher=distill.TeacherCache(tmp_path, net()))).to_yaml()
        with raises_case(RecipeError, "unknown-setting"):
            Recipe.from_data(Recipe(Finetune(teacher=net())).to_data())

    @pytest.mark.parametrize(
        ("teacher", "field"),
        [
            ("{distill.TeacherCache: {folder: 3}}", "folder"),
            ("{distill.TeacherCache: {folder: answers, teacher: self}}", "teacher"),
            ("''", "teacher"),
        ],
    )
    def test_yaml_that_names_no_teacher(self, teacher, field):
        with raises_setting(field):
            Recipe.from_yaml(f"- Finetune: {{teacher: {teacher}}}")

    def test_yaml_that_names_no_cache(self):
        with raises_case(RecipeError, "unknown-setting") as caught:
            Recipe.from_yaml("- Finetune: {teacher: {TeacherCache: {folder: answers}}}")
        assert "distill.TeacherCache" in caught.value.remedy
        with raises_case(RecipeError, "settings") as caught:
            Recipe.from_yaml("- Finetune: {teacher: distill.TeacherCache}")
        assert "folder" in caught.value.got

    def test_no_code_is_run_that_a_recipe_names(self, data, tmp_path):
        file = tmp_path / "code.py"
        file.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef teacher(): ...\n")
        for spec in (f"{file}:teacher", str(file), "platform:uname", "resnet20"):
            with raises_case(SourceError, "unopenable") as caught:
                penjing.apply(Recipe.from_data([{"Finetune": {"teacher": spec}}]), net(), task(data))
            assert caught.value.got == repr(spec) and ".pt2" in caught.value.expected
        assert not (tmp_path / "ran").exists()

    def test_a_recipe_is_refused_before_any_step(self, data, tmp_path):
        path = program(data, tmp_path / "teacher.pt2")
        CachedTeacher(tmp_path / "answers", net(16, 1))(data[0])
        CachedTeacher(tmp_path / "seven", nn.Linear(6, 7))(data[0])
        there, logits = distill.TeacherCache(tmp_path / "answers"), distill.Logits()
        (tmp_path / "empty").mkdir()
        hints = distill.Hints(features=("0",))
        for teacher, way, kind, code, got in (
            ("missing.pt2", logits, SourceError, "unopenable", "missing.pt2"),
            ("missing.pt2", hints, SourceError, "unopenable", "missing.pt2"),
            ((there, "missing.pt2"), logits, SourceError, "unopenable", "missing.pt2"),
            (str(tmp_path / "empty"), logits, SourceError, "no-model", "empty"),
            (distill.TeacherCache(tmp_path / "none"), logits, TaskError, "no-cache", "none"),
            (distill.TeacherCache(tmp_path / "seven"), logits, TaskError, "outputs", "7"),
            (path, distill.Hints(features=(("0", "nope"),)), RecipeError, "no-layer", "nope"),
            (there, hints, TaskError, "only-outputs", "0"),
            ((path, "self"), hints, TaskError, "several-teachers", "2"),
        ):
            with raises_case(kind, code) as caught:
                penjing.apply(Recipe(Never(), Finetune(teacher=teacher, distill=way)), net(), task(data))
            assert got in caught.value.got

    def test_a_teacher_two_steps_deep_is_looked_for_too(self, data):
        inner = penjing.prune.Movement(sparsity=0.5, finetune=Finetune(teacher="missing.pt2"))
        with raises_case(SourceError, "unopenable"):
            penjing.apply(Recipe(Outer((inner,))), net(), task(data))

    def test_a_damaged_file_is_told_as_what_it_is(self, data, tmp_path):
        (tmp_path / "teacher.pt2").write_bytes(b"no archive")
        with raises_case(CheckpointError, "damaged") as caught:
            run(data, str(tmp_path / "teacher.pt2"))
        assert caught.value.what.startswith("the teacher: ")

    def test_a_run_goes_on_with_the_same_teacher_alone(self, data, tmp_path):
        again = {"runtime": "onnxruntime", "out": tmp_path / "run", "seconds": 0.01, "threads": 1, "resume": True}
        steps = Recipe(Finetune(epochs=1, teacher=program(data, tmp_path / "teacher.pt2")))
        first = penjing.compress(net(), task(data), "minimize size_bytes", recipe=steps, **again)
        assert first.record.data["teacher"] == fingerprint_by_name([net(16, 1)])
        assert penjing.compress(net(), task(data), "minimize size_bytes", recipe=steps, **again).record == first.record
        program(data, tmp_path / "teacher.pt2", 2)
        with raises_case(OutputError, "settings") as caught:
            penjing.compress(net(), task(data), "minimize size_bytes", recipe=steps, **again)
        assert caught.value.got.startswith("data.teacher = ")

    def test_teachers_within_steps_are_opened_once(self, data, tmp_path, monkeypatch):
        path, opened_files = program(data, tmp_path / "teacher.pt2"), []
        monkeypatch.setattr(
            "penjing.distill.teaching.open_file",
            lambda at: opened_files.append(at) or penjing.sources.source.open_file(at),
        )
        training = Finetune(epochs=0.2, teacher=path)
        steps = Recipe(
            penjing.prune.Iterative(step=penjing.prune.Magnitude(sparsity=0.5), rounds=2, finetune=training),
            Finetune(epochs=0.2, teacher=distill.TeacherCache(tmp_path / "answers", path), distill=distill.Logits()),
        )
        penjing.apply(steps, net(), task(data))
        assert len(opened_files) == 1


class Two(nn.Module):
    """Logits, and values inside."""

    def __init__(self):
        super().__init__()
        self.inner = net(16, 1)

    def forward(self, x):
        return self.inner(x), x


def test_only_the_first_output_is_kept_and_so_rehearsed(data, tmp_path):
    way = Finetune(epochs=1, teacher=distill.TeacherCache(tmp_path, Two()), distill=distill.Logits())
    penjing.apply(Recipe(way), net(), task(data))
    assert (tmp_path / "keys.bin").stat().st_size == 40 * 16


def test_a_look_at_answers_changes_no_file(data, tmp_path):
    CachedTeacher(tmp_path, net(16, 1))(data[0])
    with (tmp_path / "keys.bin").open("ab") as file:
        file.write(b"half")
    assert len(CachedTeacher(tmp_path).rows) == 40
    assert (tmp_path / "keys.bin").stat().st_size == 40 * 16 + 4


def test_a_student_that_is_its_own_kept_teacher_stays_as_it_was(data, tmp_path):
    student, settings = net(), replace(SETTINGS, task_loss_weight=0.1)
    self_taught, other = (
        train(one, Context(task=task(data)), replace(settings, teacher=distill.TeacherCache(tmp_path / name, teacher)))
        for name, one, teacher in (("kept", student, student), ("other", net(), net()))
    )
    assert same(self_taught, other) and not same(self_taught, net())
