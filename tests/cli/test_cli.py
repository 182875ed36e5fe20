"""The command line as a hostile user meets it: what it prints, its exit codes, and what it leaves behind."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from penjing import cli, records, runtimes
from penjing.cli.inspecting import _by_reason
from penjing.records import Record
from penjing.records.lock import LOCK

FAST = ["--seconds", "0.05", "--threads", "1"]
COMMANDS = ("compress", "inspect", "quantize", "measure", "verify", "runtimes")

PARTS = """
import torch
from torch import nn

from penjing.tasks.task import Task


class Fine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class Wrong(Fine):
    def forward(self, x):
        return self.conv(x) @ torch.zeros(7, 7)  # shapes do not fit


class Moody(Fine):
    def forward(self, x):
        y = self.conv(x)
        if y.sum() > 0:  # depends on the data
            y = y + 1
        return y.mean((2, 3))


def raising():
    raise ValueError("no such weights")


def batches(*parts):
    return Task(example=torch.zeros(1, 3, 8, 8), calibration=list(parts))


def good():
    return batches(torch.randn(9, 3, 8, 8))


def bare():
    return Task(example=torch.zeros(1, 3, 8, 8))


def empty():
    return batches()


def nan():
    return batches(torch.ones(4, 3, 8, 8), torch.full((4, 3, 8, 8), float("nan")))


def infinite():
    return batches(torch.full((4, 3, 8, 8), float("inf")))


def narrow():
    return batches(torch.ones(4, 3, 8, 9))


def unbatched():
    return batches(torch.ones(3, 8, 8))


def integers():
    return batches(torch.ones(4, 3, 8, 8, dtype=torch.uint8))


def labelled():
    return batches((torch.ones(4, 3, 8, 8), torch.zeros(4)))


def failing():
    def evaluate(predict):
        raise RuntimeError("the labels are gone")

    return Task(example=torch.zeros(1, 3, 8, 8), calibration=[torch.ones(4, 3, 8, 8)], evaluate=evaluate)
