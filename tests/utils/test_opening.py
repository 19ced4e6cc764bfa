"""Only regular files are read, within bounds, and nothing is written through a link."""

from __future__ import annotations

import io
import os
import re
import zipfile

import pytest
import torch

from rosa_lightning.utils import opening
from rosa_lightning.utils.opening import (
    check_archive,
    check_input,
    open_input,
    open_lock,
    open_new,
    printable,
    read_bytes,
    read_lines,
    read_text,
    writing,
)
from tests.hostile import KINDS, limited, put


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [check_input, open_input, read_bytes, read_text, open_lock])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind, read):
    path = put(kind, tmp_path / "it")
    words = "it" if read is open_lock else f"it is {kind}, and a regular file is expected"
    with limited(), pytest.raises(OSError, match=words):
        read(path)


def test_a_file_behind_a_link_is_read(tmp_path):
    (tmp_path / "it").write_text("\ufeffé")
    (tmp_path / "link").symlink_to(tmp_path / "it")
    assert read_text(tmp_path / "link") == "é"
    with pytest.raises(FileNotFoundError, match="none"):
        read_text(tmp_path / "none")


def test_a_pipe_that_takes_the_place_of_a_file_meanwhile_is_refused(tmp_path, monkeypatch):
    path = put("a pipe", tmp_path / "it")
    monkeypatch.setattr(opening, "check_input", lambda path: None)
    with limited(), pytest.raises(OSError, match="is a pipe"):
        open_input(path)


def test_a_path_with_a_null_character_is_shown_with_it():
    with pytest.raises(ValueError, match=re.escape(r"'a\x00b' holds a null character")):
        open_input("a\0b")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "it"
    path.write_bytes(b"x" * 9)
    assert read_bytes(path, 9) == b"x" * 9
    with pytest.raises(ValueError, match="it has 9 bytes, and at most 8 are read"):
        read_bytes(path, 8)
    os.truncate(path, opening.memory_bytes())  # with holes, on no disk
    with limited(), pytest.raises(ValueError, match="are read"):
        read_bytes(path)


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "it").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"it is not UTF-8 text \(byte 2\)"):
        read_text(tmp_path / "it")


def test_lines_are_read_up_to_a_length(monkeypatch):
    monkeypatch.setattr(opening, "LINE_BYTES", 4)
    assert list(read_lines(io.BytesIO(b"ab\n\nabc\nd"), "it")) == [b"ab\n", b"\n", b"abc\n", b"d"]
    with pytest.raises(ValueError, match="it, line 2 has more than 4 bytes"):
        list(read_lines(io.BytesIO(b"ab\nabcde"), "it"))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_new_file_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tmp_path, link):
    (tmp_path / "precious").write_text("kept")
    link(tmp_path / "precious", tmp_path / "it")
    with open_new(tmp_path / "it") as file:
        file.write(b"new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "it").read_text() == "new"


def test_a_lock_is_no_link_and_loses_nothing(tmp_path):
    path = tmp_path / "it"
    open_lock(path).close()
    path.write_text("kept")
    open_lock(path).close()
    assert path.read_text() == "kept"
    (tmp_path / "link").symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match="link"):
        open_lock(tmp_path / "link")
    assert not (tmp_path / "made").exists()


def test_an_error_of_the_system_without_a_file_is_given_one():
    words = r"^out cannot be written: No space left on device\. Make room"
    with pytest.raises(OSError, match=words) as it, writing("out"):
        raise OSError(28, "No space left on device")
    assert it.value.errno == 28
    with pytest.raises(OSError, match=r"^\[Errno 2\] Gone: 'a'$"), writing("out"):
        raise OSError(2, "Gone", "a")


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
    name = os.fsdecode(b"a\xff\xc3\xa9")
    assert printable(name).encode() == "a\\udcffé".encode()
