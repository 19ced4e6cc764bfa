"""Checkpoints are read without running code, and in bounds."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from rosa_lightning import ReasoningDataModule, RoAEConfig, RoSAModule
from rosa_lightning.adapters.checkpoint import checkpoint_defaults, read_checkpoint
from tests.hostile import KINDS, limited, put


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "a.ckpt"
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=1, accelerator="cpu", limit_val_batches=0, **options)
    trainer.fit(RoSAModule("tiny", RoAEConfig(rank=2)), ReasoningDataModule(batch_size=2))
    trainer.save_checkpoint(path)
    return path


def message(path: Path | str) -> str:
    with limited(), pytest.raises(ValueError) as caught:  # noqa: PT011
        read_checkpoint(str(path))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_what_a_checkpoint_knows_is_read(checkpoint):
    known = checkpoint_defaults(str(checkpoint), {"base": None, "adapter": None})
    assert (known["model.base"], known["model.roae.rank"]) == ("tiny", 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_said_at_once(tmp_path, kind):
    assert "is no file" in message(put(kind, tmp_path / "it"))
    (tmp_path / "shards").mkdir()
    put(kind, tmp_path / "shards" / "meta.pt")
    assert "is no file" in message(tmp_path / "shards")


def test_a_null_character_is_shown():
    assert re.search(r"a\\x00b' holds a null character", message("a\0b"))


def test_a_checkpoint_that_unpacks_to_thousands_of_times_its_size_is_not_unpacked(
    checkpoint, tmp_path
):
    bomb = tmp_path / "bomb.ckpt"
    with (
        zipfile.ZipFile(checkpoint) as whole,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for part in whole.infolist():
            out.writestr(part.filename, whole.read(part))
        with out.open("a/data/99", "w", force_zip64=True) as part:
            for _ in range(100):
                part.write(bytes(2**20))
    assert bomb.stat().st_size < 2**20
    assert re.search(r"bomb\.ckpt has [\d,]+ bytes and unpacks to 10\d,\d{3},\d{3}", message(bomb))


def test_what_torch_has_not_written_or_only_in_part_is_refused(checkpoint, tmp_path):
    whole, old = checkpoint.read_bytes(), io.BytesIO()
    # Its older format may claim any size.
    torch.save({"rosa": 1}, old, _use_new_zipfile_serialization=False)
    damaged = [b"", b"no checkpoint", old.getvalue(), b"PK\x03\x04" + bytes(100)]
    for content in [*damaged, whole[:10], whole[: len(whole) // 2], whole[:-30]]:
        (tmp_path / "it").write_bytes(content)
        assert "is not whole, or no file of torch's format since 1.6" in message(tmp_path / "it")


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_code_in_a_checkpoint_is_not_run(checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "more": Code()}, tmp_path / "it")
    assert "can be read safely" in message(tmp_path / "it")
    assert "run" not in capsys.readouterr().out