"""


@pytest.fixture
def parts(tmp_path):
    """A file of networks and tasks, good and bad; the run folder would be ``run`` beside it."""
    file = tmp_path / "parts.py"
    file.write_text(PARTS, encoding="utf-8")
    return file


def error_of(capsys):
    return capsys.readouterr().err


def told(capsys, kind, code):
    """What `--json` gives a program of an error, of that kind and case."""
    error = json.loads(capsys.readouterr().out)
    assert (error["error"], error["code"]) == (kind, code), error
    return error


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_shows_an_example_of_itself(self, command, capsys):
        with pytest.raises(SystemExit) as left:
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert left.value.code == 0
        assert f"penjing {command}" in text.partition("example:")[2]
        assert "--json" in text

    def test_the_overview_names_every_command_and_the_exit_codes(self, capsys):
        with pytest.raises(SystemExit) as left:
            cli.main(["--help"])
        text = capsys.readouterr().out
        assert left.value.code == 0
        assert all(f"\n    {command} " in text for command in COMMANDS)
        assert "3 finished but goal not" in text

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["squash"],
            ["compress", "net.py:make"],  # without a task
            ["compress", "a", "--task", "b", "--batch", "0"],
            ["compress", "a", "--task", "b", "--seconds", "nan"],
            ["inspect", "resnet20", "--shape", "3,a"],
            ["verify"],
        ],
    )
    def test_what_cannot_be_understood_exits_with_2(self, arguments, capsys):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == 2
        assert "usage:" in error_of(capsys)

    @pytest.mark.parametrize("module", ["penjing", "penjing.cli"])
    def test_it_starts_as_a_module_too(self, module):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout.split()[0]) == (0, "penjing")


class TestRuntimes:
    def test_as_json(self, capsys):
        assert cli.main(["runtimes", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        rows = {row["runtime"]: row for row in data["runtimes"]}
        assert list(rows) == list(runtimes.names())
        assert "int8" in rows["onnxruntime"]["precisions"] and "conv" in rows["openvino"]["integer_operators"]
        assert rows["torch"]["integer_operators"] == []
        assert data["machine"]["cores"] >= 1

    def test_one_that_is_missing_is_shown_with_its_install_command(self, capsys, monkeypatch):
        without(monkeypatch, "openvino")
        assert cli.main(["runtimes", "--json"]) == 0
        row = next(r for r in json.loads(capsys.readouterr().out)["runtimes"] if r["runtime"] == "openvino")
        assert row["installed"] is False
        assert row["notes"] == ["pip install 'penjing[openvino]'"]

    def test_as_a_table(self, capsys):
        assert cli.main(["runtimes"]) == 0
        text = capsys.readouterr().out
        assert "onnxruntime" in text and "cores" in text


class TestInspect:
    def test_a_built_in_network_by_its_shape(self, capsys):
        assert cli.main(["inspect", "resnet20", "--shape", "3,32,32", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["parameters"] > 250_000
        assert data["macs"] > 40_000_000
        assert data["floats"]["onnxruntime"] == {}
        assert cli.main(["inspect", "resnet20", "--shape", "3,32,32"]) == 0
        assert "every convolution, linear layer and addition can run in integers" in capsys.readouterr().out

    def test_a_group_of_channels_is_shown_and_drawn(self, tmp_path, capsys):
        picture = tmp_path / "group.svg"
        asked = ["inspect", "resnet20", "--shape", "3,32,32", "--group"]
        assert cli.main([*asked, "stages.0.0.conv1", "--picture", str(picture)]) == 0
        out = capsys.readouterr().out
        assert "stages.0.0.conv2.weight axis 1 (its inputs): 16 of 16 positions" in " ".join(out.split())
        assert picture.read_text().startswith("<svg")
        assert cli.main([*asked, "stages.0.0.conv"]) == 2
        assert "did you mean stages.0.0.conv1" in " ".join(capsys.readouterr().err.split())

    def test_channels_that_belong_together_are_listed(self, capsys):
        assert cli.main(["inspect", "resnet20", "--shape", "3,32,32"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "12 groups with" in out
        assert "not prunable: classifier.weight:0 (it is an output of the network)" in out

    def test_what_each_group_of_channels_alone_is_worth(self, capsys, tmp_path):
        (tmp_path / "net.py").write_text(
            "import torch\nimport penjing as pj\nfrom torch import nn\n"
            "def trained():\n    torch.manual_seed(0)\n"
            "    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))\n"
            "def task():\n    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))\n"
            "    return pj.Task(example=x[:2], calibration=list(x.split(4)))\n"
        )
        scan, drawn = tmp_path / "scan.json", tmp_path / "scan.svg"
        asked = ["inspect", f"{tmp_path}/net.py:trained", "--task", f"{tmp_path}/net.py:task"]
        asked += ["--sensitivity", str(scan)]
        assert cli.main([*asked, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["sensitivity"]
        assert {row["name"]: row["units"] for row in rows} == {"0": 16, "2": 8}
        assert all(len(row["snr_db"]) == len(row["removed"]) for row in rows)
        finished = scan.read_text()
        assert cli.main([*asked, "--picture", str(drawn)]) == 0  # read again, not scanned again
        assert "dB" in capsys.readouterr().out
        assert scan.read_text() == finished and drawn.read_text().startswith("<svg")

    def test_a_scan_needs_a_task(self, capsys, tmp_path):
        asked = ["inspect", "resnet20", "--shape", "3,32,32", "--sensitivity", str(tmp_path / "scan.json")]
        assert cli.main([*asked, "--json"]) == 1
        told(capsys, "CalibrationError", "no-calibration")

    def test_the_noise_of_every_operator(self, capsys, tmp_path):
        (tmp_path / "net.py").write_text(
            "import torch\nfrom penjing.architectures import build\nimport penjing as pj\n"
            "def trained():\n    torch.manual_seed(0)\n    return build('resnet20', width=4)\n"
            "def task():\n    x = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))\n"
            "    return pj.Task(example=x[:2], calibration=list(x.split(4)))\n"
        )
        asked = ["inspect", f"{tmp_path}/net.py:trained", "--task", f"{tmp_path}/net.py:task", "--noise", "onnxruntime"]
        assert cli.main([*asked, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["noise"]
        assert {"conv1", "stages.0.0/add#0", "classifier"} <= {row["name"] for row in rows}
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert all(row["weights_db"] is None or row["weights_db"] > 0 for row in rows)
        assert cli.main(asked) == 0
        text = capsys.readouterr().out
        assert "repaired" in text and "classifier" in text

    def test_without_an_example_it_asks_for_one(self, capsys, parts):
        assert cli.main(["inspect", f"{parts}:Fine"]) == 2
        assert "--shape 3,224,224" in error_of(capsys)

    def test_a_shape_that_does_not_fit(self, capsys, parts):
        assert cli.main(["inspect", f"{parts}:Fine", "--shape", "5,8,8"]) == 1
        assert "parts.py" in error_of(capsys)


def without(monkeypatch, *packages):
    """Let these packages look as if they were not installed."""
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in packages else real(name, *more)
    )


def compress(parts, network, task, *more):
    """Exit code of a compression that is bound to fail; the run folder may not hold anything of it."""
    out = parts.parent / "run"
    code = cli.main(["compress", network, "--task", task, "--out", str(out), *FAST, *more])
    assert not out.exists()
    return code


class TestBadInput:
    """Each says what, got, expected and remedy, and nothing half-written is left."""

    @pytest.mark.parametrize(
        ("network", "code", "says"),
        [
            ("{folder}/nowhere.py:make", "missing", "nowhere.py"),
            ("{parts}:raisin", "unknown-name", "did you mean raising"),
            ("no.such.module:make", "no-module", "no.such"),
            ("resnet2o", "missing", "did you mean resnet"),
            ("{parts}", "no-name", "Moody"),
            ("{parts}:raising", "raised", "no such weights (parts.py:"),
            ("{parts}:PARTS", "unknown-name", "'PARTS'"),
            ("{parts}:Wrong", "forward", "parts.py:19 in forward: return self.conv(x) @ torch.zeros(7, 7)"),
            ("{parts}:Moody", "control-flow", "if y.sum() > 0:"),
            ("{folder}/net.onnx", "missing", "net.onnx"),
            ("{folder}", "no-model", "config.json"),
        ],
    )
    def test_sources(self, parts, capsys, network, code, says):
        network = network.format(parts=parts, folder=parts.parent)
        assert compress(parts, network, f"{parts}:good", "--json") == 1
        said = capsys.readouterr()
        assert json.loads(said.out)["code"] == code
        for word in (says, "got:", "expected:", "remedy:"):
            assert word in said.err
        assert "Traceback" not in said.err

    @pytest.mark.parametrize(
        ("task", "kind", "code"),
        [
            ("empty", "CalibrationError", "empty"),
            ("nan", "CalibrationError", "not-finite"),
            ("infinite", "CalibrationError", "not-finite"),
            ("narrow", "CalibrationError", "shape"),
            ("unbatched", "CalibrationError", "shape"),
            ("integers", "CalibrationError", "dtype"),
            ("labelled", "CalibrationError", "inputs"),
            ("missing", "TaskError", "unknown-name"),
            ("raising", "TaskError", "raised"),
            ("Fine", "TaskError", "not-a-task"),
        ],
    )
    def test_tasks(self, parts, capsys, task, kind, code):
        assert compress(parts, f"{parts}:Fine", f"{parts}:{task}", "--json") == 1
        error = told(capsys, kind, code)
        assert all(error[part] for part in ("what", "got", "expected", "remedy"))

    def test_a_drop_without_anything_to_measure_it_by(self, parts, capsys):
        assert compress(parts, f"{parts}:Fine", f"{parts}:bare", "--goal", "drop<=1%") == 1
        assert "evaluate" in error_of(capsys)
        assert compress(parts, f"{parts}:Fine", f"{parts}:bare", "--goal", "minimize size_bytes", "--json") == 1
        told(capsys, "CalibrationError", "no-calibration")

    def test_a_metric_that_raises(self, parts, capsys):
        out = parts.parent / "run"
        assert cli.main(["compress", f"{parts}:Fine", "--task", f"{parts}:failing", "--out", str(out), *FAST]) == 1
        text = error_of(capsys)
        assert "the labels are gone (parts.py:" in text
        assert not (out / "artifact").exists() and not (out / "record.json").exists()

    @pytest.mark.parametrize(
        ("goal", "caret_under"),
        [
            ("latncy_ms<=5", "latncy_ms"),
            ("drop<=1%, minimise size_byte", "size_byte"),
            ("drop=<1 potato", "potato"),
            ("latency_ms<=5 drop<=1%", "drop<=1%"),
        ],
    )
    def test_a_goal_points_at_the_word(self, parts, capsys, goal, caret_under):
        assert compress(parts, f"{parts}:Fine", f"{parts}:good", "--goal", goal) == 2
        lines = error_of(capsys).splitlines()
        at = next(i for i, line in enumerate(lines) if set(line.strip()) == {"^"})
        start = lines[at].index("^")
        assert goal in lines[at - 1]
        pointed = lines[at - 1][start : start + lines[at].count("^")]
        assert caret_under in pointed or pointed in caret_under

    def test_a_runtime_that_is_not_installed(self, parts, capsys, monkeypatch):
        without(monkeypatch, "onnxruntime")
        assert compress(parts, f"{parts}:Fine", f"{parts}:good", "--runtime", "onnxruntime") == 1
        assert "pip install 'penjing[onnxruntime]'" in error_of(capsys)
        without(monkeypatch, "onnxruntime", "openvino")
        assert compress(parts, f"{parts}:Fine", f"{parts}:good") == 1
        assert "pip install 'penjing[onnxruntime]'" in error_of(capsys)

    def test_a_runtime_that_does_not_exist(self, parts, capsys):
        assert compress(parts, f"{parts}:Fine", f"{parts}:good", "--runtime", "abacus") == 2
        assert "onnxruntime, openvino" in error_of(capsys)

    @pytest.mark.parametrize(
        ("recipe", "code"),
        [
            ("- quantize.Statik", "unknown-step"),
            ("- quantize.Static: {weight_bit: 8}", "unknown-setting"),
            ("- [", "unreadable"),
            ("- quantize.Static: {exclude: [conw]}", "no-match"),
        ],
    )
    def test_recipes(self, parts, capsys, recipe, code):
        file = parts.parent / "recipe.yaml"
        file.write_text(recipe, encoding="utf-8")
        arguments = [parts, f"{parts}:Fine", f"{parts}:good", "--json", "--recipe"]
        assert compress(*arguments, str(file)) == 2
        told(capsys, "RecipeError", code)
        assert compress(*arguments, str(file) + "l") == 2
        told(capsys, "UsageError", "unreadable")

    def test_a_recipe_whose_name_is_nearly_right(self, parts, capsys):
        assert compress(parts, f"{parts}:Fine", f"{parts}:good", "--recipe", "label_free") == 2
        assert "did you mean label-free?" in error_of(capsys)

    def test_a_recipe_beside_names_to_exclude(self, parts, capsys):
        file = parts.parent / "recipe.yaml"
        file.write_text("- quantize.Static", encoding="utf-8")
        more = ["--recipe", str(file), "--exclude", "conv"]
        assert compress(parts, f"{parts}:Fine", f"{parts}:good", *more, "--json") == 2
        told(capsys, "UsageError", "exclude")

    def test_an_output_path_that_can_never_be_written(self, parts, capsys):
        blocked = parts / "run"  # below a file
        assert cli.main(["compress", f"{parts}:Fine", "--task", f"{parts}:good", "--out", str(blocked), *FAST]) == 1
        text = error_of(capsys)
        assert "OutputError" in text and "--out" in text

    def test_an_output_folder_of_other_files(self, parts, capsys):
        before = parts.read_text(encoding="utf-8")
        for more in ([], ["--force"], ["--resume"]):
            arguments = ["compress", f"{parts}:Fine", "--task", f"{parts}:good", "--out", str(parts.parent), *more]
            assert cli.main([*arguments, *FAST, "--json"]) == 1
            told(capsys, "OutputError", "foreign")
        assert parts.read_text(encoding="utf-8") == before

    def test_errors_are_json_where_json_was_asked_for(self, parts, capsys):
        assert compress(parts, f"{parts}:raising", f"{parts}:good", "--json") == 1
        error = told(capsys, "SourceError", "raised")
        assert all(error[part] for part in ("what", "got", "expected", "remedy")) and error["field"] == ""

    def test_a_setting_that_breaks_its_rule_is_a_field_of_the_json(self, parts, capsys):
        (parts.parent / "recipe.yaml").write_text("- quantize.Static: {weight_bits: 99}", encoding="utf-8")
        more = ["--recipe", str(parts.parent / "recipe.yaml"), "--json"]
        assert compress(parts, f"{parts}:Fine", f"{parts}:good", *more) == 2
        assert told(capsys, "RecipeError", "settings")["field"] == "weight_bits"


class Trap:
    """A pickle that leaves a mark on disk when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


