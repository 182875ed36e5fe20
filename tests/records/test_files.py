import os
import sys

import pytest

from penjing.errors import OutputError
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
