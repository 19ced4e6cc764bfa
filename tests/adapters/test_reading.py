from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from rosa_lightning.adapters.reading import read_header, read_json, read_tensors
from rosa_lightning.utils.files import memory_bytes
from tests.hostile import KINDS, limited, put


def assert_unreadable(read, path, reason: str = "") -> None:
    match = f"it cannot be read: .*{reason}.*or export it again"
    with limited(), pytest.raises(ValueError, match=match) as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [read_json, read_header, read_tensors])
def test_what_is_no_regular_file_is_refused(tmp_path, kind, read):
    assert_unreadable(read, put(kind, tmp_path / "it"), f"is {kind}")


def test_json_that_is_damaged_is_refused(tmp_path):
    for text in ('{"r": ', "[]", '{"a":' * 50_000, '{"r": 1, "r": 2}'):
        (tmp_path / "it").write_text(text)
        assert_unreadable(read_json, tmp_path / "it")
    (tmp_path / "it").write_text(json.dumps({"r": 4}))
    assert read_json(tmp_path / "it") == {"r": 4}


DAMAGES = [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: os.truncate(path, memory_bytes()),  # on no disk
]
BAD = {
    "has dtype torch.int32": torch.ones(3).int(),
    r"not finite in float32 \(NaN or infinity\)": torch.tensor([1, float("nan")]),
    "holds values that are not finite": torch.tensor([1e300], dtype=torch.double),
}


def test_tensors_that_are_damaged_or_no_finite_floats_are_refused(tmp_path):
    path = tmp_path / "it"
    for damage in DAMAGES:
        save_file({"a": torch.ones(3)}, path, {"format": "pt"})
        assert read_tensors(path)["a"].tolist() == [1, 1, 1]
        assert read_header(path) == {"format": "pt"}
        damage(path)
        assert_unreadable(read_tensors, path)
    for reason, tensor in BAD.items():
        save_file({"a": torch.ones(2), "b": tensor}, path)
        assert_unreadable(read_tensors, path, f"b .*{reason}")