class TestCheckpointsThatWouldRunCode:
    @pytest.fixture
    def mark(self, tmp_path):
        return tmp_path / "executed"

    def refusal(self, parts, capsys, file, mark, code):
        assert compress(parts, str(file), f"{parts}:good", "--json") == 1
        assert not mark.exists()
        return told(capsys, "CheckpointError", code)

    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pkl", ".ckpt"])
    def test_pickles(self, parts, capsys, mark, suffix):
        file = parts.parent / f"weights{suffix}"
        torch.save({"state_dict": Trap(mark)}, file)
        assert f"--weights weights{suffix}" in self.refusal(parts, capsys, file, mark, "pickle")["remedy"]

    def test_a_pickle_that_calls_itself_an_exported_program(self, parts, capsys, mark):
        file = parts.parent / "net.pt2"
        file.write_bytes(pickle.dumps(Trap(mark)))
        assert "net.pt2" in self.refusal(parts, capsys, file, mark, "damaged")["what"]
        torch.save(Trap(mark), file)
        assert "net.pt2" in self.refusal(parts, capsys, file, mark, "damaged")["what"]

    def test_an_exported_program_with_a_pickle_inside(self, parts, capsys, mark):
        file = parts.parent / "net.pt2"
        torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(2, 3),)), file)
        bomb = io.BytesIO()
        torch.save((Trap(mark),), bomb)
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, bomb.getvalue() if "sample_inputs" in name else data)
        assert self.refusal(parts, capsys, file, mark, "foreign-code")["code"] == "foreign-code"


