from __future__ import annotations

import io
import os
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from rosa_lightning.utils import files
from rosa_lightning.utils.files import (
    atomic_directory,
    atomic_write,
    check_archive,
    printable,
    read_bytes,
    read_lines,
    read_text,
    writing,
)
from tests.hostile import KINDS, limited, put

# Reading.


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = put(kind, tmp_path / "it")
    with limited(), pytest.raises(OSError, match=f"it is {kind}, and a regular file is expected"):
        read_text(path)


def test_a_file_behind_a_link_is_read(tmp_path):
    (tmp_path / "it").write_text("\ufeffé")
    (tmp_path / "link").symlink_to(tmp_path / "it")
    assert read_text(tmp_path / "link") == "é"
    with pytest.raises(FileNotFoundError, match="none"):
        read_text(tmp_path / "none")


def test_a_file_that_is_too_large_or_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "it"
    path.write_bytes(b"x" * 8 + b"\xff")
    assert len(read_bytes(path, 9)) == 9
    with pytest.raises(ValueError, match="it has 9 bytes, and at most 8 are read"):
        read_bytes(path, 8)
    with pytest.raises(ValueError, match=r"it is not UTF-8 text \(byte 8\)"):
        read_text(path)
    os.truncate(path, files.memory_bytes())  # with holes, on no disk
    with limited(), pytest.raises(ValueError, match="are read"):
        read_bytes(path)


def test_lines_are_read_up_to_a_length(monkeypatch):
    monkeypatch.setattr(files, "LINE_BYTES", 4)
    assert list(read_lines(io.BytesIO(b"ab\n\nabc\nd"), "it")) == [b"ab\n", b"\n", b"abc\n", b"d"]
    with pytest.raises(ValueError, match="it, line 2 has more than 4 bytes"):
        list(read_lines(io.BytesIO(b"ab\nabcde"), "it"))


def test_archives_of_torch_unpack_to_what_they_are(tmp_path):
    path = tmp_path / "it"
    torch.save({"a": torch.zeros(1000), "b": "text"}, path)
    with path.open("rb") as file:
        check_archive(file, path)
        assert torch.load(file, weights_only=True)["b"] == "text"
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for part in whole.infolist():
            out.writestr(part.filename, whole.read(part))
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    legacy = io.BytesIO(path.read_bytes())
    for bad in (packed, legacy, io.BytesIO(b""), io.BytesIO(b"PK\x03\x04 no")):
        with pytest.raises(ValueError, match=r"^it (is not whole|has [\d,]+ bytes and unpacks)"):
            check_archive(bad, "it")


def test_names_that_are_not_utf_8_can_be_printed():
    assert printable(os.fsdecode(b"a\xff\xc3\xa9")).encode() == "a\\udcffé".encode()


# Writing.


def test_a_folder_appears_when_all_is_written_with_the_usual_permissions(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as folder:
        (folder / "a.txt").touch()
        assert not target.exists()
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert os.listdir(target) == ["a.txt"]
    assert target.stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_nothing_stays_after_an_error_but_what_was_there(tmp_path):
    (tmp_path / "kept").mkdir()
    target = tmp_path / "kept" / "made" / "out"
    with pytest.raises(ZeroDivisionError), atomic_directory(target) as folder:
        raise ZeroDivisionError((folder / "a").mkdir())
    long = tmp_path / "made" / ("n" * 300)
    with pytest.raises(OSError, match="name too long"), atomic_directory(long):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_a_path_that_exists_is_refused(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name in (".", "dangling"):
        with pytest.raises(ValueError, match="exists already"), atomic_directory(tmp_path / name):
            pass
    assert os.listdir(tmp_path) == ["dangling"]


def test_a_file_that_cannot_be_finished_leaves_the_older_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "r.json"
    atomic_write(path, b"older")

    def full(self, target):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space left"):
        atomic_write(path, b"newer")
    assert path.read_bytes() == b"older"
    assert os.listdir(path.parent) == ["r.json"]


def test_parts_are_removed_unless_another_process_still_writes_them(tmp_path):
    dead, alive, folder = (tmp_path / f".rosa-{name * 8}.part" for name in "abc")
    for path in (dead, alive):
        path.write_bytes(b"half")
    folder.mkdir()
    (folder / "shard").touch()
    for path in (dead, folder):
        Path(f"{path}.lock").touch()
    with FileLock(f"{alive}.lock"):
        atomic_write(tmp_path / "r.json", b"whole")
        assert sorted(os.listdir(tmp_path)) == [alive.name, f"{alive.name}.lock", "r.json"]
    atomic_write(tmp_path / "r.json", b"whole")
    assert os.listdir(tmp_path) == ["r.json"]


def fill_a_folder(path: Path, content: bytes) -> None:
    with atomic_directory(path) as folder:
        (folder / "a").write_bytes(content)


@pytest.mark.parametrize("write", [atomic_write, fill_a_folder])
def test_a_full_disk_is_said_with_the_name_that_was_asked_for(tmp_path, write):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="out cannot be written: File too large"):
            write(tmp_path / "out", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path) == []


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    atomic_write(tmp_path / "out", b"new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "out").read_text() == "new"


def test_an_error_of_the_system_without_a_file_is_given_one():
    words = r"^out cannot be written: No space left on device\. Make room"
    with pytest.raises(OSError, match=words) as it, writing("out"):
        raise OSError(28, "No space left on device")
    assert it.value.errno == 28
    with pytest.raises(OSError, match=r"^\[Errno 2\] Gone: 'a'$"), writing("out"):
        raise OSError(2, "Gone", "a")
