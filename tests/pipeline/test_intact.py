"""Every file of a run folder is hashed in its record, and `verify` and `--resume` look at all of them."""

import json
import os

import pytest

from penjing import cli, records
from penjing.pipeline import intact
from penjing.pipeline.verify import verify


def hashes_of(folder):
    checks = {check.figure: check for check in verify(folder, threads=1, seconds=0.0)}
    return checks["SHA-256 of the files"], checks.get("other files")


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def resumed(folder, source, task):
    arguments = ["compress", source, "--task", task, "--goal", "minimize size_bytes, drop<=2%", "--out", str(folder)]
    return cli.main([*arguments, "--seconds", "0.1", "--threads", "1", "--resume"])


def test_every_file_but_the_record_is_hashed(digits_run):
    named = records.read(digits_run.folder).files
    assert sorted([*named, "record.json"]) == files_of(digits_run.folder)
    assert {"load.py", "artifact/load.py", "artifact/model.onnx", "report.html", "evidence.npz", "plan.json"} <= set(
        named
    )
    assert digits_run.record.files == named


def test_a_change_in_any_file_is_found(digits_copy):
    assert hashes_of(digits_copy)[0].holds is True
    for name in records.read(digits_copy).files:
        before = (digits_copy / name).read_bytes()
        (digits_copy / name).write_bytes(before + b" ")
        differences = intact.differences(digits_copy, records.read(digits_copy))
        assert differences == intact.Differences((), (name,), ())
        (digits_copy / name).unlink()
        differences = intact.differences(digits_copy, records.read(digits_copy))
        assert differences == intact.Differences((name,), (), ())
        (digits_copy / name).write_bytes(before)
    (digits_copy / "load.py").write_text("import os\n")
    check, _ = hashes_of(digits_copy)
    assert check.holds is False and check.found == "changed: load.py"


@pytest.mark.parametrize("change", ["none", "empty", "chosen", "other"])
def test_hashes_that_are_missing_or_contradict_each_other_do_not_hold(digits_copy, change):
    path = digits_copy / "record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    chosen = next(c for c in record["candidates"] if c["name"] == record["goal"]["chosen"])
    if change == "none":
        del record["files"]
    elif change == "empty":
        record["files"] = {}
    elif change == "chosen":
        chosen["sha256"] = {}
    else:
        chosen["sha256"]["model.onnx"] = "0" * 64
    path.write_text(json.dumps(record), encoding="utf-8")
    assert hashes_of(digits_copy)[0].holds is False


def test_other_files_are_told(digits_copy):
    (digits_copy / "artifact" / "json.py").write_text("raise SystemExit\n")
    check, other = hashes_of(digits_copy)
    assert check.holds is True and other.found == "artifact/json.py" and other.holds is None


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_to_a_file_with_the_same_bytes_is_no_file_of_the_run(digits_copy, tmp_path):
    (digits_copy / "load.py").rename(tmp_path / "elsewhere.py")
    (digits_copy / "load.py").symlink_to(tmp_path / "elsewhere.py")
    check, _ = hashes_of(digits_copy)
    assert check.holds is False and check.found == "missing: load.py"


def test_a_finished_run_is_resumed_only_as_it_was_left(digits_copy, digits_source, digits_task, capsys):
    assert resumed(digits_copy, digits_source, digits_task) == 0
    (digits_copy / "weights.safetensors").unlink()
    assert resumed(digits_copy, digits_source, digits_task) == 1
    said = capsys.readouterr().err
    assert "have changed" in said and "missing: weights.safetensors" in said
