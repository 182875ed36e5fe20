"""`penjing compare` as a user meets it: tables, files, JSON, and what it refuses."""

import json
import subprocess
import sys

import pytest

from penjing import cli
from penjing.records import to_json
from tests.report import sample_records


@pytest.fixture
def runs(tmp_path):
    for name, record in (("first", sample_records.big()), ("second", sample_records.judged())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(to_json(record), encoding="utf-8")
    return [str(tmp_path / "first"), str(tmp_path / "second")]


def test_two_runs_are_shown_side_by_side(runs, capsys):
    assert cli.main(["compare", *runs]) == 0
    out = capsys.readouterr().out
    assert "openvino-int8" in out and "onnxruntime-int8" in out and "runtimes" not in out
    assert "Nothing differs that the records hold." in out


def test_picture_and_page_are_written_and_named(runs, tmp_path, capsys):
    picture, page = tmp_path / "new" / "runs.svg", tmp_path / "new" / "runs.html"
    assert cli.main(["compare", *runs, "--picture", str(picture), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert str(picture) in out and str(page) in out
    assert picture.read_text().startswith("<svg ") and page.read_text().startswith("<!doctype html>")


def test_json_holds_runs_conflicts_and_differences(runs, capsys):
    assert cli.main(["compare", *runs, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [run["chosen"] for run in data["runs"]] == ["openvino-int8", "onnxruntime-int8"]
    assert data["best"]["latency_ms"] == ["first"]


def test_bad_input_has_a_case_and_leaves_no_file(runs, tmp_path, capsys):
    assert cli.main(["compare", runs[0], "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["code"] == "number"
    page = tmp_path / "runs.html"
    assert cli.main(["compare", runs[0], str(tmp_path / "none"), "--html", str(page), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "missing" and not page.exists()
    assert cli.main(["compare", *runs, "--html", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "folder"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "record.json").write_text(to_json(sample_records.bare()), encoding="utf-8")
    picture = tmp_path / "runs.svg"
    assert cli.main(["compare", runs[0], str(tmp_path / "bare"), "--picture", str(picture), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "no-picture" and not picture.exists()


def test_it_opens_without_torch(runs):
    code = f"""
import sys
from penjing.records import compare
from penjing.report import runs_page, runs_picture, runs_table
comparison = compare({runs!r})
runs_page.render(comparison), runs_picture.picture(comparison), list(runs_table.artifacts(comparison))
print(*{{"torch", "onnx", "onnxruntime", "openvino"}} & set(sys.modules))
"""
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (completed.returncode, completed.stdout.strip()) == (0, ""), completed.stderr
