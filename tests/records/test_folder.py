import os

import pytest

from penjing.errors import OutputError
from penjing.records.folder import CANDIDATES, RECORD, STATE, RunFolder, writing
from tests.raises import raises_case

REQUEST = {"goal": "drop<=1%", "seed": 0, "recipe": [{"quantize.Static": {"exclude": ["a"]}}]}


@pytest.fixture
def run(tmp_path):
    """A folder with a run that was claimed and not finished."""
    RunFolder(tmp_path / "run").claim(REQUEST)
    return tmp_path / "run"


def finished(path):
    folder = RunFolder(path, resume=True)
    (path / RECORD).write_text("{}")
    (path / "report.html").write_text("report")
    with folder.building("artifact") as aside:
        (aside / "model.onnx").write_bytes(b"x")
    folder.finish()


class TestWhoMayWrite:
    def test_a_new_folder_with_its_parents(self, tmp_path):
        path = tmp_path / "runs" / "first"
        RunFolder(path).claim(REQUEST)
        assert (path / STATE / "request.json").is_file()

    def test_an_empty_folder(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.claim(REQUEST)
        assert not folder.resumed
        assert (tmp_path / STATE).is_dir()

    def test_looking_leaves_no_trace(self, tmp_path):
        RunFolder(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_with_a_run_is_refused_with_the_ways_out(self, run):
        with raises_case(OutputError, "run") as caught:
            RunFolder(run)
        assert "--resume" in caught.value.remedy
        assert "--force" in caught.value.remedy

    def test_a_finished_run_is_refused_too(self, run):
        finished(run)
        with raises_case(OutputError, "run"):
            RunFolder(run)

    @pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}])
    def test_a_folder_of_other_files_is_never_touched(self, tmp_path, options):
        (tmp_path / "thesis.tex").write_text("years")
        with raises_case(OutputError, "foreign") as caught:
            RunFolder(tmp_path, **options)
        assert "thesis.tex" in caught.value.got
        assert (tmp_path / "thesis.tex").read_text() == "years"
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        with raises_case(OutputError, "file"):
            RunFolder(tmp_path / "file")

    def test_force_removes_the_run_and_nothing_else(self, run):
        finished(run)
        (run / "notes.txt").write_text("mine")
        RunFolder(run, force=True).claim(REQUEST)
        assert {p.name for p in run.iterdir()} == {"notes.txt", STATE}
        assert RunFolder(run, resume=True).read_state("request") == REQUEST

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
    def test_a_folder_without_permission(self, tmp_path):
        tmp_path.chmod(0o500)
        with raises_case(OutputError, "unwritable"):
            RunFolder(tmp_path)

    def test_a_path_below_a_file_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with raises_case(OutputError, "unwritable"):
            RunFolder(tmp_path / "file" / "run").claim(REQUEST)


class TestResume:
    def test_the_same_request_goes_on(self, run):
        folder = RunFolder(run, resume=True)
        assert folder.resumed
        folder.write_state("latency", [1.5, 2.5])
        folder.claim(REQUEST)
        assert RunFolder(run, resume=True).read_state("latency") == [1.5, 2.5]

    def test_the_difference_is_named_and_not_all_that_is_the_same(self, run):
        request = {**REQUEST, "recipe": [{"quantize.Static": {"exclude": ["b"]}}]}
        with raises_case(OutputError, "settings") as caught:
            RunFolder(run, resume=True).claim(request)
        place = "recipe[0].quantize.Static.exclude[0]"
        assert (caught.value.got, caught.value.expected) == (f"{place} = b", f"{place} = a")

    def test_another_request_is_refused_by_name(self, run):
        folder = RunFolder(run, resume=True)
        with raises_case(OutputError, "settings") as caught:
            folder.claim({**REQUEST, "goal": "drop<=2%", "seed": 1})
        assert (caught.value.got, caught.value.expected) == ("goal = drop<=2%", "goal = drop<=1%")
        assert caught.value.what.endswith(" goal, seed")

    def test_resuming_nothing_starts(self, tmp_path):
        folder = RunFolder(tmp_path / "run", resume=True)
        assert not folder.resumed
        folder.claim(REQUEST)
        assert folder.read_state("request") == REQUEST

    def test_what_was_not_kept_is_none(self, run):
        assert RunFolder(run, resume=True).read_state("source-metrics") is None

    def test_what_was_kept_is_replaced(self, run):
        folder = RunFolder(run, resume=True)
        folder.write_state("costs", [1])
        folder.write_state("costs", {"a": None})
        assert folder.read_state("costs") == {"a": None}

    def test_a_finished_run_keeps_nothing_to_resume(self, run):
        finished(run)
        assert {p.name for p in run.iterdir()} == {RECORD, "report.html", "artifact"}


class TestBuilding:
    def test_a_folder_appears_when_it_is_whole(self, run):
        folder = RunFolder(run, resume=True)
        with folder.building(f"{CANDIDATES}/openvino-int8") as aside:
            (aside / "model.xml").write_text("<net/>")
            assert not (run / CANDIDATES / "openvino-int8").exists()
        assert (run / CANDIDATES / "openvino-int8" / "model.xml").read_text() == "<net/>"
        assert [p.name for p in (run / CANDIDATES).iterdir()] == ["openvino-int8"]

    def test_one_that_stands_is_replaced_as_a_whole(self, run):
        folder = RunFolder(run, resume=True)
        for name in ("old", "new"):
            with folder.building("artifact") as aside:
                (aside / name).write_text(name)
        assert [p.name for p in (run / "artifact").iterdir()] == ["new"]

    def test_an_error_leaves_what_stood_there(self, run):
        folder = RunFolder(run, resume=True)
        with folder.building("artifact") as aside:
            (aside / "old").write_text("old")
        with pytest.raises(KeyError), folder.building("artifact") as aside:
            (aside / "half").write_text("half")
            raise KeyError
        assert [p.name for p in (run / "artifact").iterdir()] == ["old"]
        assert {p.name for p in run.iterdir()} == {STATE, "artifact"}

    def test_what_a_crash_left_is_cleared_away(self, run):
        folder = RunFolder(run, resume=True)
        (run / ".artifact.new").mkdir()
        (run / ".artifact.new" / "half").write_text("half")
        with folder.building("artifact") as aside:
            assert list(aside.iterdir()) == []
        assert {p.name for p in run.iterdir()} == {STATE, "artifact"}

    def test_an_error_of_the_system_is_an_output_error(self, run):
        with (
            raises_case(OutputError, "unwritable"),
            RunFolder(run, resume=True).building("artifact") as a,
        ):
            (a / "missing" / "file").write_text("")

    def test_other_errors_pass(self, tmp_path):
        with pytest.raises(ValueError, match="mine"), writing(tmp_path):
            raise ValueError("mine")
