from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from rosa_lightning.utils.files import new_folder, write_file


def test_a_folder_appears_when_all_is_written(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a.txt"]
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_nothing_stays_after_an_error_but_what_was_there(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    with pytest.raises(FileExistsError), new_folder(kept / "made" / "out") as folder:
        (folder / "a").mkdir() or (folder / "a").mkdir()
    assert list(tmp_path.rglob("*")) == [kept]


def test_a_way_through_a_folder_that_is_not_there_makes_none(tmp_path):
    with new_folder(tmp_path / "a" / ".." / "b"):
        pass
    assert os.listdir(tmp_path) == ["b"]
    with pytest.raises(ValueError, match="exists already"), new_folder(tmp_path / "a" / ".." / "b"):
        pass


def test_nothing_stays_when_there_is_no_room_for_the_folder_itself(tmp_path):
    with pytest.raises(OSError, match="name too long"), new_folder(tmp_path / "made" / ("n" * 254)):
        pass
    assert os.listdir(tmp_path) == []


def test_a_path_that_exists_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for path in (tmp_path, tmp_path / "file", tmp_path / "dangling"):
        with pytest.raises(ValueError, match="exists already"), new_folder(path):
            pass


def test_files_have_the_permissions_of_any_other(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "in").mkdir()
        (folder / "in" / "a.txt").touch(0o600)
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual.txt").touch()
    made = tmp_path / "out"
    for path in (made, made / "in"):
        assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (made / "in" / "a.txt").stat().st_mode == (tmp_path / "usual.txt").stat().st_mode


def test_a_file_that_cannot_be_finished_leaves_the_older_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "r.json"
    write_file(path, b"older")

    def full(self, target):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_file(path, b"newer")
    assert path.read_bytes() == b"older"
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_two_who_write_one_file_at_once_do_not_mix(tmp_path, monkeypatch):
    path, replace = tmp_path / "r.json", Path.replace
    others = iter([b"the other's, which is longer"])

    def meanwhile(self, target):
        for content in others:
            write_file(path, content)
            assert path.read_bytes() == content
        return replace(self, target)

    monkeypatch.setattr("pathlib.Path.replace", meanwhile)
    write_file(path, b"mine, ", b"in parts")
    assert path.read_bytes() == b"mine, in parts"
    assert os.listdir(tmp_path) == ["r.json"]


def fill_a_folder(path: Path, content: bytes) -> None:
    with new_folder(path) as folder, (folder / "a").open("wb") as file:
        file.write(content)


@pytest.mark.parametrize("write", [write_file, fill_a_folder])
def test_a_full_disk_is_said_with_the_name_that_was_asked_for(tmp_path, write):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="out cannot be written: File too large"):
            write(tmp_path / "out", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path, make):
    (tmp_path / "precious").write_text("kept")
    make(tmp_path / "precious", tmp_path / "out")
    write_file(tmp_path / "out", b"new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "out").read_text() == "new"