def goes_on(run, source, task, *more, goal="drop<=2%, minimize size_bytes"):
    arguments = ["compress", source, "--task", task, "--goal", goal, "--out", str(run)]
    return cli.main([*arguments, "--runtime", "onnxruntime", *FAST, *more])


class TestExitCodes:
    def test_a_goal_that_is_not_met_3_and_a_folder_that_holds_a_run_1(
        self, capsys, digits_copy, digits_source, digits_task
    ):
        before = records.read(digits_copy)
        assert goes_on(digits_copy, digits_source, digits_task, "--json") == 1
        remedy = told(capsys, "OutputError", "run")["remedy"]
        assert "--resume" in remedy and "--force" in remedy
        impossible = "latency_ms<=0.0000001, minimize size_bytes"
        assert goes_on(digits_copy, digits_source, digits_task, "--resume", "--json", goal=impossible) == 1
        assert told(capsys, "OutputError", "settings")["got"].startswith("goal = ")
        assert goes_on(digits_copy, "nowhere.py:make", digits_task, "--force") == 1  # which removes nothing
        assert records.read(digits_copy) == before and (digits_copy / "artifact").is_dir()
        capsys.readouterr()
        assert goes_on(digits_copy, digits_source, digits_task, "--force", "--json", goal=impossible) == 3
        record = records.from_dict(Record, json.loads(capsys.readouterr().out))
        assert record == records.read(digits_copy) != before
        assert not record.goal.met and record.chosen is not None and record.goal.pareto

    def test_a_goal_that_is_met_0_without_data_or_a_metric(self, parts, capsys):
        (parts.parent / "none.yaml").write_text("[]", encoding="utf-8")
        out = parts.parent / "run"
        arguments = ["compress", f"{parts}:Fine", "--task", f"{parts}:bare", "--goal", "minimize size_bytes"]
        more = ["--recipe", str(parts.parent / "none.yaml"), "--runtime", "onnxruntime", "--out", str(out)]
        assert cli.main([*arguments, *more, *FAST]) == 0
        text = capsys.readouterr().out
        assert "goal met" in text and str(out / "report.html") in text
        record = records.read(out)
        assert [c.name for c in record.candidates] == ["onnxruntime-fp32", "onnxruntime-fp16"]
        assert record.source.metric is None and record.artifact.metric is None and record.data == {}

    def test_stopping_by_hand_is_an_error_that_names_resume(self, tmp_path, capsys, parts, digits_source):
        file = tmp_path / "stopping.py"
        file.write_text("def task():\n    raise KeyboardInterrupt\n", encoding="utf-8")
        assert goes_on(tmp_path / "run", digits_source, f"{file}:task") == 1
        assert "--resume" in error_of(capsys)


