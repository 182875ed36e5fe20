import os
import sys

import pytest

from penjing.errors import OutputError
from penjing.records import files
from penjing.records.files import write_text
from tests.raises import raises_case


def test_it_writes_and_replaces(tmp_path):
    for text in ("first\n", "second: é\r\nthird\n"):
        write_text(tmp_path / "a.json", text)
        assert (tmp_path / "a.json").read_bytes() == text.encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="files have other permissions there")
def test_others_may_read_it_as_any_new_file(tmp_path):
    write_text(tmp_path / "a.json", "text")
    (tmp_path / "b.json").write_text("text")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    import resource

    write_text(tmp_path / "a.json", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with raises_case(OutputError, "unwritable") as caught:
            write_text(tmp_path / "a.json", "new" * 2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.remedy and "a.json" in caught.value.what
    assert (tmp_path / "a.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_place_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "a.json").mkdir()
    with raises_case(OutputError, "unwritable"):
        write_text(tmp_path / "a.json", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_text_that_has_no_bytes_leaves_nothing_behind(tmp_path):
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "\ud800")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_missing_folder_is_said(tmp_path):
    with raises_case(OutputError, "unwritable"):
        write_text(tmp_path / "no" / "a.json", "text")


class TestCache:
    def test_it_is_made_for_its_user_alone(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "deep" / "cache"))
        folder = files.cache("kernels")
        assert folder == tmp_path / "deep" / "cache" / "kernels" and files.cache("kernels") == folder
        assert os.name != "posix" or folder.stat().st_mode & 0o777 == 0o700

    @pytest.mark.skipif(os.name != "posix", reason="permissions")
    def test_one_that_others_may_write_or_own_is_not_read(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PENJING_CACHE", str(tmp_path))
        for mode in (0o777, 0o770, 0o702):
            files.cache("kernels").chmod(mode)
            with raises_case(OutputError, "foreign-cache") as refusal:
                files.cache("kernels")
            (tmp_path / "kernels").chmod(0o755)
            assert f"{mode:o}" in refusal.value.got
        files.cache("kernels")
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with raises_case(OutputError, "foreign-cache"):
            files.cache("kernels")

    def test_one_that_can_not_be_made_is_an_error(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "file"))
        with raises_case(OutputError, "unwritable"):
            files.cache("tvm")