def start(source, task, out, **options):
    arguments = ["compress", source, "--task", task, "--goal", "drop<=2%, minimize size_bytes", "--out", str(out)]
    command = [sys.executable, "-m", "penjing.cli", *arguments, "--runtime", "onnxruntime", *FAST]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def candidates_of(events, kind, key):
    entries = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    return [event[key] for event in entries if event["kind"] == kind and key in event]


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, capsys, digits_run, digits_source, digits_task):
    out = tmp_path / "run"
    with start(digits_source, digits_task, out) as process:
        events = out / "events.jsonl"
        for _ in range(1200):
            if process.poll() is not None:
                raise AssertionError(process.stderr.read())
            if events.exists() and '"kind": "candidate"' in events.read_text(encoding="utf-8"):
                break
            time.sleep(0.05)
        process.kill()
    assert not (out / "artifact").exists() and not (out / "record.json").exists()
    done = candidates_of(events, "candidate", "name")  # the second may be done too before the signal arrives
    first = out / "candidates" / "onnxruntime-fp32" / "model.onnx"
    written = first.stat().st_mtime_ns
    assert goes_on(out, digits_source, digits_task, "--resume") == 0
    said = capsys.readouterr()
    assert "as you expect?" in said.err and "kept: onnxruntime-fp32" in said.err
    assert "goal met" in said.out
    assert first.stat().st_mtime_ns == written  # what was done is not done again
    resumed = candidates_of(events, "resumed", "candidate")
    assert done[0] == "onnxruntime-fp32" and resumed[: len(done)] == done  # one may be kept, and not yet told
    assert len(resumed) <= len(done) + 1 and len(resumed) < len(digits_run.record.candidates)
    # Everything is what a run without interruption makes of the same source, data and seed.
    whole = {c.name: c for c in digits_run.record.candidates}
    record = records.read(out)
    for candidate in record.candidates:
        assert candidate.sha256 == whole[candidate.name].sha256
        assert candidate.parity == whole[candidate.name].parity
        assert candidate.measured.metric == whole[candidate.name].measured.metric
    assert record.goal.chosen == digits_run.record.goal.chosen
    for name in ("weights.safetensors", "plan.json", "edits.json", "evidence.npz", "load.py"):
        assert (out / name).read_bytes() == (digits_run.folder / name).read_bytes()
    for path in digits_run.artifact.iterdir():
        assert (out / "artifact" / path.name).read_bytes() == path.read_bytes()
    assert not list(out.rglob("*.new")) and not (out / "state").exists()


EXITS = """
import sys
import torch
from torch import nn
from penjing.tasks.task import Task

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        {forward}
        return self.fc(x)

def make():
    {factory}
    return Net()

def batches():
    {loader}
    yield torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

class Loader:
    def __iter__(self):
        return batches()

def evaluate(predict):
    {evaluate}
    return float(predict(torch.zeros(2, 4).numpy()).sum())

def task():
    {task}
    return Task(example=torch.zeros(1, 4), calibration=Loader(), evaluate=evaluate)

{file}
"""


@pytest.mark.parametrize("where", ["forward", "factory", "loader", "evaluate", "task", "file"])
@pytest.mark.parametrize("code", ["0", "", "'bye'"])
def test_an_exit_in_the_users_code_is_an_error_with_its_line(tmp_path, capsys, where, code):
    if code != "0" and where not in ("evaluate", "loader"):
        pytest.skip("one code each is enough")
    places = dict.fromkeys(("forward", "factory", "loader", "evaluate", "task", "file"), "pass")
    file = tmp_path / "parts.py"
    file.write_text(EXITS.format(**places | {where: f"sys.exit({code})"}), encoding="utf-8")
    out = tmp_path / "run"
    arguments = [
        "compress",
        f"{file}:make",
        "--task",
        f"{file}:task",
        "--out",
        str(out),
        "--goal",
        "minimize size_bytes",
    ]
    assert cli.main([*arguments, "--runtime", "onnxruntime", *FAST]) == 1
    text = error_of(capsys)
    assert f"sys.exit({code})" in text and "parts.py:" in text
    assert not out.exists() or not (out / "record.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_tidies_up_as_ctrl_c_does(tmp_path, digits_source, digits_task):
    out, aside = tmp_path / "run", tmp_path / "aside"
    aside.mkdir()
    with start(digits_source, digits_task, out, env={**os.environ, "TMPDIR": str(aside)}) as process:
        for _ in range(2400):  # until a runtime is at work in a process of its own
            children = psutil.Process(process.pid).children(recursive=True)
            if children and (out / "candidates").exists():
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.terminate()
        text = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "--resume" in text and "Traceback" not in text
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list(out.rglob("*.new")) and not (out / LOCK).exists()
    assert [path.name for path in aside.iterdir() if path.name.startswith("penjing-")] == []


@pytest.mark.parametrize("option", ["--resume", "--force"])
def test_a_run_that_is_still_running_is_neither_joined_nor_replaced(
    tmp_path, capsys, digits_source, digits_task, option
):
    out = tmp_path / "run"
    with start(digits_source, digits_task, out) as process:
        try:
            for _ in range(1200):
                if (out / "state" / "request.json").exists():
                    break
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            assert goes_on(out, digits_source, digits_task, option, "--json") == 1
            assert f"process {process.pid} since" in told(capsys, "OutputError", "held")["got"]
            assert (out / "state" / "request.json").exists()
        finally:
            process.kill()


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
@pytest.mark.parametrize("limit", [4_000, 60_000])
def test_a_full_disk_ends_in_an_error_and_nothing_half_written(tmp_path, digits_source, digits_task, limit):
    import resource

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "run"
    with start(digits_source, digits_task, out, preexec_fn=small) as process:
        text = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "OutputError" in text and "free some space" in text and "Traceback" not in text
    assert not (out / "artifact").exists() and not (out / "record.json").exists()
    assert not list(out.rglob("*.new"))


class TestWeights:
    """A factory's random numbers give way to those of a file, and the record says which."""

    def test_a_run_with_weights_from_a_file(self, parts, capsys):
        (parts.parent / "none.yaml").write_text("[]", encoding="utf-8")
        file, out = parts.parent / "best.ckpt", parts.parent / "run"
        state = {"model.conv.weight": torch.full((4, 3, 3, 3), 0.5), "model.conv.bias": torch.zeros(4)}
        torch.save({"state_dict": state}, file)
        arguments = ["compress", f"{parts}:Fine", "--weights", str(file), "--task", f"{parts}:bare"]
        arguments += ["--goal", "minimize size_bytes", "--recipe", str(parts.parent / "none.yaml")]
        arguments += ["--runtime", "onnxruntime", "--out", str(out), *FAST]
        assert cli.main(arguments) == 0
        record = records.read(out)
        assert record.name == "Fine" and record.weights == str(file)
        assert record.data == {records.WEIGHTS_FILE: hashlib.sha256(file.read_bytes()).hexdigest()}
        assert torch.equal(load_file(out / "weights.safetensors")["conv.weight"], state["model.conv.weight"])
        assert cli.main([*arguments, "--resume"]) == 0
        against = ["measure", str(out), "--against", f"{parts}:Fine", "--task", f"{parts}:bare", "--weights", str(file)]
        assert cli.main([*against, *FAST]) == 0
        torch.save({"state_dict": {name: tensor + 1 for name, tensor in state.items()}}, file)
        capsys.readouterr()
        assert cli.main([*arguments, "--resume", "--json"]) == 1
        assert "weights" in told(capsys, "OutputError", "settings")["got"]

    def test_weights_of_another_network(self, parts, capsys):
        file = parts.parent / "other.pth"
        torch.save({"conv.weight": torch.zeros(4, 3, 5, 5), "conv.bias": torch.zeros(4)}, file)
        assert cli.main(["inspect", f"{parts}:Fine", "--weights", str(file), "--shape", "3,8,8", "--json"]) == 1
        assert "[4, 3, 5, 5]" in told(capsys, "CheckpointError", "misfit")["got"]

    def test_options_that_need_another(self, parts, capsys):
        file = str(parts.parent / "best.ckpt")
        assert cli.main(["measure", "anywhere", "--weights", file, "--json"]) == 2
        told(capsys, "UsageError", "no-source")
        assert compress(parts, f"{parts}:Fine", f"{parts}:bare", "--ignore-weights", "loss.*", "--json") == 2
        told(capsys, "UsageError", "no-weights")


class TestMeasure:
    def test_beside_the_source_with_the_metric(self, capsys, digits_run, digits_source, digits_task):
        arguments = ["measure", str(digits_run.folder), "--against", digits_source, "--task", digits_task, "--json"]
        assert cli.main([*arguments, "--batch", "4", *FAST]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert list(rows) == ["artifact", digits_source]
        assert rows["artifact"]["metric"] == digits_run.record.artifact.metric
        assert rows[digits_source]["metric"] == digits_run.record.source.metric
        assert rows["artifact"]["size_bytes"] == digits_run.record.artifact.size_bytes
        assert {row["latency_ms"]["batch"] for row in rows.values()} == {4}

    def test_an_artifact_folder_alone_as_a_table(self, capsys, digits_run):
        assert cli.main(["measure", str(digits_run.artifact), *FAST]) == 0
        text = capsys.readouterr().out
        assert "Latency" in text and "not measured" in text

    def test_a_folder_without_an_artifact(self, capsys, tmp_path):
        assert cli.main(["measure", str(tmp_path), "--json"]) == 1
        told(capsys, "ArtifactError", "no-artifact")


class TestVerify:
    def test_evidence_that_holds_0(self, capsys, digits_run, digits_task):
        assert cli.main(["verify", str(digits_run.folder), "--task", digits_task, "--seconds", "0", "--json"]) == 0
        checks = json.loads(capsys.readouterr().out)
        assert {check["holds"] for check in checks} == {True}
        assert "accuracy" in {check["figure"] for check in checks}

    def test_evidence_that_does_not_hold_3(self, capsys, digits_copy):
        model = next((digits_copy / "artifact").glob("model.*"))
        model.write_bytes(model.read_bytes() + b"\n")
        assert cli.main(["verify", str(digits_copy), "--seconds", "0"]) == 3
        text = capsys.readouterr().out
        assert "latency" not in text
        assert "changed:" in text and f"artifact/{model.name}" in text
        assert "differs" in text

    def test_no_record(self, capsys, tmp_path):
        assert cli.main(["verify", str(tmp_path), "--json"]) == 1
        told(capsys, "RecordError", "missing")
        (tmp_path / "record.json").write_text("{", encoding="utf-8")
        assert cli.main(["verify", str(tmp_path), "--json"]) == 1
        told(capsys, "RecordError", "unreadable")


def test_a_file_that_is_missing_is_told_before_torch_is_imported(tmp_path):
    code = (
        "import sys; from penjing import cli; "
        "left = cli.main(['compress', 'absent.py:net', '--task', 'absent.py:task']); "
        "sys.exit(10 * ('torch' in sys.modules) + left)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "the source's file is missing" in done.stderr and "absent.py" in done.stderr


def test_what_is_said_of_the_many_steps_of_a_layer_is_one_line():
    reasons = {f"cells/add#{i}": "a sum" for i in range(20)} | {
        "cells/add#20": "another",
        "head": "a number",
        "a/b#0": "x",
    }
    assert _by_reason(reasons) == [
        "cells/add#0 to cells/add#19 (20): a sum", "cells/add#20: another", "head: a number", "a/b#0: x",
    ]  # fmt: skip
